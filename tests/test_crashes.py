"""Clips whose decoding kills the process; here, the decoding script kills itself."""

import signal
from pathlib import Path

import pytest

from senticlip import crashes
from senticlip.structures import Clip

CRASH = "import json, os, sys; pieces = json.loads(sys.argv[2]); {condition} and os.kill(os.getpid(), {number})"
CLIPS = {
    3: Clip("a", Path("a.mp4"), start=0.0, end=1.0),
    5: Clip("b", Path("a.mp4"), start=1.0, end=2.0),
    6: Clip("c", None, "好"),
    8: Clip("d", Path("b.mp4")),
}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("[1.0, 2.0] in pieces", {5}),
        ("[None, None] in pieces", {8}),
        ("len(pieces) > 1", {3, 5}),  # any of them may be to blame
        ("False", set()),
    ],
)
def test_deadly_clips_are_found(monkeypatch, condition, expected):
    monkeypatch.setattr(crashes, "_DECODE_SCRIPT", CRASH.format(condition=condition, number=9))
    assert crashes.find_crashing_clips(CLIPS) == expected


def test_pieces_that_are_slow_only_together_are_not_deadly(monkeypatch):
    monkeypatch.setattr(
        crashes, "_DECODE_SCRIPT", CRASH.format(condition="len(pieces) > 1", number=signal.SIGALRM.value)
    )
    assert crashes.find_crashing_clips(CLIPS) == set()


def test_endless_decoding_is_deadly(tmp_path, monkeypatch):
    """The deadline is per piece: a film with many pieces may take longer."""
    slow_readers = """
import time
read_audio = lambda *_: None
read_frames = lambda video, _, start, end, size: time.sleep(start)
for"""
    monkeypatch.setattr(crashes, "DEADLINE", 1.5)
    monkeypatch.setattr(crashes, "_DECODE_SCRIPT", crashes._DECODE_SCRIPT.replace("\nfor", slow_readers))
    pieces = [[(0.6, None)] * 4, [(0.0, None), (60.0, None)]]
    assert [crashes.crash_signal(tmp_path / "a.mp4", video_pieces) for video_pieces in pieces] == [0, signal.SIGALRM]


def test_pieces_are_decoded_as_requested(tmp_path, monkeypatch):
    """Runs the decoding script with readers that log their arguments."""
    log = tmp_path / "asked"
    spies = f"""
def note(*arguments, **_):
    print(*arguments, file=open({str(log)!r}, "a"))
    raise ValueError  # a piece that fails does not stop the script
read_audio = read_frames = note
for"""
    monkeypatch.setattr(crashes, "_DECODE_SCRIPT", crashes._DECODE_SCRIPT.replace("\nfor", spies))
    assert not crashes.crash_signal(Path("a.mp4"), [(None, None), (1.5, 2.0)])
    expected = ["a.mp4 6 None None", "a.mp4 None None", "a.mp4 6 1.5 2.0", "a.mp4 1.5 2.0"]
    assert log.read_text().splitlines() == expected
