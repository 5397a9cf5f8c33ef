"""What is done to a training batch (words and faces change partners, frames and modalities go), and the average."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from senticlip.config import Config
from senticlip.structures import Batch, Output, Sequence
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


def test_what_a_row_lacks_is_given_to_nobody():
    """The first has words alone, the second frames alone, though both have labels for both."""
    there, gone = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    values = torch.arange(2)[:, None]
    parts = {"text": Sequence(values, torch.cat([there, gone])), "vision": Sequence(values, torch.cat([gone, there]))}
    for _ in range(10):
        mixed = recombine(parts, {"T": torch.ones(2), "V": torch.ones(2)}, 1.0)
        assert {name: part.mask[:, 0].tolist() for name, part in mixed.items()} == {
            "text": [True, False], "vision": [False, True]
        }  # fmt: skip


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


@pytest.fixture
def sound(batch):
    """Features B×5×3 that say their row, its square and their place; sound in all rows."""
    parts, labels = batch
    row, place = torch.arange(ROWS, dtype=torch.float64)[:, None], torch.arange(5.0, dtype=torch.float64)
    values = torch.stack(torch.broadcast_tensors(row, row**2, place), -1)
    holes = parts["vision"].mask.clone()
    holes[4::5, 1] = False  # of five places the second is not real
    found = {"text": Sequence(values, parts["text"].mask), "vision": Sequence(values, holes)}
    return found | {"audio": Sequence(values, parts["text"].mask)}, labels


def mixture(before, after):
    """By row: the number of the row that was mixed in, and how much of it (nothing: the row itself)."""
    own, mixed = before.values[:, 0], after.values[:, 0]
    moved = mixed[:, 0] != own[:, 0]
    # (1 − s)·a + s·b and (1 − s)·a² + s·b²: their changes are in the ratio a + b
    other = torch.where(moved, (mixed[:, 1] - own[:, 1]) / (mixed[:, 0] - own[:, 0]) - own[:, 0], own[:, 0])
    share = torch.where(moved, (mixed[:, 0] - own[:, 0]) / (other - own[:, 0]), 0)
    return other.round().long(), share


def test_words_and_faces_of_other_classes_mislead(sound):
    parts, labels = sound
    misled = mislead(parts, labels | {"A": labels["M"]}, 0.3)
    assert misled["audio"] is parts["audio"]  # no encoder knows it by heart
    for name, own in (("text", "T"), ("vision", "V")):
        rows, share = mixture(parts[name], misled[name])
        known, moved = ~labels[own].isnan(), rows != torch.arange(ROWS)
        assert not moved[~known].any()
        assert (labels[own][rows].sign() != labels[own].sign())[moved].all()
        assert 0.22 < moved[known].double().mean() < 0.38
        assert share.min() >= 0
        assert share.max() < 1
        assert abs(share[moved].mean() - 0.5) < 0.1
        assert torch.equal(misled[name].mask, parts[name].mask)


def test_the_other_row_is_stretched_over_the_real_places(sound):
    parts, labels = sound
    misled = mislead(parts, labels, 1.0)
    for name in ("text", "vision"):
        mask = parts[name].mask
        rows, share = mixture(parts[name], misled[name])
        real = [[place for place in range(5) if there[place]] for there in mask]
        seen = 0
        for row in range(ROWS):
            if share[row] < 0.01:
                continue
            for number, place in enumerate(real[row]):
                theirs = real[rows[row]]
                from_there = theirs[number * len(theirs) // len(real[row])]
                wanted = (1 - share[row]) * place + share[row] * from_there
                assert abs(misled[name].values[row, place, 2] - wanted) < 1e-6
                seen += from_there != place
        assert seen > 50


def test_only_rows_with_sound_are_misled_and_only_by_words_that_are_there(sound):
    parts, labels = sound
    silent = torch.arange(ROWS) % 3 == 0
    wordless = torch.arange(ROWS) % 7 == 0
    parts = parts | {
        "text": Sequence(parts["text"].values, parts["text"].mask & ~wordless[:, None]),
        "audio": Sequence(parts["audio"].values, parts["audio"].mask & ~silent[:, None]),
    }
    misled = mislead(parts, labels, 1.0)
    for name in ("text", "vision"):
        rows, _ = mixture(parts[name], misled[name])
        moved = rows != torch.arange(ROWS)
        assert moved.any()
        assert not moved[silent].any()
        if name == "text":
            assert not moved[wordless].any()
            assert not wordless[rows[moved]].any()


class Mirror(torch.nn.Module):
    """A model whose features are what it is given; it keeps what it was to fuse."""

    def __init__(self, config):
        super().__init__()
        self.experiment = config

    def encode(self, batch):
        return batch

    def fuse(self, batch):
        self.seen = batch
        return Output(log_probs=torch.zeros(ROWS, 3))

    def loss(self, output, batch):
        return torch.zeros(()), {}


def read(parts, labels, training=True, **switches):
    """The modalities that a model reads of a batch where these keys of the config are changed."""
    torch.manual_seed(0)
    trainee = Trainee(Mirror(Config().override(switches))).train(training)
    inputs = {name: part.values for name, part in parts.items()} | {f"{n}_mask": s.mask for n, s in parts.items()}
    trainee(**inputs, **{f"label_{name}": score for name, score in labels.items()})
    return trainee.model.seen.modalities


@pytest.mark.parametrize("names", [("text", "vision"), ("text", "vision", "audio")], ids="+".join)
def test_in_training_alone_and_where_there_is_sound_features_are_misled(sound, names):
    parts, labels = {name: sound[0][name] for name in names}, sound[1]
    for training in (True, False):
        seen = read(parts, labels, training, **{"train.mislead": 1.0})
        for name, own in (("text", "T"), ("vision", "V")):
            rows, _ = mixture(parts[name], seen[name])
            moved = rows != torch.arange(ROWS)
            assert moved.any() == (training and "audio" in names)
            assert (labels[own][rows].sign() != labels[own].sign())[moved].all()


def test_without_another_class_nobody_is_misled(sound):
    parts, _ = sound
    same = mislead(parts, {"T": torch.ones(ROWS), "V": torch.full((ROWS,), torch.nan)}, 1.0)
    assert all(torch.equal(same[name].values, parts[name].values) for name in parts)


@pytest.fixture
def frames(batch):
    """Words, and frames B×5×3×4×4 that are lighter on their right."""
    parts, labels = batch
    shades = torch.arange(ROWS)[:, None, None, None, None] % 100 + torch.tensor([0, 0, 50, 50])
    pixels = shades.expand(-1, 5, 3, 4, -1).to(torch.uint8)
    return parts | {"vision": Sequence(pixels, parts["vision"].mask)}, labels


def test_frames_of_a_training_batch_are_augmented(frames):
    (before, mask), seen = frames[0]["vision"], read(*frames, **{"vision.augment": 1.0})["vision"]
    changed = (seen.values != before).flatten(2).any(2)
    assert changed[mask].float().mean() > 0.9
    assert not changed[~mask].any()
    assert torch.equal(seen.mask, mask)


def test_of_a_training_clip_as_many_frames_are_read_as_are_asked_for(frames):
    before, seen = frames[0]["vision"], read(*frames, **{"vision.train_frames": 2})["vision"]
    assert torch.equal(seen.mask.sum(1), before.mask.sum(1).clamp(max=2))
    assert not (seen.mask & ~before.mask).any()


@pytest.mark.parametrize("chance", [0.3, 1.0])
def test_one_modality_is_left_out_now_and_then(batch, chance):
    seen = read(*batch, **{"train.modality_dropout": chance})
    gone = torch.stack([~seen[name].mask.any(1) for name in ("text", "vision")])
    assert not gone.all(0).any()
    assert gone.float().mean(1).tolist() == pytest.approx([chance / 2] * 2, abs=0.08)  # 3 standard deviations


def test_the_only_modality_is_never_left_out(batch):
    parts, labels = batch
    silent = torch.zeros_like(parts["text"].mask)
    seen = read({**parts, "text": Sequence(parts["text"].values, silent)}, labels, **{"train.modality_dropout": 1.0})
    assert torch.equal(seen["vision"].mask, parts["vision"].mask)


def test_partners_are_changed_in_a_training_batch(batch):
    seen = read(*batch, **{"train.recombine": 1.0})
    for name in ("text", "vision"):
        assert (sources(seen, name) != torch.arange(ROWS)).float().mean() > 0.5


def test_an_evaluation_reads_what_is_there(frames):
    switches = {"vision.augment": 1.0, "vision.train_frames": 2, "train.modality_dropout": 1.0, "train.recombine": 1.0}
    seen = read(*frames, training=False, **switches)
    for name, part in frames[0].items():
        assert torch.equal(seen[name].values, part.values)
        assert torch.equal(seen[name].mask, part.mask)


class Stubborn(Mirror):
    """A model that says its one parameter of every row."""

    def __init__(self, config):
        super().__init__(config)
        self.said, self.network = torch.nn.Parameter(torch.zeros(3)), torch.nn.Module()
        self.register_buffer("memory", torch.ones(2))

    def fuse(self, batch):
        return Output(log_probs=self.said.expand(ROWS, 3))


def test_the_average_of_what_was_not_known_begins_when_it_is():
    """Self-MM's labels are NaN until a row is seen."""
    trainee = Trainee(Stubborn(Config().override({"train.ema": 0.9})))
    trainee.average.memory.fill_(float("nan"))
    trainee.step_finished()
    assert torch.equal(trainee.average.memory, trainee.model.memory)


def test_the_average_of_the_steps_is_what_is_evaluated(batch):
    parts, _ = batch
    trainee = Trainee(Stubborn(Config().override({"train.ema": 0.2})))
    for value in (1.0, 3.0):
        trainee.model.said.data.fill_(value)
        trainee.step_finished()
    # it begins at 0 and keeps 2/11 of itself, then 3/12, but no more than ema
    wanted = {True: 3.0, False: 0.2 * 9 / 11 + 0.8 * 3.0}
    for training, value in wanted.items():
        trainee.train(training)
        found = trainee(text=parts["text"].values, text_mask=parts["text"].mask)["prediction"]
        torch.testing.assert_close(found, torch.full((ROWS, 3), value))


def test_the_average_does_not_learn():
    average = Trainee(Stubborn(Config().override({"train.ema": 0.9}))).average
    assert not any(parameter.requires_grad for parameter in average.parameters())
