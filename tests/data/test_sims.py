"""The reader of CH-SIMS folders and CSV files: any table layout gives the same clips; every error names its row."""

import csv
import io
import pickle
import random
import re
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from senticlip.data.sims import check, read_clips
from senticlip.data.table import EMPTY, SPLITS, score, without_zeros
from senticlip.structures import LABELS, UsageError, UserError, polarity

COLUMNS = ["video_id", "clip_id", "text", "label", "label_T", "label_A", "label_V", "annotation", "mode"]
ANNOTATIONS = {-1: "Negative", 0: "Neutral", 1: "Positive"}
TEXTS = st.text("好坏不是今天很高兴难过，。,\"'\n abc", min_size=1, max_size=12).map(lambda text: text.strip() or "好")


@st.composite
def tables(draw):
    """Rows of a CH-SIMS table: a few videos with a few clips each."""
    rows = []
    for video in range(1, draw(st.integers(1, 4)) + 1):
        for clip in range(1, draw(st.integers(1, 4)) + 1):
            scores = draw(st.lists(st.integers(-5, 5).map(lambda k: k / 5), min_size=4, max_size=4))
            annotation = ANNOTATIONS[(scores[0] > 0) - (scores[0] < 0)]
            mode = draw(st.sampled_from(["train", "valid", "test"]))
            rows.append([f"video_{video:04}", f"{clip:04}", draw(TEXTS), *map(str, scores), annotation, mode])
    return rows


def write_folder(folder: Path, rows, order=None, header=True, leading_zeros=True, encoding="utf-8", name="label.csv"):
    for row in rows:
        path = folder / "Raw" / row[0] / f"{row[1]}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    order = order or list(range(len(COLUMNS)))
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    if header:
        writer.writerow([COLUMNS[i] for i in order])
    for row in rows:
        cells = row if leading_zeros else [row[0], str(int(row[1])), *row[2:]]
        writer.writerow([cells[i] for i in order])
    (folder / name).write_bytes(buffer.getvalue().encode(encoding))
    return folder


def sims_folder(tmp_path: Path, *lines: str) -> Path:
    """A CH-SIMS folder with video_0001/0001..0003 and a label.csv of the usual header and the given lines."""
    for clip in (1, 2, 3):
        path = tmp_path / "Raw" / "video_0001" / f"000{clip}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "label.csv").write_text("\n".join([",".join(COLUMNS), *lines]), encoding="utf-8")
    return tmp_path


def write_video(path: Path) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for shade in range(0, 200, 20):
            picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, np.uint8), format="rgb24")
            out.mux(stream.encode(picture))
        out.mux(stream.encode())


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        out.mux(stream.encode(sound))
        out.mux(stream.encode())


GOOD_ROW = "video_0001,0001,今天很好,1.0,0.6,1.0,0.4,Positive,train"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=tables(),
    order=st.permutations(range(len(COLUMNS))),
    leading_zeros=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "gbk", "utf-16"]),
    name=st.sampled_from(["label.csv", "meta.csv"]),
)
def test_table_layout_and_encoding_do_not_matter(tmp_path_factory, rows, order, leading_zeros, encoding, name):
    folder = write_folder(tmp_path_factory.mktemp("sims"), rows, list(order), True, leading_zeros, encoding, name)
    clips = read_clips(folder)
    assert [clip.id for clip in clips] == [f"{row[0]}/{row[1]}" for row in rows]
    assert [clip.text for clip in clips] == [row[2] for row in rows]
    assert [clip.split for clip in clips] == [row[8] for row in rows]
    assert [list(clip.labels.values()) for clip in clips] == [[float(cell) for cell in row[3:7]] for row in rows]
    assert all(clip.video == folder / "Raw" / f"{clip.id}.mp4" for clip in clips)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=tables(), leading_zeros=st.booleans(), encoding=st.sampled_from(["utf-8", "utf-8-sig", "gbk"]))
def test_headerless_table_in_usual_column_order(tmp_path_factory, rows, leading_zeros, encoding):
    folder = write_folder(tmp_path_factory.mktemp("sims"), rows, None, False, leading_zeros, encoding)
    assert [clip.id for clip in read_clips(folder)] == [f"{row[0]}/{row[1]}" for row in rows]
    assert [clip.text for clip in read_clips(folder)] == [row[2] for row in rows]


