"""An archive of videos → Parquet: on Ray Data (extra ``ray``), or in one process.

The manifest is cut into parts, the unit of work: a worker answers a part, always in the same batches, and writes its
file atomically, so that a part answered twice gives the same file. After a kill, the same call answers only the parts
that are missing.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from senticlip import answers, manifest
from senticlip.cluster import on_ray
from senticlip.crashes import find_crashing_clips
from senticlip.data import subtitles
from senticlip.data.cache import file_key
from senticlip.data.table import parse_finite, resolve_path
from senticlip.files import folder_lock, report_full_disk, write_text
from senticlip.structures import PRECISIONS, Clip, UsageError, UserError

BATCH = 16
"""Clips per batch: always the same ones, so that a part that is answered again is identical to the last bit."""

PATIENCE = 3
"""How often a part may end without an error or an answer before its videos are first decoded in another process."""

SCHEMA = pa.schema([("id", pa.string()), *answers.FIELDS])


def bulk(
    run: str | Path,
    manifest_file: str | Path,
    out: str | Path,
    address: str | None = None,
    workers: int | None = None,
    device: str | None = None,
    rows_per_part: int = 256,
    precision: str = "fp32",
    retry: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Answer each row of a manifest; yields rows of id and answers.FIELDS (``error`` for a row that failed).

    The rows are also in ``out/part-NNNNNN.parquet``, in the manifest's order; those of a part are yielded once it is
    written. After a kill, the same call continues.

    Args:
        run: a RUN folder or an exported .onnx file. On a cluster, all machines must see it, as well as the manifest,
            the videos and ``out``.
        manifest_file: .csv, .jsonl or .parquet; id, path (relative to the manifest), text or subtitles, start, end.
        out: the folder for the answers.
        address: of a Ray cluster; None for this machine only.
        workers: number of processes that hold a model, each on one core (or GPU); by default, one for each. A single
            worker without ``address`` is this process.
        device: cpu or cuda.
        rows_per_part: rows that a worker answers at a time; a kill loses at most these.
        precision: fp32, bf16 or int8.
        retry: redo the parts with a row that failed.
        progress: called with (rows done, total rows), first for the existing parts, then after each part.

    Raises:
        UsageError: wrong arguments, a missing extra. UserError: the manifest cannot be read, or ``out`` belongs to
            another run or manifest, or another process works on it.
    """
    run, source, out = Path(run).resolve(), Path(manifest_file).resolve(), Path(out).resolve()
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: must be at least 1")
    if rows_per_part < 1:
        raise UsageError(f"rows per part {rows_per_part}: must be at least 1")
    if not (run if run.suffix == ".onnx" else run / "model.safetensors").is_file():
        raise UsageError(f"{run}: no trained model (config.json, model.safetensors) — create one with senticlip train")
    if precision not in (PRECISIONS if run.is_dir() else PRECISIONS[:1]):
        raise UsageError(f"--precision {precision}: choose one of {', '.join(PRECISIONS)} (for an ONNX file: fp32)")
    distributed = (workers != 1 or bool(address)) and has_ray()
    if address and not distributed:
        raise UsageError("--address needs Ray: pip install 'senticlip[ray]'")
    if (workers or 1) > 1 and not distributed:
        raise UsageError(f"--workers {workers} needs Ray: pip install 'senticlip[ray]' (or leave it out: one process)")
    with folder_lock(out, "bulk"):
        job = _prepare(run, source, out, rows_per_part, precision) | {"device": device, "retry": retry}
    return _stream(job, address, workers if distributed else 1, progress or (lambda done, total: None))


def has_ray() -> bool:
    """Whether the extra ``ray`` is installed."""
    try:
        importlib.import_module("ray.data")
    except ImportError:
        return False
    return True


def part_path(out: Path, number: int) -> Path:
    """The file of a part."""
    return out / f"part-{number:06}.parquet"


