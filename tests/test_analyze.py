"""A film → its timeline: correct rows, in one pass, resumable, with a self-contained page."""

import base64
import io
import json
import os
import re

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.data import test_subtitles
from tests.data.test_cutaways import write_shots
from tests.data.test_video import remux, write_delayed
from tests.fakes import SHADES, FakePredictor, write_film
from tests.test_export import add_sound

from senticlip import analyze as analyze_module
from senticlip.analyze import analyze
from senticlip.data.audio import RATE
from senticlip.data.subtitles import Line
from senticlip.data.video import VideoReader, probe, read_frames
from senticlip.structures import UsageError, UserError

MOODS = ["positive", "negative", "neutral", "positive", "negative", "positive"]
WORDS = ["真好", "真坏", "然后呢", "太坏了", "</ script>好", "好"]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_film(tmp_path_factory.mktemp("film") / "电影.mp4", MOODS, seconds=2)


@pytest.fixture
def srt(tmp_path):
    path = tmp_path / "a.srt"
    lines = [f"{i + 1}\n00:00:{2 * i:02},100 --> 00:00:{2 * i + 1:02},900\n{text}\n" for i, text in enumerate(WORDS)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(analyze_module, "BATCH", 2)


def test_rows_files_and_page(film, srt, tmp_path):
    out = tmp_path / "out"
    rows = list(analyze(FakePredictor(), film, srt, out))
    assert [row["text"] for row in rows] == WORDS
    assert [row["label"] for row in rows] == MOODS
    assert [(row["start"], row["end"]) for row in rows][:2] == [(0.1, 1.9), (2.1, 3.9)]
    conflicts = [row["conflict"] for row in rows]
    assert set(sorted(range(6), key=conflicts.__getitem__)[-2:]) == {3, 4}  # positive face, negative words
    for row in rows:
        sentiments = {name: row[f"{name}_positive"] - row[f"{name}_negative"] for name in ("text", "video")}
        assert row["conflict"] == pytest.approx(abs(sentiments["text"] - sentiments["video"]) / 2)  # 1 if opposite
        assert row["negative"] + row["neutral"] + row["positive"] == pytest.approx(1)
        assert row["sentiment"] == pytest.approx(row["positive"] - row["negative"])
        assert row["weight_text"] + row["weight_video"] == pytest.approx(1)
        assert row["audio_positive"] is None
    table = pq.read_table(out / "timeline.parquet")
    assert table.column_names == list(rows[0])
    assert table["text"].to_pylist() == WORDS
    assert pyarrow.csv.read_csv(out / "timeline.csv")["label"].to_pylist() == MOODS
    names = [path.name for path in out.iterdir() if path.name != ".lock"]
    assert sorted(names) == ["timeline.csv", "timeline.html", "timeline.parquet"]

    page = (out / "timeline.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=.?(https?:)?//", page)
    (embedded_json,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(embedded_json)
    assert "</ script" not in page
    assert data["name"] == "电影.mp4"
    assert [row["x"] for row in data["rows"]] == WORDS
    assert all(row["i"].startswith("data:image/jpeg;base64,") for row in data["rows"])


def test_rows_stream_in_one_pass_over_the_film(film, srt, monkeypatch):
    opened = []
    monkeypatch.setattr(analyze_module, "VideoReader", lambda path: opened.append(path) or VideoReader(path))
    predictor = FakePredictor()
    rows = analyze(predictor, film, srt)
    next(rows)
    assert predictor.batches == 1
    assert len(list(rows)) == 5
    assert (predictor.batches, len(opened)) == (3, 1)


def test_resumed_run_writes_identical_files(film, srt, tmp_path):
    expected = list(analyze(FakePredictor(), film, srt, tmp_path / "whole"))
    with pytest.raises(RuntimeError, match="killed"):
        list(analyze(FakePredictor(fail_after=2), film, srt, tmp_path / "cut"))
    assert not (tmp_path / "cut" / "timeline.parquet").exists()
    predictor, progress_calls = FakePredictor(), []
    options = {"resume": True, "progress": lambda done, total: progress_calls.append((done, total))}
    resumed = list(analyze(predictor, film, srt, tmp_path / "cut", **options))
    assert predictor.batches == 1
    assert progress_calls == [(2, 6), (4, 6), (6, 6)]
    assert resumed == expected
    for name in ("timeline.parquet", "timeline.csv", "timeline.html"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    finished = FakePredictor()
    assert len(list(analyze(finished, film, srt, tmp_path / "cut", resume=True))) == 6
    assert finished.batches == 0


def test_discarded_lines_are_reported_without_resume(film, srt, tmp_path, capsys):
    def killed(**options):
        with pytest.raises(RuntimeError, match="killed"):
            list(analyze(FakePredictor(fail_after=2), film, srt, tmp_path, **options))
        return capsys.readouterr().err

    assert not killed()
    assert (
        killed() == f"{tmp_path}: starting over; up to 4 finished lines are discarded — --resume would have continued\n"
    )
    assert not killed(shift=0.3)  # a different job, which --resume could not have continued


def test_resumed_run_reads_identical_sound(film, srt, tmp_path):
    """The noise that an AAC decoder fills in depends on what it decoded before."""

    class Listener(FakePredictor):
        def batch(self, clips, read, listen):
            self.heard = [listen(clip.video, clip.start, clip.end) for clip in clips]
            return super().batch(clips, read)

    film_with_sound = add_sound(film, tmp_path / "loud.mp4", 12)
    uninterrupted, resumed = Listener(), Listener()
    list(analyze(uninterrupted, film_with_sound, srt, tmp_path / "whole"))
    with pytest.raises(RuntimeError, match="killed"):
        list(analyze(FakePredictor(fail_after=2), film_with_sound, srt, tmp_path / "cut"))
    list(analyze(resumed, film_with_sound, srt, tmp_path / "cut", resume=True))
    assert (uninterrupted.batches, resumed.batches) == (3, 1)
    for expected, actual in zip(uninterrupted.heard, resumed.heard, strict=True):
        assert len(expected) == pytest.approx(1.8 * RATE, abs=2)
        np.testing.assert_array_equal(expected, actual)


def test_resume_with_other_shift_is_rejected(film, srt, tmp_path):
    with pytest.raises(RuntimeError):
        list(analyze(FakePredictor(fail_after=1), film, srt, tmp_path / "out"))
    with pytest.raises(UsageError, match="leave out --resume"):
        list(analyze(FakePredictor(), film, srt, tmp_path / "out", shift=0.3, resume=True))
    assert len(list(analyze(FakePredictor(), film, srt, tmp_path / "out", shift=0.3))) == 6


def test_resume_rejects_half_written_files_of_another_job(film, srt, tmp_path, monkeypatch):
    list(analyze(FakePredictor(), film, srt, tmp_path / "out"))
    monkeypatch.setattr(pyarrow.csv, "write_csv", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        list(analyze(FakePredictor(), film, srt, tmp_path / "out", shift=0.3))
    with pytest.raises(UsageError, match="leave out --resume"):
        list(analyze(FakePredictor(), film, srt, tmp_path / "out", resume=True))


def test_resume_detects_replaced_film(film, srt, tmp_path):
    path, data = tmp_path / "a.mp4", bytearray(film.read_bytes())
    path.write_bytes(data)
    old_stat = path.stat()
    with pytest.raises(RuntimeError, match="killed"):
        list(analyze(FakePredictor(fail_after=1), path, srt, tmp_path / "out"))
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(old_stat.st_atime_ns, old_stat.st_mtime_ns))
    with pytest.raises(UsageError, match="leave out --resume"):
        list(analyze(FakePredictor(), path, srt, tmp_path / "out", resume=True))


def test_output_folder_is_locked(film, srt, tmp_path):
    rows = analyze(FakePredictor(), film, srt, tmp_path / "out")
    first_row = next(rows)
    with pytest.raises(UserError, match=r"out: another analyze is writing here — wait, or choose another --out"):
        next(analyze(FakePredictor(), film, srt, tmp_path / "out", shift=0.3))
    assert [row["text"] for row in (first_row, *rows)] == WORDS
    assert pq.read_table(tmp_path / "out" / "timeline.parquet")["text"].to_pylist() == WORDS
    assert len(list(analyze(FakePredictor(), film, srt, tmp_path / "out", shift=0.3))) == 6  # the lock was released


def test_failed_line_is_a_row_with_its_error(film, srt):
    srt.write_text(srt.read_text(encoding="utf-8").replace("太坏了", "broken"), encoding="utf-8")
    rows = list(analyze(FakePredictor(), film, srt))
    assert [row["label"] for row in rows] == [*MOODS[:3], None, *MOODS[4:]]
    assert rows[3]["error"] == "line 4: broken"


def test_lines_after_end_of_film(film, srt, capsys):
    rows = list(analyze(FakePredictor(), film, srt, shift=5))
    assert [row["start"] for row in rows] == pytest.approx([5.1, 7.1, 9.1, 11.1, 13.1, 15.1])
    assert [row["video_positive"] is not None for row in rows] == [True] * 4 + [False] * 2  # the film lasts 12 s
    assert [row["error"] for row in rows] == [None] * 6
    assert capsys.readouterr().err == f"2 of 6 lines begin after the end of {film} (12.0 s) — check --shift\n"
    list(analyze(FakePredictor(), film, srt))
    assert not capsys.readouterr().err
    assert [row["text"] for row in rows] == WORDS
    with pytest.raises(UserError, match="all lines begin after the end"):
        analyze(FakePredictor(), film, srt, shift=500)


def test_sound_longer_than_video(film, srt, tmp_path):
    """As with a still picture or a screen recording: players hold the last frame."""
    durations = []

    class Listener(FakePredictor):
        def batch(self, clips, read, listen):
            durations.extend(len(listen(clip.video, clip.start, clip.end)) / RATE for clip in clips)
            return super().batch(clips, read)

    film_with_sound = add_sound(film, tmp_path / "loud.mp4", 20)
    rows = list(analyze(Listener(), film_with_sound, srt, shift=7))
    assert [row["video_positive"] is not None for row in rows] == [True] * 6
    assert all(row["video_positive"] > row["video_negative"] for row in rows[3:])  # the last frame is positive
    assert durations == pytest.approx([1.8] * 6, abs=0.01)
    ends = [row["end"] for row in analyze(FakePredictor(), film_with_sound, seconds=2)]
    assert (len(ends), ends[-1]) == (10, pytest.approx(20, abs=0.1))


def test_truncated_film_is_reported(film, tmp_path, capsys):
    truncated = tmp_path / "short.mp4"
    truncated.write_bytes(
        remux(film, tmp_path / "whole.mp4", movflags="faststart").read_bytes()[: -film.stat().st_size // 3]
    )
    rows = list(analyze(FakePredictor(), truncated))
    assert rows[-1]["end"] < 11
    assert re.fullmatch(r".*short\.mp4: cut off, [\d.]+ s of 12\.0 s are there — .*\n.*\n", capsys.readouterr().err)


def test_shift_that_moves_all_embedded_lines_before_start(tmp_path):
    path = test_subtitles.film(tmp_path / "film.mkv", [("chi", test_subtitles.SRT)])
    assert list(analyze(FakePredictor(), path))
    with pytest.raises(UserError, match="contains no spoken line after 0 s: --shift -100 moves all of them before it"):
        analyze(FakePredictor(), path, shift=-100)


def test_video_that_begins_after_its_sound(tmp_path):
    path = write_delayed(tmp_path)
    info = probe(path)
    assert (info.start, info.duration) == (pytest.approx(0.8), pytest.approx(1.6))
    srt = tmp_path / "a.srt"
    srt.write_text("1\n00:00:01,700 --> 00:00:02,300\n好\n\n2\n00:00:02,500 --> 00:00:03,000\n坏\n", encoding="utf-8")
    rows = list(analyze(FakePredictor(), path, srt))
    assert [row["video_positive"] is not None for row in rows] == [True, False]
    assert [(row["start"], row["end"]) for row in analyze(FakePredictor(), path, seconds=1.2)] == [(0, 1.2), (1.2, 2.4)]


def test_model_options_reach_the_video_reader(tmp_path):
    film = write_shots(tmp_path / "a.mp4", [0, 0, 1, 0])
    pairs, predictor = [], FakePredictor()

    def batch(clips, read, listen):
        segment = clips[0].video, 4, clips[0].start, clips[0].end
        pairs.append((read(*segment, size=16, cutaways="drop"), read_frames(*segment, size=16, cutaways="drop")))
        return FakePredictor.batch(predictor, clips, read, listen)

    predictor.batch = batch
    list(analyze(predictor, film, seconds=2.0))
    ((frames, expected),) = pairs
    assert len(frames.times) == 3
    assert np.array_equal(frames.pixels, expected.pixels)


def test_usage_error_only_if_no_line_can_be_read(film, srt, tmp_path):
    srt.write_text(
        srt.read_text(encoding="utf-8").replace("真好", "broken").replace("真坏", "broken"), encoding="utf-8"
    )
    rows = list(analyze(FakePredictor(), film, srt))
    assert [row["label"] for row in rows] == [None, None, *MOODS[2:]]
    predictor = FakePredictor()
    predictor.batch = lambda clips, **_: (_ for _ in ()).throw(UsageError("this model reads no such thing"))
    with pytest.raises(UsageError, match="no such thing"):
        list(analyze(predictor, film, srt, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.parametrize("option", [{"shift": float("nan")}, {"shift": float("inf")}, {"seconds": 1e-9}])
def test_invalid_times_are_rejected(film, option):
    with pytest.raises(UsageError, match=f"--{next(iter(option))}"):
        analyze(FakePredictor(), film, **option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transcribe": True, "shift": 1.0}, "--transcribe ignores subtitles"),
        ({"transcribe": True, "track": 0}, "--transcribe ignores subtitles"),
        ({"transcribe": True, "subtitles": "a.srt"}, "--transcribe ignores subtitles"),
        ({"subtitles": "a.srt", "track": 0}, "--track is for the film's own subtitles"),
        ({"shift": 1.0}, "has no subtitles, and none were given .*; --shift has nothing to move"),
    ],
)
def test_options_without_effect_are_rejected(film, options, message):
    with pytest.raises(UsageError, match=message):
        analyze(FakePredictor(), film, **options)


def test_image_subtitles_are_reported(tmp_path, capsys):
    path = test_subtitles.film(tmp_path / "film.mkv", [], image_language="chi")
    assert all(row["text"] == "" for row in analyze(FakePredictor(), path))
    message = "its subtitles are images, not text — give them as a file: --subtitles F.srt"
    assert capsys.readouterr().err == f"{path}: {message}; cutting the film without text\n"
    path = test_subtitles.film(tmp_path / "both.mkv", [("eng", test_subtitles.SRT)], image_language="chi")
    assert len(list(analyze(FakePredictor(), path))) == 2
    assert capsys.readouterr().err.startswith(f"{path}: using subtitle track 0, not a Chinese one")


def test_resume_with_other_precision_is_rejected(film, srt, tmp_path):
    with pytest.raises(RuntimeError):
        list(analyze(FakePredictor(fail_after=1, precision="bf16"), film, srt, tmp_path / "out"))
    with pytest.raises(UsageError, match="leave out --resume"):
        list(analyze(FakePredictor(), film, srt, tmp_path / "out", resume=True))


def test_film_without_subtitles(film, tmp_path):
    rows = list(analyze(FakePredictor(), film, seconds=2))
    assert [row["label"] for row in rows] == MOODS
    assert all(row["text"] == "" and row["text_positive"] is None for row in rows)
    shots = list(analyze(FakePredictor(), film, cut="shots"))
    assert [row["label"] for row in shots] == MOODS
    with pytest.raises(UsageError, match="choose windows or shots"):
        analyze(FakePredictor(), film, cut="scenes")
    empty = tmp_path / "empty.srt"
    empty.write_text("")
    with pytest.raises(UserError, match="contains no spoken line"):
        analyze(FakePredictor(), film, empty)
    with pytest.raises(UserError, match="no such video"):
        analyze(FakePredictor(), tmp_path / "none.mp4")


def test_transcribed_lines(film, monkeypatch, tmp_path):
    calls, transcript = [], [Line(0.0, 2.0, "真好"), Line(4.0, 5.5, "然后呢")]
    monkeypatch.setattr("senticlip.speech.transcript", lambda *options: calls.append(options) or transcript)
    monkeypatch.setattr("senticlip.speech.model_folder", lambda model: tmp_path)
    rows = list(analyze(FakePredictor(), film, transcribe=True, asr_model="tiny", device="cpu"))
    assert [row["text"] for row in rows] == ["真好", "然后呢"]
    assert calls == [(film, "tiny", "cpu")]
    (tmp_path / "file").touch()
    for run, out, message in (
        (tmp_path / "none", None, "none"),
        (FakePredictor(), tmp_path / "file", "cannot create this folder"),
    ):
        with pytest.raises(UsageError, match=message):  # reported before the slow transcription
            analyze(run, film, out=out, transcribe=True)
    assert len(calls) == 1
    transcript.clear()
    with pytest.raises(UserError, match="no speech detected — leave out --transcribe"):
        analyze(FakePredictor(), film, transcribe=True)


def test_damaged_parts_are_redone(film, srt, tmp_path):
    out = tmp_path / os.fsdecode(b"\xb5\xe7")  # a name that is not UTF-8
    expected = list(analyze(FakePredictor(), film, srt))
    with pytest.raises(RuntimeError, match="killed"):
        list(analyze(FakePredictor(fail_after=2), film, srt, out))
    (out / ".timeline" / "000000.parquet").write_bytes(b"PAR1")
    predictor = FakePredictor()
    assert list(analyze(predictor, film, srt, out, resume=True)) == expected
    assert predictor.batches == 2
    assert list(analyze(predictor, film, srt, out, resume=True)) == expected
    assert predictor.batches == 2
    data = bytearray((out / "timeline.parquet").read_bytes())
    data[8:40] = bytes(byte ^ 0xA5 for byte in data[8:40])
    (out / "timeline.parquet").write_bytes(data)
    assert list(analyze(predictor, film, srt, out, resume=True)) == expected
    assert pyarrow.csv.read_csv((out / "timeline.csv").open("rb"))["text"].to_pylist() == WORDS


def page_data(out):
    """The JSON object in a timeline's page."""
    page = (out / "timeline.html").read_text(encoding="utf-8")
    (embedded_json,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(embedded_json)


def test_page_matches_table(film, srt, tmp_path):
    rows = list(analyze(FakePredictor(), film, srt, tmp_path, shift=5))
    data = page_data(tmp_path)
    assert (data["film"], data["duration"]) == (pytest.approx(12), pytest.approx(rows[-1]["end"]))  # past the film
    for row, page_row in zip(rows, data["rows"], strict=True):
        assert [page_row[key] for key in "sexl"] == [row[key] for key in ("start", "end", "text", "label")]
        assert [page_row[key] for key in "fc"] == pytest.approx([row["sentiment"], row["conflict"]], abs=1e-6)
        for key, prefix in (("p", ""), ("text", "text_"), ("video", "video_"), ("audio", "audio_")):
            expected = [row[prefix + name] for name in ("negative", "neutral", "positive")]
            assert page_row[key] == (None if expected[0] is None else pytest.approx(expected, abs=5e-4))
        assert page_row["w"] == pytest.approx({head: row[f"weight_{head}"] for head in page_row["w"]}, abs=5e-4)


def test_thumbnail_is_from_the_middle_of_its_line(film, tmp_path):
    srt = tmp_path / "a.srt"
    srt.write_text("1\n00:00:00,100 --> 00:00:05,900\n好\n", encoding="utf-8")  # positive, negative, neutral frames
    list(analyze(FakePredictor(), film, srt, tmp_path))
    data = base64.b64decode(page_data(tmp_path)["rows"][0]["i"].partition(",")[2])
    picture = Image.open(io.BytesIO(data))
    assert picture.size == (128, 96)  # the film's 64 x 48
    assert np.asarray(picture).mean((0, 1)) == pytest.approx(SHADES["negative"], abs=15)


def test_requested_track_is_read(tmp_path):
    tracks = [("chi", test_subtitles.SRT), ("eng", test_subtitles.SRT.replace("今天我真的很高兴", "Hello"))]
    path = test_subtitles.film(tmp_path / "film.mkv", tracks)
    for track, words in ((None, "今天我真的很高兴"), (0, "今天我真的很高兴"), (1, "Hello")):
        assert next(analyze(FakePredictor(), path, track=track))["text"] == words


def test_finished_timeline_is_redone_without_resume(film, srt, tmp_path):
    for options, batches in (({}, 3), ({}, 3), ({"resume": True}, 0)):
        predictor = FakePredictor()
        assert len(list(analyze(predictor, film, srt, tmp_path, **options))) == 6
        assert predictor.batches == batches


def test_zeros_stay_on_the_page():
    row = dict.fromkeys(analyze_module.SCHEMA.names, 0.0) | {"thumbnail": None}
    page_row = analyze_module._page_row(row)
    assert [page_row[key] for key in ("f", "c", "p", "text", "w")] == [
        0,
        0,
        [0] * 3,
        [0] * 3,
        dict.fromkeys(analyze_module.HEADS, 0),
    ]
    assert [analyze_module._page_row(dict.fromkeys(row))[key] for key in ("f", "c", "p")] == [None] * 3
