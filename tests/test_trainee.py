"""What is done to a training batch: words and faces change partners, and two views of it must be answered alike."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from senticlip.config import Config
from senticlip.structures import Output, Sequence
from senticlip.trainee import Trainee, divergence, recombine

ROWS = 400


@pytest.fixture
def batch():
    """Values and masks that say from which row they are; labels T and V that do not agree, some of them unknown."""
    torch.manual_seed(0)
    number = torch.arange(ROWS)
    mask = number[:, None] % 5 >= torch.arange(5)  # 1 to 5 real places
    parts = {name: Sequence(number[:, None].expand(-1, 5), mask) for name in ("text", "vision")}
    scores = torch.randint(-5, 6, (2, ROWS)) / 5
    scores[0, ::10] = float("nan")
    return parts, {"M": torch.linspace(-1, 1, ROWS), "T": scores[0], "V": scores[1]}


def sources(mixed, name):
    """The row that each row's values came from; its mask must have come along."""
    rows = mixed[name].values[:, 0]
    assert torch.equal(mixed[name].values, rows[:, None].expand(-1, 5))
    assert torch.equal(mixed[name].mask, rows[:, None] % 5 >= torch.arange(5))
    return rows


@pytest.mark.parametrize("chance", [0.4, 1.0])
def test_partners_are_changed_within_the_own_label(batch, chance):
    parts, labels = batch
    before = {name: score.clone() for name, score in labels.items()}
    mixed = recombine(parts, labels, chance)
    for name, own in (("text", "T"), ("vision", "V")):
        rows = sources(mixed, name)
        assert sorted(rows.tolist()) == list(range(ROWS))  # exchanged: none is lost, none is there twice
        known = ~labels[own].isnan()
        assert torch.equal(labels[own][rows].sign()[known], labels[own].sign()[known])
        assert torch.equal(rows[~known], torch.arange(ROWS)[~known])  # unknown: stays
        moved = (rows != torch.arange(ROWS))[known].float().mean()
        assert abs(moved - chance) < 0.1
    assert all(torch.equal(labels[name].nan_to_num(9), before[name].nan_to_num(9)) for name in labels)
    assert not torch.equal(sources(mixed, "text"), sources(mixed, "vision"))


def test_without_chance_or_own_label_nothing_moves(batch):
    parts, labels = batch
    still = recombine(parts, labels, 0.0)
    joint = recombine(parts, {"M": labels["M"]}, 1.0)
    for name in parts:
        assert torch.equal(sources(still, name), torch.arange(ROWS))
        assert joint[name] is parts[name]


def test_a_row_alone_in_its_class_stays():
    parts = {"text": Sequence(torch.arange(3)[:, None], torch.ones(3, 1, dtype=torch.bool))}
    for _ in range(10):
        mixed = recombine(parts, {"T": torch.tensor([-0.2, 0.0, 1.0])}, 1.0)
        assert mixed["text"].values[:, 0].tolist() == [0, 1, 2]


def test_the_seed_decides(batch):
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(recombine(*batch, 0.5)["text"].values)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


class Forgetful(nn.Module):
    """Its answer to the text hangs on what dropout leaves of it."""

    def __init__(self, **changes):
        super().__init__()
        self.experiment = Config(modalities=["text"]).override(changes)
        self.classify = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, batch):
        return Output(log_probs=self.classify(batch.modalities["text"].values[:, 0]).log_softmax(-1))

    def loss(self, output, batch):
        return nn.functional.nll_loss(output.log_probs, batch.labels["M"].long() + 1), {}


def test_the_divergence_by_hand():
    half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert float(divergence(half, quarter)) == pytest.approx(math.log(3) / 8)
    assert float(divergence(torch.cat([half, half]), torch.cat([half, quarter]))) == pytest.approx(math.log(3) / 16)


def test_two_views_share_a_loss_and_must_agree():
    torch.manual_seed(0)
    inputs = {"text": torch.randn(6, 1, 8), "text_mask": torch.ones(6, 1, dtype=torch.bool)}
    inputs["label_M"] = torch.tensor([-1.0, 0.0, 1.0, 1.0, 0.0, -1.0])
    plain = Trainee(Forgetful()).train()
    twice = Trainee(Forgetful(**{"train.rdrop": 0.7})).train()
    twice.load_state_dict(plain.state_dict())
    torch.manual_seed(1)
    one, two = (plain(**inputs) for _ in range(2))
    apart = nn.functional.kl_div(two["prediction"], one["prediction"], log_target=True, reduction="batchmean")
    apart += nn.functional.kl_div(one["prediction"], two["prediction"], log_target=True, reduction="batchmean")
    torch.manual_seed(1)
    both = twice(**inputs)
    assert apart.item() > 0.01
    assert torch.equal(both["prediction"], one["prediction"])
    assert both["loss"].item() == pytest.approx(((one["loss"] + two["loss"]) / 2 + 0.7 * apart / 2).item(), rel=1e-5)
    assert torch.equal(plain.eval()(**inputs)["loss"], twice.eval()(**inputs)["loss"])
