"""Every frame that is asked for by time is the one a full sequential decode shows then, on a zoo of made files."""

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
from senticlip.data.video import VideoReader, faults, probe, read_frames, resize
from senticlip.explain import _pictures
from senticlip.structures import Clip, UsageError, UserError

WIDTH, HEIGHT, BITS = 96, 64, 8


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A frame that says its number in 8 black and white bars, below them moving noise, red at the top left."""
    image = np.full((height, width, 3), 90, np.uint8)
    for bit in range(BITS):
        bar = slice(bit * width // BITS, (bit + 1) * width // BITS)
        image[height // 4 : 3 * height // 4, bar] = 255 * (number >> bit & 1)
    image[3 * height // 4 :, (number * 5) % width :] = 200
    image[: height // 4, : width // 4] = (230, 20, 20)
    return image


def number(pixels: np.ndarray) -> int:
    """The number that a frame 3×H×W says."""
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
    pixel: Fraction | None = None,
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
        if pixel is not None:
            stream.codec_context.sample_aspect_ratio = pixel
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


def late_edit(folder: Path) -> Path:
    """An edit list that begins in the middle of a group of pictures."""
    return remux(write(folder / "whole.mp4"), folder / "edit.mp4", shift=-17 * 512)


def edited(folder: Path, *edits: tuple[int, int], **options: str) -> Path:
    """Milliseconds shown, each from a frame's number on (−1: nothing is shown)."""
    begin = 1024 if options.get("bf") else 0  # B-frames: the first is shown two frames after it is decoded
    places = [(shown, frame if frame < 0 else begin + 512 * frame) for shown, frame in edits]
    return with_edits(write(folder / "whole.mp4", **options), folder / "edited.mp4", places)


def delayed(folder: Path) -> Path:
    """The pictures begin 0.8 s after the sound."""
    return write(folder / "delayed.mp4", stamps=list(range(20, 60)), sound=True)


