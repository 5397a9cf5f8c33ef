"""Predictions as rows of a table, and clips answered a batch at a time where one that fails takes no other with it."""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from senticlip.data.cache import file_key
from senticlip.structures import LABELS, Clip, Prediction, UserError

HEADS = ("text", "video", "audio")
"""The modalities that may say something for themselves, by the name that a reader sees."""

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


def record(prediction: Prediction | None, error: str | None = None) -> dict[str, Any]:
    """A prediction as a row with the columns FIELDS; what it does not have is None."""
    row: dict[str, Any] = {name: None for name, _ in FIELDS}
    row["error"] = error
    if prediction is None:
        return row
    row["label"] = prediction.label
    row |= prediction.probabilities
    row["sentiment"] = _sentiment(prediction.probabilities) if prediction.score is None else prediction.score
    for head, probabilities in prediction.modalities.items():
        if head in HEADS:
            row |= {f"{head}_{name}": value for name, value in probabilities.items()}
            row[f"weight_{head}"] = prediction.weights.get(head)
    text, video = (prediction.modalities.get(head) for head in ("text", "video"))
    if text and video:
        row["conflict"] = abs(_sentiment(text) - _sentiment(video)) / 2
    return row


def _sentiment(probabilities: dict[str, float]) -> float:
    return probabilities["positive"] - probabilities["negative"]


def answer(predictor: Any, clips: list[Clip], **options: Any) -> Iterator[tuple[Prediction | None, str | None, Any]]:
    """For each clip its prediction, or the line that says why there is none, and its frames k×3×S×S if it has some.

    All clips go as one batch; where that fails, each goes alone, so that only the bad one is lost. What torch raises
    (RuntimeError) and a lack of memory are no clip's fault: they end the work, which can then go on elsewhere.

    Args:
        predictor: senticlip.load(RUN).
        clips: few enough to be one batch.
        options: handed on to ``predictor.batch``.
    """
    try:
        batch = predictor.batch(clips, **options)
        predictions = predictor.predictions(predictor.output(batch))
    except Exception as error:
        if isinstance(error, (RuntimeError, MemoryError)):
            raise
        if len(clips) == 1:
            known = isinstance(error, UserError)
            yield None, str(error) if known else f"{clips[0].id}: {type(error).__name__}: {error}", None
        else:
            for clip in clips:
                yield from answer(predictor, [clip], **options)
        return
    seen = batch.modalities.get("vision")
    for i, prediction in enumerate(predictions):
        yield prediction, None, seen.values[i][seen.mask[i]] if seen is not None and seen.mask[i].any() else None


def fingerprint(run: str | Path) -> str:
    """What tells one RUN from another: a hash of its config and weights."""
    return "-".join(file_key(path) for name in _WEIGHTS if (path := Path(run) / name).is_file())


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` make a file beside ``path`` and put it there: the file is whole, or is not there.

    Raises:
        UserError: it cannot be written (no space, no permission).
    """
    # a name of its own for every writer: two may make the same part after a crash
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written — {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table whole or not at all."""
    write_whole(path, lambda partial: pq.write_table(table, partial, compression="zstd"))


class _CallableModule(ModuleType):
    """A module that is called as the function of its own name: ``senticlip.bulk(…)`` is ``senticlip.bulk.bulk(…)``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(module: str) -> None:
    """Let the module of this name be called (importing it would else hide the function behind it)."""
    sys.modules[module].__class__ = _CallableModule
