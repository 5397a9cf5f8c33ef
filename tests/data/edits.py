"""MP4 files with an edit list, as cutting without re-encoding leaves them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path


def with_edits(source: Path, path: Path, edits: list[tuple[int, int]]) -> Path:
    """A copy of an MP4 file (with its index after its data) in which the edit list of the video track is replaced.

    Args:
        source: a file written by PyAV.
        path: where the copy is written.
        edits: for each, its duration in ms, and the time at which it starts in the track's units (−1 shows nothing).
    """
    data = bytearray(source.read_bytes())
    (movie, _), (track, _), (header, length) = _find_nested(data, b"moov", b"trak", b"tkhd")
    offset, old_size = header + length, 0
    if data[offset + 4 : offset + 8] == b"edts":
        old_size = struct.unpack_from(">I", data, offset)[0]
    entries = b"".join(struct.pack(">IiI", duration, media_time, 1 << 16) for duration, media_time in edits)
    table = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    data[offset : offset + old_size] = struct.pack(">I4s", 8 + len(table), b"edts") + table
    for box in (movie, track):
        struct.pack_into(">I", data, box, struct.unpack_from(">I", data, box)[0] + 8 + len(table) - old_size)
    total = sum(duration for duration, _ in edits)
    struct.pack_into(">I", data, _find_nested(data, b"moov", b"mvhd")[-1][0] + 24, total)
    struct.pack_into(">I", data, header + 28, total)
    path.write_bytes(data)
    return path


def _find_nested(data: bytes, *names: bytes) -> list[tuple[int, int]]:
    """Offset and size of nested boxes, the first of each name."""
    boxes, begin, end = [], 0, len(data)
    for name in names:
        box = next((offset, size) for offset, size, kind in _boxes_between(data, begin, end) if kind == name)
        boxes.append(box)
        begin, end = box[0] + 8, sum(box)
    return boxes


def _boxes_between(data: bytes, offset: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    while offset < end:
        size, kind = struct.unpack_from(">I4s", data, offset)
        yield offset, size, kind
        offset += size
