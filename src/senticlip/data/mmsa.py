"""MMSA feature files (such as ``unaligned_39.pkl``) → clips and memory-mapped rows, read without trusting the file.

Format: github.com/thuiar/MMSA; {train, valid, test} → {id, raw_text, text, text_bert, audio, vision, …_lengths,
regression_labels[_T|_A|_V]}. Two deviations from how MMSA reads it: padding is cut off (by ``…_lengths``; for text, the
mask in ``text_bert``), and all-zero vision frames, where OpenFace found no face, are left out.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from senticlip.data import unpickle
from senticlip.data.cache import Store, cached, file_keys
from senticlip.data.table import FEATURE_SUFFIXES, SPLITS, without_zeros
from senticlip.files import write_atomically
from senticlip.progress import console
from senticlip.structures import Clip, UserError

LABELS = {"M": "regression_labels", **{name: f"regression_labels_{name}" for name in "TAV"}}
VERSION = 1
FREE_TEXT = 10_000_000
"""Characters of text always allowed; beyond them, a feature file may not have more text than bytes."""


class Features(NamedTuple):
    """A feature file: its clips in the order train, valid, test, and their rows by modality, memory-mapped."""

    path: Path
    clips: list[Clip]
    rows: dict[str, Store]
    widths: dict[str, int]

    def choose(self, name: str, clips: list[Clip]) -> Store:
        """The rows of a modality for ``clips``, found by id; a clip that is not in the file gets an empty row.

        Raises:
            UserError: none is in the file, or an id matches several when leading zeros and case are ignored.
        """
        exact = {clip.id: i for i, clip in enumerate(self.clips)}
        by_loose_id = defaultdict(list)
        for i, clip in enumerate(self.clips):
            by_loose_id[_loose_id(clip.id)].append(i)

        def index_of(clip_id: str) -> int:
            matches = [exact[clip_id]] if clip_id in exact else by_loose_id.get(_loose_id(clip_id), [])
            if len(matches) > 1:
                ids = " and ".join(self.clips[i].id for i in matches)
                raise UserError(f"{self.path}: {clip_id} matches {ids} — write the id exactly as in the file")
            return matches[0] if matches else -1

        chosen = np.array([index_of(clip.id) for clip in clips], dtype=np.int64)
        if len(clips) and (chosen < 0).all():
            raise UserError(
                f"{self.path}: has none of the clips, such as {clips[0].id}; its first is {self.clips[0].id}"
            )
        return self.rows[name].take(chosen)


def _loose_id(name: str) -> str:
    return "/".join(without_zeros(part).casefold() for part in name.split("/"))


def feature_file(data: str | Path) -> Path:
    """The feature file of a data set: the path itself, or the pickle in its ``Processed/``.

    Raises:
        UserError: there is none, or more than one and none is ``unaligned_39.pkl``.
    """
    path = Path(data)
    if path.suffix.lower() in FEATURE_SUFFIXES:
        return path
    files = sorted(file for file in (path / "Processed").glob("*") if file.suffix.lower() in FEATURE_SUFFIXES)
    usual = [file for file in files if file.name == "unaligned_39.pkl"]
    if len(usual or files) != 1:
        reason = f"there are {len(files)}" if files else "there is none"
        raise UserError(f"{path}: this experiment reads a feature file, Processed/unaligned_39.pkl, but {reason}")
    return (usual or files)[0]


def feature_clips(path: str | Path) -> list[Clip]:
    """The clips of a feature file, without their features."""
    return _all_clips(path, _load_splits(path))


def _all_clips(path: str | Path, data: dict[str, dict[str, Any]]) -> list[Clip]:
    """The clips of all splits; split and row are appended to ids that are not unique (each split may count from 0)."""
    clips = [clip for split in SPLITS for clip in _clips_of_split(path, split, data[split])]
    if not clips:
        raise UserError(f"{path}: has no clips: all its id lists are empty")
    count = Counter(clip.id for clip in clips)
    return [clip if count[clip.id] == 1 else clip._replace(id=f"{clip.id}#{clip.split}{clip.row}") for clip in clips]


def _load_splits(path: str | Path) -> dict[str, dict[str, Any]]:
    data = unpickle.load(path)
    if not isinstance(data, dict) or not all(isinstance(data.get(split), dict) for split in SPLITS):
        raise UserError(f"{path}: expected a dict with the keys train, valid and test, each a dict of arrays")
    return data


def read_features(path: str | Path, root: Path, modalities: tuple[str, ...] = ("text", "audio", "vision")) -> Features:
    """Open a feature file; the first time, its arrays are checked and copied to the cache, row by row.

    Args:
        path: the pickle.
        root: the folder of all caches.
        modalities: which to convert.

    Raises:
        UserError: not a plain pickle, a missing key, an array of the wrong shape, or a value that is not finite.
    """
    path = Path(path)
    data = _load_splits(path)
    clips = _all_clips(path, data)
    key = file_keys([path], root)[path]
    rows, widths = {}, {}
    for name in modalities:
        parts = {split: _values_and_lengths(path, split, name, data[split]) for split in SPLITS}
        width = {split: values.shape[2] for split, (values, _) in parts.items()}
        if len(set(width.values())) > 1:
            raise UserError(f"{path}, {name}: widths differ: " + ", ".join(f"{s} {w}" for s, w in width.items()))
        widths[name] = width[SPLITS[0]]
        pairs = [(split, i) for split in SPLITS for i in range(len(parts[split][1]))]
        keys = [f"{key}-{split}-{i}" for split, i in pairs]

        def compute(missing: list[int], name: str = name, parts: Any = parts, pairs: Any = pairs) -> Iterator[Any]:
            infinities = 0
            for index in missing:
                split, i = pairs[index]
                values, lengths = parts[split]
                row = np.array(values[i, : lengths[i]], dtype=np.float32)
                if name == "audio":  # official files have some; MMSA replaces them by 0
                    infinities += np.isneginf(row).sum()
                    row[np.isneginf(row)] = 0
                yield _checked_row(path, split, name, i, row)
            if infinities:
                console.print(f"{path}: {infinities} audio values are -inf, read as 0 (as in MMSA)", soft_wrap=True)

        rows[name] = cached(root, {"mmsa": name, "version": VERSION}, keys, compute, f"converting {name}")
    return Features(path, clips, rows, widths)


def _require(path: str | Path, split: str, part: dict[str, Any], key: str) -> Any:
    if part.get(key) is None:
        raise UserError(f"{path}, {split}: the key {key!r} is missing; it has {', '.join(map(str, part))}")
    return part[key]


def _require_list(path: str | Path, split: str, part: dict[str, Any], key: str) -> list[Any]:
    value = _require(path, split, part, key)
    if not (isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim == 1)):
        raise UserError(f"{path}, {split}, {key}: expected a list, not {type(value).__name__}")
    items = list(value)
    for row, item in enumerate(items):  # a list that contains itself would have an endless name
        plain = isinstance(item, str | bytes | float | np.generic) or item is None
        if not plain and not (isinstance(item, int) and abs(item) < 1 << 63):
            raise UserError(f"{path}, {split}, {key}, row {row}: expected text or a number, not {type(item).__name__}")
    if sum(len(item) for item in items if isinstance(item, str | bytes)) > max(Path(path).stat().st_size, FREE_TEXT):
        # a row may refer to a long text again in two bytes, and each would be copied
        raise UserError(f"{path}, {split}, {key}: more text than the file itself — store each row's own")
    return items


def _numbers(path: str | Path, split: str, key: str, value: Any, count: int) -> np.ndarray:
    """One float64 for each of the ``count`` rows of a split."""
    value = value if isinstance(value, list | np.ndarray) else [value]
    try:
        if isinstance(value, list) and not all(_is_number(item) for item in value):
            raise TypeError
        size = len(value) if isinstance(value, list) else value.size
        if size != count:  # before anything is copied
            raise UserError(f"{path}, {split}: {count} ids, but {size} {key}")
        return np.asarray(value, dtype=np.float64).ravel()
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{path}, {split}, {key}: expected a number for each clip") from None


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a number, or a list or array that holds just one."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return value.size == 1 if isinstance(value, np.ndarray) else isinstance(value, int | float | np.number)


def _clips_of_split(path: str | Path, split: str, part: dict[str, Any]) -> list[Clip]:
    ids = [_as_text(name).replace("$_$", "/") for name in _require_list(path, split, part, "id")]
    scores = {}
    for target, key in LABELS.items():
        if key in part or target == "M":
            values = _numbers(path, split, key, _require(path, split, part, key), len(ids))
            invalid = np.flatnonzero(~(np.abs(values) <= 1))
            if len(invalid):
                problem = f"{values[invalid[0]]:g} is not between -1 and 1 (MOSI and MOSEI use -3 to 3: divide by 3)"
                raise UserError(f"{path}, {split}, {key}, row {invalid[0]}: {problem}")
            scores[target] = values
    texts: list[Any] = [None] * len(ids)
    if part.get("raw_text") is not None:
        texts = [_text_of_row(text) for text in _require_list(path, split, part, "raw_text")]
    if len(texts) != len(ids):
        raise UserError(f"{path}, {split}: {len(ids)} ids, but {len(texts)} raw_text")
    return [
        Clip(name, None, text, {target: float(values[i]) for target, values in scores.items()}, split, i)
        for i, (name, text) in enumerate(zip(ids, texts, strict=True))
    ]


def _text_of_row(text: Any) -> str | None:
    """A row's text, if any; pandas writes an empty one as NaN."""
    return None if text is None or (isinstance(text, float) and math.isnan(text)) else _as_text(text) or None


