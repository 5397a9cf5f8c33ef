"""Label tables as found in practice: UTF-8, a BOM, UTF-16, GBK or Big5; comma, tab or semicolon; long texts."""

from __future__ import annotations

import codecs
import csv
import io
import math
import os
import re
from collections import Counter
from itertools import islice, permutations
from pathlib import Path
from typing import Any, NamedTuple

from senticlip.structures import Clip, UsageError, UserError, polarity

LONGEST_CELL = 16 << 20
"""Most characters of a cell; csv's own limit (131,072) is less than what is said in a long film."""

SAMPLE = 100_000
"""Most characters from which the encoding of a file is guessed."""

EMPTY = ("", "nan", "NaN", "None", "null", "<NA>")
"""Cells that count as empty: all but the first are how pandas writes a missing value."""

VIDEO_SUFFIXES = (
    ".mp4", ".mkv", ".mov", ".avi", ".webm", ".flv", ".m4v", ".ts", ".mpg", ".wmv",
    ".mpeg", ".3gp", ".ogv", ".m2ts", ".mts", ".f4v",
)  # fmt: skip
FEATURE_SUFFIXES = (".pkl", ".pickle")
SPLITS = ("train", "valid", "test")

SPLIT_NAMES = {name: name for name in SPLITS} | {
    "training": "train", "训练": "train", "训练集": "train",
    "val": "valid", "dev": "valid", "validation": "valid", "验证": "valid", "验证集": "valid",
    "testing": "test", "测试": "test", "测试集": "test",
}  # fmt: skip
SCORES = {
    "negative": -1.0, "neg": -1.0, "消极": -1.0, "负面": -1.0, "负向": -1.0, "负": -1.0, "負面": -1.0, "消極": -1.0,
    "weakly negative": -0.5, "弱消极": -0.5, "弱负面": -0.5,
    "neutral": 0.0, "neu": 0.0, "中性": 0.0, "中立": 0.0, "中": 0.0,
    "positive": 1.0, "pos": 1.0, "积极": 1.0, "正面": 1.0, "正向": 1.0, "正": 1.0, "積極": 1.0,
    "weakly positive": 0.5, "弱积极": 0.5, "弱正面": 0.5,
}  # fmt: skip
COLUMN_ALIASES = {
    "mode": "split", "sentence": "text", "content": "text", "subtitle": "text", "label_m": "label",
    "video": "path", "file": "path", "t": "label_t", "a": "label_a", "v": "label_v",
    "文本": "text", "文字": "text", "字幕": "text", "台词": "text", "内容": "text", "文本内容": "text",
    "标签": "label", "情感": "label", "情感标签": "label", "情感类别": "label", "情感极性": "annotation",
    "標籤": "label", "編號": "id", "编号": "id", "文本标签": "label_t", "视频标签": "label_v", "视觉标签": "label_v",
    "音频标签": "label_a", "语音标签": "label_a",
    "路径": "path", "视频": "path", "文件": "path", "视频路径": "path", "video_path": "path", "filename": "path",
    "視頻": "path", "划分": "split", "劃分": "split", "数据划分": "split", "数据集划分": "split",
    "开始": "start", "结束": "end",
}  # fmt: skip
_SIMS_COLUMNS = ("video_id", "clip_id", "text", "label", "label_t", "label_a", "label_v", "annotation", "split")
_SEGMENT_COLUMNS = ("path", "start", "end")
_KNOWN_COLUMNS = {*_SIMS_COLUMNS, *_SEGMENT_COLUMNS, "id"}
TARGET_COLUMNS = {"label": "M", "label_t": "T", "label_a": "A", "label_v": "V"}

_TO_ASCII_SIGNS = str.maketrans("－−．＋", "--.+")


class Line(NamedTuple):
    """One record: its cells, stripped, and the line of the file on which it starts (from 1)."""

    row: int
    cells: list[str]


