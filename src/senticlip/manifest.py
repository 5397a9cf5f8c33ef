"""A manifest (CSV, JSONL or Parquet; id, path, text or subtitles) → a Parquet file with a row group for each part.

It is read as a stream: ten million rows take no more memory than a thousand. A worker reads only the row group it was
given.
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

from senticlip.data.subtitles import SUFFIXES
from senticlip.data.table import (
    COLUMN_ALIASES,
    EMPTY,
    LONGEST_CELL,
    check_no_workbook,
    delimiter_of,
    guess_chinese_encoding,
    marked_encoding,
)
from senticlip.files import write_atomically
from senticlip.progress import console
from senticlip.structures import UsageError, UserError, valid_utf8

COLUMNS = ("id", "path", "text", "subtitles", "start", "end")
SCHEMA = pa.schema([(name, pa.string()) for name in (*COLUMNS, "error")])
REMEMBERED = 100_000
"""Only so many ids, those of the first rows, are checked for duplicates in later rows: this bounds memory."""

_MISSING: Any = object()
"""Value of cells missing from a CSV row that is shorter than the header."""

_ALIASES = {name: column for name, column in COLUMN_ALIASES.items() if column in COLUMNS}
_ALIASES |= {"subtitle": "subtitles", "字幕": "subtitles"}


def split(manifest: Path, path: Path, rows: int) -> None:
    """Write the manifest to ``path`` in row groups of ``rows`` rows.

    Raises:
        UsageError: no such manifest, or not one of the three kinds. UserError: it cannot be read; names the row.
    """

    def write(partial: Path) -> None:
        records = read(manifest)
        count = 0
        # opened here: pyarrow cannot open paths that are not UTF-8
        with (
            partial.open("wb") as sink,
            pq.ParquetWriter(sink, SCHEMA, compression="zstd", write_page_checksum=True) as writer,
        ):
            while chunk := list(islice(records, rows)):
                writer.write_table(pa.Table.from_pylist(chunk, SCHEMA), row_group_size=rows)
                count += len(chunk)
        if not count:
            raise UserError(f"{manifest}: no rows — expected id, path, text or subtitles")

    write_atomically(path, write)


def read(manifest: Path) -> Iterator[dict[str, str | None]]:
    """Yield the rows of a manifest: the columns COLUMNS and ``error``, each text or None.

    A bad row does not fail the others: its ``error`` says what is wrong.

    Raises:
        UsageError: no such manifest, or not one of the three kinds. UserError: the content is no manifest, or cannot be
            read from some row on.
    """
    if not manifest.is_file():
        raise UsageError(f"{manifest}: no such manifest")
    readers = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".parquet": _read_parquet,
    }
    if manifest.suffix.lower() not in readers:
        raise UsageError(f"{manifest}: not a manifest — choose .csv, .jsonl or .parquet")
    seen: set[str | None] | None = set()
    for number, row in readers[manifest.suffix.lower()](manifest):
        record = _record(f"{manifest}, row {number}", number, row)
        if seen is not None and record["id"] in seen:
            message = f"{manifest}, row {number}: duplicate id {record['id']!r}"
            console.print(f"{message} — give each row its own id, to tell their answers apart", soft_wrap=True)
            seen = None
        elif seen is not None and len(seen) < REMEMBERED:
            seen.add(record["id"])
        yield record


def _record(where: str, number: int, row: dict[Any, Any] | ValueError) -> dict[str, str | None]:
    """A row as read → the columns of SCHEMA; the key None holds a CSV's cells beyond the header."""
    if isinstance(row, ValueError):
        return {**dict.fromkeys(COLUMNS), "id": f"row {number}", "error": f"{where}: not readable as JSON ({row})"}
    # EMPTY includes str(None) and str(NaN)
    cells = _by_column(
        {key: value for key, value in row.items() if value is not _MISSING and str(value).strip() not in EMPTY}
    )
    texts = {name: str(value) if name == "text" else str(value).strip() for name, value in cells.items()}
    valid = {name: valid_utf8(texts[name]) for name in COLUMNS if name in texts}
    record: dict[str, str | None] = {**dict.fromkeys(COLUMNS), **valid, "error": None}
    record["id"] = record["id"] or record["path"] or f"row {number}"
    mistyped = [name for name in valid if not isinstance(cells[name], str | int | float)]
    invalid = [name for name, value in valid.items() if value != texts[name]]
    if mistyped:
        record["error"] = (
            f"{where}, column {mistyped[0]}: a {type(cells[mistyped[0]]).__name__} — expected text or a number"
        )
    elif invalid:
        record["error"] = f"{where}, column {invalid[0]}: an unpaired surrogate (\\ud800 … \\udfff)"
    elif any(row.get(None) or ()):
        record["error"] = f"{where}: more cells than columns — is a text with a comma quoted?"
    elif _MISSING in row.values():
        record["error"] = f"{where}: fewer cells than columns — is a text with a line break quoted?"
    elif not {"path", "text", "subtitles"} & texts.keys():
        record["error"] = f"{where}: neither path nor text"
    return record


