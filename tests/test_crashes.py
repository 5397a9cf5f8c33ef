"""Clips that kill whoever decodes them, by decoders that kill themselves."""

import signal
from pathlib import Path

import pytest

from senticlip import crashes
from senticlip.structures import Clip

DIE = "import json, os, sys; pieces = json.loads(sys.argv[2]); {condition} and os.kill(os.getpid(), {number})"
CLIPS = {
    3: Clip("a", Path("a.mp4"), start=0.0, end=1.0),
    5: Clip("b", Path("a.mp4"), start=1.0, end=2.0),
    6: Clip("c", None, "好"),
    8: Clip("d", Path("b.mp4")),
}


@pytest.mark.parametrize(
    ("condition", "wanted"),
    [
        ("[1.0, 2.0] in pieces", {5}),
        ("[None, None] in pieces", {8}),
        ("len(pieces) > 1", {3, 5}),  # nobody knows which
        ("False", set()),
    ],
)
def test_the_piece_that_kills_is_found(monkeypatch, condition, wanted):
    monkeypatch.setattr(crashes, "_DECODE", DIE.format(condition=condition, number=9))
    assert crashes.deadly(CLIPS) == wanted


def test_pieces_that_are_slow_only_together_kill_nobody(monkeypatch):
    monkeypatch.setattr(crashes, "_DECODE", DIE.format(condition="len(pieces) > 1", number=signal.SIGALRM.value))
    assert crashes.deadly(CLIPS) == set()


def test_a_video_that_is_never_done_kills_too(tmp_path, monkeypatch):
    """Each piece has its own time: a film of many is no slower for it."""
    slow = """
import time
read_audio = lambda *_: None
read_frames = lambda video, _, start, end, size: time.sleep(start)
for"""
    monkeypatch.setattr(crashes, "DEADLINE", 1.5)
    monkeypatch.setattr(crashes, "_DECODE", crashes._DECODE.replace("\nfor", slow))
    pieces = [[(0.6, None)] * 4, [(0.0, None), (60.0, None)]]
    assert [crashes.kills(tmp_path / "a.mp4", each) for each in pieces] == [0, signal.SIGALRM]


def test_what_is_decoded_is_the_piece(tmp_path, monkeypatch):
    """The code of the process, with readers that write down what they are asked for."""
    asked = tmp_path / "asked"
    spies = f"""
def note(*arguments, **_):
    print(*arguments, file=open({str(asked)!r}, "a"))
    raise ValueError  # what fails does not end it
read_audio = read_frames = note
for"""
    monkeypatch.setattr(crashes, "_DECODE", crashes._DECODE.replace("\nfor", spies))
    assert not crashes.kills(Path("a.mp4"), [(None, None), (1.5, 2.0)])
    wanted = ["a.mp4 6 None None", "a.mp4 None None", "a.mp4 6 1.5 2.0", "a.mp4 1.5 2.0"]
    assert asked.read_text().splitlines() == wanted
