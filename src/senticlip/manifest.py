"""A manifest (CSV, JSONL or Parquet; id, path, text or subtitles) → one Parquet file whose row groups are the work.

It is read as a stream: ten million rows take no more memory than a thousand. A worker opens the row group it was given.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from senticlip.answers import write_whole
from senticlip.structures import UsageError, UserError

COLUMNS = ("id", "path", "text", "subtitles", "start", "end")
SCHEMA = pa.schema([(name, pa.string()) for name in COLUMNS])
_ALIASES = {"video": "path", "file": "path", "video_path": "path", "subtitle": "subtitles", "sentence": "text"}


def split(manifest: Path, path: Path, rows: int) -> None:
    """Write the manifest to ``path`` in groups of ``rows`` rows.

    Raises:
        UsageError: no such manifest, or not one of the three kinds. UserError: it cannot be read, with the row.
    """

    def write(partial: Path) -> None:
        records = read(manifest)
        count = 0
        with pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
            while chunk := list(islice(records, rows)):
                writer.write_table(pa.Table.from_pylist(chunk, SCHEMA), row_group_size=rows)
                count += len(chunk)
        if not count:
            raise UserError(f"{manifest}: no rows — expected id, path, text or subtitles")

    write_whole(path, write)


def read(manifest: Path) -> Iterator[dict[str, str | None]]:
    """The rows of a manifest, one after the other: the columns COLUMNS, as text or None."""
    if not manifest.is_file():
        raise UsageError(f"{manifest}: no such manifest")
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    if manifest.suffix.lower() not in readers:
        raise UsageError(f"{manifest}: not a manifest — choose .csv, .jsonl or .parquet")
    for number, row in readers[manifest.suffix.lower()](manifest):
        said = {_ALIASES.get(name, name): value for name, value in row.items() if value not in (None, "")}
        if number is not None and not ({"path", "text"} & said.keys()):
            raise UserError(f"{manifest}, row {number}: neither path nor text")
        record = {name: str(said[name]) if name in said else None for name in COLUMNS}
        record["id"] = record["id"] or record["path"] or f"row {number}"
        yield record


def _csv(manifest: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with manifest.open(encoding=_encoding(manifest), newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if manifest.suffix.lower() == ".tsv" else ",")
        try:
            names = [name.strip().casefold() for name in reader.fieldnames or []]
            _known(manifest, names)
            reader.fieldnames = names
            for row in reader:
                row.pop(None, None)
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{manifest}, row {reader.line_num + 1}: not readable as CSV ({error})") from None


def _jsonl(manifest: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with manifest.open(encoding="utf-8-sig") as file:
        try:
            number = 0
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
                yield number, row
        except ValueError as error:
            raise UserError(f"{manifest}, row {number or 1}: not readable as JSON ({error})") from None


def _parquet(manifest: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(manifest)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{manifest}: not readable as Parquet ({' '.join(str(error).split())})") from None
    with file:
        _known(manifest, file.schema_arrow.names)
        names = [name for name in file.schema_arrow.names if _ALIASES.get(name, name) in COLUMNS]
        number = 0
        for batch in file.iter_batches(4096, columns=names):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _known(manifest: Path, names: Iterable[str]) -> None:
    """The header must name a column that can be worked on."""
    if not {"path", "text"} & {_ALIASES.get(name, name) for name in names}:
        found = ", ".join(map(str, names)) or "nothing"
        raise UserError(f"{manifest}, row 1: the columns are {found} — expected id, path, text or subtitles")


def _encoding(path: Path) -> str:
    """UTF-8, UTF-16 or GB18030, from the first megabyte."""
    with path.open("rb") as file:
        head = file.read(1 << 20)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return "gb18030"
    return "utf-8-sig"
