"""Finds clips whose decoding kills the process (a crashing codec, a picture larger than memory), in a subprocess."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from senticlip.structures import Clip

DEADLINE = 300.0
"""Time limit for a piece, in seconds; a slower one counts as killing the process."""

_DECODE_SCRIPT = """import json, os, signal, sys
from contextlib import suppress
from senticlip.data.audio import read_audio
from senticlip.data.video import read_frames
for start, end in json.loads(sys.argv[2]):
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[3]))
    with suppress(Exception):
        read_frames(sys.argv[1], 6, start, end, size=16)
    with suppress(Exception):
        read_audio(sys.argv[1], start, end)
os._exit(0)
"""

Piece = tuple[float | None, float | None]


def find_crashing_clips(clips: dict[int, Clip]) -> set[int]:
    """The keys of clips whose decoding kills a process: each video is decoded in its own, then, if that dies, each of
    its pieces."""
    pieces: dict[Path, dict[int, Piece]] = {}
    for key, clip in clips.items():
        if clip.video is not None:
            pieces.setdefault(clip.video, {})[key] = (clip.start, clip.end)
    deadly_keys: set[int] = set()
    for video, video_pieces in pieces.items():
        if killed_by := crash_signal(video, video_pieces.values()):
            alone = {
                key for key, piece in video_pieces.items() if len(video_pieces) == 1 or crash_signal(video, [piece])
            }
            # no piece dies alone: if a crash needs several, any may be to blame; if one was merely slow, none is
            deadly_keys |= alone or (set() if killed_by == signal.SIGALRM else video_pieces.keys())
    return deadly_keys


def crash_signal(video: Path, pieces: Collection[Piece]) -> int:
    """The signal that kills a process decoding these pieces of a video: SIGALRM if one takes over DEADLINE, 0 if none
    does."""
    command = [sys.executable, "-c", _DECODE_SCRIPT, str(video), json.dumps([*pieces]), str(DEADLINE)]
    return max(0, -subprocess.run(command, stderr=subprocess.DEVNULL).returncode)