def test_headerless_table_in_other_column_order(tmp_path):
    rng = random.Random(0)
    rows = []
    for clip in range(40):
        value = rng.choice([-1.0, -0.4, 0.0, 0.8])
        annotation = ANNOTATIONS[(value > 0) - (value < 0)]
        scores = [str(value), "0.2", "-0.2", "0.0"]
        rows.append(
            [f"aqgy3_{clip // 20:04}", f"{clip % 20:05}", f"今天天气很好第{clip}句", *scores, annotation, "train"]
        )
    folder = write_folder(tmp_path, rows, [8, 2, 0, 1, 7, 3, 4, 5, 6], header=False, name="meta.csv")
    clips = read_clips(folder)
    assert [clip.id for clip in clips] == [f"{row[0]}/{row[1]}" for row in rows]
    assert [clip.text for clip in clips] == [row[2] for row in rows]
    assert [clip.labels["M"] for clip in clips] == [float(row[3]) for row in rows]


@pytest.mark.parametrize("leading_zeros", [True, False])
@pytest.mark.parametrize("order", [
    [0, 1, 2, 3, 8], [0, 1, 2, 3, 7, 8], [0, 1, 2, 3, 4, 5, 6, 8], [1, 0, 2, 3, 4, 5, 6, 7, 8],
    [2, 0, 1, 3, 4, 5, 6, 7, 8], [0, 2, 1, 3, 4, 5, 6, 7, 8], [8, 3, 2, 1, 0], [3, 0, 1, 2, 8],
])  # fmt: skip
def test_headerless_ids_that_look_like_labels(tmp_path, order, leading_zeros):
    """Each video has one clip, 0001, which could be a label: the files in Raw/ show which columns hold ids."""
    rows = []
    for video in range(1, 31):
        value = video % 3 - 1
        rows.append(
            [
                f"video_{video:04}",
                "0001",
                f"今天天气很好第{video}句",
                *[str(float(value))] * 4,
                ANNOTATIONS[value],
                "train",
            ]
        )
    clips = read_clips(write_folder(tmp_path, rows, order, header=False, leading_zeros=leading_zeros))
    assert [clip.video for clip in clips] == [tmp_path / "Raw" / row[0] / "0001.mp4" for row in rows]
    assert [clip.text for clip in clips] == [row[2] for row in rows]
    assert [clip.labels["M"] for clip in clips] == [float(row[3]) for row in rows]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=tables(), seed=st.integers(0, 5), protocol=st.sampled_from(["tenth", "video"]))
def test_random_protocols_are_reproducible_in_any_row_order(tmp_path_factory, rows, seed, protocol):
    folder = write_folder(tmp_path_factory.mktemp("sims"), rows)
    clips = read_clips(folder, protocol=protocol, seed=seed)
    assert clips == read_clips(folder, protocol=protocol, seed=seed)
    reversed_folder = write_folder(folder, rows[::-1])
    assert {c.id: c.split for c in read_clips(reversed_folder, protocol=protocol, seed=seed)} == {
        c.id: c.split for c in clips
    }
    tenth = round(len(rows) / 10)
    if protocol == "tenth":
        assert [sum(c.split == name for c in clips) for name in ("valid", "test")] == [tenth, tenth]
    else:
        split_of_video = {c.id.split("/")[0]: c.split for c in clips}
        assert all(split_of_video[c.id.split("/")[0]] == c.split for c in clips)
    assert any(c.split == "train" for c in clips)


