"""Predictions as rows of a table, and batches of clips in which one bad clip does not fail the others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from av.error import FFmpegError

from senticlip.data.cache import file_key
from senticlip.files import write_atomically
from senticlip.structures import LABELS, SURFACE, Clip, Prediction, UserError, bounded, valid_utf8

HEADS = tuple(SURFACE.values())
"""The modalities by their user-facing names: text, video, audio."""

_RUN_FILES = ("config.json", "model.safetensors")

FIELDS = [
    ("label", pa.string()),
    *((name, pa.float64()) for name in LABELS),
    ("sentiment", pa.float64()),
    *((f"{head}_{name}", pa.float64()) for head in HEADS for name in LABELS),
    *((f"weight_{head}", pa.float64()) for head in HEADS),
    ("conflict", pa.float64()),
    ("error", pa.string()),
]
"""The columns of every answer. ``sentiment`` is P(positive) − P(negative), or a regression model's score clipped to
[-1, 1]. ``conflict`` is half the distance between the sentiments of text and video: 0 if equal, 1 if opposite, empty if
one of them is missing."""


def shown(path: str | Path) -> str:
    """A file's name as valid UTF-8, for an HTML page."""
    return Path(path).name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def record(prediction: Prediction | None, error: UserError | None = None) -> dict[str, Any]:
    """A prediction, or the error in its place, as a row with the columns FIELDS; missing values are None."""
    row: dict[str, Any] = {name: None for name, _ in FIELDS}
    row["error"] = None if error is None else valid_utf8(str(error))
    if prediction is None:
        return row
    row["label"] = prediction.label
    row |= prediction.probabilities
    if prediction.score is None:
        row["sentiment"] = _sentiment(prediction.probabilities)
    else:
        row["sentiment"] = bounded(prediction.score)
    for head, probabilities in prediction.modalities.items():
        row |= {f"{head}_{name}": value for name, value in probabilities.items()}
        row[f"weight_{head}"] = prediction.weights.get(head)
    text, video = (prediction.modalities.get(head) for head in ("text", "video"))
    if text and video:
        row["conflict"] = abs(_sentiment(text) - _sentiment(video)) / 2
    return row


def _sentiment(probabilities: dict[str, float]) -> float:
    return probabilities["positive"] - probabilities["negative"]


Answer = tuple[Prediction | None, UserError | None, Any]
"""A prediction or an error, and the frames that the model read, k×3×S×S uint8 (None if it read none)."""


def answer(predictor: Any, clips: list[Clip], **options: Any) -> Iterator[Answer]:
    """The Answer to each clip.

    All clips form one batch; if it fails, each clip is tried alone, so that only the bad one is lost. A RuntimeError
    (of torch) or MemoryError may be the machine's fault: such a clip is tried once more. If several clips still fail in
    this way and none is answered, the error is raised, so that the work can be continued elsewhere.

    Args:
        predictor: senticlip.load(RUN).
        clips: few enough for one batch.
        options: passed on to ``predictor.batch``.
    """
    results = _answer_batch(predictor, clips, options)
    if not isinstance(results, Exception):
        yield from results
        return
    single = [results] if len(clips) == 1 else [_answer_batch(predictor, [clip], options) for clip in clips]
    single = [
        _answer_batch(predictor, [clip], options) if _may_be_machine_error(result) else result
        for clip, result in zip(clips, single, strict=True)
    ]
    machine_errors = [result for result in single if isinstance(result, Exception) and _may_be_machine_error(result)]
    if len(machine_errors) > 1 and all(isinstance(result, Exception) for result in single):
        raise machine_errors[0]
    for clip, result in zip(clips, single, strict=True):
        if isinstance(result, Exception):
            yield None, as_user_error(clip.id, result), None
        else:
            yield from result


def _answer_batch(predictor: Any, clips: list[Clip], options: dict[str, Any]) -> list[Answer] | Exception:
    """The Answers to clips in one batch, or the error."""
    try:
        batch = predictor.batch(clips, **options)
        predictions = predictor.predictions(predictor.output(batch))
    except Exception as error:
        return error.with_traceback(None)  # a traceback would keep the batch in memory
    vision = batch.modalities.get("vision")
    return [
        (prediction, None, vision.values[i][vision.mask[i]] if vision is not None and vision.mask[i].any() else None)
        for i, prediction in enumerate(predictions)
    ]


def _may_be_machine_error(result: Any) -> bool:
    """Whether an error may be the machine's fault. (Some FFmpeg errors have these types, but are about a file.)"""
    return isinstance(result, (RuntimeError, MemoryError)) and not isinstance(result, FFmpegError)


def as_user_error(name: str, error: Exception) -> UserError:
    """Any error as a one-line UserError; ``name`` says what it is about."""
    if isinstance(error, UserError):
        return error
    return UserError(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def fingerprint(run: str | Path) -> str:
    """A hash of the config and weights of a RUN, or of an exported file."""
    paths = [Path(run), *(Path(run) / name for name in _RUN_FILES)]
    return "-".join(file_key(path) for path in paths if path.is_file())


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table atomically."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # pyarrow cannot open paths that are not UTF-8
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)

    write_atomically(path, write)


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a table written by ``write_parquet``."""
    with path.open("rb") as file:
        return pq.read_table(file, columns=columns, page_checksum_verification=True)


def read_parquet_or_none(path: Path, columns: list[str] | None = None) -> pa.Table | None:
    """As ``read_parquet``, but None if the file is missing or damaged (a disk may lose what was written)."""
    try:
        return read_parquet(path, columns)
    except (OSError, pa.ArrowInvalid):
        return None


def parquet_metadata(path: Path) -> pq.FileMetaData | None:
    """The metadata of a Parquet file; None if the file is missing or its end is damaged."""
    try:
        with path.open("rb") as file:
            return pq.read_metadata(file)
    except (OSError, pa.ArrowInvalid):
        return None


class _CallableModule(ModuleType):
    """A module callable as the function of the same name: ``senticlip.bulk(…)`` is ``senticlip.bulk.bulk(…)``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(module: str) -> None:
    """Make a module callable: once imported, it hides the function of the same name in ``senticlip``."""
    sys.modules[module].__class__ = _CallableModule