def packed(folder: Path) -> Path:
    """Each B-frame lies in the packet of the frame before it; a frame that is not coded fills its own place."""

    def marked(data: bytes) -> bytes:
        return re.sub(rb"Lavc[\d.]+", b"DivX503b1393p", data)

    source = write(folder / "plain.avi", codec="mpeg4", bf="1")
    with av.open(str(source)) as old, av.open(str(folder / "packed.avi"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        stream.codec_context.extradata = marked(old.streams.video[0].codec_context.extradata)
        packets = [packet for packet in old.demux(video=0) if packet.dts is not None]
        is_b = [(bytes(packet).rpartition(b"\0\0\1\xb6")[2] + b"\0")[0] >> 6 == 2 for packet in packets] + [False]
        for i, packet in enumerate(packets):
            data = b"\0\0\1\xb6\x50\0" if is_b[i] else bytes(packet)
            joined = av.Packet(marked(data + (bytes(packets[i + 1]) if is_b[i + 1] else b"")))
            joined.stream, joined.time_base, joined.is_keyframe = stream, packet.time_base, packet.is_keyframe
            joined.pts = joined.dts = packet.dts
            new.mux(joined)
        assert sum(is_b) > 20
    return folder / "packed.avi"


ZOO = {
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
    "edit list": late_edit,
    "trimmed at its end": lambda d: edited(d, (600, 5), bf="3"),
    "trimmed at its end, no B-frames": lambda d: edited(d, (600, 5), bf="0", g="60"),
    "cut in the middle": lambda d: edited(d, (800, 0), (800, 35), bf="3"),
    "two pieces in another order": lambda d: edited(d, (1000, 30), (1000, 5), bf="3"),
    "a piece three times": lambda d: edited(d, (800, 10), (800, 10), (800, 10)),
    "nothing at first": lambda d: edited(d, (500, -1), (1000, 7), bf="3"),
    "pictures after the sound": delayed,
    "fragments, no index": lambda d: write(d / "a.mp4", container={"movflags": "frag_keyframe+empty_moov"}),
    "matroska without index": lambda d: write(d / "a.mkv", bf="2", container={"live": "1"}),
    "transport stream": lambda d: write(d / "a.ts", bf="2"),
    "flash": lambda d: write(d / "a.flv", bf="2"),
    "MPEG-2": lambda d: write(d / "a.mpg", codec="mpeg2video", bf="2"),
    "MPEG-4 in AVI (no presentation times)": lambda d: write(d / "a.avi", codec="mpeg4", bf="2"),
    "MPEG-4 in AVI, B-frames packed as Xvid does": packed,
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


@pytest.fixture(scope="module", params=ZOO)
def animal(request, tmp_path_factory) -> tuple[Path, list[tuple[float, int]]]:
    path = ZOO[request.param](tmp_path_factory.mktemp("zoo"))
    return path, sequential(path)


def sequential(path: Path) -> list[tuple[float, int]]:
    """(time, number) of every frame, decoded from the start; where one has no time, they are counted at 25 a second."""
    with av.open(str(path)) as container:
        zero, frames, told = float(Fraction(container.start_time or 0, 10**6)), [], True
        for frame in container.decode(video=0):
            told = told and frame.pts is not None
            frames.append((float((frame.pts or 0) * frame.time_base) - zero, number(rgb(frame))))
    if not told or any(one[0] > two[0] for one, two in pairwise(frames)):  # what falls is no presentation time
        return [(i / 25, said) for i, (_, said) in enumerate(frames)]
    return frames


def rgb(frame: av.VideoFrame) -> np.ndarray:
    return frame.to_ndarray(format="rgb24").transpose(2, 0, 1)


def shown(frames: list[tuple[float, int]], time: float) -> int:
    return [n for t, n in frames if t <= time + 2e-6][-1] if time >= frames[0][0] else frames[0][1]


def middles(frames: list[tuple[float, int]]) -> list[float]:
    """Times that are not at the border of two frames."""
    ends = [t for t, _ in frames[1:]] + [frames[-1][0] + 0.03]
    return [t + (end - t) * x for (t, _), end in zip(frames, ends, strict=True) for x in (0.1, 0.5, 0.9)]


def test_any_times_in_any_order(animal):
    path, frames = animal
    times = random.Random(0).sample(middles(frames), 3 * len(frames))[:50]
    got = read_frames(path, times=times)
    assert [number(p) for p in got.pixels] == [shown(frames, t) for t in times]
    assert all(got.times[i] <= t + 1e-3 or t < frames[0][0] + 1e-3 for i, t in enumerate(times))


@pytest.mark.parametrize("near", [0, 20])
def test_one_frame_at_a_time(animal, near, monkeypatch):
    """Forwards with one reader, jumping about with one reader; with every jump sought and with every jump read."""
    monkeypatch.setattr("senticlip.data.decode.NEAR", max(near, 0.01))
    path, frames = animal
    times = middles(frames)[::2]
    with VideoReader(path) as reader:
        assert [number(reader.read(times=[t]).pixels[0]) for t in times] == [shown(frames, t) for t in times]
        random.Random(2).shuffle(times)
        times = times[:20]
        assert [number(reader.read(times=[t]).pixels[0]) for t in times] == [shown(frames, t) for t in times]


@pytest.mark.parametrize("m", [1, 6, 200])
def test_evenly_spaced(animal, m):
    path, frames = animal
    with VideoReader(path) as reader:
        first, duration = float(reader._start), reader.duration
    got = read_frames(path, m)
    expected = [shown(frames, first + (i + 0.5) * duration / m) for i in range(m)]
    if m < 200:
        assert [number(p) for p in got.pixels] == [each for each, _ in groupby(expected)]
    assert len(got.pixels) == len(got.times) <= min(m, len(frames))
    assert np.all(np.diff(got.times) > 0)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
def test_a_picture_that_is_refreshed_bit_by_bit_is_whole(tmp_path, kind):
    """Its "keyframes" are not: no frame may be taken before all of it has come, whatever FFmpeg calls recovered."""
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
        wanted = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    with VideoReader(path) as reader:
        times = [reader._seconds(reader._decoder.first) + (i + 0.5) / 10 for i in range(0, 200, 7)]
    for i, time in zip(range(0, 200, 7), times, strict=True):
        assert np.array_equal(read_frames(path, times=[time]).pixels[0].transpose(1, 2, 0), wanted[i]), i


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("plain") / "3s.mp4", 90, 0, seconds=3)


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 12), ends=st.tuples(st.integers(0, 2999), st.integers(0, 4000)).filter(lambda e: e[0] < e[1]))
def test_any_number_of_frames_of_any_piece(plain, m, ends):
    """The frames shown at t_i = start + (i + ½)·T/m, of 30 that are shown for a tenth of a second each."""
    start, end = Fraction(ends[0], 1000), Fraction(ends[1], 1000)
    times = [start + (i + Fraction(1, 2)) * (min(end, 3) - start) / m for i in range(m)]
    shown_at = sorted({int(time * 10) / 10 for time in times})
    assert read_frames(plain, m, ends[0] / 1000, ends[1] / 1000).times == pytest.approx(shown_at)


