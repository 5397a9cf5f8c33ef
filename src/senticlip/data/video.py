"""A clip, or a piece of a film → frames evenly spaced in time; also the properties of a video file."""

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
    """``pixels``: uint8 k×3×H×W as displayed (k×3×S×S if a size was given); ``times``: k, in seconds."""

    pixels: np.ndarray
    times: np.ndarray


class VideoInfo(NamedTuple):
    """The properties of a video file.

    The pictures begin at ``start`` on a player's clock and last ``duration`` (both in seconds). ``aspect``: displayed
    width / height. ``problem``: a line for the user if the file is shorter than its header says, else None.
    """

    start: float
    duration: float
    aspect: float
    has_audio: bool
    problem: str | None


class VideoReader:
    """An open video from which many pieces are read; fastest in increasing order of time.

    Time 0 is where a player shows 0:00 (the start of the file's first stream). A frame is shown from its own time until
    the next frame's; times before the first frame give the first, times after the last give the last.

    Raises:
        UsageError: on opening, if there is no such file. UserError: it is empty, no video, or has no frames.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._decoder = Decoder(self.path)
        tick, zero = self._decoder.tick, self._decoder.container.start_time
        start = (self._decoder.stream.start_time or 0) * tick
        # the container's start is in microseconds, the stream's in exact ticks: use the latter if both agree
        self._clock_zero = (
            start if zero is None or abs(Fraction(zero, 1_000_000) - start) < tick else Fraction(zero, 10**6)
        )
        self._start = max(start, self._decoder.first * tick, self._clock_zero) - self._clock_zero
        self._end = max(self._decoder.end * tick - self._clock_zero, self._start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.close()

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last frame present in the file."""
        return float(self._end - self._start)

    @property
    def aspect(self) -> float:
        """Displayed width / height of the first picture: pixels may not be square, and it may be rotated."""
        ((_, frame),) = self._decoder.frames([self._to_ticks(self._start)])
        aspect = frame.width * float(self._decoder.stream.sample_aspect_ratio or 1) / frame.height
        return 1 / aspect if frame.rotation % 180 else aspect

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
        wanted_times = list(times) if times is not None else self._evenly_spaced_times(frames, start, end)
        order = sorted(range(len(wanted_times)), key=wanted_times.__getitem__)
        stamps = [self._to_ticks(wanted_times[i]) for i in order]
        pixels: dict[int, np.ndarray] = {}
        shown: list[int] = [0] * len(wanted_times)
        shape: tuple[int, ...] = ()
        for i, (stamp, frame) in zip(order, self._decoder.frames(stamps), strict=True):
            shown[i] = stamp
            if stamp not in pixels:
                picture = upright(frame, shape if size is None else ())
                shape = shape or picture.shape
                pixels[stamp] = picture if size is None else resize(picture[None], size)[0].numpy()
        kept = shown if times is not None else sorted(pixels)
        empty = np.zeros((0, 3, size or 0, size or 0), np.uint8)
        stack = np.stack([pixels[stamp] for stamp in kept]) if kept else empty
        result = Frames(stack, np.array([self._to_seconds(stamp) for stamp in kept]))
        if cutaways == "drop":
            in_main_shot = main_shot(resize(without_bars(stack), GRID).numpy())
            result = Frames(stack[in_main_shot], result.times[in_main_shot])
        return result

    def _evenly_spaced_times(self, frames: int, start: float | None, end: float | None) -> list[Fraction]:
        """t_i = start + (i + ½)·T/m; a piece that extends beyond the video is cut at its end."""
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

    def _to_ticks(self, time: float | Fraction) -> int:
        """In ticks, plus a thousandth: otherwise, a time that was rounded down would miss the frame beginning there."""
        return floor((Fraction(time) + self._clock_zero) / self._decoder.tick + Fraction(1, 1000))

    def _to_seconds(self, stamp: int) -> float:
        return float(stamp * self._decoder.tick - self._clock_zero)


def read_frames(
    path: str | Path,
    frames: int = 6,
    start: float | None = None,
    end: float | None = None,
    times: Sequence[float] | None = None,
    size: int | None = None,
    cutaways: str = "keep",
) -> Frames:
    """The frames shown at t_i = (i + ½)·T/m (plus ``start``), where T is the duration of the clip or its piece.

    Args:
        path: any video file that FFmpeg reads.
        frames: m; if the piece has only k < m distinct frames, all k are returned.
        start: where the piece begins, in seconds on a player's clock; the start of the video if None.
        end: where the piece ends; the end of the video if None.
        times: use these times instead; one frame for each (before ``cutaways``), even if two show the same frame.
        size: squash each frame to size×size once decoded (so that 8K frames are never in memory together).
        cutaways: "drop" leaves out frames that are not of the clip's main shot, see ``cutaways.main_shot``.

    Raises:
        UserError: not a readable video, nothing in it decodes, or a piece beyond its end. From a truncated file, the
            frames that are present are returned (``probe(path).problem`` tells that it is truncated).
        UsageError: no such file, or fewer than one frame requested.
    """
    with VideoReader(path) as reader:
        reader._decoder.single_call = True
        return reader.read(frames, start, end, times, size, cutaways)