def _as_text(value: Any) -> str:
    """An id or a text as str; files that went through HDF5 or Python 2 hold bytes."""
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _values_and_lengths(path: str | Path, split: str, name: str, part: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The values N×L×d of a modality and its lengths N."""
    values, count = _require(path, split, part, name), len(part["id"])
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise UserError(f"{path}, {split}, {name}: expected a numeric array of rows × steps × columns")
    if values.ndim == 2 and name != "text":
        values = values[:, None]  # one vector a clip
    if values.ndim != 3 or len(values) != count or 0 in values.shape[1:]:
        raise UserError(f"{path}, {split}, {name}: shape {values.shape}, expected {count} rows × steps × columns")
    key, steps = f"{name}_lengths", values.shape[1]
    given = part.get(key)
    if given is None and name == "text" and part.get("text_bert") is not None:
        key, given = "text_bert", _token_counts(path, split, part["text_bert"], count)
    lengths = _numbers(path, split, key, np.full(count, steps) if given is None else given, count)
    invalid = np.flatnonzero(~((lengths >= 0) & (lengths <= steps)))
    if len(invalid):
        raise UserError(
            f"{path}, {split}, {key}, row {invalid[0]}: length {lengths[invalid[0]]:g}, but there are {steps} steps"
        )
    return values, lengths.astype(np.int64)


def _token_counts(path: str | Path, split: str, value: Any, count: int) -> np.ndarray:
    """The number of unmasked tokens in each row of ``text_bert`` (N×3×n: ids, mask, types)."""
    is_numeric = isinstance(value, np.ndarray) and value.dtype.kind in "fiu"
    if not is_numeric or value.ndim != 3 or value.shape[:2] != (count, 3):
        actual = f"shape {value.shape}" if is_numeric else type(value).__name__
        raise UserError(f"{path}, {split}, text_bert: {actual}, expected a numeric array of {count} rows × 3 × tokens")
    return value[:, 1].sum(1)


def _checked_row(path: str | Path, split: str, name: str, i: int, row: np.ndarray) -> np.ndarray:
    """Check that a row (without padding) is finite, and drop vision frames without a face."""
    if not np.isfinite(row).all():
        step, column = np.argwhere(~np.isfinite(row))[0]
        raise UserError(
            f"{path}, {split}, {name}, row {i}, step {step}, column {column}: {row[step, column]} — "
            "features must be finite; replace it or leave the clip out"
        )
    return row[row.any(1)] if name == "vision" else row


def write_features(path: str | Path, splits: dict[str, dict[str, Any]]) -> None:
    """Write {train, valid, test} → {key: array or list} as a pickle that MMSA and :func:`read_features` read."""
    import pickle

    def write(partial: Path) -> None:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            pickle.dump(splits, file, protocol=4)

    write_atomically(Path(path), write)
