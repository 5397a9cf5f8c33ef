"""CH-SIMS v1 and v2 folders, and the user's own CSV files → Clips; the three splits; the problems of a data set.

A folder holds ``Raw/VIDEO/CLIP.mp4`` and ``label.csv`` or ``meta.csv`` (Yu et al. 2020; Liu et al. 2022 for v2), as
found in the wild: with or without a header, columns in any order, ``1`` for ``0001``, UTF-8, a BOM, GBK or Big5. The
user's own CSV has the columns path, text, label, and optionally split, id, video_id, start, end, label_T/A/V.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from senticlip.data.table import (
    EMPTY,
    FEATURE_SUFFIXES,
    SPLIT_NAMES,
    SPLITS,
    TARGET_COLUMNS,
    VIDEO_SUFFIXES,
    Line,
    binary_label_warning,
    canonical_split,
    columns_of,
    ignored_column_warnings,
    missing_content_warnings,
    parse_finite,
    read_table,
    resolve_path,
    score,
    without_zeros,
)
from senticlip.structures import LABELS, Clip, UsageError, UserError, polarity

PROTOCOLS = ("official", "tenth", "video")


class Report(NamedTuple):
    """What ``data check`` found and prints with ``--json``: the number of clips, counts by split and class, errors
    (``problems``) and oddities (``warnings``)."""

    clips: int
    splits: dict[str, dict[str, int]]
    problems: list[str]
    warnings: list[str]


class _Row(NamedTuple):
    """A clip, the video it was cut from, and what is wrong with its row of the table."""

    clip: Clip
    source: str
    problems: list[str]
    warnings: list[str]


def read_clips(path: str | Path, split: str | None = None, protocol: str = "official", seed: int = 0) -> list[Clip]:
    """The clips of a CH-SIMS folder or of a CSV file, in the order of its rows.

    Args:
        path: a folder with ``label.csv`` or ``meta.csv`` beside ``Raw/`` (without ``Raw/``, but with
            ``Processed/unaligned_39.pkl``, clips have no video), or one CSV file.
        split: train, valid or test, or any other name that tables use (``val``); None (or ``all``) for all.
        protocol: ``official`` (the table's own; ``tenth`` if it has none), ``tenth`` (random 8:1:1 over clips, as the
            paper seems to have done) or ``video`` (8:1:1 such that no source video is in two splits).
        seed: of the two random protocols; the order of the rows does not matter.

    Raises:
        UsageError: no such path, split or protocol. UserError: the first row that cannot be used.
    """
    split = canonical_split(split)
    if split not in ("all", *SPLITS):
        raise UsageError(f"split {split!r}: unknown — choose one of {', '.join(SPLITS)}, all")
    table, rows = _read_rows(Path(path), protocol)
    problems = [problem for row in rows for problem in row.problems]
    if problems:
        more = f" (and {len(problems) - 1} more: senticlip data check {path})" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)
    clips = _assign_splits(rows, protocol, seed)
    chosen = [clip for clip in clips if split in ("all", clip.split)]
    if not chosen:
        available = ", ".join(name for name in SPLITS if any(clip.split == name for clip in clips))
        raise UserError(f"{table}: no clips in split {split!r}, only in {available} — assign some rows to it")
    return chosen


def check(path: str | Path, videos: bool = True, protocol: str = "official", seed: int = 0) -> Report:
    """Read everything and list all problems at once, each with its row.

    Args:
        path: as for read_clips.
        videos: also open every file, to find empty, truncated and undecodable ones and those without video.
        protocol, seed: the split whose clips are counted and checked for leaks.

    Raises:
        UsageError, UserError: there is no table, or it cannot be read as one.
    """
    table, rows = _read_rows(Path(path), protocol)
    from senticlip.data.video import video_problems

    problems, warnings = [], []
    for row in rows:
        problems += row.problems
        warnings += row.warnings
        if videos and row.clip.video is not None and not row.problems:
            problems += [f"{table}, row {row.clip.row}: {fault}" for fault in video_problems(row.clip)]
    clips = _assign_splits(rows, protocol, seed)
    rows = [row._replace(clip=clip) for row, clip in zip(rows, clips, strict=True)]
    warnings += [*leaks(rows), *missing_content_warnings(table, clips)]
    if lacking := {"train", "valid"} - {clip.split for clip in clips}:
        warnings.append(f"{table}: no clip is in {' or '.join(sorted(lacking))}, so it cannot be used for training")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for clip in clips:
        if "M" in clip.labels:
            counts[clip.split or "none"][LABELS[polarity(clip.labels["M"])]] += 1
    splits = {name: {label: counts[name][label] for label in LABELS} for name in (*SPLITS, "none") if name in counts}
    return Report(len(rows), splits, problems, warnings)


def leaks(rows: list[_Row]) -> list[str]:
    """A line for each source video and each text that is in more than one split."""
    occurrences: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for clip, source, _, _ in rows:
        for kind, name in (("video", source), ("text", "".join((clip.text or "").split()))):
            if name and clip.split:
                occurrences[kind, name][clip.split].append(clip.row or 0)
    lines = []
    for (kind, name), splits in occurrences.items():
        if len(splits) > 1:
            where = ", ".join(f"{split} (row {splits[split][0]})" for split in SPLITS if split in splits)
            lines.append(f"{kind} {name!r} is in {len(splits)} splits: {where}")
    return lines


# ---- the splits


def _assign_splits(rows: list[_Row], protocol: str, seed: int) -> list[Clip]:
    """The clips, with their splits set according to the protocol."""
    if protocol == "official" and any(row.clip.split for row in rows):
        return [row.clip for row in rows]
    tenth = round(len(rows) / 10)
    # sorted below, so that the split depends on the clips and the seed, not on the order of the file
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row.source if protocol == "video" else _content_key(row.clip)].append(index)
    names = sorted(groups)
    random.Random(seed).shuffle(names)
    splits = ["train"] * len(rows)
    for split in ("test", "valid"):
        chosen, count = [], 0
        for name in names:
            if count + len(groups[name]) <= tenth:
                chosen.append(name)
                count += len(groups[name])
        # every video is larger than a tenth: take the smallest, if that leaves one for train
        if not chosen and tenth and len(names) > 1:
            chosen = [min(names, key=lambda name: len(groups[name]))]
        for name in chosen:
            names.remove(name)
            for index in groups[name]:
                splits[index] = split
    return [row.clip._replace(split=split) for row, split in zip(rows, splits, strict=True)]


def _content_key(clip: Clip) -> str:
    """A row's content without its row number, which is part of the id if rows share an id or file, or have neither."""
    name = clip.id.removesuffix(f"#{clip.row}").removesuffix(f"row {clip.row}")
    return "\n".join(map(str, (name, clip.start, clip.end, clip.text, sorted(clip.labels.items()))))


