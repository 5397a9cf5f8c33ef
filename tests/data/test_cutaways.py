"""Frames of the main shot stay, those of a cutaway go, whatever the pictures, the light, the camera and the order."""

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


def frames_of(shots: list[int], seed: int) -> np.ndarray:
    """A frame for each number: its own noise picture in another light, and moved a little (no two frames by more
    than two pixels)."""
    random = np.random.default_rng(seed)
    pictures = random.uniform(60, 190, (max(shots) + 1, 3, GRID, GRID))
    frames = []
    for shot in shots:
        moved = np.roll(pictures[shot], random.integers(-1, 2, 2), (1, 2))
        lit = (moved - 125) * random.uniform(0.6, 1.3) + 125 + random.uniform(-30, 30)
        frames.append(lit + random.normal(0, 4, lit.shape))
    return np.stack(frames).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("pixels", "stays"), [(2, True), (3, False)])
def test_how_far_a_picture_may_have_moved(pixels, stays):
    """Of noise, no pixel tells anything of the one beside it."""
    still = frames_of([0], 7)[0].astype(np.uint8)
    frames = np.stack([still, still, still, np.roll(still, (-pixels, pixels), (1, 2))])
    expected = [True, True, True, stays]
    assert main_shot(frames).tolist() == expected
    assert runpy.run_path(str(EXAMPLE))["main_shot"](frames).tolist() == expected


@settings(deadline=None)
@given(st.integers(0, 10**6), st.permutations([0, 0, 0, 0, 1, 1]))
def test_what_is_shown_for_a_moment_goes(seed, shots):
    assert main_shot(frames_of(shots, seed)).tolist() == [shot == 0 for shot in shots]


@pytest.mark.parametrize("shots", [[], [0], [0, 1], [0, 1, 2], [0, 0, 1, 1], [0, 1, 2, 3, 4, 4], [0, 0, 0, 1, 2, 3]])
def test_where_no_shot_is_more_than_half_all_frames_stay(shots):
    pixels = frames_of(shots, 1) if shots else np.zeros((0, 3, GRID, GRID), np.uint8)
    assert main_shot(pixels).tolist() == [True] * len(shots)


def test_a_camera_that_moves_on_stays_in_its_shot():
    """The first frame is no longer like the last, but each is like the next."""
    scene = np.random.default_rng(0).uniform(0, 255, (3, GRID, 4 * GRID))
    frames = np.stack([scene[:, :, x : x + GRID] for x in range(0, 14, 2)])
    far = np.corrcoef(frames[0].ravel(), frames[-1].ravel())[0, 1]
    assert far < 0.5
    assert main_shot(frames).all()
    assert main_shot(np.concatenate([frames, frames_of([0], 5)])).tolist() == [True] * 7 + [False]


@pytest.mark.parametrize("noise", [0, 3])
def test_plain_frames_are_like_no_other(noise):
    """Black ones of a fade, and ones of a single colour, with the faint noise that a codec leaves."""
    random = np.random.default_rng(0)
    faint = np.repeat(random.integers(0, noise + 1, (1, 3, GRID, GRID)), 3, 0).astype(np.uint8)
    for colour in ([0, 0, 0], [10, 30, 220]):
        plain = faint + np.array(colour, np.uint8)[:, None, None]
        assert main_shot(np.concatenate([plain, frames_of([0, 0, 1], 2)])).tolist() == [True] * 6
        found = main_shot(np.concatenate([plain[:2], frames_of([0, 0, 0], 2)]))
        assert found.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(("blend", "stays"), [(0.45, False), (0.6, False), (0.74, True), (0.9, True)])
def test_how_alike_is_alike(blend, stays):
    """A picture of which a share is another's correlates with it by that share, here within a few hundredths."""
    random = np.random.default_rng(4)
    one, other = random.normal(0, 40, (2, 3, GRID, GRID))
    mixed = blend * one + np.sqrt(1 - blend**2) * other
    pixels = (125 + np.stack([one, one, one, mixed])).clip(0, 255).astype(np.uint8)
    assert abs(np.corrcoef(pixels[0].ravel(), pixels[3].ravel())[0, 1] - blend) < 0.05
    expected = [True, True, True, stays]
    assert main_shot(pixels).tolist() == expected
    assert runpy.run_path(str(EXAMPLE))["main_shot"](pixels).tolist() == expected


@pytest.mark.parametrize(("above", "beside"), [(0, 0), (3, 0), (12, 0), (40, 0), (0, 7), (0, 33), (5, 30)])
def test_black_bars_make_no_shots_alike(above, beside):
    """Bars of any width, with a codec's faint noise in them."""
    random = np.random.default_rng(above + beside)
    shots = [0, 1, 0, 0, 1, 0]
    lit = frames_of(shots, above).repeat(3, 2).repeat(3, 3)
    frames = random.integers(0, 12, (6, 3, 48 + 2 * above, 48 + 2 * beside), np.uint8)
    frames[:, :, above : 48 + above, beside : 48 + beside] = lit
    assert np.array_equal(without_bars(frames), lit)
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
    assert main_shot(frames_of(shots, k)).tolist() == [shot == 0 for shot in shots]


def write_shots(path: Path, shots: list[int]) -> Path:
    """Half a second of coarse noise for each number, lossless, ten frames a second."""
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


def test_a_clip_is_read_without_its_cutaway(tmp_path):
    path = write_shots(tmp_path / "a.mp4", [0, 0, 1, 0, 0, 1])
    kept, every = read_frames(path, 6, size=32, cutaways="drop"), read_frames(path, 6, size=32)
    assert every.times.tolist() == [0.2, 0.7, 1.2, 1.7, 2.2, 2.7]
    assert kept.times.tolist() == [0.2, 0.7, 1.7, 2.2]
    assert np.array_equal(kept.pixels, every.pixels[[0, 1, 3, 4]])
    piece = read_frames(path, 4, 0.0, 1.5, cutaways="drop")
    assert piece.times.tolist() == [0.1, 0.5, 0.9]
    example = runpy.run_path(str(EXAMPLE))
    assert example["main_shot"](example["frames"](str(path), 6, 32)).tolist() == [True, True, False, True, True, False]


def test_the_cache_tells_them_apart(tmp_path):
    clips = [Clip("a", write_shots(tmp_path / "a.mp4", [0, 0, 1, 0])), Clip("none")]
    for cutaways, length in (("drop", 3), ("keep", 4), ("drop", 3)):
        store = frame_store(clips, 4, 32, tmp_path / "cache", cutaways=cutaways)
        assert store.lengths.tolist() == [length, 0]
