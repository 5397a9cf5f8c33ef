"""Augmentation of training batches (recombined, misled, with frames or modalities dropped) and the moving average."""

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
    """Values and masks that identify their row; labels T and V that disagree, some of them unknown."""
    torch.manual_seed(0)
    row = torch.arange(ROWS)
    mask = row[:, None] % 5 >= torch.arange(5)  # 1 to 5 real positions
    parts = {name: Sequence(row[:, None].expand(-1, 5), mask) for name in ("text", "vision")}
    scores = torch.randint(-5, 6, (2, ROWS)) / 5
    scores[0, ::10] = float("nan")
    return parts, {"M": torch.linspace(-1, 1, ROWS), "T": scores[0], "V": scores[1]}


def source_rows(mixed, name):
    """The row from which each row's values came; the mask must come from the same row."""
    rows = mixed[name].values[:, 0]
    assert torch.equal(mixed[name].values, rows[:, None].expand(-1, 5))
    assert torch.equal(mixed[name].mask, rows[:, None] % 5 >= torch.arange(5))
    return rows


@pytest.mark.parametrize("chance", [0.4, 1.0])
def test_recombine_exchanges_within_unimodal_labels(batch, chance):
    parts, labels = batch
    before = {name: score.clone() for name, score in labels.items()}
    mixed = recombine(parts, labels, chance)
    for name, label in (("text", "T"), ("vision", "V")):
        rows = source_rows(mixed, name)
        assert sorted(rows.tolist()) == list(range(ROWS))  # a permutation: each row occurs once
        known = ~labels[label].isnan()
        assert torch.equal(labels[label][rows].sign()[known], labels[label].sign()[known])
        assert torch.equal(rows[~known], torch.arange(ROWS)[~known])  # rows with an unknown label stay
        moved_share = (rows != torch.arange(ROWS))[known].float().mean()
        assert abs(moved_share - chance) < 0.1
    assert all(torch.equal(labels[name].nan_to_num(9), before[name].nan_to_num(9)) for name in labels)
    assert not torch.equal(source_rows(mixed, "text"), source_rows(mixed, "vision"))


def test_recombine_needs_chance_and_unimodal_label(batch):
    parts, labels = batch
    no_chance = recombine(parts, labels, 0.0)
    no_unimodal_label = recombine(parts, {"M": labels["M"]}, 1.0)
    for name in parts:
        assert torch.equal(source_rows(no_chance, name), torch.arange(ROWS))
        assert no_unimodal_label[name] is parts[name]


def test_recombine_keeps_row_alone_in_its_class():
    parts = {"text": Sequence(torch.arange(3)[:, None], torch.ones(3, 1, dtype=torch.bool))}
    for _ in range(10):
        mixed = recombine(parts, {"T": torch.tensor([-0.2, 0.0, 1.0])}, 1.0)
        assert mixed["text"].values[:, 0].tolist() == [0, 1, 2]


def test_recombine_does_not_exchange_missing_modalities():
    """The first row has only text, the second only frames, though both rows have both labels."""
    present, absent = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    values = torch.arange(2)[:, None]
    parts = {
        "text": Sequence(values, torch.cat([present, absent])),
        "vision": Sequence(values, torch.cat([absent, present])),
    }
    for _ in range(10):
        mixed = recombine(parts, {"T": torch.ones(2), "V": torch.ones(2)}, 1.0)
        assert {name: part.mask[:, 0].tolist() for name, part in mixed.items()} == {
            "text": [True, False], "vision": [False, True]
        }  # fmt: skip


def test_recombine_depends_on_seed(batch):
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(recombine(*batch, 0.5)["text"].values)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_single_modality_is_not_recombined(batch):
    parts, labels = batch
    trainee = SimpleNamespace(experiment=Config(modalities=["text"]).override({"train.recombine": 1.0}))
    unchanged = Trainee.augment_batch(trainee, Batch({"text": parts["text"]}, labels))
    assert torch.equal(unchanged.modalities["text"].values, parts["text"].values)


@pytest.fixture
def audio_batch(batch):
    """Features B×5×3 of the row, its square and the position; every row has audio."""
    parts, labels = batch
    row, position = torch.arange(ROWS, dtype=torch.float64)[:, None], torch.arange(5.0, dtype=torch.float64)
    values = torch.stack(torch.broadcast_tensors(row, row**2, position), -1)
    mask_with_gaps = parts["vision"].mask.clone()
    mask_with_gaps[4::5, 1] = False  # in rows of five positions the second is masked
    features = {"text": Sequence(values, parts["text"].mask), "vision": Sequence(values, mask_with_gaps)}
    return features | {"audio": Sequence(values, parts["text"].mask)}, labels


