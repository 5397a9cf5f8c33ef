"""Frames of the main shot are kept and cutaways dropped, whatever the content, light, camera movement and order."""

import runpy
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from senticlip.data.cache import frame_store
from senticlip.data.cutaways import GRID, main_shot, without_bars
from senticlip.data.video import read_frames, resize
from senticlip.structures import Clip

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_only.py"


def noisy_frames(shots: list[int], seed: int) -> np.ndarray:
    """A frame for each shot number: the noise picture of that shot under random light, moved by up to a pixel
    each way (no two frames by more than two pixels)."""
    random = np.random.default_rng(seed)
    pictures = random.uniform(60, 190, (max(shots) + 1, 3, GRID, GRID))
    frames = []
    for shot in shots:
        moved = np.roll(pictures[shot], random.integers(-1, 2, 2), (1, 2))
        lit = (moved - 125) * random.uniform(0.6, 1.3) + 125 + random.uniform(-30, 30)
        frames.append(lit + random.normal(0, 4, lit.shape))
    return np.stack(frames).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("pixels", "is_kept"), [(2, True), (3, False)])
def test_tolerated_movement(pixels, is_kept):
    """In noise, neighbouring pixels are independent: pictures correlate only if aligned to the pixel."""
    still = noisy_frames([0], 7)[0].astype(np.uint8)
    frames = np.stack([still, still, still, np.roll(still, (-pixels, pixels), (1, 2))])
    expected = [True, True, True, is_kept]
    assert main_shot(frames).tolist() == expected
    assert runpy.run_path(str(EXAMPLE))["main_shot"](frames).tolist() == expected


@settings(deadline=None)
@given(st.integers(0, 10**6), st.permutations([0, 0, 0, 0, 1, 1]))
def test_cutaway_is_dropped(seed, shots):
    assert main_shot(noisy_frames(shots, seed)).tolist() == [shot == 0 for shot in shots]


@pytest.mark.parametrize("shots", [[], [0], [0, 1], [0, 1, 2], [0, 0, 1, 1], [0, 1, 2, 3, 4, 4], [0, 0, 0, 1, 2, 3]])
def test_without_majority_shot_all_frames_are_kept(shots):
    pixels = noisy_frames(shots, 1) if shots else np.zeros((0, 3, GRID, GRID), np.uint8)
    assert main_shot(pixels).tolist() == [True] * len(shots)


def test_panning_camera_is_one_shot():
    """The first and the last frame differ, but each is similar to the next."""
    scene = np.random.default_rng(0).uniform(0, 255, (3, GRID, 4 * GRID))
    frames = np.stack([scene[:, :, x : x + GRID] for x in range(0, 14, 2)])
    correlation = np.corrcoef(frames[0].ravel(), frames[-1].ravel())[0, 1]
    assert correlation < 0.5
    assert main_shot(frames).all()
    assert main_shot(np.concatenate([frames, noisy_frames([0], 5)])).tolist() == [True] * 7 + [False]


@pytest.mark.parametrize("noise", [0, 3])
def test_plain_frames_match_no_others(noise):
    """Black frames (of a fade) and frames of one colour, with the faint noise that a codec leaves."""
    random = np.random.default_rng(0)
    faint = np.repeat(random.integers(0, noise + 1, (1, 3, GRID, GRID)), 3, 0).astype(np.uint8)
    for colour in ([0, 0, 0], [10, 30, 220]):
        plain = faint + np.array(colour, np.uint8)[:, None, None]
        assert main_shot(np.concatenate([plain, noisy_frames([0, 0, 1], 2)])).tolist() == [True] * 6
        kept = main_shot(np.concatenate([plain[:2], noisy_frames([0, 0, 0], 2)]))
        assert kept.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(("blend", "is_kept"), [(0.45, False), (0.6, False), (0.74, True), (0.9, True)])
