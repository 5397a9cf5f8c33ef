"""A film without subtitles is cut where its picture changes abruptly, and nowhere else."""

import av
import numpy as np
import pytest
from tests.data.test_video import remux
from tests.fakes import write_film

from senticlip.data.shots import LONGEST, SHORTEST, shots, windows
from senticlip.data.video import probe
from senticlip.structures import UsageError, UserError

RATE = 25


def shots_of(path):
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
    """Frames of large random blocks, over which the camera pans by ``move`` pixels a frame."""
    random = np.random.default_rng(seed)
    wide = random.integers(0, 256, (4, 40, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    return [wide[:, int(i * move) : int(i * move) + 96] for i in range(frames)]


def boundaries(lines):
    return [line.start for line in lines] + [lines[-1].end]


def test_windows_are_equal_and_cover_the_film():
    assert boundaries(windows(10, 3)) == [0, 3.333, 6.667, 10]
    assert boundaries(windows(7200, 5)) == pytest.approx(np.arange(0, 7201, 5))
    assert boundaries(windows(0.5)) == [0, 0.5]
    assert len(windows(1, 0.1)) == 10
    for seconds in (0, -1, float("nan"), float("inf"), 1e-9, 0.09):
        with pytest.raises(UsageError, match=r"--seconds .* at least 0\.1"):
            windows(10, seconds)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_cuts_are_found(suffix, tmp_path):
    lengths = [50, 33, 80, 20, 60]  # frames
    pictures = [picture for seed, count in enumerate(lengths) for picture in scene(seed, count)]
    lines = shots_of(film(tmp_path / f"a{suffix}", pictures))
    # frames are compared every fifth of a second
    assert boundaries(lines) == pytest.approx(np.cumsum([0, *lengths]) / RATE, abs=0.25)
    assert all(line.text == "" for line in lines)


def test_panning_camera_is_not_a_cut(tmp_path):
    pictures = scene(0, 100, move=0.5) + scene(1, 100, move=0.5)
    lines = shots_of(film(tmp_path / "pan.mp4", pictures))
    assert boundaries(lines) == pytest.approx([0, 4, 8], abs=0.25)


def test_threshold_adapts_to_recent_motion(tmp_path):
    """The camera moves so fast that the first cut is missed; between still shots, a cut is found again."""
    pictures = scene(0, 100, move=5) + scene(1, 100) + scene(2, 100)
    assert boundaries(shots_of(film(tmp_path / "hand.mp4", pictures))) == pytest.approx([0, 8, 12], abs=0.25)


@pytest.mark.parametrize(("grey", "cuts"), [(120, []), (150, [2])])
def test_size_of_change_that_is_a_cut(tmp_path, grey, cuts):
    """From a grey of 100, by 0.08 or by 0.2 of the full range."""
    pictures = [np.full((64, 96, 3), shade, np.uint8) for shade in (100, grey) for _ in range(50)]
    assert boundaries(shots_of(film(tmp_path / "a.mp4", pictures))) == pytest.approx([0, *cuts, 4], abs=0.25)


def test_long_shots_are_cut_into_equal_pieces(tmp_path):
    lines = shots_of(write_film(tmp_path / "long.mp4", ["positive"], seconds=25))
    assert len(lines) == 3
    assert all(line.end - line.start <= LONGEST for line in lines)
    assert boundaries(lines)[0] == 0
    assert boundaries(lines)[-1] == pytest.approx(25, abs=0.2)
    assert np.diff(boundaries(lines)) == pytest.approx(25 / len(lines), abs=0.01)


def test_rapid_cuts_make_no_tiny_shots(tmp_path):
    pictures = [picture for seed in range(30) for picture in scene(seed, 6)]  # a cut every 0.24 s
    lines = shots_of(film(tmp_path / "flashes.mp4", pictures))
    assert all(line.end - line.start >= SHORTEST - 0.01 for line in lines[:-1])
    assert boundaries(lines)[-1] == pytest.approx(180 / RATE, abs=0.2)


def test_clock_that_does_not_start_at_zero(tmp_path):
    path = film(tmp_path / "late.ts", scene(0, 50) + scene(1, 50), start=2500)
    assert boundaries(shots_of(path)) == pytest.approx([0, 2, 4], abs=0.25)


def test_video_without_timestamps(tmp_path):
    remux(film(tmp_path / "a.mp4", scene(1, 50)), tmp_path / "a.h264")
    with pytest.raises(UserError, match="no timestamps to cut at"):
        shots_of(tmp_path / "a.h264")


def test_sound_longer_than_video_adds_no_shots(tmp_path):
    """The header then states a longer duration than that of the pictures."""
    path = film(tmp_path / "a.mp4", scene(0, 50) + scene(1, 50))
    with av.open(str(path)) as video, av.open(str(tmp_path / "b.mkv"), "w") as out:
        copied, sound = out.add_stream_from_template(video.streams.video[0]), out.add_stream("pcm_s16le", rate=16000)
        for packet in video.demux(video=0):
            if packet.dts is not None:
                packet.stream = copied
                out.mux(packet)
        for i in range(12):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, 16000 * i
            out.mux(sound.encode(frame))
    assert boundaries(shots_of(tmp_path / "b.mkv")) == pytest.approx([0, 2, 4], abs=0.25)


def test_truncated_film(tmp_path):
    complete = film(tmp_path / "a.ts", scene(0, 50) + scene(1, 50))
    path = tmp_path / "cut.ts"
    path.write_bytes(complete.read_bytes()[: complete.stat().st_size * 3 // 4])
    times = boundaries(shots_of(path))
    assert times[:2] == pytest.approx([0, 2], abs=0.25)
    assert times[-1] <= 4.1
    with pytest.raises(UserError, match="no such video"):
        shots_of(tmp_path / "none.mp4")


def test_cuts_after_the_end_are_ignored(tmp_path):
    path = film(tmp_path / "a.mp4", [*scene(0, 50), *scene(1, 50)])
    assert boundaries(shots(path, 3.0)) == pytest.approx([0, 2, 3], abs=0.2)
    assert boundaries(shots(path, 1.5)) == [0, 1.5]
