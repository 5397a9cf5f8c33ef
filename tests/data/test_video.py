"""The frame read at any time is the one that a full sequential decode shows then, for many kinds of generated files."""

import errno
import os
import random
import re
from fractions import Fraction
from itertools import groupby, pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tests.data.edits import with_edits
from tests.tiny import write_clip

from senticlip.data import decode
from senticlip.data import sequential as sequential_module
from senticlip.data.decode import Decoder
from senticlip.data.video import VideoReader, probe, read_frames, resize, video_problems
from senticlip.explain import _read_pictures
from senticlip.structures import Clip, UsageError, UserError

WIDTH, HEIGHT, BITS = 96, 64, 8


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A frame that encodes its number as 8 black and white bars, with a moving edge below and red at the top left."""
    image = np.full((height, width, 3), 90, np.uint8)
    for bit in range(BITS):
        bar = slice(bit * width // BITS, (bit + 1) * width // BITS)
        image[height // 4 : 3 * height // 4, bar] = 255 * (number >> bit & 1)
    image[3 * height // 4 :, (number * 5) % width :] = 200
    image[: height // 4, : width // 4] = (230, 20, 20)
    return image


def read_number(pixels: np.ndarray) -> int:
    """The number that ``picture`` encoded in a frame 3×H×W."""
    _, height, width = pixels.shape
    return sum(int(pixels[1, height // 2, (2 * b + 1) * width // (2 * BITS)] > 128) << b for b in range(BITS))


def write(
    path: Path,
    codec: str = "libx264",
    stamps: list[int] | None = None,
    base: Fraction = Fraction(1, 25),
    size: tuple[int, int] = (WIDTH, HEIGHT),
    sound: bool = False,
    rotation: int | None = None,
    pixel_aspect: Fraction | None = None,
    container: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Frames 0, 1, … at ``stamps`` × ``base`` seconds."""
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=round(1 / base) if base.numerator == 1 and base > Fraction(1, 120) else 25)
        stream.width, stream.height = size
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p", "apng": "rgb24"}.get(codec, "yuv420p")
        stream.codec_context.time_base = base
        stream.options = {"g": "12", **options}
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if sound:
            audio = out.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, 0
        for i, stamp in enumerate(range(60) if stamps is None else stamps):
            image = av.VideoFrame.from_ndarray(picture(i, *size), "rgb24")
            image.pts, image.time_base = stamp, base
            out.mux(stream.encode(image))
        out.mux(stream.encode(None))
        if sound:
            out.mux(audio.encode(frame))
            out.mux(audio.encode(None))
    return path


