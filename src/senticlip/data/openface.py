"""OpenFace 2.0 ``FeatureExtraction`` CSVs → 709 columns a frame (Baltrusaitis et al. 2018)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from senticlip.data.cache import MISSING, Store, cached, file_key
from senticlip.structures import Clip, UserError

BEFORE = ("frame", "face_id", "timestamp", "confidence", "success")
WIDTH = 709


def read_openface(path: str | Path, limit: int | None = 55) -> np.ndarray:
    """The frames of one CSV in which a face was found, k×709 float32; k is 0 where there was none.

    Args:
        path: what ``FeatureExtraction -f CLIP.mp4`` wrote. Of several faces in a frame the surest counts.
        limit: at most so many frames, evenly spaced (MMSA's length on CH-SIMS is 55); None for all.

    Raises:
        UserError: no such file, not OpenFace's columns, a cell that is no finite number.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    header = [cell.strip() for cell in lines[0]] if lines else []
    missing = [name for name in ("frame", "confidence", "success") if name not in header]
    columns = [i for i, name in enumerate(header) if name not in BEFORE]
    if missing or len(columns) != WIDTH:
        raise UserError(
            f"{path}: {len(columns)} feature columns{' and no ' + missing[0] if missing else ''}, expected OpenFace's "
            f"{WIDTH} — run FeatureExtraction with all of its outputs (-2Dfp -3Dfp -pdmparams -pose -aus -gaze)"
        )
    frame, confidence, success = (header.index(name) for name in ("frame", "confidence", "success"))
    best: dict[float, tuple[float, np.ndarray]] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            cells = np.array(line, dtype=np.float64)
        except ValueError:
            raise UserError(f"{path}, row {number}: a cell is no number") from None
        if len(cells) != len(header):
            raise UserError(
                f"{path}, row {number}: {len(cells)} columns instead of {len(header)} — is the file cut off?"
            )
        if cells[success] != 1:
            continue  # no face: OpenFace writes zeros
        if not np.isfinite(cells).all():
            raise UserError(f"{path}, row {number}, column {header[int(np.argmin(np.isfinite(cells)))]}: not finite")
        if cells[frame] not in best or cells[confidence] > best[cells[frame]][0]:
            best[cells[frame]] = (cells[confidence], cells[columns].astype(np.float32))
    faces = [best[key][1] for key in sorted(best)]
    if limit and len(faces) > limit:
        faces = [faces[i] for i in np.linspace(0, len(faces) - 1, limit).round().astype(int)]
    return np.stack(faces) if faces else np.zeros((0, WIDTH), np.float32)


def openface_store(clips: list[Clip], folder: str | Path, root: Path) -> Store:
    """The rows of clips from ``FOLDER/VIDEO/CLIP.csv`` (or ``FOLDER/CLIP.csv``); a clip without a CSV is an empty row.

    Raises:
        UserError: not one CSV is there.
    """
    folder = Path(folder)
    found = [next((p for p in _places(folder, clip.id) if p.is_file()), None) for clip in clips]
    if clips and not any(found):
        raise UserError(f"{folder}: no OpenFace CSV for any clip, as {_places(folder, clips[0].id)[0]} would be")

    def compute(missing: list[int]) -> Iterator[np.ndarray]:
        for place in missing:
            path = found[place]
            assert path is not None
            yield read_openface(path)

    keys = [MISSING if path is None else file_key(path) for path in found]
    return cached(root, {"openface": 1}, keys, compute)


def _places(folder: Path, name: str) -> list[Path]:
    stem = name.rsplit(".", 1)[0] if name.lower().endswith((".mp4", ".avi", ".mkv", ".mov")) else name
    return [folder / f"{stem}.csv", folder / f"{Path(stem).name}.csv"]