def mixed_rows_and_shares(before, after):
    """By row: the index of the row that was mixed in (if none, its own) and the share of that row."""
    own, mixed = before.values[:, 0], after.values[:, 0]
    moved = mixed[:, 0] != own[:, 0]
    # (1 − s)·a + s·b and (1 − s)·a² + s·b²: their changes are in the ratio a + b
    other = torch.where(moved, (mixed[:, 1] - own[:, 1]) / (mixed[:, 0] - own[:, 0]) - own[:, 0], own[:, 0])
    share = torch.where(moved, (mixed[:, 0] - own[:, 0]) / (other - own[:, 0]), 0)
    return other.round().long(), share


def test_mislead_mixes_in_rows_of_other_classes(audio_batch):
    parts, labels = audio_batch
    misled = mislead(parts, labels | {"A": labels["M"]}, 0.3)
    assert misled["audio"] is parts["audio"]  # audio has no encoder that could overfit
    for name, label in (("text", "T"), ("vision", "V")):
        rows, share = mixed_rows_and_shares(parts[name], misled[name])
        known, moved = ~labels[label].isnan(), rows != torch.arange(ROWS)
        assert not moved[~known].any()
        assert (labels[label][rows].sign() != labels[label].sign())[moved].all()
        assert 0.22 < moved[known].double().mean() < 0.38
        assert share.min() >= 0
        assert share.max() < 1
        assert abs(share[moved].mean() - 0.5) < 0.1
        assert torch.equal(misled[name].mask, parts[name].mask)


