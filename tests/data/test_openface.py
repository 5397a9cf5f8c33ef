"""Reading CSVs that are written here in OpenFace's format."""

from __future__ import annotations

import numpy as np
import pytest

from senticlip.data.openface import WIDTH, openface_store, read_openface
from senticlip.structures import Clip, UserError

HEADER = ["frame", " face_id", " timestamp", " confidence", " success", *[f" f_{i}" for i in range(WIDTH)]]


def write(path, rows, header=HEADER):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [", ".join(header)] + [", ".join(map(str, row)) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def row(frame, value, success=1, confidence=0.9, face=0):
    return [frame, face, frame / 25, confidence, success, *[value] * WIDTH]


def test_frames_without_face_are_dropped_and_most_confident_face_is_kept(tmp_path):
    rows = [row(1, 1.5), row(2, 0, success=0), row(3, 7, confidence=0.5), row(3, 3, confidence=0.8, face=1), row(4, 4)]
    frames = read_openface(write(tmp_path / "a.csv", rows))
    assert frames.shape == (3, WIDTH)
    assert frames[:, 0].tolist() == [1.5, 3, 4]
    assert read_openface(write(tmp_path / "b.csv", [row(1, 0, success=0)])).shape == (0, WIDTH)
    assert read_openface(write(tmp_path / "c.csv", [])).shape == (0, WIDTH)
    with (tmp_path / "a.csv").open("a") as file:
        file.write("\n\n")
    assert np.array_equal(read_openface(tmp_path / "a.csv"), frames)


def test_long_clip_is_subsampled_evenly(tmp_path):
    frames = read_openface(write(tmp_path / "a.csv", [row(i, i) for i in range(1, 101)]), limit=5)
    assert frames[:, 0].tolist() == [1, 26, 50, 75, 100] or frames[:, 0].tolist() == [1, 26, 51, 75, 100]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([row(1, 1)], HEADER[:-1], "708 feature columns, expected OpenFace's 709"),
        ([row(1, 1)], ["a", "b"], "no frame"),
        ([], [], "0 feature columns and no frame"),
        ([row(1, 1), row(2, 1)[:-3]], HEADER, "row 3: 711 columns instead of 714"),
        ([row(1, "x")], HEADER, "row 2: a cell is not a number"),
        ([row(1, "nan")], HEADER, "row 2, column f_0: not finite"),
    ],
)
def test_malformed_csv_is_rejected(tmp_path, rows, header, message):
    with pytest.raises(UserError, match=message):
        read_openface(write(tmp_path / "a.csv", rows, header))


def test_store_finds_the_csv_of_each_clip(tmp_path):
    write(tmp_path / "faces" / "video_0001" / "0001.csv", [row(1, 1), row(2, 2)])
    clips = [Clip("video_0001/0001"), Clip("video_0001/0002")]
    values, mask = openface_store(clips, tmp_path / "faces", tmp_path / "cache").gather(np.array([0, 1]))
    assert mask.tolist() == [[True, True], [False, False]]
    assert values[0, :, 5].tolist() == [1, 2]
    with pytest.raises(UserError, match="no OpenFace CSV for any clip"):
        openface_store(clips[1:], tmp_path / "faces", tmp_path / "cache")


def test_segments_of_film_share_its_csv(tmp_path):
    write(tmp_path / "film.csv", [row(i, i) for i in range(1, 101)])  # 25 frames per second
    clips = [Clip("film.mp4", row=2, start=0.0, end=1.0), Clip("film.mp4#3", row=3, start=1.0, end=3.0)]
    values, mask = openface_store(clips, tmp_path, tmp_path / "cache").gather(np.array([0, 1]))
    assert values[0, mask[0], 0].tolist() == list(range(1, 25))
    assert values[1, mask[1], 0].tolist() == list(range(25, 75))
    without_timestamp = write(
        tmp_path / "bare.csv", [row(1, 1)], [name.replace("timestamp", "time") for name in HEADER]
    )
    with pytest.raises(UserError, match="no timestamp"):
        read_openface(without_timestamp, start=1.0)


def test_only_video_suffixes_are_removed_from_clip_names(tmp_path):
    for name in ("FILM", "news.1/0001"):
        write(tmp_path / f"{name}.csv", [row(1, 1)])
    clips = [Clip("FILM.MP4"), Clip("news.1/0001"), Clip("news.2/0001")]
    _, mask = openface_store(clips, tmp_path, tmp_path / "cache").gather(np.array([0, 1, 2]))
    assert mask.sum(1).tolist() == [1, 1, 0]


def test_csv_in_root_folder_needs_unique_clip_name(tmp_path):
    write(tmp_path / "0001.csv", [row(1, 1)])
    write(tmp_path / "0002.csv", [row(1, 2)])
    clips = [Clip("video_0001/0001"), Clip("video_0002/0001"), Clip("video_0002/0002")]
    _, mask = openface_store(clips, tmp_path, tmp_path / "cache").gather(np.array([0, 1, 2]))
    assert mask.sum(1).tolist() == [0, 0, 1]


def test_frames_are_sorted_by_number(tmp_path):
    frames = read_openface(write(tmp_path / "a.csv", [row(3, 3), row(1, 1), row(2, 2)]))
    assert frames[:, 0].tolist() == [1, 2, 3]