def test_split_names_and_their_aliases(tmp_path):
    folder = sims_folder(tmp_path, GOOD_ROW, GOOD_ROW.replace("0001,今", "0002,今").replace("train", "test"))
    assert [clip.id for clip in read_clips(folder, "test")] == ["video_0001/0002"]
    for name in ("valid", "val", "dev", "Validation"):  # other names that tables use
        with pytest.raises(UserError, match=r"no clips in split 'valid', only in train, test"):
            read_clips(folder, name)
    for wrong in ("dev2", ""):  # the empty one, as from an unset shell variable
        with pytest.raises(UsageError, match=f"split '{wrong}': unknown — choose one of train, valid, test"):
            read_clips(folder, wrong)
    with pytest.raises(UsageError, match="protocol"):
        read_clips(folder, protocol="fifth")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("video_0001,0002,好,great,,,,,train", "row 3, column label: 'great' is not a label"),
        ("video_0001,0002,好,1.4,,,,,train", "row 3, column label: '1.4' is not a label"),
        ("video_0001,0002,好,nan,,,,,train", "row 3, column label: 'nan' is not a label"),
        ("video_0001,0002,好,,,,,,train", "row 3, column label: '' is not a label"),
        ("video_0001,0002,好,0.2,x,,,,train", "row 3, column label_t: 'x' is not a label"),
        ("video_0001,0002,好,0.2,,,,,third", "row 3, column split/mode: 'third' is unknown — choose from train, valid"),
        ("video_0001,0009,好,0.2,,,,,train", "0009 does not exist"),
        ("video_0007,0001,好,0.2,,,,,train", "video_0007 does not exist"),
        ("video_0001,1,好,0.2,,,,,train", "row 3: video_0001/0001 is already in row 2"),
        ("video_0001,0002,好", "row 3: 3 columns instead of 9"),
        (",0002,好,0.2,,,,,train", "row 3: video_id or clip_id is empty"),
    ],
)
def test_errors_name_their_row(tmp_path, line, message):
    folder = sims_folder(tmp_path, GOOD_ROW, line)
    with pytest.raises(UserError) as error:
        read_clips(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert any(message in problem for problem in check(folder, videos=False).problems)


def test_check_lists_all_problems_and_warnings(tmp_path):
    folder = sims_folder(
        tmp_path,
        GOOD_ROW,
        "video_0001,0002,今天很好,0.0,,,,Positive,test",
        "video_0001,0003,,-0.2,,,,,dev",
        "video_0001,0004,好,bad,,,,,nowhere",
    )
    report = check(folder, videos=False)
    assert report.clips == 4
    assert report.splits == {
        "train": dict.fromkeys(LABELS, 0) | {"positive": 1},
        "valid": dict.fromkeys(LABELS, 0) | {"negative": 1},
        "test": dict.fromkeys(LABELS, 0) | {"neutral": 1},
    }
    assert len(report.problems) == 3
    assert all("row 5" in problem for problem in report.problems)
    warnings = "\n".join(report.warnings)
    assert "video 'video_0001' is in 3 splits: train (row 2), valid (row 4), test (row 3)" in warnings
    assert "text '今天很好' is in 2 splits: train (row 2), test (row 3)" in warnings
    assert "row 3: label 0, but annotation Positive" in warnings
    assert "row 4: no text" in warnings
    assert set(report._fields) == {"clips", "splits", "problems", "warnings"}


def test_no_leak_warning_within_one_split(tmp_path):
    (warning,) = check(sims_folder(tmp_path, GOOD_ROW, GOOD_ROW.replace("0001,今", "0002,今")), videos=False).warnings
    assert warning == f"{tmp_path}/label.csv: no clip is in valid, so it cannot be used for training"


def test_video_protocol_has_no_video_leak(tmp_path):
    rows = [
        [f"v_{i:02}", f"{j:02}", f"句{i}{j}", "0", "0", "0", "0", "Neutral", "train"] for i in range(20) for j in (1, 2)
    ]
    folder = write_folder(tmp_path, rows)
    assert not any("splits" in warning for warning in check(folder, videos=False, protocol="video").warnings)
    assert any("video" in warning for warning in check(folder, videos=False, protocol="tenth").warnings)


def test_check_finds_broken_videos(tmp_path):
    lines = [GOOD_ROW.replace("0001,今", f"000{clip},今") for clip in (1, 2, 3, 4, 5)]
    folder = sims_folder(tmp_path, *lines[:3])
    (folder / "label.csv").write_text("\n".join([",".join(COLUMNS), *lines]), encoding="utf-8")
    video_folder = folder / "Raw" / "video_0001"
    write_video(video_folder / "0001.mp4")
    (video_folder / "0002.mp4").write_bytes(b"")
    (video_folder / "0003.mp4").write_bytes(b"no video at all")
    (video_folder / "0004.mp4").write_bytes((video_folder / "0001.mp4").read_bytes()[:-300])
    write_sound(video_folder / "0005.mp4")
    problems = check(folder).problems
    assert len(problems) == 4
    for row, (problem, fault) in enumerate(zip(problems, ("empty", "not a video", "cut off", "no video"), strict=True)):
        assert f"row {row + 3}: " in problem
        assert fault in problem
        assert "\n" not in problem
    assert check(folder, videos=False).problems == []


def test_folder_with_features_but_no_videos(tmp_path):
    folder = sims_folder(tmp_path, GOOD_ROW)
    (folder / "Processed").mkdir()
    (folder / "Processed" / "unaligned_39.pkl").write_bytes(b"")
    (folder / "Raw").rename(folder / "elsewhere")
    (clip,) = read_clips(folder)
    assert clip.video is None
    assert clip.id == "video_0001/0001"


def test_unknown_header_is_not_read_as_row(tmp_path):
    table = tmp_path / "own.csv"
    rows = ["今天很好,0.5", "今天很坏,-0.5", "今天,0"]
    table.write_text("\n".join(["transcript,sentiment", *rows]), encoding="utf-8")
    with pytest.raises(UserError, match=r"row 1: has the columns transcript, sentiment — expected .* path, text"):
        read_clips(table)
    table.write_text("\n".join(rows), encoding="utf-8")
    assert [clip.text for clip in read_clips(table)] == ["今天很好", "今天很坏", "今天"]


def test_missing_and_unreadable_tables(tmp_path):
    with pytest.raises(UsageError, match="no such folder or CSV"):
        read_clips(tmp_path / "none")
    with pytest.raises(UserError, match=r"has neither label\.csv nor meta\.csv"):
        read_clips(tmp_path)
    (tmp_path / "label.csv").write_text("")
    with pytest.raises(UserError, match="empty"):
        read_clips(tmp_path)
    (tmp_path / "label.csv").write_text(",".join(COLUMNS))
    with pytest.raises(UserError, match="only a header"):
        read_clips(tmp_path)
    (tmp_path / "label.csv").write_text(GOOD_ROW)
    with pytest.raises(UserError, match="neither Raw/ nor Processed/"):
        read_clips(tmp_path)
    for header, row in (("name,Age", "a,3"), ("a,b", "1,2"), ("A,mode", "")):  # the message spells them as in the file
        (tmp_path / "label.csv").write_text(f"{header}\n{row}")
        message = f"row 1: has the columns {header.replace(',', ', ')} — expected video_id, clip_id, text, label, mode"
        with pytest.raises(UserError, match=re.escape(message)):
            read_clips(tmp_path)
    (tmp_path / "label.csv").write_text('path,text,label\na.mp4,"open,1')
    with pytest.raises(UserError, match=r"row 2.*quote"):
        read_clips(tmp_path)
    (tmp_path / "label.csv").write_bytes(b"path,text,label\na.mp4,\xff\xff,1")
    with pytest.raises(UserError, match="row 2: neither UTF-8 nor GBK"):
        read_clips(tmp_path)


def test_id_that_matches_two_files(tmp_path):
    folder = sims_folder(tmp_path, GOOD_ROW.replace("0001,今", "01,今"))
    (folder / "Raw" / "video_0001" / "1.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match=r"matches 0001\.mp4 and 1\.mp4"):
        read_clips(folder)


def test_own_csv(tmp_path):
    (tmp_path / "clips").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "clips" / f"{name}.mp4").write_bytes(b"x")
    table = tmp_path / "mine.csv"
    table.write_text(
        "label,path,text\n积极,clips/a.mp4,好\nneutral,clips/b.mp4,\n-0.4,clips/c.mp4,坏\n", encoding="gbk"
    )
    clips = read_clips(table)
    assert [clip.labels for clip in clips] == [{"M": 1.0}, {"M": 0.0}, {"M": -0.4}]
    assert [clip.text for clip in clips] == ["好", None, "坏"]
    assert clips[0].video == tmp_path / "clips" / "a.mp4"


def test_missing_split_column_draws_tenths(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text("path,text,label\n" + "".join(f",好{i},{i % 3 - 1}\n" for i in range(30)), encoding="utf-8")
    assert [clip.split for clip in read_clips(table)] == [clip.split for clip in read_clips(table, None, "tenth")]
    assert [len(read_clips(table, split)) for split in ("train", "valid", "test", "all")] == [24, 3, 3, 30]
    assert read_clips(table, "test", seed=1) != read_clips(table, "test")
    report = check(table, videos=False)
    assert [sum(counts.values()) for counts in report.splits.values()] == [24, 3, 3]
    assert [line for line in report.warnings if "no split column" in line]
    table.write_text("path,text,label\n,好,1\n", encoding="utf-8")
    with pytest.raises(UserError, match="no clips in split 'test', only in train"):
        read_clips(table, "test")


def test_own_csv_with_splits_segments_and_errors(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"x")
    table = tmp_path / "mine.csv"
    table.write_text(
        "path\ttext\tlabel\tsplit\tstart\tend\n"
        "film.mp4\t好\tpositive\ttraining\t0\t1.5\n"
        "film.mp4\t坏\t消极\t测试\t1.5\t3\n"
        "gone.mp4\t坏\t消极\t测试\tx\t3\n",
        encoding="utf-8",
    )
    report = check(table, videos=False)
    assert len(report.problems) == 2
    assert "row 4, column start: 'x'" in report.problems[0]
    assert "gone.mp4 does not exist" in report.problems[1]
    table.write_text("\n".join(table.read_text(encoding="utf-8").split("\n")[:3]), encoding="utf-8")
    first, second = read_clips(table)
    assert (first.start, first.end, first.split) == (0.0, 1.5, "train")
    assert (second.start, second.end, second.split) == (1.5, 3.0, "test")
    assert first.id != second.id
    assert "video 'film.mp4' is in 2 splits: train (row 2), test (row 3)" in check(table, videos=False).warnings


def test_csv_with_texts_only(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text("text,label\n好,1\n坏,-1\n", encoding="utf-8")
    assert [clip.video for clip in read_clips(table)] == [None, None]


@given(st.integers(0, 99999), st.integers(1, 8))
def test_without_zeros_removes_leading_zeros_only(number, width):
    assert without_zeros(f"{number:0{width}}") == without_zeros(str(number)) == without_zeros(f"{number}.0")
    assert without_zeros(f"video_{number:0{width}}") == without_zeros(f"video_{number}")
    fractions = {f"2.{'0' * zeros}{number}" for zeros in range(width)}
    assert len({without_zeros(f"d{fraction}") for fraction in fractions}) == len(fractions)


def test_missing_clip_is_not_matched_to_similar_name(tmp_path):
    rows = [["BVx", name, f"好{name}", "1", "1", "1", "1", "Positive", "train"] for name in ("aB", "d2.05", "c1")]
    folder = write_folder(tmp_path, rows)
    text = (folder / "label.csv").read_text(encoding="utf-8")
    text = text.replace("BVx,aB", "BVx,Ab").replace("BVx,d2.05", "BVx,d2.5").replace("BVx,c1", "BVx,c01")
    (folder / "label.csv").write_text(text, encoding="utf-8")
    videos = folder / "Raw" / "BVx"
    problems = check(folder, videos=False).problems
    assert [line.split(": ")[1] for line in problems] == [f"{videos / name} does not exist" for name in ("Ab", "d2.5")]


def test_clip_id_may_be_file_name(tmp_path):
    folder = sims_folder(tmp_path, GOOD_ROW.replace("0001,今", "0001.mp4,今"), GOOD_ROW.replace("0001,今", "2.MP4,今"))
    assert [clip.id for clip in read_clips(folder)] == ["video_0001/0001", "video_0001/0002"]
    (folder / "Raw" / "video_0001" / "0001.mkv").write_bytes(b"x")
    assert read_clips(folder)[0].video == folder / "Raw" / "video_0001" / "0001.mp4"


@pytest.mark.parametrize("suffix", [".mpeg", ".3gp", ".m2ts", ".mts"])
def test_less_common_video_suffixes(suffix, tmp_path):
    folder = sims_folder(tmp_path, GOOD_ROW)
    (folder / "Raw" / "video_0001" / "0001.mp4").unlink()
    write_video(folder / "Raw" / "video_0001" / f"0001{suffix}")
    assert check(folder).problems == []
    assert read_clips(folder)[0].id == "video_0001/0001"


@pytest.mark.parametrize("column", ["video", "filename", "file", "path", "start", "end", "开始"])
def test_ids_take_precedence_over_paths_and_times_in_sims_folder(column, tmp_path):
    folder = sims_folder(tmp_path, f"{GOOD_ROW},00:12", GOOD_ROW.replace("0001,今", "0002,今") + ",99")
    table = folder / "label.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("mode", f"mode,{column}"), encoding="utf-8")
    first, second = read_clips(folder)
    assert [first.id, second.id] == ["video_0001/0001", "video_0001/0002"]
    assert {(clip.start, clip.end) for clip in (first, second)} == {(None, None)}
    warning = f"{table}: ignored columns, since video_id and clip_id name whole files: {column}"
    assert warning in check(folder, videos=False).warnings


def test_paths_take_precedence_over_ids_without_raw_folder(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"x")
    table = tmp_path / "mine.csv"
    table.write_text("video_id,clip_id,path,text,label,start,end\nfilm,1,film.mp4,好,1,2,3\n", encoding="utf-8")
    (clip,) = read_clips(table)
    assert (clip.video, clip.start, clip.end) == (tmp_path / "film.mp4", 2, 3)
    assert not any("ignored" in line for line in check(table, videos=False).warnings)


@pytest.mark.parametrize("cell", EMPTY)
def test_empty_markers_are_no_text(cell, tmp_path):
    folder = sims_folder(tmp_path, GOOD_ROW.replace("今天很好", cell))
    assert read_clips(folder)[0].text is None
    assert f"{folder}/label.csv, row 2: no text" in check(folder, videos=False).warnings


def test_second_label_table_is_warned_about(tmp_path):
    folder = sims_folder(tmp_path, GOOD_ROW)
    assert not any("ignored" in line for line in check(folder, videos=False).warnings)
    (folder / "meta.csv").write_text("anything", encoding="utf-8")
    assert f"{folder}/meta.csv: ignored, since label.csv is there, too" in check(folder, videos=False).warnings


def test_own_csv_may_name_source_videos(tmp_path):
    (tmp_path / "Raw").mkdir()
    table = tmp_path / "own.csv"
    table.write_text("video_id,text,label,split\nfilm,你好,1,train\nfilm,再见,-1,test\n", encoding="utf-8")
    assert [(clip.text, clip.video) for clip in read_clips(table)] == [("你好", None), ("再见", None)]
    assert "video 'film' is in 2 splits" in check(table).warnings[0]


def test_video_folder_with_dot_in_name(tmp_path):
    rows = [["movie.2019", "0001", "好", "1", "1", "1", "1", "Positive", "train"]]
    assert read_clips(write_folder(tmp_path, rows))[0].video == tmp_path / "Raw" / "movie.2019" / "0001.mp4"


def test_invalid_paths_and_times_are_reported_by_row(tmp_path):
    write_video(tmp_path / "a.mp4")
    table = tmp_path / "own.csv"
    rows = ["长" * 100, "~nobody99/x.mp4", "a.mp4,好,1,5,3", "a.mp4,好,1,nan,", "a.mp4,好,1,99,100"]
    rows = [f"{row},好,1,," if row.count(",") < 4 else row for row in rows]
    table.write_text("\n".join(["path,text,label,start,end", *rows, "a.mp4,难过,1,0,1,多"]), encoding="utf-8")
    problems = check(table).problems
    for row, reason in enumerate(
        [
            "cannot be a file name",
            "nobody99",
            "not after its start",
            "not a time in seconds",
            "before the segment starts",
        ],
        2,
    ):
        assert any(f"row {row}" in line and reason in line for line in problems), (row, problems)
    assert any("row 7: more cells than columns" in line for line in problems)


def test_split_of_film_segments_ignores_row_order(tmp_path):
    (tmp_path / "f.mp4").write_bytes(b"x")
    rows = [f"f.mp4,{i},{i % 3 - 1},{i},{i + 1}" for i in range(60)]

    def splits(lines):
        (tmp_path / "own.csv").write_text("path,text,label,start,end\n" + "\n".join(lines), encoding="utf-8")
        return {clip.text: clip.split for clip in read_clips(tmp_path / "own.csv", protocol="tenth")}

    assert splits(rows) == splits(rows[::-1]) == splits(sorted(rows))
    assert set(splits(rows).values()) == {"train", "valid", "test"}


def test_split_of_texts_ignores_row_order_and_keeps_duplicates_together(tmp_path):
    rows = [f"第{i % 40}句,{i % 3 - 1}" for i in range(120)]

    def splits(lines):
        (tmp_path / "own.csv").write_text("文本,标签\n" + "\n".join(lines), encoding="utf-8")
        splits_of_content = {}
        for clip in read_clips(tmp_path / "own.csv", protocol="tenth"):
            splits_of_content.setdefault((clip.text, clip.labels["M"]), set()).add(clip.split)
        assert all(len(names) == 1 for names in splits_of_content.values())
        return splits_of_content

    assert splits(rows) == splits(rows[::-1]) == splits(sorted(rows))


def test_different_spellings_of_path_are_one_source(tmp_path):
    (tmp_path / "f.mp4").write_bytes(b"x")
    (tmp_path / "a").mkdir()
    lines = [f"{('', './', 'a/../')[i % 3]}f.mp4,{i},1" for i in range(40)]
    (tmp_path / "own.csv").write_text("path,text,label\n" + "\n".join(lines), encoding="utf-8")
    assert {clip.split for clip in read_clips(tmp_path / "own.csv", protocol="video")} == {"train"}


def test_utf_16_without_byte_order_mark(tmp_path):
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / "own.csv").write_bytes("path,text,label\n,你好世界,1\n".encode(encoding))
        assert read_clips(tmp_path / "own.csv")[0].text == "你好世界"


def test_headerless_ids_longer_than_texts(tmp_path):
    lines = [f"550e8400-e29b-41d4-a716-4466554400{i:02},今天{i},1" for i in range(10, 30)]
    (tmp_path / "own.csv").write_text("\n".join(lines), encoding="utf-8")
    assert read_clips(tmp_path / "own.csv")[0].text == "今天10"


def test_negative_start_is_rejected(tmp_path):
    (tmp_path / "f.mp4").write_bytes(b"x")
    (tmp_path / "own.csv").write_text("path,text,label,start,end\nf.mp4,好,1,-5,1\n", encoding="utf-8")
    with pytest.raises(UserError, match="row 2, column start: -5 s is before the video starts"):
        read_clips(tmp_path / "own.csv")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (-1.0, "Negative neg 消极 负面"),
        (0.0, "Neutral neu 中性"),
        (1.0, "Positive pos 积极 正面"),
        (-0.5, "Weakly_Negative"),
        (0.5, "Weakly_Positive"),
    ],
)
def test_scores_of_label_words(value, words):
    assert {score(word.replace("_", " ")) for word in words.split()} == {value}


