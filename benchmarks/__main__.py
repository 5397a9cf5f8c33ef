"""All speed benchmarks, one after the other: ``python -m benchmarks [--quick]``."""

from __future__ import annotations

from benchmarks import cache_build, decode, encode, long_video, resize, step, timing, whole_clip


def run(quick: bool) -> None:
    """Decoding first, training last."""
    for part in (decode, long_video, resize, encode, whole_clip, cache_build, step):
        part.run(quick)


if __name__ == "__main__":
    timing.main(run, __doc__)
