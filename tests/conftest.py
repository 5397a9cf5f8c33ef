"""What holds for every test: the same examples and sums in every run, and no cache but its own."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums over more threads differ in their last bit

import pytest
from hypothesis import settings

# hypothesis draws from the test's name, not from the clock
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SENTICLIP_CACHE", str(tmp_path / "cache"))
