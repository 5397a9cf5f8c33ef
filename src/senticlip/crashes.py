"""Clips whose decoding kills the process (a codec that crashes, a picture larger than memory), found in another one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from senticlip.structures import Clip

DEADLINE = 300.0
"""Seconds that this process may take: a video that takes longer counts as one that kills it."""

_DECODE = """import json, sys
from contextlib import suppress
from senticlip.data.audio import read_audio
from senticlip.data.video import read_frames
for start, end in json.loads(sys.argv[2]):
    with suppress(Exception):
        read_frames(sys.argv[1], 6, start, end, size=16)
    with suppress(Exception):
        read_audio(sys.argv[1], start, end)
"""

Piece = tuple[float | None, float | None]


def deadly(clips: dict[int, Clip]) -> set[int]:
    """The keys of the clips whose decoding kills the process. Each video has one of its own, and then each piece."""
    pieces: dict[Path, dict[int, Piece]] = {}
    for key, clip in clips.items():
        if clip.video is not None:
            pieces.setdefault(clip.video, {})[key] = (clip.start, clip.end)
    found: set[int] = set()
    for video, of_it in pieces.items():
        if kills(video, of_it.values()):
            alone = {key for key, piece in of_it.items() if len(of_it) == 1 or kills(video, [piece])}
            found |= alone or of_it.keys()
    return found


def kills(video: Path, pieces: Collection[Piece]) -> bool:
    """Whether decoding pieces of a video kills the process, or takes longer than DEADLINE."""
    command = [sys.executable, "-c", _DECODE, str(video), json.dumps([*pieces])]
    try:
        return subprocess.run(command, stderr=subprocess.DEVNULL, timeout=DEADLINE).returncode < 0
    except subprocess.TimeoutExpired:
        return True