def test_pieces_in_order(animal):
    path, frames = animal
    first, last = frames[0][0], frames[-1][0]
    pieces = [(first + i * (last - first) / 7, first + (i + 1) * (last - first) / 7) for i in range(7)]
    with VideoReader(path) as reader:
        for start, end in pieces:
            got = reader.read(3, start, end)
            assert {number(p) for p in got.pixels} == {
                shown(frames, start + (i + 0.5) * (end - start) / 3) for i in range(3)
            }


def test_the_duration_is_that_of_the_pictures(animal):
    path, frames = animal
    info = probe(path)
    assert info.problem is None
    assert info.duration == pytest.approx(frames[-1][0] - frames[0][0] + 0.04, abs=0.25)


def test_a_clock_that_goes_back_is_told(tmp_path):
    """As in recordings that were joined as they are: half of them would never be seen."""
    one = write(tmp_path / "one.ts")
    (tmp_path / "two.ts").write_bytes(2 * one.read_bytes())
    assert len(read_frames(one).pixels) == 6
    with pytest.raises(UserError, match=r"two\.ts: its timestamps go back by 2\.\d s, as in joined files"):
        read_frames(tmp_path / "two.ts")


def test_what_is_shown_before_the_first_picture_comes_does_not_count(tmp_path):
    """AVI's first frame of MPEG-4 with B-frames comes one late."""
    info = probe(write(tmp_path / "a.avi", codec="mpeg4", bf="2"))
    assert (info.start, info.duration) == (pytest.approx(0.04), pytest.approx(60 / 25))


def test_a_codec_without_a_decoder_is_one_line(tmp_path):
    path = write(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    for ask in (probe, read_frames):
        with pytest.raises(UserError, match=r"a\.mp4: no decoder for its video"):
            ask(path)


@pytest.mark.parametrize("short", [1 << 24, 0])
def test_one_frame_a_second_with_b_frames(tmp_path, monkeypatch, short):
    """The first packets after a seek in Matroska have no decoding times: how late may a frame still come?"""
    monkeypatch.setattr("senticlip.data.decode.SHORT", short)
    path = write(tmp_path / "a.mkv", stamps=list(range(60)), base=Fraction(1), **{"x264-params": "bframes=3:b-adapt=0"})
    with VideoReader(path) as reader:
        for i in range(0, 57, 3):  # in rising pieces, as a film is read
            assert [number(each) for each in reader.read(3, i, i + 3).pixels] == [i, i + 1, i + 2]
    assert [number(read_frames(path, times=[i + 0.5]).pixels[0]) for i in range(60)] == list(range(60))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotated(tmp_path, degrees):
    """Phones store the picture as the sensor saw it, and how to turn it."""
    plain = read_frames(write(tmp_path / "a.mp4", qp="0"), 3).pixels  # lossless: x264 varies a little
    turned = read_frames(write(tmp_path / "b.mp4", rotation=degrees, qp="0"), 3).pixels
    with av.open(str(tmp_path / "b.mp4")) as container:
        said = next(container.decode(video=0)).rotation
    assert said % 360 == degrees
    # FFmpeg's rotation is counterclockwise, as numpy's is
    assert np.array_equal(turned, np.rot90(plain, degrees // 90, axes=(2, 3)))
    assert probe(tmp_path / "b.mp4").aspect == turned.shape[3] / turned.shape[2]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_photo_turned_by_its_exif(tmp_path, orientation):
    told = Image.Exif()
    told[0x0112] = orientation
    Image.fromarray(picture(1)).save(tmp_path / "a.jpg", exif=told, quality=100, subsampling=0)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))).transpose(2, 0, 1)
    assert np.abs(read_frames(tmp_path / "a.jpg", 1).pixels[0].astype(int) - wanted).mean() < 1