def _by_column(row: dict[Any, Any]) -> dict[str, Any]:
    """A row keyed by the names of COLUMNS; aliases (``Path``, ``video``) count only where the name itself is missing.

    ``字幕`` may hold a subtitle file, or the text, as in the tables that models are trained on.
    """
    names = {key: str(key).strip("\ufeff \t").casefold() for key in row if key is not None}
    aliased = {_ALIASES[name]: row[key] for key, name in names.items() if name in _ALIASES}
    if "subtitles" in aliased and not str(aliased["subtitles"]).strip().lower().endswith(SUFFIXES):
        aliased = {"text": aliased.pop("subtitles")} | aliased
    return aliased | {name: row[key] for key, name in names.items() if name in COLUMNS}


def _read_csv(manifest: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    csv.field_size_limit(LONGEST_CELL)
    with manifest.open(encoding=_detect_encoding(manifest), newline="") as file:
        start = 1
        try:
            is_tsv = manifest.suffix.lower() == ".tsv"
            delimiter = "\t" if is_tsv else delimiter_of(file.readline(LONGEST_CELL))
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter, strict=True, restval=_MISSING)
            _check_columns(manifest, reader.fieldnames or [])
            start = reader.line_num + 1
            for row in reader:
                yield reader.line_num, row
                start = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{manifest}, row {start}: not readable as CSV ({error}) — is a quote left open?") from None


def _read_jsonl(manifest: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """A line that is not a JSON object is yielded as a ValueError; if the first is not, the file is not JSONL.

    Raises:
        UserError: the first line is not an object.
    """
    with manifest.open("rb") as file:
        accepted = False
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except (ValueError, RecursionError) as error:
                if not accepted:
                    raise UserError(f"{manifest}, row {number}: not readable as JSON ({error})") from None
                row = ValueError(str(error))
            if not accepted and isinstance(row, dict):
                _report_ignored(manifest, row)
            accepted = True
            yield number, row


def _read_parquet(manifest: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        opened = manifest.open("rb")
        file = pq.ParquetFile(opened)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{manifest}: not readable as Parquet ({' '.join(str(error).split())})") from None
    with opened, file:
        _check_columns(manifest, file.schema_arrow.names)
        names = [name for name in file.schema_arrow.names if _by_column({name: None})]
        number = 0
        for batch in file.iter_batches(4096, columns=names):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _check_columns(manifest: Path, names: Iterable[str]) -> None:
    """Refuse a header without a path, text or subtitles column."""
    if not {"path", "text", "subtitles"} & _by_column(dict.fromkeys(names)).keys():
        columns = ", ".join(map(str, names)) or "nothing"
        raise UserError(f"{manifest}, row 1: the columns are {columns} — expected id, path, text or subtitles")
    _report_ignored(manifest, names)


def _report_ignored(manifest: Path, names: Iterable[Any]) -> None:
    """Name the columns that are not read: with a misnamed text column, clips would silently be answered without their
    text."""
    if ignored := [str(name) for name in names if name is not None and not _by_column({name: None})]:
        message = f"{manifest}: ignored columns: {', '.join(ignored)} (columns that are read: {', '.join(COLUMNS)})"
        console.print(message, soft_wrap=True, highlight=False)


def _detect_encoding(path: Path) -> str:
    """The encoding identified by the first bytes, else UTF-8 if the whole file is valid, else Big5 or GB18030."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        head = file.read(4000)
        check_no_workbook(head, path)
        if encoding := marked_encoding(head):
            return encoding
        file.seek(0)
        try:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                decoder.decode(chunk)
        except UnicodeDecodeError:
            file.seek(0)
            return guess_chinese_encoding(file.read(1 << 20).rpartition(b"\n")[0])
    return "utf-8"