# ---- the table


def _read_rows(path: Path, protocol: str) -> tuple[Path, list[_Row]]:
    """The label file that was found and its rows."""
    if protocol not in PROTOCOLS:
        raise UsageError(f"protocol {protocol!r}: unknown — choose one of {', '.join(PROTOCOLS)}")
    candidates = [path / "label.csv", path / "meta.csv"] if path.is_dir() else [path]
    tables = [candidate for candidate in candidates if candidate.is_file()]
    is_feature_file = tables == [path] and path.suffix.lower() in FEATURE_SUFFIXES
    if is_feature_file or (not tables and (path / "Processed").is_dir()):
        return _rows_of_feature_file(path)
    if not tables and path.is_dir():
        raise UserError(f"{path}: has neither label.csv nor meta.csv — is this a CH-SIMS folder?")
    if not tables:
        raise UsageError(f"{path}: no such folder or CSV file")
    table = tables[0]
    records = read_table(table)
    columns, lines = columns_of(table, records)
    has_header, width = len(lines) < len(records), len(records[0].cells)
    if not lines:
        raise UserError(f"{table}: only a header — expected a row for each clip")
    found_by_ids = {"video_id", "clip_id"} <= columns.keys() and "path" not in columns
    find = _RawFolder(table).find if found_by_ids else _own_file_finder(table)
    rows = []
    seen: dict[str, int] = {}
    for line in lines:
        row = _parse_row(table, columns, line, find, protocol == "official")
        if has_header and any(line.cells[width:]):
            row.problems.append(f"{table}, row {line.row}: more cells than columns — is a text with a comma quoted?")
        # in the user's own table, rows may share a file; a CH-SIMS clip may occur only once
        if row.clip.id in seen and found_by_ids:
            row.problems.append(f"{table}, row {line.row}: {row.clip.id} is already in row {seen[row.clip.id]}")
        elif row.clip.id in seen:
            row = row._replace(clip=row.clip._replace(id=f"{row.clip.id}#{line.row}"))
        seen.setdefault(row.clip.id, line.row)
        rows.append(row)
    warnings = [f"{other}: ignored, since {table.name} is there, too" for other in tables[1:]]
    warnings += binary_label_warning(table, columns, lines)
    warnings += ignored_column_warnings(table, columns, records[0].cells) if has_header else []
    if protocol == "official" and "split" not in columns:
        warnings.append(f"{table}: no split column: a random tenth each becomes valid and test")
    rows[0].warnings.extend(warnings)
    return table, rows