def _prepare(run: Path, source: Path, out: Path, rows_per_part: int, precision: str) -> dict[str, Any]:
    """Make ``out``, or check that it belongs to this job; cut the manifest; remove leftovers of a killed process."""
    if not source.is_file():
        raise UsageError(f"{source}: no such manifest")
    key = {
        "run": answers.fingerprint(run),
        "manifest": file_key(source),
        "folder of the manifest": str(source.parent),  # where its relative paths begin
        "rows_per_part": rows_per_part,
        "precision": precision,
    }
    # Parquet readers skip names that begin with a dot, and so see only the answers in this folder
    stamp, parts = out / ".bulk" / "job.json", out / ".bulk" / "rows.parquet"
    try:
        parts.parent.mkdir(parents=True, exist_ok=True)
        if stamp.is_file():
            stored = json.loads(stamp.read_text(encoding="utf-8"))
            if not isinstance(stored, dict):
                raise ValueError("no object")
            differing = [name for name, value in key.items() if stored.get(name) != value]
            if differing:
                raise UserError(
                    f"{out}: holds answers from a different {' and '.join(differing)} — choose another --out"
                )
        elif any(out.glob("part-*.parquet")):
            raise UserError(f"{out}: holds part-*.parquet files from something else — choose another --out")
        for partial in (*out.glob(".*.partial"), *parts.parent.glob(".*.partial")):
            partial.unlink(missing_ok=True)
    except ValueError:
        raise UserError(f"{stamp}: damaged, so the answers there cannot be identified — choose another --out") from None
    except OSError as error:
        raise UserError(f"{out}: cannot be used — {error.strerror or error}") from None
    if not (stamp.is_file() and answers.parquet_metadata(parts)):  # without a stamp, it may be another manifest's
        manifest.split(source, parts, rows_per_part)
    write_text(stamp, json.dumps(key, indent=1))
    job = {"run": str(run), "root": str(source.parent), "parts": str(parts), "out": str(out), "precision": precision}
    return job | {"fingerprint": key["run"]}


def _stream(
    job: dict[str, Any], address: str | None, workers: int | None, progress: Callable[[int, int], None]
) -> Iterator[dict[str, Any]]:
    """The rows of the existing parts, then those of the others as they are written."""
    out, metadata = Path(job["out"]), answers.parquet_metadata(Path(job["parts"]))
    assert metadata is not None
    with folder_lock(out, "bulk"):
        numbers = range(metadata.num_row_groups)
        finished = [number for number in numbers if _is_done(part_path(out, number), job["retry"])]
        todo = sorted(set(numbers) - set(finished))
        done = sum(metadata.row_group(number).num_rows for number in finished)
        progress(done, metadata.num_rows)
        for number in finished:
            if (table := answers.read_parquet_or_none(part_path(out, number))) is None:
                todo, done = sorted([*todo, number]), done - metadata.row_group(number).num_rows
            else:
                yield from table.to_pylist()
        replaced = [number for number in todo if part_path(out, number).exists()]  # they stay until replaced
        for number in _make_parts(job | {"again": replaced}, todo, address, workers):
            rows = answers.read_parquet(part_path(out, number)).to_pylist()
            done += len(rows)
            progress(done, metadata.num_rows)
            yield from rows


def _is_done(part: Path, retry: bool) -> bool:
    """Whether a part exists, is complete and, with ``retry``, has no row that failed."""
    if (metadata := answers.parquet_metadata(part)) is None:
        return False
    errors = answers.read_parquet_or_none(part, ["error"]) if retry else None
    return not retry or (errors is not None and errors["error"].null_count == metadata.num_rows)


def _make_parts(job: dict[str, Any], todo: list[int], address: str | None, workers: int | None) -> Iterator[int]:
    """Yield the number of each part in ``todo`` once its file is written."""
    if todo and (workers != 1 or address):
        try:
            yield from on_ray(Worker, job, todo, address, workers)
        finally:
            for marker in Path(job["out"]).glob(".*.begun"):  # their workers ended with this job and did not crash
                marker.unlink(missing_ok=True)
    elif todo:
        yield from map(Worker(job).make, todo)