def resize(pixels: np.ndarray | Tensor | Sequence[np.ndarray], size: int) -> Tensor:
    """Squash uint8 frames k×3×H×W (or k of 3×H×W) to k×3×S×S: antialiased bicubic, horizontal pass first, as in PIL.

    Equal to PIL within 1/255 (in pure noise, one pixel in 100 000 is off by 2). If the height shrinks much more than
    the width, Pillow >= 13 does the vertical pass first; clipping in between then differs, in noise by up to 30.
    """
    import torch  # not at the top: slow, and ``data check`` does not need it

    if not len(pixels):
        return torch.zeros(0, 3, size, size, dtype=torch.uint8)
    if not isinstance(pixels, (np.ndarray, torch.Tensor)):
        return torch.cat([resize(frame[None], size) for frame in pixels])
    frames = torch.as_tensor(pixels)
    if min(frames.shape[-2:]) < size:
        # torch's 8-bit path is off by up to 2 when enlarging (coarse weights): use floats and PIL's two rounded passes
        for shape in ((frames.shape[-2], size), (size, size)):
            enlarged = torch.nn.functional.interpolate(frames.float(), shape, mode="bicubic", antialias=True)
            frames = enlarged.round().clamp(0, 255).byte()
    elif frames.shape[-2:] != (size, size):
        # channels_last selects the path that follows PIL, the fastest
        frames = frames.contiguous(memory_format=torch.channels_last)
        frames = torch.nn.functional.interpolate(frames, (size, size), mode="bicubic", antialias=True)
    return frames.contiguous()


def upright(frame: VideoFrame, shape: tuple[int, ...] = ()) -> np.ndarray:
    """A decoded frame as uint8 RGB 3×H×W (a view of H×W×3), rotated and mirrored according to its display matrix.

    ``shape``: the required 3×H×W; a frame of another size (some streams change it) is stretched to it.
    """
    a, b, c, d = 1, 0, 0, 1
    try:
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
        if matrix is not None:
            a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    except ValueError:  # PyAV does not know all side data, such as a photo's EXIF: counterclockwise quarter turns
        a, b = ((1, 0), (0, -1), (-1, 0), (0, 1))[round(frame.rotation / 90) % 4]
        c, d = -b, a
    transposed = abs(b) > abs(a)
    height, width = (shape[2:0:-1] if transposed else shape[1:]) if shape else (frame.height, frame.width)
    # starting threads takes as long as converting the frame
    rgb = frame.to_ndarray(format="rgb24", width=width, height=height, threads=1)
    if transposed:
        # a pixel at (x, y) is shown at (c·y, b·x)
        rgb, a, d = rgb.transpose(1, 0, 2), c, b
    rgb = rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(rgb).transpose(2, 0, 1)


def _truncation_problem(reader: VideoReader) -> str | None:
    """A line for the user if a file's header promises more pictures than are there."""
    stream, present, promised = reader._decoder.stream, reader.duration, 0.0
    if "matroska" in reader._decoder.container.format.name:  # streams have no duration, but a tag with their end
        present = float(reader._end + reader._clock_zero)
        if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
            promised = sum(float(part) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True))
    elif stream.duration:
        promised = float(stream.duration * reader._decoder.tick)
    if present >= promised - max(0.5, 2 / (stream.average_rate or stream.guessed_rate or 25)):
        return None
    return f"{reader.path}: cut off, {present:.1f} s of {promised:.1f} s are there — copy it again"


def probe(path: str | Path) -> VideoInfo:
    """Open a file, decode its first frame and find its last packet.

    Raises:
        UsageError: no such file. UserError: not a readable video, or nothing in it decodes.
    """
    with VideoReader(path) as reader:
        has_audio = bool(reader._decoder.container.streams.audio)
        return VideoInfo(float(reader._start), reader.duration, reader.aspect, has_audio, _truncation_problem(reader))


def video_problems(clip: Clip) -> list[str]:
    """Why a clip's video cannot be used or is incomplete: opens it, decodes its first frame and finds its end."""
    assert clip.video is not None
    try:
        info = probe(clip.video)
    except UserError as error:
        return [str(error)]
    if (clip.start or 0.0) >= info.start + info.duration:
        return [f"{clip.video} ends at {info.start + info.duration:.2f} s, before the segment starts"]
    return [info.problem] if info.problem else []
