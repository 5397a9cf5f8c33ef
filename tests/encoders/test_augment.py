"""Frames that are chosen stay where they are in time; what is changed is the same for all frames of a clip."""

from __future__ import annotations

import math

import pytest
import torch

from senticlip.config import Config
from senticlip.encoders.augment import _box, _turns, augment, sample_frames
from senticlip.models.temporal import TEMPORAL
from senticlip.structures import Sequence


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def clips(lengths=(6, 6, 2, 0)):
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    return Sequence(torch.randint(0, 256, (len(lengths), 6, 3, 12, 12), dtype=torch.uint8), mask)


@pytest.mark.parametrize("k", [1, 2, 6, 9])
def test_k_real_frames_are_left_in_their_places(k):
    vision = clips()
    chosen = sample_frames(vision, k)
    assert torch.equal(chosen.values, vision.values)
    assert not (chosen.mask & ~vision.mask).any()
    assert chosen.mask.sum(1).tolist() == [min(k, n) for n in (6, 6, 2, 0)]


def test_every_place_in_time_gets_its_turn():
    vision = Sequence(torch.zeros(600, 6, 3, 1, 1, dtype=torch.uint8), torch.ones(600, 6, dtype=torch.bool))
    counts = sample_frames(vision, 2).mask.sum(0)
    assert ((counts - 200).abs() < 60).all()  # 5 standard deviations


@pytest.mark.parametrize("temporal", ["transformer", "lstm", "mean"])
def test_masked_frames_are_as_good_as_absent(temporal):
    network = TEMPORAL[temporal](Config(width=8, heads=2, temporal=temporal, dropout=0.0)).eval()
    mask = torch.tensor([[False, True, False, True, False, False]])
    values = torch.randn(1, 6, 8)
    other = torch.where(mask[..., None], values, torch.randn(1, 6, 8))
    found = [network(Sequence(v, mask)).values[0, [0, 2, 4]] for v in (values, other)]
    torch.testing.assert_close(found[0], found[1])
    if temporal != "transformer":  # no positions: as if only these frames had been there
        alone = network(Sequence(values[:, [1, 3]], torch.ones(1, 2, dtype=torch.bool))).values[0]
        torch.testing.assert_close(found[0], alone)


def test_every_position_of_the_transformer_learns_from_sampled_frames():
    network = TEMPORAL["transformer"](Config(width=8, heads=2, dropout=0.0))
    for _ in range(20):
        network(sample_frames(Sequence(torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)), 1)).values[
            :, 0
        ].square().sum().backward()
    assert (network.positions.grad.abs().sum(1) > 0).all()


def test_frames_of_a_clip_are_changed_alike_and_clips_differ():
    frame = torch.randint(0, 256, (1, 1, 3, 12, 12), dtype=torch.uint8)
    vision = Sequence(frame.expand(4, 6, 3, 12, 12), torch.ones(4, 6, dtype=torch.bool))
    changed = augment(vision, 1.0).values
    assert torch.equal(changed, changed[:, :1].expand_as(changed))
    assert len({tuple(clip.flatten().tolist()) for clip in changed[:, 0]}) == 4


def lit(values, rows=400):
    """Clips of one frame whose upper and lower half have these two values, after augmentation: B×3×12×12."""
    halves = torch.tensor(values, dtype=torch.uint8).repeat_interleave(6)[:, None].expand(12, 12)
    frames = halves.expand(rows, 1, 3, 12, 12)
    return augment(Sequence(frames, torch.ones(rows, 1, dtype=torch.bool)), 1.0).values[:, 0].float()


def test_light_changes_by_40_at_most_and_nothing_comes_in_from_outside():
    found = lit((128, 128))
    moved = found.flatten(1).median(1).values - 128  # a box is a third of each side at most
    assert -40.5 <= float(moved.min()) < -38 < 38 < float(moved.max()) <= 40.5
    boxes = (found != found.flatten(1).median(1).values[:, None, None, None]).flatten(1).any(1)
    assert float(boxes.float().mean()) < 0.4  # a third have a box; no frame has black edges


def test_contrast_is_stretched_about_the_middle_by_half_at_most():
    found = lit((96, 160)).flatten(1)
    spread = (found.max(1).values - found.min(1).values) / 64
    assert math.exp(-0.4) - 0.02 < float(spread.min()) < 0.69 < 1.47 < float(spread.max()) < math.exp(0.4) + 0.02
    centre = (found.max(1).values + found.min(1).values) / 2 - 128
    assert float(centre.abs().max()) <= 41


def test_three_clips_of_ten_lose_their_colours():
    frames = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(600, 1, 3, 12, 12)
    changed = augment(Sequence(frames, torch.ones(600, 1, dtype=torch.bool)), 1.0).values
    found = changed[:, 0].flatten(2).median(2).values
    grey = (found[:, 0] == found[:, 2]).float().mean()
    assert float(grey) == pytest.approx(0.3, abs=0.07)


def test_masked_frames_change_nothing_and_are_not_changed():
    vision = clips()
    noise = torch.randint(0, 256, vision.values.shape, dtype=torch.uint8)
    other = Sequence(torch.where(vision.mask[:, :, None, None, None], vision.values, noise), vision.mask)
    found = []
    for sequence in (vision, other):
        torch.manual_seed(1)
        found.append(augment(sequence, 1.0).values)
    assert torch.equal(found[0][vision.mask], found[1][vision.mask])
    assert torch.equal(found[1][~vision.mask], noise[~vision.mask])
    assert not torch.equal(found[0][vision.mask], vision.values[vision.mask])


def test_no_strength_and_no_frames_are_no_change():
    vision = clips()
    assert augment(vision, 0.0) is vision
    nothing = Sequence(vision.values, torch.zeros_like(vision.mask))
    assert augment(nothing, 1.0) is nothing


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_box_is_in_a_third_of_the_rows_times_the_strength(strength):
    box = _box(4000, 90, 120, strength, torch.device("cpu"))
    assert float(box.any(2).any(1).float().mean()) == pytest.approx(strength / 3, abs=0.03)  # some are thin: no pixel
    assert int(box.any(2).sum(1).max()) in range(28, 31)
    assert int(box.any(1).sum(1).max()) in range(38, 41)


def test_clips_are_turned_stretched_cropped_and_half_of_them_mirrored():
    """The matrix is a turn of up to 15° after a scaling of both axes, and what is cropped lies within the frame."""
    theta = _turns(2000, 1.0, lambda low, high: torch.empty(2000).uniform_(low, high))
    matrix, shift = theta[:, :, :2], theta[:, :, 2]
    square = matrix.mT @ matrix
    torch.testing.assert_close(square[:, 0, 1], torch.zeros(2000), atol=1e-5, rtol=0)
    sides = square.diagonal(dim1=1, dim2=2).sqrt()
    scale, stretch = sides.prod(1).sqrt(), (sides[:, 0] / sides[:, 1]).log() / 2
    for found, low, high in ((scale, 0.7, 1), (stretch, -0.15, 0.15)):
        assert low - 1e-5 < float(found.min()) < low + 0.01 < high - 0.01 < float(found.max()) < high + 1e-5
    angle = torch.rad2deg((-matrix[:, 0, 1] / matrix[:, 1, 1]).atan())
    assert -15.01 < float(angle.min()) < -14.8 < 14.8 < float(angle.max()) < 15.01
    assert float((torch.linalg.det(matrix) < 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert (shift.abs() <= (1 - sides).clamp_min(0) + 1e-6).all()
