"""Predictions as rows of a table, and clips answered a batch at a time where one that fails takes no other with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from av.error import FFmpegError

from senticlip.data.cache import file_key
from senticlip.files import write_whole
from senticlip.structures import LABELS, SURFACE, Clip, Prediction, UserError, whole

HEADS = tuple(SURFACE.values())
"""The modalities by the names that a user reads: text, video, audio."""

_WEIGHTS = ("config.json", "model.safetensors")

FIELDS = [
    ("label", pa.string()),
    *((name, pa.float64()) for name in LABELS),
    ("sentiment", pa.float64()),
    *((f"{head}_{name}", pa.float64()) for head in HEADS for name in LABELS),
    *((f"weight_{head}", pa.float64()) for head in HEADS),
    ("conflict", pa.float64()),
    ("error", pa.string()),
]
"""The columns of every answer. ``sentiment`` is positive − negative (or the score of a regression model), in [-1, 1];
``conflict`` is how far apart the sentiments of text and video are, halved: 0 agree, 1 opposite; empty if one is
absent."""


def shown(path: str | Path) -> str:
    """A file's name for a page, which is UTF-8; on disk it need not be."""
    return os.fsencode(Path(path).name).decode("utf-8", "replace")


def record(prediction: Prediction | None, error: UserError | None = None) -> dict[str, Any]:
    """A prediction as a row with the columns FIELDS; what it does not have is None."""
    row: dict[str, Any] = {name: None for name, _ in FIELDS}
    row["error"] = None if error is None else whole(str(error))
    if prediction is None:
        return row
    row["label"] = prediction.label
    row |= prediction.probabilities
    row["sentiment"] = _sentiment(prediction.probabilities) if prediction.score is None else prediction.score
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
"""A prediction, or why there is none, and the frames k×3×S×S that were seen (None: none were)."""


def answer(predictor: Any, clips: list[Clip], **options: Any) -> Iterator[Answer]:
    """The Answer of each clip.

    All clips go as one batch; where that fails, each goes alone, so that only the bad one is lost. What torch raises
    (RuntimeError) and a lack of memory may be the machine's fault: such a clip is tried once more, and where several
    clips end so and none is answered, the work ends, which can then go on elsewhere.

    Args:
        predictor: senticlip.load(RUN).
        clips: few enough to be one batch.
        options: handed on to ``predictor.batch``.
    """
    together = _together(predictor, clips, options)
    if not isinstance(together, Exception):
        yield from together
        return
    found = [together] if len(clips) == 1 else [_together(predictor, [clip], options) for clip in clips]
    found = [
        _together(predictor, [clip], options) if _is_machines(one) else one
        for clip, one in zip(clips, found, strict=True)
    ]
    broken = [one for one in found if isinstance(one, Exception) and _is_machines(one)]
    if len(broken) > 1 and all(isinstance(one, Exception) for one in found):
        raise broken[0]
    for clip, one in zip(clips, found, strict=True):
        if isinstance(one, Exception):
            yield None, as_user_error(clip.id, one), None
        else:
            yield from one


def _together(predictor: Any, clips: list[Clip], options: dict[str, Any]) -> list[Answer] | Exception:
    """The Answers of clips that go as one batch, or what went wrong."""
    try:
        batch = predictor.batch(clips, **options)
        predictions = predictor.predictions(predictor.output(batch))
    except Exception as error:
        return error.with_traceback(None)  # a traceback would keep the batch in memory
    seen = batch.modalities.get("vision")
    return [
        (each, None, seen.values[i][seen.mask[i]] if seen is not None and seen.mask[i].any() else None)
        for i, each in enumerate(predictions)
    ]


def _is_machines(found: Any) -> bool:
    """Whether it may be the machine that failed (FFmpeg's errors, some of them of these kinds, are about a file)."""
    return isinstance(found, (RuntimeError, MemoryError)) and not isinstance(found, FFmpegError)


def as_user_error(name: str, error: Exception) -> UserError:
    """Any error as one line about what has this name."""
    if isinstance(error, UserError):
        return error
    return UserError(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def fingerprint(run: str | Path) -> str:
    """What tells one RUN, or exported file, from another: a hash of its config and weights."""
    paths = [Path(run), *(Path(run) / name for name in _WEIGHTS)]
    return "-".join(file_key(path) for path in paths if path.is_file())


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table whole or not at all."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # pyarrow itself opens no path that is not UTF-8
            pq.write_table(table, file, compression="zstd")

    write_whole(path, write)


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A table that ``write_parquet`` wrote."""
    with path.open("rb") as file:
        return pq.read_table(file, columns=columns)


def about_parquet(path: Path) -> pq.FileMetaData | None:
    """What a Parquet file says of itself; None if it is not there, or not whole (a disk may lose what was written)."""
    try:
        with path.open("rb") as file:
            return pq.read_metadata(file)
    except (OSError, pa.ArrowInvalid):
        return None


class _CallableModule(ModuleType):
    """A module that is called as the function of its own name: ``senticlip.bulk(…)`` is ``senticlip.bulk.bulk(…)``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(module: str) -> None:
    """Let the module of this name be called (importing it would else hide the function behind it)."""
    sys.modules[module].__class__ = _CallableModule