def decode(data: bytes, path: Path) -> str:
    """The text of a file of unknown encoding.

    Tried in order: a byte order mark; UTF-16, whose ASCII has zero bytes (a table has commas and line breaks); UTF-8,
    which hardly ever fits by accident; Big5, if its frequent characters suggest it; GB18030, which includes GBK.

    Raises:
        UserError: none of them fits, or it is an Excel workbook.
    """
    check_no_workbook(data, path)
    if (text := decode_marked(data)) is not None:
        return text
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
    try:
        return data.decode(guess_chinese_encoding(data))
    except UnicodeDecodeError:
        raise UserError(f"{path}, row {line}: neither UTF-8 nor GBK nor Big5 — save the file as UTF-8") from None


def check_no_workbook(data: bytes, path: Path) -> None:
    """Refuse Excel workbooks, whatever their name.

    Raises:
        UserError: it is one.
    """
    if data.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0")):
        raise UserError(f"{path}: is an Excel workbook or a zip file — save it as CSV UTF-8 (另存为 → CSV UTF-8)")


def delimiter_of(line: str) -> str:
    """The separator of a table's cells, judged by its first line: comma, tab or semicolon."""
    return max(",\t;", key=line.count)


def guess_chinese_encoding(data: bytes) -> str:
    """The encoding of data that is not UTF-8: Big5 if its frequent characters suggest it, else GB18030."""
    share, encoding = score_chinese_encodings(data)
    return encoding if share >= 0.5 else "gb18030"


def score_chinese_encodings(data: bytes) -> tuple[float, str]:
    """The share of frequent characters if decoded as GB18030 or as Big5, whichever is larger, and that encoding.

    Each decodes most files of the other, but to rare characters. On a tie, GB18030.
    """
    candidates: list[tuple[float, str]] = []
    for encoding, first, last in (("gb18030", 0xB0, 0xD7), ("cp950", 0xA4, 0xC6)):
        hits = re.finditer("[\u3040-\u30ff\u3400-\u9fff\ue000-\uf8ff\ufffd]", data.decode(encoding, errors="replace"))
        characters = [character[0] for character in islice(hits, SAMPLE)]
        frequent = sum(_first_byte(character, encoding) in range(first, last + 1) for character in characters)
        candidates.append(((frequent - 10 * characters.count("\ufffd")) / (len(characters) or 1), encoding))
    return max(candidates, key=lambda each: each[0])


def _first_byte(character: str, encoding: str) -> int:
    """The first byte of a character, which tells frequent from rare characters in GB2312 and Big5."""
    try:
        code = character.encode("gb2312" if encoding == "gb18030" else encoding)
    except UnicodeEncodeError:
        return 0
    return code[0]


def decode_marked(data: bytes) -> str | None:
    """The text if its first bytes identify the encoding; else None."""
    encoding = marked_encoding(data[:4000])
    return None if encoding is None else data.decode(encoding, errors="replace")


def marked_encoding(data: bytes) -> str | None:
    """The encoding identified by a byte order mark, or by the zero bytes of ASCII in UTF-16; else None."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            return encoding
    zeros = [data[start::2].count(0) / (len(data[start::2]) or 1) for start in (0, 1)]
    if max(zeros) <= 0.1:
        return None
    return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"


def resolve_path(folder: Path, name: str) -> Path:
    """The file that a table in ``folder`` names; Windows' a\\b.mp4 is taken as a/b.mp4 if no such file exists."""
    path = folder / name
    return path if "\\" not in name or os.path.exists(path) else folder / name.replace("\\", "/")