def test_correlation_threshold(blend, is_kept):
    """The correlation of a picture with a mixture is its share in the mixture, here within a few hundredths."""
    random = np.random.default_rng(4)
    first, second = random.normal(0, 40, (2, 3, GRID, GRID))
    mixture = blend * first + np.sqrt(1 - blend**2) * second
    pixels = (125 + np.stack([first, first, first, mixture])).clip(0, 255).astype(np.uint8)
    assert abs(np.corrcoef(pixels[0].ravel(), pixels[3].ravel())[0, 1] - blend) < 0.05
    expected = [True, True, True, is_kept]
    assert main_shot(pixels).tolist() == expected
    assert runpy.run_path(str(EXAMPLE))["main_shot"](pixels).tolist() == expected


@pytest.mark.parametrize(("above", "beside"), [(0, 0), (3, 0), (12, 0), (40, 0), (0, 7), (0, 33), (5, 30)])
def test_black_bars_are_ignored(above, beside):
    """Bars of any width, with a codec's faint noise in them."""
    random = np.random.default_rng(above + beside)
    shots = [0, 1, 0, 0, 1, 0]
    content = noisy_frames(shots, above).repeat(3, 2).repeat(3, 3)
    frames = random.integers(0, 12, (6, 3, 48 + 2 * above, 48 + 2 * beside), np.uint8)
    frames[:, :, above : 48 + above, beside : 48 + beside] = content
    assert np.array_equal(without_bars(frames), content)
    expected = [shot == 0 for shot in shots]
    assert main_shot(resize(without_bars(frames), GRID).numpy()).tolist() == expected
    assert runpy.run_path(str(EXAMPLE))["main_shot"](frames).tolist() == expected


def test_black_frames_have_no_bars():
    black = np.zeros((3, 3, 32, 32), np.uint8)
    assert without_bars(black) is black
    assert main_shot(black[:, :, :GRID, :GRID]).all()
    assert runpy.run_path(str(EXAMPLE))["main_shot"](black).all()


@pytest.mark.parametrize("k", [20, 21, 40, 64])
def test_many_frames(k):
    shots = [int(i % 4 == 3) for i in range(k)]
    assert main_shot(noisy_frames(shots, k)).tolist() == [shot == 0 for shot in shots]


def write_shots(path: Path, shots: list[int]) -> Path:
    """A lossless video at 10 frames a second: half a second of coarse noise for each shot number."""
    pictures = np.random.default_rng(3).integers(0, 256, (max(shots) + 1, 6, 8, 3), np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264rgb", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 48, "rgb24", {"qp": "0"}
        for shot in shots:
            for _ in range(5):
                image = pictures[shot].repeat(8, 0).repeat(8, 1)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        out.mux(stream.encode(None))
    return path


def test_clip_is_read_without_cutaway(tmp_path):
    path = write_shots(tmp_path / "a.mp4", [0, 0, 1, 0, 0, 1])
    kept, all_frames = read_frames(path, 6, size=32, cutaways="drop"), read_frames(path, 6, size=32)
    assert all_frames.times.tolist() == [0.2, 0.7, 1.2, 1.7, 2.2, 2.7]
    assert kept.times.tolist() == [0.2, 0.7, 1.7, 2.2]
    assert np.array_equal(kept.pixels, all_frames.pixels[[0, 1, 3, 4]])
    segment = read_frames(path, 4, 0.0, 1.5, cutaways="drop")
    assert segment.times.tolist() == [0.1, 0.5, 0.9]
    example = runpy.run_path(str(EXAMPLE))
    assert example["main_shot"](example["frames"](str(path), 6, 32)).tolist() == [True, True, False, True, True, False]


def test_cache_distinguishes_cutaway_modes(tmp_path):
    clips = [Clip("a", write_shots(tmp_path / "a.mp4", [0, 0, 1, 0])), Clip("none")]
    for cutaways, length in (("drop", 3), ("keep", 4), ("drop", 3)):
        store = frame_store(clips, 4, 32, tmp_path / "cache", cutaways=cutaways)
        assert store.lengths.tolist() == [length, 0]
