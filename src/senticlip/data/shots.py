"""A film without subtitles → pieces: windows of equal length, or its shots."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from math import ceil, inf
from pathlib import Path

import numpy as np

from senticlip.data.sequential import clock_start, decoded_frames, open_video
from senticlip.data.subtitles import Line
from senticlip.structures import UsageError, UserError

CHANGE = 0.12
"""A larger mean colour difference (of 0 … 1) is a cut, if it is also more than three times the median of the seconds
before: otherwise every hand-held camera would cause cuts."""

STEP, SHORTEST, LONGEST = 0.2, 0.6, 10.0
"""Seconds: between compared frames; of the shortest shot (the last may be shorter); of the longest piece of a shot."""

SHORTEST_WINDOW = 0.1
"""Seconds of the shortest window: shorter ones could outnumber the pictures of a film."""


def windows(duration: float, seconds: float = 5.0) -> list[Line]:
    """Windows of equal length, as close to ``seconds`` as fits ``duration``; their texts are empty.

    Raises:
        UsageError: ``seconds`` is below SHORTEST_WINDOW or not finite.
    """
    if not SHORTEST_WINDOW <= seconds < inf:
        raise UsageError(f"--seconds {seconds}: a window must be at least {SHORTEST_WINDOW} s long")
    return _equal_pieces(0.0, duration, max(1, round(duration / seconds)))


def _equal_pieces(start: float, end: float, count: int) -> list[Line]:
    """A part of a film in ``count`` equal pieces."""
    edges = [round(start + (end - start) * i / count, 3) for i in range(count + 1)]
    return [Line(first, last, "") for first, last in pairwise(edges) if last > first]


def shots(video: str | Path, end: float) -> list[Line]:
    """The shots of a film, cut where the picture changes abruptly; long shots are cut into equal pieces.

    Decodes the file once, without non-reference frames, and compares frames at 32×18 pixels.

    Args:
        video: any file that FFmpeg reads.
        end: end of the film, and so of its last shot, in seconds on a player's clock (the header may claim more).

    Raises:
        UserError: not a readable video, or one without times.
    """
    container, stream = open_video(video)
    clock_zero = clock_start(container)
    recent_changes: deque[float] = deque([0.0], maxlen=15)
    previous, times, previous_time = None, [0.0], 0.0
    stream.codec_context.skip_frame = "NONREF"
    with container:
        for frame in decoded_frames(container, stream):
            if frame.time is None:
                raise UserError(f"{video}: its pictures have no timestamps to cut at — leave out --cut shots")
            time = frame.time - clock_zero
            if previous is not None and time - previous_time < STEP:
                continue
            previous_time = time
            thumbnail = frame.reformat(32, 18, "rgb24").to_ndarray().astype(np.float32) / 255
            if previous is not None:
                change = float(np.abs(thumbnail - previous).mean())
                if change > max(CHANGE, 3 * float(np.median(recent_changes))) and time - times[-1] >= SHORTEST:
                    times.append(time)
                recent_changes.append(change)
            previous = thumbnail
    edges = pairwise([*(time for time in times if time < end), end])
    return [piece for start, end in edges for piece in _equal_pieces(start, end, max(1, ceil((end - start) / LONGEST)))]