def _rows_of_feature_file(path: Path) -> tuple[Path, list[_Row]]:
    """The clips of a feature file that has no table."""
    from senticlip.data.mmsa import feature_clips, feature_file

    file = feature_file(path)

    def source(name: str) -> str:  # an id may be the path of the user's own file
        return name if name.lower().endswith(VIDEO_SUFFIXES) else name.split("/")[0]

    return file, [_Row(clip, source(clip.id), [], []) for clip in feature_clips(file)]


def _parse_row(table: Path, columns: dict[str, int], line: Line, find: Any, official: bool) -> _Row:
    """One row of the table as a clip, with everything that is wrong with it."""
    where = f"{table}, row {line.row}"
    problems, warnings = [], []
    cells = {name: line.cells[index] if index < len(line.cells) else "" for name, index in columns.items()}
    width = max(columns.values()) + 1
    if len(line.cells) < width:
        problems.append(f"{where}: {len(line.cells)} columns instead of {width} — is a text with a comma quoted?")
    labels = {}
    for column, target in TARGET_COLUMNS.items():
        cell = cells.get(column, "")
        if (value := score(cell)) is not None:
            labels[target] = value
        elif cell or column == "label":
            problems.append(
                f"{where}, column {column}: {cell!r} is not a label — give -1 to 1, or negative/neutral/positive"
                ", 消极/中性/积极"
            )
    word = score(cells.get("annotation", ""))
    if word is not None and "M" in labels and polarity(word) != polarity(labels["M"]):
        warnings.append(f"{where}: label {labels['M']:g}, but annotation {cells['annotation']}")
    split = SPLIT_NAMES.get(cells.get("split", "").casefold())
    if official and "split" in columns and split is None:
        problems.append(f"{where}, column split/mode: {cells['split']!r} is unknown — choose from {', '.join(SPLITS)}")
    times: dict[str, float] = {}
    for column in ("start", "end"):
        if raw := cells.get(column):
            if (time := parse_finite(raw)) is None:
                problems.append(f"{where}, column {column}: {raw!r} is not a time in seconds")
            else:
                times[column] = time
    if times.get("start", 0.0) < 0:
        problems.append(f"{where}, column start: {times['start']:g} s is before the video starts")
    if times.get("end", math.inf) <= times.get("start", 0.0):
        problems.append(f"{where}, columns start and end: the segment ends at {times['end']:g} s, not after its start")
    video, name, source, faults = find(cells, line.row)
    problems += [f"{where}: {fault}" for fault in faults]
    text = None if cells.get("text", "") in EMPTY else cells["text"]
    if text is None and "text" in columns:
        warnings.append(f"{where}: no text")
    if text is None and video is None and not faults:
        problems.append(f"{where}: neither a video nor a text")
    clip = Clip(name, video, text, labels, split, line.row, times.get("start"), times.get("end"))
    return _Row(clip, source, problems, warnings)


