"""Manifests of all formats give the same rows; what is wrong with one is reported in one line."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from senticlip import manifest
from senticlip.data.sims import read_clips
from senticlip.structures import UsageError, UserError

ROWS = [
    {"id": "一", "path": "a.mp4", "text": "今天真好，\n“明天”呢"},
    {"id": "b", "path": "b.mp4", "subtitles": "b.srt", "start": "1.5", "end": "3"},
    {"path": "c.mp4"},
    {"text": "只有话"},
]
NAMES = ["一", "b", "c.mp4", "row 4"]


def full_row(row, name):
    return {column: row.get(column) for column in manifest.COLUMNS} | {"id": name, "error": None}


def write(path, rows=ROWS, encoding="utf-8"):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{c: row.get(c) for c in manifest.COLUMNS} for row in rows]), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding=encoding)
    else:
        with path.open("w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, manifest.COLUMNS, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.jsonl", "m.parquet", "M.CSV"])
def test_all_formats_give_the_same_rows(name, tmp_path):
    rows = list(manifest.read(write(tmp_path / name)))
    # without an id, a CSV row is named by its last line in the file, and the first text has two lines
    assert [row | {"id": NAMES[i]} for i, row in enumerate(rows)] == [
        full_row(*pair) for pair in zip(ROWS, NAMES, strict=True)
    ]
    assert [row["id"] for row in rows][:3] == NAMES[:3]
    assert rows[3]["id"].startswith("row ")


def test_subtitle_column_may_hold_files_or_text(tmp_path):
    """As in the tables that models are trained on."""
    (tmp_path / "a.csv").write_text("路径,字幕,标签\na.mp4,真好,1\nb.mp4,b.SRT,0\n", encoding="utf-8")
    rows = [(row["path"], row["text"], row["subtitles"]) for row in manifest.read(tmp_path / "a.csv")]
    assert rows == [("a.mp4", "真好", None), ("b.mp4", None, "b.SRT")]


def test_encoding_is_detected_late_in_a_file(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"id,text\n" + b"1,ok\n" * 300_000 + "2,真好\n".encode("gb18030"))
    *_, last = manifest.read(tmp_path / "a.csv")
    assert last["text"] == "真好"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gb18030"])
def test_csv_encodings(encoding, tmp_path):
    rows = list(manifest.read(write(tmp_path / "m.csv", encoding=encoding)))
    assert rows[0] == full_row(ROWS[0], "一")


def test_column_aliases_and_numbers(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"Video": 1, "video_path": "x.mp4", "sentence": "好", "start": 2, "id": 7, "more": [1]}')
    assert list(manifest.read(path)) == [
        {"id": "7", "path": "x.mp4", "text": "好", "subtitles": None, "start": "2", "end": None, "error": None}
    ]


def test_chinese_columns_and_ignored_columns(tmp_path, capsys):
    path = tmp_path / "m.csv"
    path.write_text("路径,台词,开始,结束\na.mp4,好,1,2\n", encoding="utf-8")
    cells = {"id": "a.mp4", "path": "a.mp4", "text": "好", "start": "1", "end": "2"}
    assert list(manifest.read(path)) == [full_row(cells, "a.mp4")]
    assert capsys.readouterr() == ("", "")
    for name, data in (
        ("m.csv", "path,transcript,id\na.mp4,好,1\n"),
        ("m.jsonl", '{"path": "a", "transcript": 1}\n{"path": "b", "transcript": 1}\n'),
    ):
        (tmp_path / name).write_text(data, encoding="utf-8")
        assert [row["text"] for row in manifest.read(tmp_path / name)] == [None] * (
            data.count("\n") - (name == "m.csv")
        )
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"{name}: ignored columns: transcript (columns that are read: id, path, text" in err


def test_split_writes_row_groups(tmp_path):
    rows = [{"id": str(i), "text": f"第{i}句"} for i in range(10)]
    manifest.split(write(tmp_path / "m.csv", rows), tmp_path / "rows.parquet", 4)
    file = pq.ParquetFile(tmp_path / "rows.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)] == [4, 4, 2]
    assert file.read_row_group(2).to_pylist() == [full_row(row, row["id"]) for row in rows[8:]]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("m.csv", "id,url\n1,x\n", "row 1: the columns are id, url — expected id, path, text or subtitles"),
        ("m.csv", "", "row 1: the columns are nothing"),
        ("m.csv", "path,text\n", "no rows"),
        ("m.csv", b"\x00\xff\xfe\x81\x00" * 9, "m.csv"),
        ("m.csv", 'text\n"' + "x" * 9, "row 2: not readable as CSV"),
        ("m.jsonl", '{"path": ', "row 1: not readable as JSON"),
        ("m.jsonl", "[1]", "row 1: not readable as JSON (not an object)"),
        ("m.jsonl", b'{"path": "\xff\xfe"}', "not readable as JSON"),
        ("m.parquet", "no parquet", "not readable as Parquet"),
    ],
)
def test_bad_manifest_is_one_line(name, data, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(UserError) as error:
        manifest.split(path, tmp_path / "rows.parquet", 4)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_missing_or_unsupported_manifest(tmp_path):
    with pytest.raises(UsageError, match="no such manifest"):
        list(manifest.read(tmp_path / "none.csv"))
    (tmp_path / "m.xlsx").write_text("")
    with pytest.raises(UsageError, match=r"choose \.csv, \.jsonl or \.parquet"):
        list(manifest.read(tmp_path / "m.xlsx"))


def test_bad_row_is_a_row_with_its_error(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("id,path,text\n1,a.mp4,\n2,,\n3,,好\n")
    manifest.split(path, tmp_path / "rows.parquet", 4)
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [row["error"] for row in rows] == [None, f"{path}, row 3: neither path nor text", None]
    assert [row["id"] for row in rows] == ["1", "2", "3"]

    path = tmp_path / "m.jsonl"
    lines = [
        '{"id": 1, "text": "好"}',
        '{"id": "\\ud800", "text": "a\\udfffb"}',
        '{"path": ',
        "[1]",
        '{"path": "\udcff"}',
    ]
    lines += ["[" * 100_000, '{"text": "\\ud83d\\ude00"}', '{"subtitles": "a.srt"}', "{}"]
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    manifest.split(path, tmp_path / "rows.parquet", 4)
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["1", "?", *(f"row {i}" for i in range(3, 10))]
    assert [row["text"] for row in rows if not row["error"]] == ["好", "😀", None]
    for i, message in {
        1: "column id: an unpaired surrogate",
        2: "JSON",
        3: "not an object",
        4: "utf-8",
        5: "JSON",
    }.items():
        assert message in rows[i]["error"]
        assert f"{path}, row {i + 1}" in rows[i]["error"]
    assert rows[8]["error"].endswith("row 9: neither path nor text")


def test_misquoted_csv_rows_are_errors(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text('id,path,text\n1,a.mp4,好\n2,b.mp4,"你好\n3,c.mp4,再见\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"m\.csv, row 3: not readable as CSV .* quote"):
        list(manifest.read(path))
    path.write_text("id,path,text\n1,a.mp4,我很难过, 但是今天真开心\n2,b.mp4,好,,\n", encoding="utf-8")
    first, second = manifest.read(path)
    assert "row 2: more cells than columns" in first["error"]
    assert (second["text"], second["error"]) == ("好", None)


def test_row_needs_path_text_or_subtitles(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("id,subtitles,start\n1,a.srt,\n2,  ,\n", encoding="utf-8")
    first, second = manifest.read(path)
    assert (first["subtitles"], first["error"]) == ("a.srt", None)
    assert "neither path nor text" in second["error"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_column_names_and_empty_cells_of_pandas(kind, tmp_path):
    path, missing = tmp_path / f"m.{kind}", float("nan")
    rows = [
        {"Id": "1", "Path ": "a.mp4", "video": "other.mp4", "text": "好", "start": 1.5},
        {"Id": "2", "Path ": None, "video": "b.mp4", "text": missing, "start": missing},
    ]
    if kind == "csv":
        path.write_text("Id,Path ,video,text,start\n1,a.mp4,other.mp4,好,1.5\n2,,b.mp4,,\n", encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    else:
        rows[1]["text"] = None
        pq.write_table(pa.Table.from_pylist(rows), path)
    first, second = manifest.read(path)
    empty = {**dict.fromkeys(manifest.COLUMNS), "error": None}
    assert first == {**empty, "id": "1", "path": "a.mp4", "text": "好", "start": "1.5"}
    assert second == {**empty, "id": "2", "path": "b.mp4"}


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "null", "<NA>"])
def test_words_for_missing_values(word, tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(f"path,text,start\na.mp4,{word},{word}\n{word},{word},\n", encoding="utf-8")
    first, second = manifest.read(path)
    assert first == full_row({"path": "a.mp4"}, "a.mp4")
    assert second["error"].endswith("row 3: neither path nor text")


def test_duplicate_ids_are_reported_once(tmp_path, capsys, monkeypatch):
    path = tmp_path / "m.csv"
    path.write_text("id,text\na,好\nb,坏\nb,好\na,坏\n", encoding="utf-8")
    assert [row["id"] for row in manifest.read(path)] == ["a", "b", "b", "a"]
    out, err = capsys.readouterr()
    assert out == ""
    message = "duplicate id 'b' — give each row its own id, to tell their answers apart"
    assert err == f"{path}, row 4: {message}\n"
    monkeypatch.setattr(manifest, "REMEMBERED", 1)
    list(manifest.read(path))
    assert f"{path}, row 5: duplicate id 'a'" in capsys.readouterr().err


def test_cells_of_wrong_type_are_row_errors(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"id": 1, "text": ["x"]}\n{"id": 2, "path": {"a": 1}}\n{"id": 3, "text": 5}\n', encoding="utf-8")
    first, second, third = manifest.read(path)
    assert "row 1, column text: a list" in first["error"]
    assert "row 2, column path: a dict" in second["error"]
    assert (third["text"], third["error"]) == ("5", None)
    path = tmp_path / "m.csv"
    path.write_text("id,path,text,start,end\n1,a.mp4,好\n2,a.mp4,好,,\n", encoding="utf-8")
    first, second = manifest.read(path)
    assert "row 2: fewer cells than columns" in first["error"]
    assert second["error"] is None


def test_long_text(tmp_path):
    (tmp_path / "m.csv").write_text('text,label\n"' + "好" * 200_000 + '",0.5\n', encoding="utf-8")
    (row,) = manifest.read(tmp_path / "m.csv")
    assert row["text"] == "好" * 200_000
    assert read_clips(tmp_path / "m.csv")[0].text == row["text"]


def test_big5_manifest(tmp_path):
    text = "媽媽說晚餐已經準備好了"
    (tmp_path / "m.csv").write_bytes(f"id,text\n1,{text}\n2,謝謝\n".encode("cp950"))
    assert [row["text"] for row in manifest.read(tmp_path / "m.csv")] == [text, "謝謝"]


@pytest.mark.parametrize("delimiter", [";", "\t", ","])
def test_delimiters_of_csv(delimiter, tmp_path):
    (tmp_path / "a.csv").write_text(
        delimiter.join(["编号", "视频路径", "台词"]) + f"\r\n1{delimiter}a.mp4{delimiter}好\r\n", encoding="utf-8"
    )
    assert [(row["id"], row["path"], row["text"]) for row in manifest.read(tmp_path / "a.csv")] == [
        ("1", "a.mp4", "好")
    ]


def test_excel_workbook_named_csv(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"PK\3\4" + bytes(range(256)))
    with pytest.raises(UserError, match=r"a\.csv: is an Excel workbook or a zip file — save it as CSV UTF-8"):
        list(manifest.read(tmp_path / "a.csv"))
    with pytest.raises(UserError, match=r"a\.csv: is an Excel workbook or a zip file — save it as CSV UTF-8"):
        read_clips(tmp_path / "a.csv")
