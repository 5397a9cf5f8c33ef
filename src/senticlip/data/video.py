"""A clip, or a piece of a film → frames evenly spaced in time; and the properties of a video file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from av.video.frame import VideoFrame

from senticlip.data.cutaways import GRID, main_shot, without_bars
from senticlip.data.decode import Decoder
from senticlip.structures import Clip, UsageError, UserError

if TYPE_CHECKING:
    from torch import Tensor


class Frames(NamedTuple):
    """``pixels`` uint8 k×3×H×W as they are displayed (k×3×S×S if a size was asked for); ``times`` k, in seconds."""

    pixels: np.ndarray
    times: np.ndarray


class VideoInfo(NamedTuple):
    """The properties of a video file.

    The pictures begin at ``start`` on a player's clock and last ``duration`` (both in seconds); ``aspect``: width by
    height on a screen; ``problem``: a line for the user if the file is shorter than its header says, else None.
    """

    start: float
    duration: float
    aspect: float
    has_audio: bool
    problem: str | None


class VideoReader:
    """One open video that serves many pieces; those in increasing time order cost the least.

    Time 0 is where a player shows 0:00 (the start of the file's first stream). A frame is shown from its own time until
    the next frame's; before the first frame the first is taken, after the last the last.

    Raises:
        UserError: on opening, where the file is missing, empty, no video, or nothing of it can be decoded.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._decoder = Decoder(self.path)
        tick, zero = self._decoder.tick, self._decoder.container.start_time
        start = (self._decoder.stream.start_time or 0) * tick
        # the container's start is in microseconds, the stream's in its own unit: the exact one, where they agree
        self._zero = start if zero is None or abs(Fraction(zero, 1_000_000) - start) < tick else Fraction(zero, 10**6)
        self._start = max(start, self._decoder.first * tick, self._zero) - self._zero
        self._end = max(self._decoder.end * tick - self._zero, self._start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.close()

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last that is in the file."""
        return float(self._end - self._start)

    @property
    def aspect(self) -> float:
        """Width by height of the first picture on a screen: pixels may be no squares, and it may be turned."""
        ((_, frame),) = self._decoder.frames([self._stamp(self._start)])
        wide = frame.width * float(self._decoder.stream.sample_aspect_ratio or 1) / frame.height
        return 1 / wide if frame.rotation % 180 else wide

    def read(
        self,
        frames: int = 6,
        start: float | None = None,
        end: float | None = None,
        times: Sequence[float] | None = None,
        size: int | None = None,
        cutaways: str = "keep",
    ) -> Frames:
        """See :func:`read_frames`."""
        wanted = list(times) if times is not None else self._spaced(frames, start, end)
        order = sorted(range(len(wanted)), key=wanted.__getitem__)
        stamps = [self._stamp(wanted[i]) for i in order]
        pixels: dict[int, np.ndarray] = {}
        shown: list[int] = [0] * len(wanted)
        shape: tuple[int, ...] = ()
        for i, (stamp, frame) in zip(order, self._decoder.frames(stamps), strict=True):
            shown[i] = stamp
            if stamp not in pixels:
                picture = upright(frame, shape if size is None else ())
                shape = shape or picture.shape
                pixels[stamp] = picture if size is None else resize(picture[None], size)[0].numpy()
        keep = shown if times is not None else sorted(pixels)
        nothing = np.zeros((0, 3, size or 0, size or 0), np.uint8)
        stack = np.stack([pixels[stamp] for stamp in keep]) if keep else nothing
        found = Frames(stack, np.array([self._seconds(stamp) for stamp in keep]))
        if cutaways == "drop":
            stays = main_shot(resize(without_bars(stack), GRID).numpy())
            found = Frames(stack[stays], found.times[stays])
        return found

    def _spaced(self, frames: int, start: float | None, end: float | None) -> list[Fraction]:
        """t_i = start + (i + ½)·T/m; a piece that reaches beyond the video is cut at its end."""
        if frames < 1:
            raise UsageError(f"{self.path}: {frames} frames requested — request at least 1")
        first = self._start if start is None else Fraction(start)
        last = self._end if end is None else min(Fraction(end), self._end)
        if end is not None and end < first:
            raise UserError(f"{self.path}: the segment ends at {end} s, before its start {float(first)} s — swap them")
        if start is not None and start < 0:
            raise UserError(f"{self.path}: the segment starts at {start:g} s, before the video — start at 0")
        if start is not None and first >= self._end:
            raise UserError(f"{self.path}: no frame at {start:.2f} s — the video ends at {float(self._end):.2f} s")
        return [first + (2 * i + 1) * (last - first) / (2 * frames) for i in range(frames)]

    def _stamp(self, time: float | Fraction) -> int:
        """Plus a thousandth of a tick, or a time that was rounded down would miss the frame that begins there."""
        return floor((Fraction(time) + self._zero) / self._decoder.tick + Fraction(1, 1000))

    def _seconds(self, stamp: int) -> float:
        return float(stamp * self._decoder.tick - self._zero)


def read_frames(
    path: str | Path,
    frames: int = 6,
    start: float | None = None,
    end: float | None = None,
    times: Sequence[float] | None = None,
    size: int | None = None,
    cutaways: str = "keep",
) -> Frames:
    """The frames that are shown at t_i = (i + ½)·T/m, where T is the duration of the clip, or of the piece of it.

    Args:
        path: any video file that FFmpeg reads.
        frames: m; where the piece has fewer distinct frames, all of these k < m.
        start: where the piece begins, seconds (a player's clock); the start of the video if None.
        end: where it ends.
        times: these times instead, a frame for each (that stays), also where two of them show the same one.
        size: squash every frame to size×size as it comes (8K frames are then never together in memory).
        cutaways: "drop" leaves out the frames that are not of the clip's main shot, see ``cutaways.main_shot``.

    Raises:
        UserError: not a readable video; nothing in it decodes; a piece beyond its end. Of a file that was cut off you
            get the frames that are there (``probe(path).problem`` tells).
        UsageError: fewer than one frame asked for.
    """
    with VideoReader(path) as reader:
        reader._decoder.alone = True
        return reader.read(frames, start, end, times, size, cutaways)


def resize(pixels: np.ndarray | Tensor | Sequence[np.ndarray], size: int) -> Tensor:
    """Squash uint8 frames k×3×H×W (or k of 3×H×W) to k×3×S×S: antialiased bicubic, across and then down, as PIL does.

    Within 1/255 (in pure noise a pixel in 100 000 is off by 2). Where the height shrinks much more than the width,
    Pillow goes down first since version 13: what is clipped between the two steps differs then, in noise by up to 30.
    """
    import torch  # here, so that ``data check`` need not wait for it

    if not len(pixels):
        return torch.zeros(0, 3, size, size, dtype=torch.uint8)
    if not isinstance(pixels, (np.ndarray, torch.Tensor)):
        return torch.cat([resize(frame[None], size) for frame in pixels])
    frames = torch.as_tensor(pixels)
    if min(frames.shape[-2:]) < size:
        # enlarging, torch's 8-bit path is off by up to 2: its weights are coarse. In PIL's steps: across, round, down
        for shape in ((frames.shape[-2], size), (size, size)):
            wide = torch.nn.functional.interpolate(frames.float(), shape, mode="bicubic", antialias=True)
            frames = wide.round().clamp(0, 255).byte()
    elif frames.shape[-2:] != (size, size):
        # PIL's path for channels that lie side by side is the fastest
        frames = frames.contiguous(memory_format=torch.channels_last)
        frames = torch.nn.functional.interpolate(frames, (size, size), mode="bicubic", antialias=True)
    return frames.contiguous()


def upright(frame: VideoFrame, shape: tuple[int, ...] = ()) -> np.ndarray:
    """A decoded frame as uint8 RGB 3×H×W (a view of H×W×3), turned and mirrored as its display matrix says.

    ``shape``: the 3×H×W that it must have; a frame of another size (some streams change it) is stretched to it.
    """
    a, b, c, d = 1, 0, 0, 1
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
        if matrix is not None:
            a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    except ValueError:  # PyAV does not know all kinds of side data, such as a photo's EXIF: quarter turns to the left
        a, b = ((1, 0), (0, -1), (-1, 0), (0, 1))[round(frame.rotation / 90) % 4]
        c, d = -b, a
    turned = abs(b) > abs(a)
    height, width = (shape[2:0:-1] if turned else shape[1:]) if shape else (frame.height, frame.width)
    # starting threads takes as long as converting the frame
    rgb = frame.to_ndarray(format="rgb24", width=width, height=height, threads=1)
    if turned:
        # a pixel at (x, y) is shown at (c·y, b·x)
        rgb, a, d = rgb.transpose(1, 0, 2), c, b
    rgb = rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(rgb).transpose(2, 0, 1)


def _cut_off(reader: VideoReader) -> str | None:
    """A line for the user if a file's header tells of more pictures than are there."""
    stream, there, promised = reader._decoder.stream, reader.duration, 0.0
    if "matroska" in reader._decoder.container.format.name:  # no length for each stream, but its end in a tag
        there = float(reader._end + reader._zero)
        if told := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
            promised = sum(float(part) * unit for part, unit in zip(told.groups(), (3600, 60, 1), strict=True))
    elif stream.duration:
        promised = float(stream.duration * reader._decoder.tick)
    if there >= promised - max(0.5, 2 / (stream.average_rate or stream.guessed_rate or 25)):
        return None
    return f"{reader.path}: cut off, {there:.1f} s of {promised:.1f} s are there — copy it again"


def probe(path: str | Path) -> VideoInfo:
    """Open a file, decode its first frame and look for its last packet.

    Raises:
        UserError: not a readable video, or nothing in it decodes.
    """
    with VideoReader(path) as reader:
        has_audio = bool(reader._decoder.container.streams.audio)
        return VideoInfo(float(reader._start), reader.duration, reader.aspect, has_audio, _cut_off(reader))


def faults(clip: Clip) -> list[str]:
    """Why the video of a clip cannot be used, or is not all there: it is opened, decoded, and its end looked for."""
    assert clip.video is not None
    try:
        info = probe(clip.video)
    except UserError as error:
        return [str(error)]
    if (clip.start or 0.0) >= info.start + info.duration:
        return [f"{clip.video} ends at {info.start + info.duration:.2f} s, before the segment starts"]
    return [info.problem] if info.problem else []
