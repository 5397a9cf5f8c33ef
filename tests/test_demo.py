"""What ``senticlip demo`` is beside its parts, which have tests of their own."""

import pytest

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


@pytest.mark.parametrize(("terminal", "watched"), [(True, True), (False, False)], indirect=["terminal"])
def test_the_making_of_clips_is_shown_to_who_watches(tmp_path, monkeypatch, terminal, watched):
    def make(*args, progress, **options):
        progress(30, 1080)
        raise Enough

    monkeypatch.setattr("senticlip.demo.make", make)
    with pytest.raises(Enough):
        demo(tmp_path / "out")
    assert ("clips" in terminal.getvalue() and "30/1080" in terminal.getvalue()) == watched
