"""A film without words is cut where its picture changes, and nowhere else."""

import av
import numpy as np
import pytest
from tests.data.test_video import remux
from tests.fakes import write_film

from senticlip.data.shots import LONGEST, SHORTEST, shots, windows
from senticlip.data.video import probe
from senticlip.structures import UsageError, UserError

RATE = 25


def cut(path):
    """The shots of a whole film."""
    info = probe(path)
    return shots(path, info.start + info.duration)


def film(path, pictures, start=0, codec="libx264"):
    """A film of these pictures (H×W×3), whose clock begins at ``start`` frames."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=RATE)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts = start + i
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def scene(seed, frames, move=0):
    """A still of large blocks, or one that a camera pans over by ``move`` pixels a frame."""
    random = np.random.default_rng(seed)
    wide = random.integers(0, 256, (4, 40, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    return [wide[:, int(i * move) : int(i * move) + 96] for i in range(frames)]


def edges(lines):
    return [line.start for line in lines] + [lines[-1].end]


def test_windows_are_equal_and_cover_all():
    assert edges(windows(10, 3)) == [0, 3.333, 6.667, 10]
    assert edges(windows(7200, 5)) == pytest.approx(np.arange(0, 7201, 5))
    assert edges(windows(0.5)) == [0, 0.5]
    assert len(windows(1, 0.1)) == 10
    for wrong in (0, -1, float("nan"), float("inf"), 1e-9, 0.09):
        with pytest.raises(UsageError, match=r"--seconds .* at least 0\.1"):
            windows(10, wrong)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_cuts_are_found_where_they_are(suffix, tmp_path):
    lengths = [50, 33, 80, 20, 60]  # frames
    pictures = [picture for seed, count in enumerate(lengths) for picture in scene(seed, count)]
    found = cut(film(tmp_path / f"a{suffix}", pictures))
    # frames are compared every fifth of a second
    assert edges(found) == pytest.approx(np.cumsum([0, *lengths]) / RATE, abs=0.25)
    assert all(line.text == "" for line in found)


def test_a_panning_camera_is_no_cut(tmp_path):
    pictures = scene(0, 100, move=0.5) + scene(1, 100, move=0.5)
    found = cut(film(tmp_path / "pan.mp4", pictures))
    assert edges(found) == pytest.approx([0, 4, 8], abs=0.25)


def test_a_moving_hand_is_no_cut_and_what_is_usual_is_forgotten(tmp_path):
    """Every picture is as far from the one before as in a cut; in the second of two still shots that is behind us."""
    pictures = scene(0, 100, move=5) + scene(1, 100) + scene(2, 100)
    assert edges(cut(film(tmp_path / "hand.mp4", pictures))) == pytest.approx([0, 8, 12], abs=0.25)


@pytest.mark.parametrize(("grey", "cuts"), [(120, []), (150, [2])])
def test_how_large_a_change_is_a_cut(tmp_path, grey, cuts):
    """From a grey of 100: by 0.08, or by 0.2 of what there is."""
    pictures = [np.full((64, 96, 3), shade, np.uint8) for shade in (100, grey) for _ in range(50)]
    assert edges(cut(film(tmp_path / "a.mp4", pictures))) == pytest.approx([0, *cuts, 4], abs=0.25)


def test_long_shots_are_cut_into_equal_pieces(tmp_path):
    found = cut(write_film(tmp_path / "long.mp4", ["positive"], seconds=25))
    assert len(found) == 3
    assert all(line.end - line.start <= LONGEST for line in found)
    assert edges(found)[0] == 0
    assert edges(found)[-1] == pytest.approx(25, abs=0.2)
    assert np.diff(edges(found)) == pytest.approx(25 / len(found), abs=0.01)


def test_flashes_make_no_splinters(tmp_path):
    pictures = [picture for seed in range(30) for picture in scene(seed, 6)]  # a cut every 0.24 s
    found = cut(film(tmp_path / "flashes.mp4", pictures))
    assert all(line.end - line.start >= SHORTEST - 0.01 for line in found[:-1])
    assert edges(found)[-1] == pytest.approx(180 / RATE, abs=0.2)


def test_a_clock_that_does_not_begin_at_nought(tmp_path):
    path = film(tmp_path / "late.ts", scene(0, 50) + scene(1, 50), start=2500)
    assert edges(cut(path)) == pytest.approx([0, 2, 4], abs=0.25)


def test_pictures_without_times(tmp_path):
    remux(film(tmp_path / "a.mp4", scene(1, 50)), tmp_path / "a.h264")
    with pytest.raises(UserError, match="no timestamps to cut at"):
        cut(tmp_path / "a.h264")


def test_sound_that_goes_on_makes_no_shots(tmp_path):
    """The header promises more than there are pictures."""
    path = film(tmp_path / "a.mp4", scene(0, 50) + scene(1, 50))
    with av.open(str(path)) as video, av.open(str(tmp_path / "b.mkv"), "w") as out:
        copy, voice = out.add_stream_from_template(video.streams.video[0]), out.add_stream("pcm_s16le", rate=16000)
        for packet in video.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                out.mux(packet)
        for i in range(12):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, 16000 * i
            out.mux(voice.encode(frame))
    assert edges(cut(tmp_path / "b.mkv")) == pytest.approx([0, 2, 4], abs=0.25)


def test_a_film_that_was_cut_off(tmp_path):
    whole = film(tmp_path / "a.ts", scene(0, 50) + scene(1, 50))
    path = tmp_path / "cut.ts"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    found = edges(cut(path))
    assert found[:2] == pytest.approx([0, 2], abs=0.25)
    assert found[-1] <= 4.1
    with pytest.raises(UserError, match="no such video"):
        cut(tmp_path / "none.mp4")


def test_a_cut_after_the_end_makes_no_shot(tmp_path):
    path = film(tmp_path / "a.mp4", [*scene(0, 50), *scene(1, 50)])
    assert edges(shots(path, 3.0)) == pytest.approx([0, 2, 3], abs=0.2)
    assert edges(shots(path, 1.5)) == [0, 1.5]