def test_typographic_minus_and_full_width_digits(tmp_path):
    (tmp_path / "a.csv").write_text("文本,标签\n坏,−0.6\n差,－０．８\n好,０．４\n", encoding="utf-8")
    assert [clip.labels["M"] for clip in read_clips(tmp_path / "a.csv")] == [-0.6, -0.8, 0.4]
    (tmp_path / "b.csv").write_text("文本,标签\n好,0.5²\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"'0\.5²' is not a label"):
        read_clips(tmp_path / "b.csv")


def test_chinese_names_of_unimodal_label_columns(tmp_path):
    rows = "文本,标签,文本标签,语音标签,视频标签,数据集划分\n好,积极,弱积极,中性,弱消极,测试集\n"
    (tmp_path / "a.csv").write_text(rows, encoding="utf-8")
    (clip,) = read_clips(tmp_path / "a.csv")
    assert (clip.labels, clip.split) == ({"M": 1, "T": 0.5, "A": 0, "V": -0.5}, "test")


def test_stray_zero_byte_is_not_taken_for_utf_16(tmp_path):
    (tmp_path / "own.csv").write_text("path,text,label\n,你\0好,1\n", encoding="utf-8")
    assert read_clips(tmp_path / "own.csv")[0].text == "你好"


def test_windows_path_separators(tmp_path):
    for name in ("a/1.mp4", "b\\2.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "mine.csv").write_text("path,label\na\\1.mp4,0.5\nb\\2.mp4,-1\n")
    assert [clip.video for clip in read_clips(tmp_path / "mine.csv")] == [
        tmp_path / "a" / "1.mp4",
        tmp_path / "b\\2.mp4",
    ]


def test_warnings_about_what_no_clip_has(tmp_path):
    """A misnamed video column, or scores from 0 to 1, would silently train something else."""
    table = tmp_path / "mine.csv"
    rows = [f"{i}.mp4,第{i}句,{0.1 + i / 20}" for i in range(10)]
    table.write_text("\n".join(["vedio,text,label", *rows]), encoding="utf-8")
    warnings = [line.removeprefix(f"{table}: ") for line in check(table).warnings]
    assert "ignored columns: vedio" in warnings
    assert "no clip has a video" in warnings
    assert "no label is below 0 (neutral) — labels range from -1 (negative) to 1 (positive)" in warnings
    assert not any("above" in line or "has a text" in line for line in warnings)


def test_feature_file_ids_may_be_file_paths(tmp_path):
    """The folder that they share is not a source video."""
    part = {"regression_labels": np.array([0.5, -0.5], np.float32)}
    splits = {s: {"id": [f"clips/{s}{i}.mp4" for i in (1, 2)], **part} for s in ("train", "valid", "test")}
    (tmp_path / "f.pkl").write_bytes(pickle.dumps(splits))
    assert not any("splits" in warning for warning in check(tmp_path / "f.pkl").warnings)


def test_big5_is_not_taken_for_gbk(tmp_path):
    text = "你怎麼這樣說，我真的很難過裏面"
    (tmp_path / "mine.csv").write_bytes(f"path,text,label\n,{text},-1\n,謝謝,1\n".encode("cp950"))
    assert [clip.text for clip in read_clips(tmp_path / "mine.csv")] == [text, "謝謝"]


def test_first_of_synonymous_columns_is_read(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text("text,label,情感,Label,split\n好,1,消极,x,train\n", encoding="utf-8")
    assert f"{table}: ignored columns: 情感, Label" in check(table).warnings
    assert read_clips(table)[0].labels == {"M": 1.0}


def test_split_column_with_only_unknown_values(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text("text,label,split\n好,1,\n坏,-1,dev2\n", encoding="utf-8")
    report = check(table)
    assert [problem.split(": ")[1] for problem in report.problems] == [
        "'' is unknown — choose from train, valid, test",
        "'dev2' is unknown — choose from train, valid, test",
    ]
    assert not any("no split column" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("labels", "warned"), [("0 1 0", True), ("0 1 -1", False), ("neutral positive 0", False), ("1 1 1", False)]
)
def test_warning_if_labels_are_only_0_and_1(tmp_path, labels, warned):
    rows = "".join(f"好{label},{label},train\n" for label in labels.split())
    (tmp_path / "mine.csv").write_text("text,label,split\n" + rows, encoding="utf-8")
    warnings = [line for line in check(tmp_path / "mine.csv").warnings if "0 is neutral, 1 positive" in line]
    assert len(warnings) == warned


def test_annotations_compare_by_class_and_leaks_ignore_spaces(tmp_path):
    folder = sims_folder(
        tmp_path,
        "video_0001,0001,今天 很好,0.4,,,,Positive,train",  # weakly positive: no contradiction
        "video_0001,0002,今天很好,0.4,,,,Negative,train",
        "video_0001,0003,今天很 好,-0.2,,,,,test",
    )
    warnings = check(folder, videos=False).warnings
    assert [line for line in warnings if "but annotation" in line] == [
        f"{tmp_path}/label.csv, row 3: label 0.4, but annotation Negative"
    ]
    assert "text '今天很好' is in 2 splits: train (row 2), test (row 4)" in warnings  # the first row of each


def test_video_protocol_holds_out_smallest_if_all_exceed_a_tenth(tmp_path):
    sizes = {"a": 3, "b": 2, "c": 9, "d": 8}
    rows = [[name, f"{i:02}", f"句{name}{i}", *"0000", "Neutral", ""] for name, n in sizes.items() for i in range(n)]
    for seed in range(3):
        clips = read_clips(write_folder(tmp_path, rows), protocol="video", seed=seed)
        videos = {split: {clip.id.split("/")[0] for clip in clips if clip.split == split} for split in SPLITS}
        assert videos == {"train": {"c", "d"}, "valid": {"a"}, "test": {"b"}}


def test_check_counts_splits_of_given_seed(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text("path,text,label\n" + "".join(f",好{i},{i % 3 - 1}\n" for i in range(30)), encoding="utf-8")
    counts_by_seed = [check(table, videos=False, seed=seed).splits for seed in range(4)]
    for seed, counts in enumerate(counts_by_seed):
        drawn = [LABELS[polarity(clip.labels["M"])] for clip in read_clips(table, "test", seed=seed)]
        assert counts["test"] == {label: drawn.count(label) for label in LABELS}
    assert any(counts != counts_by_seed[0] for counts in counts_by_seed)


def test_zero_length_segments_and_unused_splits(tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text("text,label,split,start,end\n好,1,third,1,1\n坏,-1,third,1,1.5\n", encoding="utf-8")
    problems = [f"{table}, row 2, columns start and end: the segment ends at 1 s, not after its start"]
    assert check(table, protocol="tenth").problems == problems
    assert sum("column split/mode: 'third' is unknown" in line for line in check(table).problems) == 2
