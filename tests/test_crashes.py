"""Clips that kill whoever decodes them, by decoders that kill themselves."""

from pathlib import Path

import pytest

from senticlip import crashes
from senticlip.structures import Clip

DIE = "import json, os, sys; pieces = json.loads(sys.argv[2]); {condition} and os.kill(os.getpid(), 9)"
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
    monkeypatch.setattr(crashes, "_DECODE", DIE.format(condition=condition))
    assert crashes.deadly(CLIPS) == wanted


def test_a_video_that_is_never_done_kills_too(tmp_path, monkeypatch):
    monkeypatch.setattr(crashes, "DEADLINE", 0.5)
    monkeypatch.setattr(crashes, "_DECODE", "import sys, time; time.sleep(60 * sys.argv[1].endswith('b.mp4'))")
    assert [crashes.kills(tmp_path / name, [(None, None)]) for name in ("a.mp4", "b.mp4")] == [False, True]


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