class _RawFolder:
    """Finds ``Raw/VIDEO/CLIP.mp4`` by ids that may have lost their leading zeros; lists each folder only once."""

    def __init__(self, table: Path) -> None:
        self.root = table.parent / "Raw"
        self.exists = self.root.is_dir()
        if not self.exists and not (table.parent / "Processed").is_dir():
            raise UserError(f"{table.parent}: has neither Raw/ nor Processed/ — where are the clips?")
        self.folders = _entries_by_id(self.root, lambda path: path.is_dir()) if self.exists else {}
        self.files: dict[Path, dict[str, list[Path]]] = {}

    def find(self, cells: dict[str, str], row: int) -> tuple[Path | None, str, str, list[str]]:
        """The file, the clip's id ``VIDEO/CLIP`` as on disk, its source video, and what is wrong."""
        video, clip = cells["video_id"], cells["clip_id"]
        name = f"{video}/{clip}"
        if not video or not clip:
            return None, f"{name}#{row}", video, ["video_id or clip_id is empty"]
        if not self.exists:
            return None, name, video, []
        folder, fault = _pick_entry(self.folders, video, self.root)
        if folder is None:
            return None, name, video, [fault]
        if folder not in self.files:
            self.files[folder] = _entries_by_id(folder, lambda path: path.suffix.lower() in VIDEO_SUFFIXES)
        path, fault = _pick_entry(self.files[folder], clip, folder)
        if path is None:
            return None, name, folder.name, [fault]
        return path, f"{folder.name}/{path.stem}", folder.name, []


def _entries_by_id(folder: Path, keep: Callable[[Path], bool]) -> dict[str, list[Path]]:
    entries: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if keep(path):
            entries[without_zeros(path.name if path.is_dir() else path.stem)].append(path)
    return entries


def _pick_entry(entries: dict[str, list[Path]], name: str, folder: Path) -> tuple[Path | None, str]:
    """The one entry that matches ``name``, or None and why there is none."""
    stem = name.rsplit(".", 1)[0] if name.lower().endswith(VIDEO_SUFFIXES) else name
    matches = entries.get(without_zeros(name)) or entries.get(without_zeros(stem), [])
    exact = [path for path in matches if name in (path.stem, path.name)]
    if len(exact or matches) == 1:
        return (exact or matches)[0], ""
    if matches:
        return None, f"{name!r} matches {' and '.join(path.name for path in matches)} in {folder} — keep one"
    return None, f"{folder / name} does not exist"


def _own_file_finder(table: Path) -> Callable[[dict[str, str], int], tuple[Path | None, str, str, list[str]]]:
    """Finds the files of the user's own CSV; relative paths are relative to its folder."""

    def find(cells: dict[str, str], row: int) -> tuple[Path | None, str, str, list[str]]:
        name = cells.get("path", "")
        path, faults = None, []
        try:
            path = resolve_path(table.parent, str(Path(name).expanduser())) if name else None
            if path is not None and not path.is_file():
                faults = [f"{path} does not exist"]
        except (OSError, RuntimeError) as error:
            faults = [f"{name!r} cannot be a file name ({getattr(error, 'strerror', None) or error})"]
        clip = cells.get("id") or name or f"row {row}"
        return path, clip, cells.get("video_id") or (os.path.normpath(name) if name else clip), faults

    return find
