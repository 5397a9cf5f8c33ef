"""What holds for every test: the same examples and sums in every run, and no cache but its own."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums over more threads differ in their last bit

import io

import pytest
from hypothesis import settings
from rich.console import Console

# hypothesis draws from the test's name, not from the clock
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SENTICLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def terminal(request, monkeypatch):
    """What somebody sees who watches the progress bars; with False: who reads a log of them."""
    shown, watched = io.StringIO(), getattr(request, "param", True)
    console = Console(file=shown, force_terminal=watched, force_interactive=watched, width=100)
    monkeypatch.setattr("senticlip.progress.console", console)
    return shown