class Worker:
    """Holds a model and answers parts; each Ray Data actor has one."""

    def __init__(self, job: dict[str, Any], threads: int | None = None) -> None:
        self.job, self.out, self.root, self.rows_path = job, *(Path(job[key]) for key in ("out", "root", "parts"))
        if threads:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # before load, which fixes onnxruntime's and OpenVINO's
        self.lines = lru_cache(8)(subtitles.read)  # a film's rows follow each other
        self.parts = pq.ParquetFile(self.rows_path.open("rb"), page_checksum_verification=True)

    @cached_property
    def predictor(self) -> Any:
        """Loaded when the first part is made: from an error in `__init__` Ray would tell only that an actor died.

        Raises:
            UserError: the model has changed since bulk began; others: as ``senticlip.load``.
        """
        from senticlip.predictor import load

        run = self.job["run"]
        predictor = load(run, device=self.job["device"], precision=self.job["precision"])
        if answers.fingerprint(run) != self.job["fingerprint"]:  # after loading, or it might change in between
            raise UserError(f"{run}: the model has changed since this began — restore it, or choose another --out")
        return predictor

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The interface for Ray Data: makes the parts of these numbers and returns the numbers."""
        for number in batch["id"]:
            self.make(int(number))
        return {"id": batch["id"]}

    def make(self, number: int) -> int:
        """Answer a part and write its file, unless it exists and need not be redone."""
        path = part_path(self.out, number)
        if number in self.job["again"] or not path.is_file():
            # the model is loaded before the mark is set: a crash while loading is no video's fault
            rows, _ = self._rows(number), self.predictor
            marker = path.with_name(f".{path.name}.begun")
            with report_full_disk(self.out), marker.open("a") as file:
                file.write("|")
            if marker.stat().st_size > PATIENCE:
                crashing = find_crashing_clips(self._clips(rows))
                rows = [row | {"deadly": i in crashing} for i, row in enumerate(rows)]
            try:
                output = [
                    row for first in range(0, len(rows), BATCH) for row in self.answer(rows[first : first + BATCH])
                ]
                answers.write_parquet(path, pa.Table.from_pylist(output, SCHEMA))
            finally:  # also on a full disk or Ctrl-C: no video killed this process
                marker.unlink(missing_ok=True)
        return number

    def _rows(self, number: int) -> list[dict[str, Any]]:
        try:
            return self.parts.read_row_group(number).to_pylist()
        except (OSError, pa.ArrowInvalid):
            self.rows_path.unlink(missing_ok=True)  # the next call makes it again
            raise UserError(f"{self.rows_path}: was damaged — run the same command again") from None

    def _clips(self, rows: list[dict[str, Any]]) -> dict[int, Clip]:
        """The clips of the rows, by index; invalid rows are left out."""
        clips = {}
        for i, row in enumerate(rows):
            with suppress(Exception):  # answer() reports it
                clips[i] = self._clip(row)
        return clips

    def answer(self, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Answer one batch of manifest rows; one that cannot be read becomes a row with its error."""
        clips: list[Clip] = []
        errors: dict[int, UserError] = {}
        for i, row in enumerate(rows):
            try:
                clips.append(self._clip(row))
            except Exception as error:
                errors[i] = answers.as_user_error(row["id"], error)
        results = answers.answer(self.predictor, clips) if clips else iter(())
        for i, row in enumerate(rows):
            prediction, failure, _ = (None, errors[i], None) if i in errors else next(results)
            yield {"id": row["id"], **answers.record(prediction, failure)}

    def _clip(self, row: dict[str, Any]) -> Clip:
        if row["error"] is not None:
            raise UserError(row["error"])
        path = None if row["path"] is None else resolve_path(self.root, row["path"])
        if row.get("deadly"):
            raise UserError(f"{path}: decoding it crashes or never ends — replace the file")
        times: dict[str, float | None] = {}
        for name in ("start", "end"):
            times[name] = None if row[name] is None else parse_finite(row[name])
            if times[name] is None and row[name] is not None:
                raise UserError(f"{row['id']}: {name} {row[name]!r} is not a time in seconds")
        text = row["text"]
        if text is None and row["subtitles"] is not None:
            lines = self.lines(resolve_path(self.root, row["subtitles"]))
            begin, end = times["start"] or 0.0, float("inf") if times["end"] is None else times["end"]
            text = " ".join(line.text for line in lines if line.end > begin and line.start < end) or None
        if path is None and text is None:
            raise UserError(f"{row['id']}: no path, and its subtitles have no line in this segment")
        return Clip(row["id"], path, text, start=times["start"], end=times["end"])


answers.make_callable(__name__)
