"""Settings for all tests: reproducible hypothesis examples and floating-point sums, and a cache folder per test."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums over more threads differ in their last bit

import io

import pytest
from hypothesis import settings
from rich.console import Console

# derandomize: examples are derived from the test, not from a random seed
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SENTICLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def terminal(request, monkeypatch):
    """The output of progress bars: on a terminal or, parametrized with False, in a log file."""
    output, interactive = io.StringIO(), getattr(request, "param", True)
    console = Console(file=output, force_terminal=interactive, force_interactive=interactive, width=100)
    monkeypatch.setattr("senticlip.progress.console", console)
    return output
