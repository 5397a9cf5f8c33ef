"""What ``senticlip demo`` is beside its parts, which have tests of their own."""

import io

import pytest
from rich.console import Console

from senticlip import progress
from senticlip.demo import demo
from senticlip.structures import UserError


class Enough(Exception):
    """Ends a demo before it trains."""


def test_one_demo_at_a_time_writes_into_a_folder(tmp_path, monkeypatch):
    def make(*args, **options):
        with pytest.raises(UserError, match=r"out: another demo is writing here — wait, or choose another --out"):
            demo(tmp_path / "out")
        raise Enough

    monkeypatch.setattr("senticlip.demo.make", make)
    for _ in range(2):  # the lock is open again
        with pytest.raises(Enough):
            demo(tmp_path / "out")


@pytest.mark.parametrize("watched", [True, False])
def test_the_making_of_clips_is_shown_to_who_watches(tmp_path, monkeypatch, watched):
    def make(*args, progress, **options):
        progress(30, 1080)
        raise Enough

    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr.isatty", lambda: watched, raising=False)
    monkeypatch.setattr(progress, "console", Console(file=shown, force_terminal=True, width=100))
    monkeypatch.setattr("senticlip.demo.make", make)
    with pytest.raises(Enough):
        demo(tmp_path / "out")
    assert ("clips" in shown.getvalue() and "30/1080" in shown.getvalue()) == watched
