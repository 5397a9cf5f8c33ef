"""What is done to a training batch: words and faces of the same own label change partners."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from senticlip.config import Config
from senticlip.structures import Batch, Sequence
from senticlip.trainee import Trainee, mislead, recombine

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


def test_a_single_modality_has_no_partner(batch):
    parts, labels = batch
    trainee = SimpleNamespace(experiment=Config(modalities=["text"]).override({"train.recombine": 1.0}))
    same = Trainee.disturb(trainee, Batch({"text": parts["text"]}, labels))
    assert torch.equal(same.modalities["text"].values, parts["text"].values)


def test_words_and_faces_of_other_classes_mislead(batch):
    parts, labels = batch
    parts = parts | {"audio": parts["text"]}
    misled = mislead(parts, labels | {"A": labels["M"]}, 0.3)
    assert misled["audio"] is parts["audio"]  # no encoder knows it by heart
    for name, own in (("text", "T"), ("vision", "V")):
        rows = sources(misled, name)
        known, moved = ~labels[own].isnan(), rows != torch.arange(ROWS)
        assert not moved[~known].any()
        assert (labels[own][rows].sign() != labels[own].sign())[moved].all()
        assert 0.22 < moved[known].float().mean() < 0.38


def test_only_rows_with_sound_are_misled_and_only_by_words_that_are_there(batch):
    parts, labels = batch
    silent = torch.arange(ROWS) % 3 == 0
    wordless = torch.arange(ROWS) % 5 == 0
    parts = parts | {
        "text": Sequence(parts["text"].values, parts["text"].mask & ~wordless[:, None]),
        "audio": Sequence(parts["text"].values, parts["text"].mask & ~silent[:, None]),
    }
    misled = mislead(parts, labels, 1.0)
    for name in ("text", "vision"):
        rows = misled[name].values[:, 0]
        moved = rows != torch.arange(ROWS)
        assert moved.any()
        assert not moved[silent].any()
        assert torch.equal(misled[name].mask, parts[name].mask[rows])
        if name == "text":
            assert not moved[wordless].any()
            assert not wordless[rows[moved]].any()


def test_nobody_is_misled_where_there_is_no_sound(batch):
    parts, labels = batch
    trainee = SimpleNamespace(experiment=Config().override({"train.mislead": 1.0}))
    assert Trainee.disturb(trainee, Batch(parts, labels)).modalities == parts
    parts = parts | {"audio": parts["text"]}
    trainee = SimpleNamespace(
        experiment=Config(modalities=["text", "vision", "audio"]).override({"train.mislead": 1.0})
    )
    assert Trainee.disturb(trainee, Batch(parts, labels)).modalities["text"] is not parts["text"]
    one_class = {"T": torch.ones(ROWS), "V": torch.full((ROWS,), torch.nan)}
    same = mislead(parts, one_class, 1.0)
    assert all(torch.equal(same[name].values, parts[name].values) for name in parts)