def remux(source: Path, path: Path, keep=lambda packet: True, shift: int = 0, **options: str) -> Path:
    """The same packets in another file; those that ``keep`` rejects are left out, the rest is moved by ``shift``."""
    with av.open(str(source)) as old, av.open(str(path), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None and keep(packet):
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = stream
                new.mux(packet)
    return path


def edit_in_mid_gop(folder: Path) -> Path:
    """A video whose edit list starts in the middle of a GOP."""
    return remux(write(folder / "whole.mp4"), folder / "edit.mp4", shift=-17 * 512)


def write_edited(folder: Path, *edits: tuple[int, int], **options: str) -> Path:
    """A video with an edit list; ``edits``: duration in ms and number of the first frame (−1 shows nothing)."""
    first_pts = 1024 if options.get("bf") else 0  # with B-frames, decoding begins two frames before showing
    edits_in_ticks = [(duration, first if first < 0 else first_pts + 512 * first) for duration, first in edits]
    return with_edits(write(folder / "whole.mp4", **options), folder / "edited.mp4", edits_in_ticks)


def write_delayed(folder: Path) -> Path:
    """A video whose first frame comes 0.8 s after the sound starts."""
    return write(folder / "delayed.mp4", stamps=list(range(20, 60)), sound=True)


def write_packed(folder: Path) -> Path:
    """Each B-frame is in the packet of the frame before it; its own packet holds an empty ("not coded") frame."""

    def as_divx(data: bytes) -> bytes:
        return re.sub(rb"Lavc[\d.]+", b"DivX503b1393p", data)

    source = write(folder / "plain.avi", codec="mpeg4", bf="1")
    with av.open(str(source)) as old, av.open(str(folder / "packed.avi"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        stream.codec_context.extradata = as_divx(old.streams.video[0].codec_context.extradata)
        packets = [packet for packet in old.demux(video=0) if packet.dts is not None]
        is_b = [(bytes(packet).rpartition(b"\0\0\1\xb6")[2] + b"\0")[0] >> 6 == 2 for packet in packets] + [False]
        for i, packet in enumerate(packets):
            data = b"\0\0\1\xb6\x50\0" if is_b[i] else bytes(packet)
            joined = av.Packet(as_divx(data + (bytes(packets[i + 1]) if is_b[i + 1] else b"")))
            joined.stream, joined.time_base, joined.is_keyframe = stream, packet.time_base, packet.is_keyframe
            joined.pts = joined.dts = packet.dts
            new.mux(joined)
        assert sum(is_b) > 20
    return folder / "packed.avi"


SAMPLES = {
    "constant rate, B-frames": lambda d: write(d / "a.mp4", bf="3"),
    "one keyframe": lambda d: write(d / "a.mp4", g="600", bf="3"),
    "no B-frames, sound": lambda d: write(d / "a.mp4", bf="0", sound=True),
    "variable rate": lambda d: write(
        d / "a.mp4", stamps=sorted(random.Random(1).sample(range(9000), 60)), base=Fraction(1, 1000), bf="3"
    ),
    "variable rate, long gaps": lambda d: write(
        d / "a.mkv", stamps=[0, 10, 5000, 5010, 5020, 90000, 90040, 95000], base=Fraction(1, 1000), bf="2"
    ),
    "open GOP": lambda d: write(d / "a.mp4", **{"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3"}),
    "open GOP, cut at its start": lambda d: remux(
        write(d / "a.ts", **{"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3"}),
        d / "b.ts",
        keep=lambda packet: packet.dts > 126000 + 7 * 3600,
    ),
    "rolling refresh": lambda d: write(d / "a.mp4", **{"x264-params": "intra-refresh=1:keyint=12:bframes=0"}),
    "edit list": edit_in_mid_gop,
    "trimmed at its end": lambda d: write_edited(d, (600, 5), bf="3"),
    "trimmed at its end, no B-frames": lambda d: write_edited(d, (600, 5), bf="0", g="60"),
    "cut in the middle": lambda d: write_edited(d, (800, 0), (800, 35), bf="3"),
    "two pieces in another order": lambda d: write_edited(d, (1000, 30), (1000, 5), bf="3"),
    "a piece three times": lambda d: write_edited(d, (800, 10), (800, 10), (800, 10)),
    "nothing at first": lambda d: write_edited(d, (500, -1), (1000, 7), bf="3"),
    "pictures after the sound": write_delayed,
    "fragments, no index": lambda d: write(d / "a.mp4", container={"movflags": "frag_keyframe+empty_moov"}),
    "matroska without index": lambda d: write(d / "a.mkv", bf="2", container={"live": "1"}),
    "transport stream": lambda d: write(d / "a.ts", bf="2"),
    "flash": lambda d: write(d / "a.flv", bf="2"),
    "MPEG-2": lambda d: write(d / "a.mpg", codec="mpeg2video", bf="2"),
    "MPEG-4 in AVI (no presentation times)": lambda d: write(d / "a.avi", codec="mpeg4", bf="2"),
    "MPEG-4 in AVI, B-frames packed as Xvid does": write_packed,
    "HEVC": lambda d: write(d / "a.mp4", codec="libx265", **{"x265-params": "log-level=none:keyint=12:bframes=3"}),
    "VP9": lambda d: write(d / "a.webm", codec="libvpx-vp9", deadline="realtime", **{"cpu-used": "8"}),
    "VP8": lambda d: write(d / "a.webm", codec="libvpx", **{"auto-alt-ref": "1", "lag-in-frames": "10"}),
    "H.264 in AVI (wrong presentation times)": lambda d: write(d / "a.avi", bf="3"),
    "H.264 in MPEG-PS (few presentation times)": lambda d: write(d / "a.mpg", bf="3"),
    "H.264 in ASF (decoding times)": lambda d: write(d / "a.asf", bf="3"),
    "animated PNG": lambda d: write(d / "a.apng", codec="apng"),
    "AV1": lambda d: write(d / "a.mp4", codec="libsvtav1", preset="11", **{"svtav1-params": "keyint=12"}),
    "motion JPEG": lambda d: write(d / "a.avi", codec="mjpeg"),
    "bare H.264": lambda d: write(d / "a.h264", bf="2"),
    "GIF": lambda d: write(d / "a.gif", codec="gif"),
    "one frame": lambda d: write(d / "a.mp4", stamps=[0]),
    "two frames": lambda d: write(d / "a.mkv", stamps=[0, 1]),
    "vertical": lambda d: write(d / "a.mp4", size=(48, 128)),
}


@pytest.fixture(scope="module", params=SAMPLES)
def sample(request, tmp_path_factory) -> tuple[Path, list[tuple[float, int]]]:
    path = SAMPLES[request.param](tmp_path_factory.mktemp("samples"))
    return path, all_frames(path)


def all_frames(path: Path) -> list[tuple[float, int]]:
    """(time, number) of every frame, decoded from the start; if any has no time, at 25 frames a second."""
    with av.open(str(path)) as container:
        clock_start, frames, has_times = float(Fraction(container.start_time or 0, 10**6)), [], True
        for frame in container.decode(video=0):
            has_times = has_times and frame.pts is not None
            frames.append((float((frame.pts or 0) * frame.time_base) - clock_start, read_number(rgb(frame))))
    # decreasing times are not presentation times
    if not has_times or any(first[0] > second[0] for first, second in pairwise(frames)):
        return [(i / 25, number) for i, (_, number) in enumerate(frames)]
    return frames


def rgb(frame: av.VideoFrame) -> np.ndarray:
    return frame.to_ndarray(format="rgb24").transpose(2, 0, 1)


def number_at(frames: list[tuple[float, int]], time: float) -> int:
    """The number of the frame shown at a time."""
    return [n for t, n in frames if t <= time + 2e-6][-1] if time >= frames[0][0] else frames[0][1]


def inner_times(frames: list[tuple[float, int]]) -> list[float]:
    """Three times within each frame, none at the border between two."""
    ends = [t for t, _ in frames[1:]] + [frames[-1][0] + 0.03]
    return [t + (end - t) * x for (t, _), end in zip(frames, ends, strict=True) for x in (0.1, 0.5, 0.9)]


def test_times_in_random_order(sample):
    path, frames = sample
    times = random.Random(0).sample(inner_times(frames), 3 * len(frames))[:50]
    result = read_frames(path, times=times)
    assert [read_number(p) for p in result.pixels] == [number_at(frames, t) for t in times]
    assert all(result.times[i] <= t + 1e-3 or t < frames[0][0] + 1e-3 for i, t in enumerate(times))


@pytest.mark.parametrize("near", [0, 20])
def test_one_reader_reads_frames_one_by_one(sample, near, monkeypatch):
    """In increasing and in random order; ``near`` = 0 makes every jump ahead a seek, 20 none."""
    monkeypatch.setattr("senticlip.data.decode.MAX_READ_AHEAD", max(near, 0.01))
    path, frames = sample
    times = inner_times(frames)[::2]
    with VideoReader(path) as reader:
        assert [read_number(reader.read(times=[t]).pixels[0]) for t in times] == [number_at(frames, t) for t in times]
        random.Random(2).shuffle(times)
        times = times[:20]
        assert [read_number(reader.read(times=[t]).pixels[0]) for t in times] == [number_at(frames, t) for t in times]


@pytest.mark.parametrize("m", [1, 6, 200])
def test_evenly_spaced_frames(sample, m):
    path, frames = sample
    with VideoReader(path) as reader:
        first, duration = float(reader._start), reader.duration
    result = read_frames(path, m)
    expected = [number_at(frames, first + (i + 0.5) * duration / m) for i in range(m)]
    if m < 200:
        assert [read_number(p) for p in result.pixels] == [number for number, _ in groupby(expected)]
    assert len(result.pixels) == len(result.times) <= min(m, len(frames))
    assert np.all(np.diff(result.times) > 0)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
def test_intra_refresh_frames_are_complete(tmp_path, kind):
    """Decoding can start at a "keyframe" that is incomplete: no frame may be returned before it is complete."""
    path, random = tmp_path / f"a.{kind}", np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", 10, options={"x264-params": "intra-refresh=1:keyint=40:bframes=0"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        scene = random.integers(0, 256, (12, 20, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        for i in range(200):
            image = np.roll(scene, i, 1)
            image[48:] ^= 255 * (i // 37 % 2)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    with av.open(str(path)) as file:
        expected = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    with VideoReader(path) as reader:
        times = [reader._to_seconds(reader._decoder.first) + (i + 0.5) / 10 for i in range(0, 200, 7)]
    for i, time in zip(range(0, 200, 7), times, strict=True):
        assert np.array_equal(read_frames(path, times=[time]).pixels[0].transpose(1, 2, 0), expected[i]), i


@pytest.fixture(scope="module")
def ten_fps_clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("plain") / "3s.mp4", 90, 0, seconds=3)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 12),
    bounds=st.tuples(st.integers(0, 2999), st.integers(0, 4000)).filter(lambda pair: pair[0] < pair[1]),
)
def test_evenly_spaced_frames_of_any_segment(ten_fps_clip, m, bounds):
    """The frames shown at t_i = start + (i + ½)·T/m; the clip has 30 frames of a tenth of a second."""
    start, end = Fraction(bounds[0], 1000), Fraction(bounds[1], 1000)
    times = [start + (i + Fraction(1, 2)) * (min(end, 3) - start) / m for i in range(m)]
    expected = sorted({int(time * 10) / 10 for time in times})
    assert read_frames(ten_fps_clip, m, bounds[0] / 1000, bounds[1] / 1000).times == pytest.approx(expected)


def test_consecutive_segments(sample):
    path, frames = sample
    first, last = frames[0][0], frames[-1][0]
    segments = [(first + i * (last - first) / 7, first + (i + 1) * (last - first) / 7) for i in range(7)]
    with VideoReader(path) as reader:
        for start, end in segments:
            result = reader.read(3, start, end)
            assert {read_number(p) for p in result.pixels} == {
                number_at(frames, start + (i + 0.5) * (end - start) / 3) for i in range(3)
            }


def test_duration_matches_frames(sample):
    path, frames = sample
    info = probe(path)
    assert info.problem is None
    assert info.duration == pytest.approx(frames[-1][0] - frames[0][0] + 0.04, abs=0.25)


def test_timestamps_that_go_back_are_an_error(tmp_path):
    """As in recordings joined byte by byte: half of the frames would never be read."""
    one = write(tmp_path / "one.ts")
    (tmp_path / "two.ts").write_bytes(2 * one.read_bytes())
    assert len(read_frames(one).pixels) == 6
    with pytest.raises(UserError, match=r"two\.ts: its timestamps go back by 2\.\d s, as in joined files"):
        read_frames(tmp_path / "two.ts")


def test_video_starts_at_first_decoded_frame(tmp_path):
    """In an AVI of MPEG-4 with B-frames, the first frame comes one frame late."""
    info = probe(write(tmp_path / "a.avi", codec="mpeg4", bf="2"))
    assert (info.start, info.duration) == (pytest.approx(0.04), pytest.approx(60 / 25))


def test_codec_without_decoder_is_one_line(tmp_path):
    path = write(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    for function in (probe, read_frames):
        with pytest.raises(UserError, match=r"a\.mp4: no decoder for its video"):
            function(path)


@pytest.mark.parametrize("small_file", [1 << 24, 0])
def test_b_frames_at_one_frame_per_second(tmp_path, monkeypatch, small_file):
    """In Matroska, the first packets after a seek have no decoding times that would bound the reordering of frames."""
    monkeypatch.setattr("senticlip.data.decode.SMALL_FILE_BYTES", small_file)
    path = write(tmp_path / "a.mkv", stamps=list(range(60)), base=Fraction(1), **{"x264-params": "bframes=3:b-adapt=0"})
    with VideoReader(path) as reader:
        for i in range(0, 57, 3):  # in increasing segments, as a film is read
            assert [read_number(pixels) for pixels in reader.read(3, i, i + 3).pixels] == [i, i + 1, i + 2]
    assert [read_number(read_frames(path, times=[i + 0.5]).pixels[0]) for i in range(60)] == list(range(60))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotated_video(tmp_path, degrees):
    """Phones store the picture as the sensor saw it, and how to rotate it."""
    upright = read_frames(write(tmp_path / "a.mp4", qp="0"), 3).pixels  # lossless: x264 varies a little
    rotated = read_frames(write(tmp_path / "b.mp4", rotation=degrees, qp="0"), 3).pixels
    with av.open(str(tmp_path / "b.mp4")) as container:
        rotation = next(container.decode(video=0)).rotation
    assert rotation % 360 == degrees
    # FFmpeg's rotation is counterclockwise, as numpy's is
    assert np.array_equal(rotated, np.rot90(upright, degrees // 90, axes=(2, 3)))
    assert probe(tmp_path / "b.mp4").aspect == rotated.shape[3] / rotated.shape[2]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photo_rotated_by_exif(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(1)).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))).transpose(2, 0, 1)
    assert np.abs(read_frames(tmp_path / "a.jpg", 1).pixels[0].astype(int) - expected).mean() < 1


@pytest.mark.parametrize("size", [(96, 64), (96, 96)])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_non_square_pixels(tmp_path, degrees, size):
    path = write(tmp_path / "a.mp4", rotation=degrees, pixel_aspect=Fraction(4, 3), size=size)
    aspect = (size[0] * 4 / (size[1] * 3)) ** (-1 if degrees % 180 else 1)
    assert probe(path).aspect == pytest.approx(aspect)
    assert _read_pictures(path, [0.0])[0].size == (pytest.approx(256 * aspect, abs=0.5), 256)


def test_mirrored_video(tmp_path):
    path = write(tmp_path / "a.mp4", rotation=0)
    upright = read_frames(path, 2).pixels
    data = bytearray(path.read_bytes())
    offset = data.index(b"tkhd") + 4 + 40  # the track's display matrix; its first number is 1.0
    assert data[offset : offset + 4] == (1 << 16).to_bytes(4, "big")
    data[offset : offset + 4] = (-(1 << 16) & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(data)
    assert np.array_equal(read_frames(path, 2).pixels, upright[..., ::-1])


def test_8k_video(tmp_path):
    path = write(tmp_path / "a.mp4", stamps=[0, 1], size=(7680, 4320), preset="ultrafast", codec="libx264")
    result = read_frames(path, 2, size=224)
    assert result.pixels.shape == (2, 3, 224, 224)
    assert [read_number(p) for p in result.pixels] == [0, 1]
    assert probe(path).aspect == 7680 / 4320


def test_huge_pictures_are_rejected(tmp_path, monkeypatch):
    large = Image.new("1", (12000, 12000))
    large.save(tmp_path / "a.png")
    large.save(tmp_path / "a.apng", format="PNG", save_all=True, append_images=[ImageOps.invert(large)])
    for name in ("a.png", "a.apng"):
        for function in (probe, read_frames):
            with pytest.raises(
                UserError, match=rf"{name}: its pictures are .* too large — .* at most 134 million pixels"
            ):
                function(tmp_path / name)
    small, wide = (write(tmp_path / f"{width}.h264", size=(width, 64), stamps=list(range(5))) for width in (96, 192))
    joined = tmp_path / "both.h264"
    joined.write_bytes(small.read_bytes() + wide.read_bytes())
    assert {frame.width for frame in decode_all(joined)} == {96, 192}
    monkeypatch.setattr(sequential_module, "MAX_PIXELS", 10_000)
    assert {frame.width for frame in decode_all(joined)} == {96}
    with pytest.raises(UserError, match=r"192\.h264: pictures of 192 x 64 pixels — reduce them to at most"):
        read_frames(wide)


def decode_all(path: Path) -> list[av.VideoFrame]:
    container, stream = sequential_module.open_video(path)
    with container:
        return list(sequential_module.decoded_frames(container, stream))


def test_percent_in_name_is_no_sequence_pattern(tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(tmp_path / "x1.png")
    Image.new("RGB", (WIDTH, HEIGHT), "blue").save(tmp_path / "x%d.png")
    assert read_frames(tmp_path / "x%d.png", 1).pixels[0, :, 0, 0].tolist() == [0, 0, 255]
    assert len(read_frames(write(tmp_path / "a%d.mp4"), 3).pixels) == 3


def test_long_film_is_decoded_only_near_wanted_frames(tmp_path, monkeypatch):
    """Six frames of twenty minutes: at most one GOP each; 40 segments in order: hardly any GOP twice."""
    monkeypatch.setattr("senticlip.data.decode.Sequential", no_sequential_decode)
    path = write(tmp_path / "film.mp4", stamps=list(range(0, 1200 * 2)), base=Fraction(1, 2), g="20", bf="2")
    decoded = []
    real = Decoder._decode_packet
    monkeypatch.setattr(
        Decoder, "_decode_packet", lambda self, read, skip: decoded.append(read.pts) or real(self, read, skip)
    )
    read_frames(path, 6)
    assert len(decoded) <= 6 * 22
    decoded.clear()
    with VideoReader(path) as reader:
        for i in range(40):
            reader.read(2, 100 + 5 * i, 103 + 5 * i)
    assert len(decoded) <= 40 * 5 * 2 * 1.7


def no_sequential_decode(path: Path) -> None:
    """Replaces ``Sequential`` where it must not be used."""
    raise AssertionError(f"{path}: decoded from its start")


@pytest.mark.parametrize("codec", [{"bf": "3"}, {"bf": "3", "g": "250"}, {"codec": "libsvtav1", "preset": "11"}])
def test_short_clip_needs_no_sequential_decode(tmp_path, monkeypatch, codec):
    """Also if the last wanted frame is decoded before another wanted one."""
    monkeypatch.setattr("senticlip.data.decode.Sequential", no_sequential_decode)
    for length in range(12, 26):
        path = write(tmp_path / f"{length}.mp4", stamps=list(range(length)), **codec)
        for m in (3, 16):
            numbers = [read_number(p) for p in read_frames(path, m).pixels]
            assert numbers == sorted({int((i + 0.5) * length / m) for i in range(m)})


def test_resize_of_no_frames_and_to_same_size():
    assert resize(np.zeros((0, 3, 5, 5), np.uint8), 8).shape == (0, 3, 8, 8)
    same = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(1, 3, 8, 8)
    assert np.array_equal(resize(same, 8).numpy(), same)


@settings(max_examples=40)
@given(st.integers(1, 90), st.integers(0, 60), st.integers(1, 90), st.integers(0, 9))
def test_resize_matches_pil(height, extra_width, size, seed):
    """On wide noise, the worst case (for tall noise, newer versions of Pillow differ, see ``resize``)."""
    width = height + extra_width
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    ours = resize(image.transpose(2, 0, 1)[None], size)
    assert ours.dtype == torch.uint8
    pil = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    assert np.abs(ours[0].permute(1, 2, 0).numpy().astype(int) - pil).max() <= 1
    from_list = resize([image.transpose(2, 0, 1)] * 2, size)
    assert torch.equal(from_list[1], ours[0])


def bad_files(folder: Path) -> dict[str, Path]:
    good = write(folder / "good.mp4", sound=True)
    data = good.read_bytes()
    files = {"missing": folder / "none.mp4", "folder": folder}
    for name, content in {
        "empty": b"",
        "cut off before the index": data[: len(data) // 2],
        "text": "这不是视频".encode() * 100,
        "zeros": bytes(5000),
        "picture data lost": data.replace(data[60 : len(data) // 2], b"", 1)[: len(data) // 2],
    }.items():
        files[name] = folder / f"{name}.mp4"
        files[name].write_bytes(content)
    files["plain text"] = folder / "notes.txt"
    files["plain text"].write_text("hello\n" * 50)
    files["sound alone"] = folder / "sound.wav"
    with av.open(str(files["sound alone"]), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
    files["no frames"] = remux(good, folder / "zero.mp4", keep=lambda packet: False)
    return files


def test_bad_files_give_one_line_errors(tmp_path, capfd):
    for name, path in bad_files(tmp_path).items():
        for function in (read_frames, probe):
            with pytest.raises(UserError) as error:
                function(path)
            assert error.value.code == (1 if path.is_file() else 2), name
            assert str(path) in str(error.value), name
            assert "\n" not in str(error.value), name
    assert capfd.readouterr().err == ""


def test_invalid_paths_have_specific_errors(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, message in (
        ("none.mp4", "no such video file — check the path$"),
        (".", r"check the path \(a folder\)"),
        ("pipe.mp4", "a pipe or a device, not a video file — write it to a file first"),
        ("https://x.org/a.mp4", "URLs must be downloaded first"),
        ("C:/a.mp4", "no such video file — check the path$"),
    ):
        with pytest.raises(UsageError, match=message):
            read_frames(tmp_path / name)

    def deny(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "is_file", deny)  # patched, since root is never denied access
    with pytest.raises(UserError, match=r"permission denied\) — ask its owner"):
        read_frames(tmp_path / "hidden" / "a.mp4")


def test_invalid_segments(tmp_path):
    path = write(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="before its start"):
        read_frames(path, 6, 2.0, 1.0)
    with pytest.raises(UserError, match="ends at"):
        read_frames(path, 6, 5.0, 6.0)
    with pytest.raises(UserError, match="starts at -3 s, before the video"):
        read_frames(path, 6, -3.0, 1.0)
    with pytest.raises(UsageError, match="at least 1"):
        read_frames(path, 0)
    # a subtitle may end a little after the film
    assert len(read_frames(path, 2, 2.0, 9.0).pixels) == 2
    assert len(read_frames(path, times=[]).pixels) == 0


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_truncated_file_gives_its_remaining_frames(tmp_path, name):
    path = write(tmp_path / name, container={"movflags": "faststart"} if name == "a.mp4" else None)
    frames = all_frames(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    result = read_frames(path, 6)
    numbers = [read_number(p) for p in result.pixels]
    assert 2 <= len(numbers) <= 6
    assert numbers == [number_at(frames, t + 1e-3) for t in result.times]
    assert ("cut off" in (probe(path).problem or "")) == (name != "a.ts")  # an MPEG-TS header states no duration
    if name == "a.mp4":
        with pytest.raises(UserError, match="ends at"):
            read_frames(path, 2, 2.2, 2.3)


def test_trimmed_clip_ends_at_its_edit(tmp_path):
    path = write_edited(tmp_path, (600, 5), bf="3", g="60")
    assert probe(path).duration == pytest.approx(0.6)
    assert [read_number(p) for p in read_frames(path, 6).pixels] == [6, 8, 11, 13, 16, 18]


def test_late_first_frame_is_not_truncation(tmp_path):
    """Matroska stores when a track ends, not how long it is."""
    for stamps, sound in ((range(25, 85), True), (range(2500, 2560), False)):
        path = write(tmp_path / "a.mkv", stamps=list(stamps), sound=sound, bf="3")
        assert probe(path).problem is None


def test_end_of_large_file_without_timestamps(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "SMALL_FILE_BYTES", 0)
    path = write(tmp_path / "a.mpg", bf="3")
    assert probe(path).duration == pytest.approx(2.4, abs=0.1)
    assert len(read_frames(path, 6).pixels) == 6


def test_timestamps_that_jump_are_an_error(tmp_path):
    first, second = write(tmp_path / "a.ts"), write(tmp_path / "b.ts", container={"output_ts_offset": "36000"})
    (tmp_path / "c.ts").write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(UserError, match=r"its timestamps jump by 3599\d\.\d s, as in joined files"):
        probe(tmp_path / "c.ts")


@pytest.mark.parametrize("small_file", [1 << 24, 0])
def test_long_still_does_not_change_the_end(tmp_path, monkeypatch, small_file):
    """In MP4, a packet lasts until the next frame is decoded; with B-frames, that is not the next one shown."""
    monkeypatch.setattr(decode, "SMALL_FILE_BYTES", small_file)
    stamps = [*range(20), *range(320, 331)]  # one frame is shown for 12 s
    path = write(tmp_path / "a.mp4", stamps=stamps, g="99", **{"x264-params": "bframes=3:b-adapt=0"})
    assert probe(path).duration == pytest.approx(331 / 25, abs=0.1)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_default_track_is_read(tmp_path, suffix):
    with av.open(str(tmp_path / f"a{suffix}"), "w") as out:
        tracks = [out.add_stream("mpeg4", rate=25) for _ in range(2)]
        for i, track in enumerate(tracks):
            track.width, track.height, track.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            track.disposition = Disposition.default if i else Disposition(0)
        for frame in range(25):
            for i, track in enumerate(tracks):
                image = av.VideoFrame.from_ndarray(picture(frame + 100 * i), "rgb24")
                image.pts, image.time_base = frame, Fraction(1, 25)
                out.mux(track.encode(image))
        for track in tracks:
            out.mux(track.encode(None))
    assert [read_number(p) >= 100 for p in read_frames(tmp_path / f"a{suffix}", 3).pixels] == [True] * 3


def test_damaged_bytes_cost_only_the_frames_they_hit(tmp_path):
    path = write(tmp_path / "a.mkv")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    path.write_bytes(data)
    result = read_frames(path, 6)
    assert 3 <= len(result.pixels) <= 6
    assert [read_number(p) for p in result.pixels[:3]] == [round(t * 25) for t in result.times[:3]]


def test_segment_may_start_until_last_frame_ends(tmp_path):
    path = write_delayed(tmp_path)  # pictures from 0.8 to 2.4 s
    assert video_problems(Clip("a", path, start=2.3)) == []
    assert video_problems(Clip("a", path, start=2.45)) == [f"{path} ends at 2.40 s, before the segment starts"]


def test_cover_art_is_not_video(tmp_path):
    """As in most music files."""
    with av.open(str(tmp_path / "song.mp3"), "w") as out:
        sound, cover = out.add_stream("mp3", rate=16000, layout="mono"), out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 64, 48, "yuvj420p", Disposition.attached_pic
        out.mux(cover.encode(av.VideoFrame(64, 48, "yuvj420p")))
        out.mux(cover.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        out.mux(sound.encode(silence))
        out.mux(sound.encode())
    with pytest.raises(UserError, match=r"no video in this file \(it contains: audio, cover art\)"):
        read_frames(tmp_path / "song.mp3")
