"""The same examples in every run: hypothesis draws them from the test's name, not from the clock."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")