def test_mislead_stretches_other_row_to_real_positions(audio_batch):
    parts, labels = audio_batch
    misled = mislead(parts, labels, 1.0)
    for name in ("text", "vision"):
        mask = parts[name].mask
        rows, share = mixed_rows_and_shares(parts[name], misled[name])
        real_positions = [[position for position in range(5) if row_mask[position]] for row_mask in mask]
        shifted = 0
        for row in range(ROWS):
            if share[row] < 0.01:
                continue
            for rank, position in enumerate(real_positions[row]):
                other_positions = real_positions[rows[row]]
                source = other_positions[rank * len(other_positions) // len(real_positions[row])]
                expected = (1 - share[row]) * position + share[row] * source
                assert abs(misled[name].values[row, position, 2] - expected) < 1e-6
                shifted += source != position
        assert shifted > 50


def test_mislead_needs_audio_and_present_modality(audio_batch):
    parts, labels = audio_batch
    silent = torch.arange(ROWS) % 3 == 0
    wordless = torch.arange(ROWS) % 7 == 0
    parts = parts | {
        "text": Sequence(parts["text"].values, parts["text"].mask & ~wordless[:, None]),
        "audio": Sequence(parts["audio"].values, parts["audio"].mask & ~silent[:, None]),
    }
    misled = mislead(parts, labels, 1.0)
    for name in ("text", "vision"):
        rows, _ = mixed_rows_and_shares(parts[name], misled[name])
        moved = rows != torch.arange(ROWS)
        assert moved.any()
        assert not moved[silent].any()
        if name == "text":
            assert not moved[wordless].any()
            assert not wordless[rows[moved]].any()


class IdentityModel(torch.nn.Module):
    """A model whose features are its input; it records the batch that it fuses."""

    def __init__(self, config):
        super().__init__()
        self.experiment = config

    def encode(self, batch):
        return batch

    def fuse(self, batch):
        self.fused_batch = batch
        return Output(log_probs=torch.zeros(ROWS, 3))

    def loss(self, output, batch):
        return torch.zeros(()), {}


def fused_parts(parts, labels, training=True, **changes):
    """The modalities of a batch as the fusion network receives them, with these config keys changed."""
    torch.manual_seed(0)
    trainee = Trainee(IdentityModel(Config().override(changes))).train(training)
    inputs = {name: part.values for name, part in parts.items()} | {f"{n}_mask": s.mask for n, s in parts.items()}
    trainee(**inputs, **{f"label_{name}": score for name, score in labels.items()})
    return trainee.model.fused_batch.modalities


@pytest.mark.parametrize("names", [("text", "vision"), ("text", "vision", "audio")], ids="+".join)
def test_mislead_only_in_training_with_audio(audio_batch, names):
    parts, labels = {name: audio_batch[0][name] for name in names}, audio_batch[1]
    for training in (True, False):
        fused = fused_parts(parts, labels, training, **{"train.mislead": 1.0})
        for name, label in (("text", "T"), ("vision", "V")):
            rows, _ = mixed_rows_and_shares(parts[name], fused[name])
            moved = rows != torch.arange(ROWS)
            assert moved.any() == (training and "audio" in names)
            assert (labels[label][rows].sign() != labels[label].sign())[moved].all()


def test_mislead_needs_another_class(audio_batch):
    parts, _ = audio_batch
    unchanged = mislead(parts, {"T": torch.ones(ROWS), "V": torch.full((ROWS,), torch.nan)}, 1.0)
    assert all(torch.equal(unchanged[name].values, parts[name].values) for name in parts)


@pytest.fixture
def pixel_batch(batch):
    """Text, and frames B×5×3×4×4 whose right half is lighter."""
    parts, labels = batch
    shades = torch.arange(ROWS)[:, None, None, None, None] % 100 + torch.tensor([0, 0, 50, 50])
    pixels = shades.expand(-1, 5, 3, 4, -1).to(torch.uint8)
    return parts | {"vision": Sequence(pixels, parts["vision"].mask)}, labels


def test_training_frames_are_augmented(pixel_batch):
    (before, mask), after = pixel_batch[0]["vision"], fused_parts(*pixel_batch, **{"vision.augment": 1.0})["vision"]
    changed = (after.values != before).flatten(2).any(2)
    assert changed[mask].float().mean() > 0.9
    assert not changed[~mask].any()
    assert torch.equal(after.mask, mask)


def test_train_frames_limits_frames_in_training(pixel_batch):
    before, after = pixel_batch[0]["vision"], fused_parts(*pixel_batch, **{"vision.train_frames": 2})["vision"]
    assert torch.equal(after.mask.sum(1), before.mask.sum(1).clamp(max=2))
    assert not (after.mask & ~before.mask).any()


@pytest.mark.parametrize("chance", [0.3, 1.0])
def test_modality_dropout_rate(batch, chance):
    fused = fused_parts(*batch, **{"train.modality_dropout": chance})
    dropped = torch.stack([~fused[name].mask.any(1) for name in ("text", "vision")])
    assert not dropped.all(0).any()
    assert dropped.float().mean(1).tolist() == pytest.approx([chance / 2] * 2, abs=0.08)  # 3 standard deviations


def test_modality_dropout_keeps_the_only_modality(batch):
    parts, labels = batch
    empty_mask = torch.zeros_like(parts["text"].mask)
    fused = fused_parts(
        {**parts, "text": Sequence(parts["text"].values, empty_mask)}, labels, **{"train.modality_dropout": 1.0}
    )
    assert torch.equal(fused["vision"].mask, parts["vision"].mask)


def test_training_batch_is_recombined(batch):
    fused = fused_parts(*batch, **{"train.recombine": 1.0})
    for name in ("text", "vision"):
        assert (source_rows(fused, name) != torch.arange(ROWS)).float().mean() > 0.5


def test_evaluation_batch_is_not_augmented(pixel_batch):
    changes = {"vision.augment": 1.0, "vision.train_frames": 2, "train.modality_dropout": 1.0, "train.recombine": 1.0}
    fused = fused_parts(*pixel_batch, training=False, **changes)
    for name, part in pixel_batch[0].items():
        assert torch.equal(fused[name].values, part.values)
        assert torch.equal(fused[name].mask, part.mask)


class ConstantModel(IdentityModel):
    """A model that predicts its only parameter for every row."""

    def __init__(self, config):
        super().__init__(config)
        self.prediction, self.network = torch.nn.Parameter(torch.zeros(3)), torch.nn.Module()
        self.register_buffer("memory", torch.ones(2))

    def fuse(self, batch):
        return Output(log_probs=self.prediction.expand(ROWS, 3))


def test_average_of_nan_buffer_starts_with_first_value():
    """Self-MM's labels are NaN until their row is first seen."""
    trainee = Trainee(ConstantModel(Config().override({"train.ema": 0.9})))
    trainee.average.memory.fill_(float("nan"))
    trainee.step_finished()
    assert torch.equal(trainee.average.memory, trainee.model.memory)


def test_moving_average_is_evaluated(batch):
    parts, _ = batch
    trainee = Trainee(ConstantModel(Config().override({"train.ema": 0.2})))
    for value in (1.0, 3.0):
        trainee.model.prediction.data.fill_(value)
        trainee.step_finished()
    # the average starts at 0; its decay is 2/11, then 3/12, but at most ema
    expected = {True: 3.0, False: 0.2 * 9 / 11 + 0.8 * 3.0}
    for training, value in expected.items():
        trainee.train(training)
        prediction = trainee(text=parts["text"].values, text_mask=parts["text"].mask)["prediction"]
        torch.testing.assert_close(prediction, torch.full((ROWS, 3), value))


def test_average_requires_no_gradient():
    average = Trainee(ConstantModel(Config().override({"train.ema": 0.9}))).average
    assert not any(parameter.requires_grad for parameter in average.parameters())