def read_table(path: Path) -> list[Line]:
    """The records of a CSV file, including its header (if any), without blank ones.

    Raises:
        UsageError: no such file. UserError: unreadable, empty, or a quote that is never closed.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read — {error.strerror}") from None
    text = decode(data, path).replace("\0", "").lstrip("\ufeff")  # some programs write a second mark
    delimiter = delimiter_of(text.lstrip("\r\n").split("\n", 1)[0])
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines, start = [], 1
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if any(stripped):
                lines.append(Line(start, stripped))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, row {start}: not readable as CSV ({error}) — is a quote left open?") from None
    if not lines:
        raise UserError(f"{path}: empty — expected a row for each clip")
    return lines


def columns_of(table: Path, lines: list[Line]) -> tuple[dict[str, int], list[Line]]:
    """The index of each column, by its header or its content, and the lines below the header.

    If the clips are named by ids (in a CH-SIMS folder, or without paths), path, start and end are left out.
    """
    first = lines[0].cells
    names = [COLUMN_ALIASES.get(cell.casefold(), cell.casefold()) for cell in first]
    if len(_KNOWN_COLUMNS & set(names)) >= min(2, len(names)):
        columns = {name: index for index, name in reversed(list(enumerate(names)))}
        lines = lines[1:]
        # in a CH-SIMS folder, "video" or "filename" may hold anything, and "start" the clip's place in the film
        if {"video_id", "clip_id"} <= columns.keys() and ("path" not in columns or (table.parent / "Raw").is_dir()):
            columns = {name: index for name, index in columns.items() if name not in _SEGMENT_COLUMNS}
    else:
        columns = _guess_columns(lines, table.parent / "Raw")
        columns = {} if _is_unknown_header(first, columns) else columns
    if "label" not in columns and "annotation" in columns:
        columns["label"] = columns["annotation"]
    has_ids = {"video_id", "clip_id"} <= set(columns)
    if "label" not in columns or not (has_ids or {"path", "text"} & set(columns)):
        raise UserError(
            f"{table}, row 1: has the columns {', '.join(first)} — expected video_id, clip_id, text, label, mode"
            " (CH-SIMS) or path, text, label (路径, 文本, 标签)"
        )
    return columns, lines


def _is_unknown_header(first: list[str], columns: dict[str, int]) -> bool:
    """Whether the first line is a header of unknown names: no number and no file in it, and no label where the other
    lines have theirs."""
    if any(parse_finite(cell) is not None or cell.casefold().endswith(VIDEO_SUFFIXES) for cell in first):
        return False
    index = next((column for name, column in columns.items() if name in ("label", "annotation")), len(first))
    return index < len(first) and score(first[index]) is None


def _guess_columns(lines: list[Line], raw: Path) -> dict[str, int]:
    """Columns of a table without a header: the ids by the files in ``raw`` that they name; the others in the usual
    order if it fits, else by their content."""
    sample = [line.cells for line in lines[:200]]
    width = Counter(map(len, sample)).most_common(1)[0][0]
    sample = [cells for cells in sample if len(cells) == width]

    def mostly(index: int, test: Any) -> bool:
        return sum(bool(test(cells[index])) for cells in sample) > 0.6 * len(sample)

    ids = _find_id_columns(raw, sample, width)
    kinds = {
        index: "id" if index in ids
        else "split" if mostly(index, lambda cell: cell.casefold() in SPLIT_NAMES)
        else "word" if mostly(index, lambda cell: cell.casefold() in SCORES)
        else "score" if mostly(index, lambda cell: score(cell) is not None)
        else "path" if mostly(index, lambda cell: cell.casefold().endswith(VIDEO_SUFFIXES))
        else "other"
        for index in range(width)
    }  # fmt: skip
    usual = ["other", "any", "any", "score", "score", "score", "score", "word", "split"]
    if not ids and width == len(usual) and all(usual[i] in ("any", kinds[i]) for i in range(width)):
        return {name: index for index, name in enumerate(_SIMS_COLUMNS)}
    columns: dict[str, int] = {}
    of_kind = {kind: [i for i in kinds if kinds[i] == kind] for kind in ("split", "word", "score", "path", "other")}
    for name, kind in (("split", "split"), ("path", "path"), ("annotation", "word")):
        if of_kind[kind]:
            columns[name] = of_kind[kind][0]
    columns |= dict(zip(TARGET_COLUMNS, of_kind["score"], strict=False))
    # the text column has the most Chinese characters, else the most characters; the ids come in the order video, clip
    rest = of_kind["other"]
    if rest:
        columns["text"] = max(rest, key=lambda index: _text_richness([cells[index] for cells in sample]))
        ids = ids or [index for index in rest if index != columns["text"]]
    return columns | dict(zip(("video_id", "clip_id"), ids, strict=False))


def _find_id_columns(raw: Path, sample: list[list[str]], width: int) -> list[int]:
    """The columns of video and clip ids, by the files in ``raw``: a clip id may look like a label. Empty if unknown."""
    existing = {(without_zeros(file.parent.name), without_zeros(file.stem)) for file in raw.glob("*/*")}
    counts: Counter[tuple[int, int]] = Counter()
    for cells in sample:
        names = [without_zeros(cell) for cell in cells]
        counts.update(pair for pair in permutations(range(width), 2) if (names[pair[0]], names[pair[1]]) in existing)
    return [index for pair, rows in counts.most_common(1) if rows > 0.6 * len(sample) for index in pair]


def _text_richness(cells: list[str]) -> tuple[int, int]:
    """The numbers of different Chinese characters, and of different characters, per cell, summed over a column."""
    return sum(len(set(re.findall("[\u4e00-\u9fff]", cell))) for cell in cells), sum(len(set(cell)) for cell in cells)


def without_zeros(name: str) -> str:
    """An id without leading zeros: ``1``, ``1.0`` and ``0001`` become equal, as do ``video_1`` and ``video_0001``, but
    not ``2.5`` and ``2.05``."""
    return re.sub(r"(?<!\d)(?<!\d\.)0*(\d+)", r"\1", re.sub(r"^(\d+)\.0$", r"\1", name.strip()))


def score(cell: str) -> float | None:
    """The score of a label, which is a number from -1 to 1 or a word; None if it is neither."""
    if cell.casefold() in SCORES:
        return SCORES[cell.casefold()]
    value = parse_finite(cell)
    return value if value is not None and -1 <= value <= 1 else None


def canonical_split(name: str | None) -> str:
    """The split that a name means (``valid`` for ``val``, …); ``all`` for None; an unknown name is returned as is."""
    return "all" if name is None else SPLIT_NAMES.get(name.casefold(), name)


def parse_finite(cell: str) -> float | None:
    """The cell as a finite number, also with a typographic minus or in full width (－０．５); else None."""
    try:
        value = float(cell.translate(_TO_ASCII_SIGNS))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def ignored_column_warnings(table: Path, columns: dict[str, int], header: list[str]) -> list[str]:
    """Warnings that name the columns not read: otherwise, a misnamed path column would go unnoticed.

    Of two columns with the same meaning, the first is read.
    """
    ignored, overruled = [], []
    for index, cell in enumerate(header):
        name = COLUMN_ALIASES.get(cell.casefold(), cell.casefold())
        if name in _SEGMENT_COLUMNS and name not in columns:
            overruled.append(cell)
        elif cell and (name not in _KNOWN_COLUMNS or columns[name] != index):
            ignored.append(cell)
    by_message = {"ignored columns": ignored, "ignored columns, since video_id and clip_id name whole files": overruled}
    return [f"{table}: {message}: {', '.join(cells)}" for message, cells in by_message.items() if cells]


def binary_label_warning(table: Path, columns: dict[str, int], lines: list[Line]) -> list[str]:
    """A warning if all labels are 0 or 1: many people write negative as 0."""
    index = columns["label"]
    if {parse_finite(line.cells[index]) for line in lines if any(line.cells[index : index + 1])} != {0.0, 1.0}:
        return []
    message = f"{table}: labels are only 0 and 1: 0 is neutral, 1 positive"
    return [f"{message} — if 0 means negative, write words (negative/positive)"]


def missing_content_warnings(table: Path, clips: list[Clip]) -> list[str]:
    """Warnings about what no clip has: a negative or a positive label, a video, a text."""
    scores = {clip.labels["M"] for clip in clips if "M" in clip.labels}
    signs = set() if scores <= {0.0, 1.0} else set(map(polarity, scores))  # binary_label_warning warns of 0 and 1
    missing = [
        f"no label is {side} 0 (neutral) — labels range from -1 (negative) to 1 (positive)"
        for side, sign in (("below", 0), ("above", 2))
        if signs and sign not in signs
    ]
    missing += ["no clip has a video"] if table.suffix == ".csv" and not any(clip.video for clip in clips) else []
    missing += [] if any(clip.text for clip in clips) else ["no clip has a text"]
    return [f"{table}: {message}" for message in missing]