@pytest.mark.parametrize("size", [(96, 64), (96, 96)])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_pixels_that_are_no_squares(tmp_path, degrees, size):
    path = write(tmp_path / "a.mp4", rotation=degrees, pixel=Fraction(4, 3), size=size)
    aspect = (size[0] * 4 / (size[1] * 3)) ** (-1 if degrees % 180 else 1)
    assert probe(path).aspect == pytest.approx(aspect)
    assert _pictures(path, [0.0])[0].size == (pytest.approx(256 * aspect, abs=0.5), 256)


def test_mirrored(tmp_path):
    path = write(tmp_path / "a.mp4", rotation=0)
    plain = read_frames(path, 2).pixels
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the matrix of the track: its first number is 1.0
    assert data[at : at + 4] == (1 << 16).to_bytes(4, "big")
    data[at : at + 4] = (-(1 << 16) & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(data)
    assert np.array_equal(read_frames(path, 2).pixels, plain[..., ::-1])


def test_huge(tmp_path):
    path = write(tmp_path / "a.mp4", stamps=[0, 1], size=(7680, 4320), preset="ultrafast", codec="libx264")
    got = read_frames(path, 2, size=224)
    assert got.pixels.shape == (2, 3, 224, 224)
    assert [number(p) for p in got.pixels] == [0, 1]
    assert probe(path).aspect == 7680 / 4320


def test_pictures_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    large = Image.new("1", (12000, 12000))
    large.save(tmp_path / "a.png")
    large.save(tmp_path / "a.apng", format="PNG", save_all=True, append_images=[ImageOps.invert(large)])
    for name in ("a.png", "a.apng"):
        for ask in (probe, read_frames):
            with pytest.raises(
                UserError, match=rf"{name}: its pictures are .* too large — .* at most 134 million pixels"
            ):
                ask(tmp_path / name)
    small, larger = (write(tmp_path / f"{width}.h264", size=(width, 64), stamps=list(range(5))) for width in (96, 192))
    both = tmp_path / "both.h264"
    both.write_bytes(small.read_bytes() + larger.read_bytes())
    assert {frame.width for frame in decoded(both)} == {96, 192}
    monkeypatch.setattr(sequential_module, "MOST_PIXELS", 10_000)
    assert {frame.width for frame in decoded(both)} == {96}
    with pytest.raises(UserError, match=r"192\.h264: pictures of 192 x 64 pixels — reduce them to at most"):
        read_frames(larger)


def decoded(path: Path) -> list[av.VideoFrame]:
    container, stream = sequential_module.open_video(path)
    with container:
        return list(sequential_module.pictures(container, stream))


def test_a_name_is_no_pattern_of_other_names(tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(tmp_path / "x1.png")
    Image.new("RGB", (WIDTH, HEIGHT), "blue").save(tmp_path / "x%d.png")
    assert read_frames(tmp_path / "x%d.png", 1).pixels[0, :, 0, 0].tolist() == [0, 0, 255]
    assert len(read_frames(write(tmp_path / "a%d.mp4"), 3).pixels) == 3


def test_a_long_film_is_not_decoded(tmp_path, monkeypatch):
    """Six frames of twenty minutes: at most a group of pictures each, and 40 lines in order no group twice."""
    monkeypatch.setattr("senticlip.data.decode.Sequential", never)
    path = write(tmp_path / "film.mp4", stamps=list(range(0, 1200 * 2)), base=Fraction(1, 2), g="20", bf="2")
    fed = []
    feed = Decoder._feed
    monkeypatch.setattr(Decoder, "_feed", lambda self, read, skip: fed.append(read.pts) or feed(self, read, skip))
    read_frames(path, 6)
    assert len(fed) <= 6 * 22
    fed.clear()
    with VideoReader(path) as reader:
        for i in range(40):
            reader.read(2, 100 + 5 * i, 103 + 5 * i)
    assert len(fed) <= 40 * 5 * 2 * 1.7


def never(path: Path) -> None:
    raise AssertionError(f"{path}: decoded from its start")


@pytest.mark.parametrize("codec", [{"bf": "3"}, {"bf": "3", "g": "250"}, {"codec": "libsvtav1", "preset": "11"}])
def test_a_short_clip_is_decoded_once(tmp_path, monkeypatch, codec):
    """Also where its last frame that is wanted is decoded before another one."""
    monkeypatch.setattr("senticlip.data.decode.Sequential", never)
    for length in range(12, 26):
        path = write(tmp_path / f"{length}.mp4", stamps=list(range(length)), **codec)
        for m in (3, 16):
            numbers = [number(p) for p in read_frames(path, m).pixels]
            assert numbers == sorted({int((i + 0.5) * length / m) for i in range(m)})


def test_size_and_no_frames():
    assert resize(np.zeros((0, 3, 5, 5), np.uint8), 8).shape == (0, 3, 8, 8)
    same = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(1, 3, 8, 8)
    assert np.array_equal(resize(same, 8).numpy(), same)


@settings(max_examples=40)
@given(st.integers(1, 90), st.integers(0, 60), st.integers(1, 90), st.integers(0, 9))
def test_resize_is_pils(height, more, size, seed):
    """On wide noise, the worst there is (tall noise may be squashed downwards first, see ``resize``)."""
    width = height + more
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    ours = resize(image.transpose(2, 0, 1)[None], size)
    assert ours.dtype == torch.uint8
    pil = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    assert np.abs(ours[0].permute(1, 2, 0).numpy().astype(int) - pil).max() <= 1
    listed = resize([image.transpose(2, 0, 1)] * 2, size)
    assert torch.equal(listed[1], ours[0])


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


def test_bad_files_are_one_line(tmp_path, capfd):
    for name, path in bad_files(tmp_path).items():
        for ask in (read_frames, probe):
            with pytest.raises(UserError) as told:
                ask(path)
            assert told.value.code == (1 if path.is_file() else 2), name
            assert str(path) in str(told.value), name
            assert "\n" not in str(told.value), name
    assert capfd.readouterr().err == ""


def test_what_is_no_file_is_told_apart(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, said in (
        ("none.mp4", "no such video file — check the path$"),
        (".", r"check the path \(a folder\)"),
        ("pipe.mp4", "a pipe or a device, not a video file — write it to a file first"),
        ("https://x.org/a.mp4", "URLs must be downloaded first"),
        ("C:/a.mp4", "no such video file — check the path$"),
    ):
        with pytest.raises(UsageError, match=said):
            read_frames(tmp_path / name)

    def denied(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "is_file", denied)  # who runs as root is denied nothing
    with pytest.raises(UserError, match=r"permission denied\) — ask its owner"):
        read_frames(tmp_path / "hidden" / "a.mp4")


def test_wrong_pieces(tmp_path):
    path = write(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="before its start"):
        read_frames(path, 6, 2.0, 1.0)
    with pytest.raises(UserError, match="ends at"):
        read_frames(path, 6, 5.0, 6.0)
    with pytest.raises(UserError, match="starts at -3 s, before the video"):
        read_frames(path, 6, -3.0, 1.0)
    with pytest.raises(UsageError, match="at least 1"):
        read_frames(path, 0)
    # a subtitle that stays a little longer than the film
    assert len(read_frames(path, 2, 2.0, 9.0).pixels) == 2
    assert len(read_frames(path, times=[]).pixels) == 0


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_a_file_that_was_cut_off_gives_what_is_there(tmp_path, name):
    path = write(tmp_path / name, container={"movflags": "faststart"} if name == "a.mp4" else None)
    whole = sequential(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    got = read_frames(path, 6)
    numbers = [number(p) for p in got.pixels]
    assert 2 <= len(numbers) <= 6
    assert numbers == [shown(whole, t + 1e-3) for t in got.times]
    assert ("cut off" in (probe(path).problem or "")) == (name != "a.ts")  # which promises nothing
    if name == "a.mp4":
        with pytest.raises(UserError, match="ends at"):
            read_frames(path, 2, 2.2, 2.3)


def test_a_clip_that_was_trimmed_ends_where_it_is_cut(tmp_path):
    path = edited(tmp_path, (600, 5), bf="3", g="60")
    assert probe(path).duration == pytest.approx(0.6)
    assert [number(p) for p in read_frames(path, 6).pixels] == [6, 8, 11, 13, 16, 18]


def test_pictures_that_begin_late_are_not_cut_off(tmp_path):
    """Matroska tells when a track ends, not how long it is."""
    for stamps, sound in ((range(25, 85), True), (range(2500, 2560), False)):
        path = write(tmp_path / "a.mkv", stamps=list(stamps), sound=sound, bf="3")
        assert probe(path).problem is None


def test_the_end_of_a_large_file_without_times(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "SHORT", 0)
    path = write(tmp_path / "a.mpg", bf="3")
    assert probe(path).duration == pytest.approx(2.4, abs=0.1)
    assert len(read_frames(path, 6).pixels) == 6


def test_a_clock_that_jumps_is_told(tmp_path):
    first, second = write(tmp_path / "a.ts"), write(tmp_path / "b.ts", container={"output_ts_offset": "36000"})
    (tmp_path / "c.ts").write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(UserError, match=r"its timestamps jump by 3599\d\.\d s, as in joined files"):
        probe(tmp_path / "c.ts")


@pytest.mark.parametrize("short", [1 << 24, 0])
def test_a_picture_that_stays_does_not_move_the_end(tmp_path, monkeypatch, short):
    """MP4 tells how long until the next picture is decoded, and with B-frames that is another one."""
    monkeypatch.setattr(decode, "SHORT", short)
    stamps = [*range(20), *range(320, 331)]  # 12 s of one picture
    path = write(tmp_path / "a.mp4", stamps=stamps, g="99", **{"x264-params": "bframes=3:b-adapt=0"})
    assert probe(path).duration == pytest.approx(331 / 25, abs=0.1)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_the_track_that_players_show_is_read(tmp_path, suffix):
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
    assert [number(p) >= 100 for p in read_frames(tmp_path / f"a{suffix}", 3).pixels] == [True] * 3


def test_damage_in_the_middle(tmp_path):
    """Broken bytes cost the frames they hit, not the clip."""
    path = write(tmp_path / "a.mkv")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    path.write_bytes(data)
    got = read_frames(path, 6)
    assert 3 <= len(got.pixels) <= 6
    assert [number(p) for p in got.pixels[:3]] == [round(t * 25) for t in got.times[:3]]


def test_a_piece_lies_in_a_video_until_its_last_picture_is_over(tmp_path):
    path = delayed(tmp_path)  # pictures from 0.8 to 2.4 s
    assert faults(Clip("a", path, start=2.3)) == []
    assert faults(Clip("a", path, start=2.45)) == [f"{path} ends at 2.40 s, before the segment starts"]


def test_a_cover_is_no_video(tmp_path):
    """As in most files of music."""
    with av.open(str(tmp_path / "song.mp3"), "w") as out:
        sound, cover = out.add_stream("mp3", rate=16000, layout="mono"), out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 64, 48, "yuvj420p", Disposition.attached_pic
        out.mux(cover.encode(av.VideoFrame(64, 48, "yuvj420p")))
        out.mux(cover.encode())
        quiet = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        quiet.sample_rate = 16000
        out.mux(sound.encode(quiet))
        out.mux(sound.encode())
    with pytest.raises(UserError, match=r"no video in this file \(it contains: audio, cover art\)"):
        read_frames(tmp_path / "song.mp3")
