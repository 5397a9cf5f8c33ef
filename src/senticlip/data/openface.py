"""OpenFace 2.0 ``FeatureExtraction`` CSVs → 709 columns a frame (Baltrusaitis et al. 2018)."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from senticlip.data.cache import MISSING, Store, cached, file_keys, piece_key
from senticlip.data.table import VIDEO_SUFFIXES
from senticlip.structures import Clip, UserError

METADATA_COLUMNS = ("frame", "face_id", "timestamp", "confidence", "success")
WIDTH = 709


def read_openface(
    path: str | Path, limit: int | None = 55, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """The frames of one CSV in which a face was found, k×709 float32; k is 0 if there are none.

    Args:
        path: the output of ``FeatureExtraction -f CLIP.mp4``. Of several faces in a frame, the one with the highest
            confidence is taken.
        limit: at most so many frames, evenly spaced (MMSA's length on CH-SIMS is 55); None for all.
        start, end: the wanted piece in seconds, by the column ``timestamp``; the whole file by default.

    Raises:
        UserError: no such file, not OpenFace's columns, or a cell that is not a finite number.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    header = [cell.strip() for cell in lines[0]] if lines else []
    is_segment = start is not None or end is not None
    needed = ("frame", "confidence", "success", *(("timestamp",) if is_segment else ()))
    missing = [name for name in needed if name not in header]
    columns = [i for i, name in enumerate(header) if name not in METADATA_COLUMNS]
    if missing or len(columns) != WIDTH:
        raise UserError(
            f"{path}: {len(columns)} feature columns{' and no ' + missing[0] if missing else ''}, expected OpenFace's "
            f"{WIDTH} — run FeatureExtraction with all its outputs (-2Dfp -3Dfp -pdmparams -pose -aus -gaze)"
        )
    frame, confidence, success = (header.index(name) for name in ("frame", "confidence", "success"))
    best: dict[float, tuple[float, np.ndarray]] = {}
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        try:
            cells = np.array(line, dtype=np.float64)
        except ValueError:
            raise UserError(f"{path}, row {number}: a cell is not a number") from None
        if len(cells) != len(header):
            raise UserError(
                f"{path}, row {number}: {len(cells)} columns instead of {len(header)} — is the file cut off?"
            )
        if cells[success] != 1:
            continue  # no face: OpenFace writes zeros
        if is_segment and not (start or 0.0) <= cells[header.index("timestamp")] < (math.inf if end is None else end):
            continue
        if not np.isfinite(cells).all():
            raise UserError(f"{path}, row {number}, column {header[int(np.argmin(np.isfinite(cells)))]}: not finite")
        if cells[frame] not in best or cells[confidence] > best[cells[frame]][0]:
            best[cells[frame]] = (cells[confidence], cells[columns].astype(np.float32))
    faces = [best[key][1] for key in sorted(best)]
    if limit and len(faces) > limit:
        faces = [faces[i] for i in np.linspace(0, len(faces) - 1, limit).round().astype(int)]
    return np.stack(faces) if faces else np.zeros((0, WIDTH), np.float32)


def openface_store(clips: list[Clip], folder: str | Path, root: Path) -> Store:
    """The rows of clips from ``FOLDER/VIDEO/CLIP.csv``; a clip without a CSV gets an empty row.

    ``FOLDER/CLIP.csv`` also works if no other clip has that name. The pieces of a film share its CSV.

    Raises:
        UserError: no clip has a CSV.
    """
    folder = Path(folder)
    names = [_clip_name(clip) for clip in clips]
    owners: dict[str, set[str]] = defaultdict(set)
    for name in names:
        owners[Path(name).name].add(name)
    candidates = [[name, *([Path(name).name] if len(owners[Path(name).name]) == 1 else [])] for name in names]
    paths = [next((p for name in options if (p := folder / f"{name}.csv").is_file()), None) for options in candidates]
    if clips and not any(paths):
        raise UserError(f"{folder}: no OpenFace CSV for any clip — expected files such as {folder / names[0]}.csv")

    def compute(missing: list[int]) -> Iterator[np.ndarray]:
        for index in missing:
            path = paths[index]
            assert path is not None
            yield read_openface(path, start=clips[index].start, end=clips[index].end)

    hashes = file_keys([path for path in paths if path is not None], root)
    keys = [MISSING if p is None else piece_key(hashes[p], clip) for p, clip in zip(paths, clips, strict=True)]
    return cached(root, {"openface": 1}, keys, compute, "reading OpenFace")


def _clip_name(clip: Clip) -> str:
    """A clip's id without the video's suffix and without the row number that tells pieces of one file apart."""
    name = clip.id.removesuffix(f"#{clip.row}")
    return name.rsplit(".", 1)[0] if name.lower().endswith(VIDEO_SUFFIXES) else name
