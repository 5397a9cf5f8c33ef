"""MP4 files with an edit list, as cuts without re-encoding leave them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path


def with_edits(source: Path, path: Path, edits: list[tuple[int, int]]) -> Path:
    """A copy of an MP4 whose index lies behind its data, with other edits of its video.

    Args:
        source: what PyAV wrote.
        path: the copy.
        edits: milliseconds that are shown, and the time of the first in units of the track (−1: nothing is shown).
    """
    data = bytearray(source.read_bytes())
    (movie, _), (track, _), (head, length) = _box(data, b"moov", b"trak", b"tkhd")
    at, old = head + length, 0
    if data[at + 4 : at + 8] == b"edts":
        old = struct.unpack_from(">I", data, at)[0]
    entries = b"".join(struct.pack(">IiI", shown, first, 1 << 16) for shown, first in edits)
    table = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    data[at : at + old] = struct.pack(">I4s", 8 + len(table), b"edts") + table
    for box in (movie, track):
        struct.pack_into(">I", data, box, struct.unpack_from(">I", data, box)[0] + 8 + len(table) - old)
    total = sum(shown for shown, _ in edits)
    struct.pack_into(">I", data, _box(data, b"moov", b"mvhd")[-1][0] + 24, total)
    struct.pack_into(">I", data, head + 28, total)
    path.write_bytes(data)
    return path


def _box(data: bytes, *names: bytes) -> list[tuple[int, int]]:
    """Begin and length of nested boxes, the first of each name."""
    found, begin, end = [], 0, len(data)
    for name in names:
        place = next((at, size) for at, size, kind in _boxes(data, begin, end) if kind == name)
        found.append(place)
        begin, end = place[0] + 8, sum(place)
    return found


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    while at < end:
        size, kind = struct.unpack_from(">I4s", data, at)
        yield at, size, kind
        at += size
