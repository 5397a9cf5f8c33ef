"""Sampling keeps frames at their positions; augmentation changes all frames of a clip alike."""

from __future__ import annotations

import math

import pytest
import torch

from senticlip.config import Config
from senticlip.encoders.augment import _affine_maps, _random_box, augment, sample_frames
from senticlip.models.temporal import TEMPORAL
from senticlip.structures import Sequence


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_clips(lengths=(6, 6, 2, 0)):
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    return Sequence(torch.randint(0, 256, (len(lengths), 6, 3, 12, 12), dtype=torch.uint8), mask)


@pytest.mark.parametrize("k", [1, 2, 6, 9])
def test_sampling_keeps_at_most_k_real_frames(k):
    vision = make_clips()
    chosen = sample_frames(vision, k)
    assert torch.equal(chosen.values, vision.values)
    assert not (chosen.mask & ~vision.mask).any()
    assert chosen.mask.sum(1).tolist() == [min(k, n) for n in (6, 6, 2, 0)]


def test_frames_are_sampled_uniformly():
    vision = Sequence(torch.zeros(600, 6, 3, 1, 1, dtype=torch.uint8), torch.ones(600, 6, dtype=torch.bool))
    counts = sample_frames(vision, 2).mask.sum(0)
    assert ((counts - 200).abs() < 60).all()  # 5 standard deviations


@pytest.mark.parametrize("temporal", ["transformer", "lstm", "mean"])
def test_temporal_networks_ignore_masked_frames(temporal):
    network = TEMPORAL[temporal](Config(width=8, heads=2, temporal=temporal, dropout=0.0)).eval()
    mask = torch.tensor([[False, True, False, True, False, False]])
    values = torch.randn(1, 6, 8)
    altered = torch.where(mask[..., None], values, torch.randn(1, 6, 8))
    outputs = [network(Sequence(v, mask)).values[0, [0, 2, 4]] for v in (values, altered)]
    torch.testing.assert_close(outputs[0], outputs[1])
    if temporal != "transformer":  # without positions, the same as passing only the real frames
        unpadded = network(Sequence(values[:, [1, 3]], torch.ones(1, 2, dtype=torch.bool))).values[0]
        torch.testing.assert_close(outputs[0], unpadded)


def test_sampled_frames_train_all_position_embeddings():
    network = TEMPORAL["transformer"](Config(width=8, heads=2, dropout=0.0))
    for _ in range(20):
        network(sample_frames(Sequence(torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)), 1)).values[
            :, 0
        ].square().sum().backward()
    assert (network.positions.grad.abs().sum(1) > 0).all()


def test_augmentation_is_the_same_within_a_clip_and_differs_between_clips():
    frame = torch.randint(0, 256, (1, 1, 3, 12, 12), dtype=torch.uint8)
    vision = Sequence(frame.expand(4, 6, 3, 12, 12), torch.ones(4, 6, dtype=torch.bool))
    changed = augment(vision, 1.0).values
    assert torch.equal(changed, changed[:, :1].expand_as(changed))
    assert len({tuple(clip.flatten().tolist()) for clip in changed[:, 0]}) == 4


def augment_halves(values, rows=400):
    """Augmented one-frame clips whose upper and lower halves started with these two values: B×3×12×12."""
    halves = torch.tensor(values, dtype=torch.uint8).repeat_interleave(6)[:, None].expand(12, 12)
    frames = halves.expand(rows, 1, 3, 12, 12)
    return augment(Sequence(frames, torch.ones(rows, 1, dtype=torch.bool)), 1.0).values[:, 0].float()


def test_brightness_changes_by_at_most_40_without_black_borders():
    frames = augment_halves((128, 128))
    shift = frames.flatten(1).median(1).values - 128  # the median ignores the box: at most a third of each side
    assert -40.5 <= float(shift.min()) < -38 < 38 < float(shift.max()) <= 40.5
    boxes = (frames != frames.flatten(1).median(1).values[:, None, None, None]).flatten(1).any(1)
    assert float(boxes.float().mean()) < 0.4  # only a third of the frames have a box, and none has black edges


def test_contrast_changes_by_a_limited_factor_around_the_mean():
    pixels = augment_halves((96, 160)).flatten(1)
    spread = (pixels.max(1).values - pixels.min(1).values) / 64
    assert math.exp(-0.4) - 0.02 < float(spread.min()) < 0.69 < 1.47 < float(spread.max()) < math.exp(0.4) + 0.02
    centre = (pixels.max(1).values + pixels.min(1).values) / 2 - 128
    assert float(centre.abs().max()) <= 41


def test_30_percent_of_clips_become_grey():
    frames = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(600, 1, 3, 12, 12)
    changed = augment(Sequence(frames, torch.ones(600, 1, dtype=torch.bool)), 1.0).values
    colours = changed[:, 0].flatten(2).median(2).values
    grey = (colours[:, 0] == colours[:, 2]).float().mean()
    assert float(grey) == pytest.approx(0.3, abs=0.07)


def test_masked_frames_are_neither_read_nor_changed():
    vision = make_clips()
    noise = torch.randint(0, 256, vision.values.shape, dtype=torch.uint8)
    altered = Sequence(torch.where(vision.mask[:, :, None, None, None], vision.values, noise), vision.mask)
    results = []
    for sequence in (vision, altered):
        torch.manual_seed(1)
        results.append(augment(sequence, 1.0).values)
    assert torch.equal(results[0][vision.mask], results[1][vision.mask])
    assert torch.equal(results[1][~vision.mask], noise[~vision.mask])
    assert not torch.equal(results[0][vision.mask], vision.values[vision.mask])


def test_zero_strength_or_no_frames_returns_input():
    vision = make_clips()
    assert augment(vision, 0.0) is vision
    empty = Sequence(vision.values, torch.zeros_like(vision.mask))
    assert augment(empty, 1.0) is empty


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_boxes_cover_a_third_of_rows_scaled_by_strength(strength):
    box = _random_box(4000, 90, 120, strength, torch.device("cpu"))
    # some boxes are too thin to cover a pixel
    assert float(box.any(2).any(1).float().mean()) == pytest.approx(strength / 3, abs=0.03)
    assert int(box.any(2).sum(1).max()) in range(28, 31)
    assert int(box.any(1).sum(1).max()) in range(38, 41)


def test_ranges_of_rotation_scale_stretch_crop_and_mirroring():
    """The matrix scales both axes, then rotates by up to 15°; the crop lies within the frame."""
    theta = _affine_maps(2000, 1.0, lambda low, high: torch.empty(2000).uniform_(low, high))
    matrix, shift = theta[:, :, :2], theta[:, :, 2]
    gram = matrix.mT @ matrix
    torch.testing.assert_close(gram[:, 0, 1], torch.zeros(2000), atol=1e-5, rtol=0)
    sides = gram.diagonal(dim1=1, dim2=2).sqrt()
    scale, stretch = sides.prod(1).sqrt(), (sides[:, 0] / sides[:, 1]).log() / 2
    for values, low, high in ((scale, 0.7, 1), (stretch, -0.15, 0.15)):
        assert low - 1e-5 < float(values.min()) < low + 0.01 < high - 0.01 < float(values.max()) < high + 1e-5
    angle = torch.rad2deg((-matrix[:, 0, 1] / matrix[:, 1, 1]).atan())
    assert -15.01 < float(angle.min()) < -14.8 < 14.8 < float(angle.max()) < 15.01
    assert float((torch.linalg.det(matrix) < 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert (shift.abs() <= (1 - sides).clamp_min(0) + 1e-6).all()
