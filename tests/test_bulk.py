"""An archive → its rows: in one process and on Ray, whatever fails, and whoever is killed when."""

import csv
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fakes import FakePredictor
from tests.tiny import write_clip

import senticlip
from senticlip import answers, bulk, crashes, manifest
from senticlip.config import Config
from senticlip.data import subtitles
from senticlip.encoders.text import load_tokenizer
from senticlip.models import create_model
from senticlip.structures import Clip, Prediction, UsageError, UserError

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ROWS = 26
PART = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A RUN folder of random weights."""
    folder = tmp_path_factory.mktemp("bulk")
    clip = {
        "model_type": "chinese_clip",
        "projection_dim": 12,
        "text_config": {"model_type": "chinese_clip_text_model", "vocab_size": 22000, **SMALL},
        "vision_config": {"patch_size": 8, "image_size": 32, **SMALL},
    }
    keys = {"width": 16, "heads": 2, "vision.frames": 3, "text.max_length": 24, "text.prefix_length": 2}
    for name, spec in (("text", {"model_type": "bert", "vocab_size": 22000, **SMALL}), ("vision", clip)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(spec))
        keys |= {f"{name}.encoder": str(folder / name), f"{name}.pretrained": False}
    torch.manual_seed(0)
    create_model(Config().override({**keys, "label.pretrained": False})).save_pretrained(folder / "run")
    load_tokenizer(None).save_pretrained(folder / "run" / "tokenizer")
    return folder / "run"


@pytest.fixture(scope="module")
def archive(run) -> Path:
    """A manifest of good clips with four bad rows among them."""
    folder = run.parent / "archive"
    for i in range(3):
        write_clip(folder / f"{i}.mp4", 60 + 70 * i, i, size=32)
    (folder / "text.mp4").write_text("not a film")
    (folder / "0.srt").write_text("1\n00:00:00,000 --> 00:00:00,300\n真好\n\n2\n00:00:00,350 --> 00:00:00,600\n太坏\n")
    rows = [{"id": f"{i:02}", "path": f"{i % 3}.mp4", "text": f"第{i}句话真好"} for i in range(ROWS)]
    rows[1] |= {"path": "none.mp4"}
    rows[5] |= {"path": "text.mp4"}
    rows[6] |= {"start": "soon"}
    rows[7] |= {"start": "100", "end": "101"}
    rows[9] |= {"path": ""}
    rows[10] |= {"text": ""}
    rows[11] |= {"text": "", "path": "0.mp4", "subtitles": "0.srt"}
    rows[12] |= {"text": "", "path": "0.mp4", "subtitles": "0.srt", "start": "0.32", "end": "0.6"}
    rows[13] |= {"end": "inf"}
    rows[14] |= {"text": "", "subtitles": "字" * 300 + ".srt"}  # no file system has such a name
    rows[15] |= {"path": "", "text": ""}
    rows[17] |= {"path": "", "text": "", "subtitles": "0.srt"}
    with (folder / "archive.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "path", "text", "subtitles", "start", "end"])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "archive.csv"


@pytest.fixture(scope="module")
def undisturbed(run, archive) -> dict[str, bytes]:
    """The files of one process that nobody disturbed."""
    list(bulk.bulk(run, archive, run.parent / "out", workers=1, rows_per_part=PART))
    return files(run.parent / "out")


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("part-*.parquet")}


def table(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_rows_are_those_of_predict(run, archive, undisturbed):
    rows = {row["id"]: row for row in table(run.parent / "out")}
    assert list(rows) == [f"{i:02}" for i in range(ROWS)]
    predict, folder = senticlip.load(run), archive.parent
    for name, given in {
        "02": {"video": folder / "2.mp4", "text": "第2句话真好"},
        "09": {"text": "第9句话真好"},
        "10": {"video": folder / "1.mp4"},
        "17": {"text": "真好 太坏"},
        "11": {"video": folder / "0.mp4", "text": "真好 太坏"},
        "12": {"video": folder / "0.mp4", "text": "太坏", "start": 0.32, "end": 0.6},
    }.items():
        expected = answers.record(predict(**given))
        assert {k: v for k, v in rows[name].items() if k != "id"} == pytest.approx(expected, abs=1e-6), name


def test_a_score_beyond_the_labels_is_a_sentiment_within_them():
    rows = [answers.record(Prediction("positive", {}, {}, {}, score)) for score in (-3.0, 0.25, 2.5)]
    assert [row["sentiment"] for row in rows] == [-1.0, 0.25, 1.0]


def test_the_folder_read_as_one_table_is_the_rows(run, undisturbed):
    assert pq.read_table(run.parent / "out").to_pylist() == table(run.parent / "out")


def test_a_failing_row_is_a_row_with_its_error(run, undisturbed):
    rows = table(run.parent / "out")
    errors = {row["id"]: row["error"] for row in rows if row["error"]}
    assert set(errors) == {"01", "05", "06", "07", "13", "14", "15"}
    assert "none.mp4: no such video" in errors["01"]
    assert "'soon' is not a time" in errors["06"]
    assert "'inf' is not a time" in errors["13"]
    assert "the video ends at" in errors["07"]
    assert "14: OSError: " in errors["14"]
    assert "archive.csv, row 17: neither path nor text" in errors["15"]
    for row in rows:
        assert (row["label"] is None) == (row["error"] is not None)


def test_a_piece_that_ends_at_zero_has_no_words(tmp_path):
    (tmp_path / "a.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\n真好\n", encoding="utf-8")
    (tmp_path / "m.csv").write_text("id,path,subtitles,end\nx,a.mp4,a.srt,0\n", encoding="utf-8")
    worker = object.__new__(bulk.Worker)
    worker.root, worker.lines = tmp_path, subtitles.read
    (row,) = manifest.read(tmp_path / "m.csv")
    assert worker._clip(row) == Clip("x", tmp_path / "a.mp4", None, end=0.0)


def test_the_subtitles_of_a_film_are_read_once(run, archive, tmp_path, monkeypatch):
    seen, read = [], subtitles.read
    monkeypatch.setattr(subtitles, "read", lambda path: seen.append(path.name) or read(path))
    list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert seen.count("0.srt") == 1


def test_an_error_of_no_kind_that_we_know_costs_one_row(run, archive, undisturbed, tmp_path, monkeypatch):
    real = senticlip.load(run)

    class Odd:
        def batch(self, clips, **options):
            if any(clip.id == "03" for clip in clips):
                raise KeyError("a surprise")
            return real.batch(clips, **options)

        output, predictions = staticmethod(real.output), staticmethod(real.predictions)

    monkeypatch.setattr("senticlip.predictor.load", lambda run, **options: Odd())
    rows = list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert rows[3]["error"] == "03: KeyError: 'a surprise'"
    expected = table(run.parent / "out")
    for i in (0, 2, 4):
        assert rows[i] == pytest.approx(expected[i], abs=1e-6)


@pytest.mark.parametrize("error", [av.error.MemoryError(12, "no memory"), RuntimeError("conv2d"), MemoryError()])
def test_what_one_clip_alone_does_to_the_machine_costs_its_row(error):
    class Picky(FakePredictor):
        def batch(self, clips, **options):
            if any(clip.id == "b" for clip in clips):
                raise error
            return super().batch(clips, **options)

    found = list(answers.answer(Picky(), [Clip(name, None, "好") for name in "abc"]))
    assert [each[0] is None for each in found] == [False, True, False]
    assert str(found[1][1]).startswith(f"b: {type(error).__name__}")
    ((alone, _, _),) = answers.answer(Picky(), [Clip("b", None, "好")])
    assert alone is None


def test_a_broken_machine_ends_the_work_and_files_do_not():
    class Broken(FakePredictor):
        def batch(self, clips, **options):
            self.batches += 1
            raise self.error

    clips, broken = [Clip(name, None, "好") for name in "ab"], Broken()
    broken.error = RuntimeError("CUDA error")
    with pytest.raises(RuntimeError, match="CUDA error"):
        list(answers.answer(broken, clips))
    broken.error = av.error.BugError(1, "bug")
    assert ["BugError" in str(error) for _, error, _ in answers.answer(broken, clips)] == [True, True]


def test_a_bad_clip_is_not_tried_again_and_good_ones_are_not_either():
    predictor = FakePredictor()
    found = list(answers.answer(predictor, [Clip(text, None, text) for text in ("好", "broken", "坏")]))
    assert [error is None for _, error, _ in found] == [True, False, True]
    assert predictor.batches == 1 + 3  # all together, and then each alone


def test_what_fails_once_is_tried_again():
    class Shaky(FakePredictor):
        def batch(self, clips, **options):
            if self.batches < 2:
                self.batches += 1
                raise RuntimeError("out of memory")
            return super().batch(clips, **options)

    (found,) = answers.answer(Shaky(), [Clip("a", None, "好")])  # the batch, and then the clip again
    assert found[0] is None
    assert [error for _, error, _ in answers.answer(Shaky(), [Clip("a", None, "好"), Clip("b", None, "坏")])] == [
        None
    ] * 2


def test_the_same_call_goes_on(run, archive, undisturbed, tmp_path, monkeypatch):
    made = []
    real = bulk.Worker.make
    monkeypatch.setattr(bulk.Worker, "make", lambda self, number: made.append(number) or real(self, number))
    stream = senticlip.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART)
    assert next(stream)["id"] == "00"
    with pytest.raises(UserError, match="another bulk is writing here"):
        bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART)
    stream.close()
    (tmp_path / ".part-000003.parquet.0123.partial").write_text("what a kill leaves")
    assert made == [0]
    told = []
    stream = bulk.bulk(
        run, archive, tmp_path, workers=1, rows_per_part=PART, progress=lambda done, total: told.append((done, total))
    )
    rows = list(stream)
    assert told == [(done, ROWS) for done in (4, 8, 12, 16, 20, 24, 26)]
    assert made == list(range(7))
    assert rows == table(run.parent / "out")
    assert files(tmp_path) == undisturbed
    assert {path.name for path in tmp_path.glob(".*")} == {".bulk", ".lock"}
    list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert made == list(range(7))


def test_another_manifest_or_folder_is_refused(run, archive, undisturbed, tmp_path):
    with pytest.raises(UserError, match="a different rows_per_part"):
        bulk.bulk(run, archive, run.parent / "out", workers=1, rows_per_part=5)
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "好"}')
    with pytest.raises(UserError, match="a different manifest"):
        bulk.bulk(run, other, run.parent / "out", workers=1, rows_per_part=PART)
    moved = tmp_path / archive.name
    moved.write_bytes(archive.read_bytes())
    with pytest.raises(UserError, match="a different folder of the manifest"):
        bulk.bulk(run, moved, run.parent / "out", workers=1, rows_per_part=PART)
    (tmp_path / "part-000000.parquet").write_text("")
    with pytest.raises(UserError, match="something else"):
        bulk.bulk(run, other, tmp_path)
    for wrong, said in (({"workers": 0}, "at least 1"), ({"rows_per_part": 0}, "at least 1")):
        with pytest.raises(UsageError, match=said):
            bulk.bulk(run, other, tmp_path, **wrong)
    with pytest.raises(UserError, match="a different precision"):
        bulk.bulk(run, archive, run.parent / "out", workers=1, rows_per_part=PART, precision="bf16")
    with pytest.raises(UsageError, match="--precision fp8: choose one of fp32, bf16, int8"):
        bulk.bulk(run, other, tmp_path, precision="fp8")
    with pytest.raises(UsageError, match="no trained model"):
        bulk.bulk(tmp_path, other, tmp_path)
    with pytest.raises(UsageError, match="no such manifest"):
        bulk.bulk(run, tmp_path / "none.csv", tmp_path)


def test_a_manifest_that_was_cut_before_a_kill_is_not_anothers(run, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": name, "text": "好"}), encoding="utf-8")

    def killed(path, write):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bulk, "write_text", killed)  # the stamp's
        with pytest.raises(KeyboardInterrupt):
            bulk.bulk(run, tmp_path / "one.jsonl", tmp_path / "out", workers=1)
    assert (tmp_path / "out" / ".bulk" / "rows.parquet").is_file()
    assert [row["id"] for row in bulk.bulk(run, tmp_path / "two.jsonl", tmp_path / "out", workers=1)] == ["two"]


def test_an_exported_file_is_a_run_too(run, tmp_path, monkeypatch):
    monkeypatch.setattr("senticlip.predictor.load", lambda path, **options: FakePredictor(path))
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_text(name)
    (tmp_path / "a.jsonl").write_text('{"id": "a", "text": "真好"}', encoding="utf-8")
    (row,) = bulk.bulk(tmp_path / "a.onnx", tmp_path / "a.jsonl", tmp_path / "out", workers=1)
    assert row["label"] == "positive"
    with pytest.raises(UserError, match="a different run"):
        bulk.bulk(tmp_path / "b.onnx", tmp_path / "a.jsonl", tmp_path / "out", workers=1)
    with pytest.raises(UsageError, match="for an ONNX file: fp32"):
        bulk.bulk(tmp_path / "a.onnx", tmp_path / "a.jsonl", tmp_path / "new", workers=1, precision="int8")
    assert not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match="no trained model"):
        bulk.bulk(tmp_path / "c.onnx", tmp_path / "a.jsonl", tmp_path / "new", workers=1)


def test_without_ray_it_is_one_process(run, archive, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    list(bulk.bulk(run, archive, tmp_path, rows_per_part=PART))
    assert files(tmp_path) == undisturbed
    for wrong in ({"workers": 2}, {"address": "10.0.0.1:6379"}):
        with pytest.raises(UsageError, match=r"pip install 'senticlip\[ray\]'"):
            bulk.bulk(run, archive, tmp_path, rows_per_part=PART, **wrong)


def test_a_video_that_kills_its_worker_costs_its_rows(run, archive, undisturbed, tmp_path, monkeypatch):
    code = "import os, sys; sys.argv[1].endswith('/2.mp4') and os.kill(os.getpid(), 9)"
    monkeypatch.setattr(crashes, "_DECODE", code)
    stream = bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART)
    (tmp_path / ".part-000000.parquet.begun").write_text("|" * bulk.PATIENCE)  # as that many killed workers leave it
    (tmp_path / ".part-000002.parquet.begun").write_text("|" * (bulk.PATIENCE - 1))
    rows = list(stream)
    assert [row["id"] for row in rows if "crashes" in (row["error"] or "")] == ["02"]
    expected = table(run.parent / "out")
    assert [row for row in rows if row["id"] != "02"] == [
        pytest.approx(row, abs=1e-6) for row in expected if row["id"] != "02"
    ]
    assert {path.name for path in tmp_path.glob(".*")} == {".bulk", ".lock"}


def test_what_ends_without_a_crash_is_no_videos_fault(run, archive, tmp_path, monkeypatch):
    """A job that is started again and again on a full disk must not open each video alone in the end."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq, "write_table", full)
    for _ in range(bulk.PATIENCE):
        with pytest.raises(UserError, match="the disk is full"):
            list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert not list(tmp_path.glob(".*.begun"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_interrupts_it_is_no_video(run, archive, tmp_path, monkeypatch, error):
    def interrupt(*_):
        raise error

    monkeypatch.setattr(bulk.Worker, "answer", interrupt)
    with pytest.raises(error):
        list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert not list(tmp_path.glob(".*.begun"))


def driver(run: Path, archive: Path, out: Path, workers: int) -> subprocess.Popen:
    code = (
        "import sys, time; from senticlip.bulk import bulk\n"
        # an archive this small is else done between two looks of who wants to kill it
        f"for row in bulk(*sys.argv[1:], workers={workers}, rows_per_part={PART}): time.sleep(0.03)"
    )
    return subprocess.Popen([sys.executable, "-c", code, run, archive, out], env={**os.environ, "OMP_NUM_THREADS": "1"})


def killed_when(process: subprocess.Popen, happened) -> None:
    """Kill -9 as soon as something has happened."""
    deadline = time.monotonic() + 300
    try:
        while not happened():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()


def test_a_driver_that_is_killed_at_any_moment(run, archive, undisturbed, tmp_path):
    moments = [
        lambda: (tmp_path / ".bulk" / "job.json").exists(),
        lambda: any(tmp_path.glob("part-*")),
        lambda: any(tmp_path.glob(".part-00000[3-5]*.partial")) or len(files(tmp_path)) > 3,
    ]
    for happened in moments:
        killed_when(driver(run, archive, tmp_path, 1), happened)
    assert len(files(tmp_path)) < len(undisturbed)
    assert driver(run, archive, tmp_path, 1).wait() == 0
    assert files(tmp_path) == undisturbed


def children(pid: int) -> dict[int, str]:
    """The processes below one: pid → command line."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    below, found = [pid], {}
    while below:
        parent = below.pop()
        for child in [p for p, above in parents.items() if above == parent]:
            below.append(child)
            found[child] = names.get(child, "")
    return found


def test_on_ray_a_worker_is_killed(run, archive, undisturbed, tmp_path):
    import ray

    killed: list[int] = []
    assassin = threading.Thread(target=kill_a_worker, args=(tmp_path, killed))
    assassin.start()
    rows = list(bulk.bulk(run, archive, tmp_path, workers=2, rows_per_part=PART))
    assassin.join()
    assert not ray.is_initialized()
    assert killed
    assert sorted(row["id"] for row in rows) == [f"{i:02}" for i in range(ROWS)]
    assert files(tmp_path) == undisturbed


def test_on_ray_the_driver_is_killed(run, archive, undisturbed, tmp_path):
    killed_when(driver(run, archive, tmp_path, 2), lambda: any(tmp_path.glob("part-*")))
    list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert files(tmp_path) == undisturbed


def test_on_ray_who_ends_it_is_no_video(run, archive, tmp_path):
    code = (
        "import sys, time; from senticlip.bulk import bulk; from senticlip.files import terminable\n"
        f"with terminable():\n for row in bulk(*sys.argv[1:], workers=2, rows_per_part={PART}): time.sleep(1)"
    )
    command, home = [sys.executable, "-c", code, run, archive, tmp_path], {**os.environ, "HOME": str(tmp_path / "home")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=home)
    begun = tmp_path / ".part-000006.parquet.begun"
    deadline = time.monotonic() + 300
    while not any(tmp_path.glob("part-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    begun.write_text("|")  # as of a worker that is killed with this job
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors.endswith("KeyboardInterrupt\n")
    assert "SIGTERM received" not in errors  # Ray's own way
    assert not (tmp_path / "home" / ".ray").exists()  # a token for all that is to come; HOME may not be writable
    assert not list(tmp_path.glob(".*.begun"))


def test_on_ray_a_model_that_cannot_be_loaded_is_one_line(run, archive, tmp_path, capfd):
    broken = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(UserError, match=r"^[^\n]*tokenizer: the tokenizer folder is missing[^\n]*$"):
        list(bulk.bulk(broken, archive, tmp_path / "out", workers=2, rows_per_part=PART))
    assert "Traceback" not in "".join(capfd.readouterr())


def kill_a_worker(out: Path, killed: list[int]) -> None:
    """Kill -9 the first worker that begins to write."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list(out.glob("*.parquet*")):
        time.sleep(0.001)
    for pid, name in children(os.getpid()).items():
        if name.startswith("ray::") and "Worker" in name and not killed:
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)


def test_no_cluster_answers(run, archive, tmp_path):
    with pytest.raises(UserError, match="no Ray cluster answers"):
        list(bulk.bulk(run, archive, tmp_path, address="127.0.0.1:1", rows_per_part=PART))
    with pytest.raises(UsageError, match="give the HOST:PORT of ray start --head"):
        list(bulk.bulk(run, archive, tmp_path, address="ray://127.0.0.1:10001", rows_per_part=PART))


def hurt(path):
    """Change bytes of a file's data; its end stays sound."""
    data = bytearray(path.read_bytes())
    data[8:40] = bytes(byte ^ 0xA5 for byte in data[8:40])
    path.write_bytes(data)


def test_what_a_disk_has_lost_is_made_again(run, archive, undisturbed, tmp_path):
    list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    (tmp_path / "part-000000.parquet").write_bytes(b"")
    for damaged in (tmp_path / "part-000002.parquet", tmp_path / ".bulk" / "rows.parquet"):
        damaged.write_bytes(damaged.read_bytes()[:-50])
    rows = list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert sorted(row["id"] for row in rows) == [f"{i:02}" for i in range(ROWS)]
    assert files(tmp_path) == undisturbed
    hurt(tmp_path / "part-000001.parquet")
    for retry in (False, True):
        rows = list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART, retry=retry))
        assert sorted(row["id"] for row in rows) == [f"{i:02}" for i in range(ROWS)]
    assert files(tmp_path) == undisturbed
    hurt(tmp_path / ".bulk" / "rows.parquet")
    (tmp_path / "part-000000.parquet").unlink()
    with pytest.raises(UserError, match=r"rows\.parquet: was damaged — run the same command again"):
        list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert files(tmp_path) == undisturbed
    for wrong in ("[]", "{"):
        (tmp_path / ".bulk" / "job.json").write_text(wrong)
        with pytest.raises(UserError, match=r"job\.json: damaged, .* choose another --out"):
            bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART)


def test_retry_answers_the_parts_again_in_which_rows_failed(run, tmp_path, monkeypatch):
    rows = [{"id": name, "text": "好"} for name in "abc"] + [{"id": "d", "path": "late.mp4"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    made = []
    real = bulk.Worker.make
    monkeypatch.setattr(bulk.Worker, "make", lambda self, number: made.append(number) or real(self, number))

    def again(**options):
        made.clear()
        found = bulk.bulk(run, tmp_path / "m.jsonl", tmp_path / "out", workers=1, rows_per_part=2, **options)
        return {row["id"]: row["error"] for row in found}

    assert "no such video" in again()["d"]
    write_clip(tmp_path / "late.mp4", 60, 0, size=32)
    assert "no such video" in again()["d"]
    assert made == []
    before = files(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(bulk.answers, "write_parquet", stopped)
        with pytest.raises(KeyboardInterrupt):
            again(retry=True)
    assert files(tmp_path / "out") == before  # what was answered stays until it is replaced
    assert again(retry=True) == dict.fromkeys("abcd")
    assert made == [1]
    assert again(retry=True) == dict.fromkeys("abcd")
    assert made == []


def stopped(*_):
    raise KeyboardInterrupt


def test_a_run_that_is_trained_again_meanwhile_is_told(run, archive, tmp_path, monkeypatch):
    mine, real = shutil.copytree(run, tmp_path / "run"), senticlip.predictor.load

    def late(*args, **options):
        loaded, weights = real(*args, **options), load_file(mine / "model.safetensors")
        save_file({name: value + 1 for name, value in weights.items()}, mine / "model.safetensors")
        return loaded

    monkeypatch.setattr(senticlip.predictor, "load", late)
    with pytest.raises(UserError, match="the model has changed since this began"):
        list(bulk.bulk(mine, archive, tmp_path / "out", workers=1, rows_per_part=PART))
    assert not list((tmp_path / "out").glob("part-*"))


def test_folders_need_not_be_utf_8_and_tables_come_from_windows(run, tmp_path):
    place = tmp_path / os.fsdecode(b"\xb5\xe7")
    write_clip(place / "clips" / "0.mp4", 60, 0, size=32)
    (place / "m.csv").write_text("id,path\na,clips\\0.mp4\nb,none.mp4\n")
    found, lost = bulk.bulk(run, place / "m.csv", place / "out", workers=1)
    assert found["error"] is None
    assert "/??/none.mp4: no such video file" in lost["error"]
    assert answers.read_parquet(place / "out" / "part-000000.parquet").to_pylist() == [found, lost]
    (place / "m.parquet").write_bytes(as_parquet(place / "m.csv"))
    assert [row["id"] for row in bulk.bulk(run, place / "m.parquet", place / "more", workers=1)] == ["a", "b"]


def as_parquet(table: Path) -> bytes:
    """A CSV as Parquet."""
    sink = io.BytesIO()
    with table.open(encoding="utf-8", newline="") as file:
        pq.write_table(pa.Table.from_pylist(list(csv.DictReader(file))), sink)
    return sink.getvalue()


def test_the_words_of_a_piece_are_those_said_in_it(tmp_path):
    """A line that goes over an edge of the piece is heard in it; one that only touches it is not."""
    times = ((0, 1), (1, 2), (2, 4), (4, 5))
    lines = [f"{i}\n00:00:0{a},000 --> 00:00:0{b},000\n{'甲乙丙丁'[i]}\n" for i, (a, b) in enumerate(times)]
    (tmp_path / "a.srt").write_text("\n".join(lines), encoding="utf-8")
    worker = bulk.Worker.__new__(bulk.Worker)
    worker.root, worker.lines = tmp_path, subtitles.read
    row = {"id": "x", "path": "a.mp4", "text": None, "subtitles": "a.srt", "start": "1.0", "end": "3.0", "error": None}
    clip = worker._clip(row)
    assert (clip.text.split(), clip.start, clip.end) == (["乙", "丙"], 1.0, 3.0)


def test_the_precision_and_the_device_reach_the_model(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("senticlip.predictor.load", lambda _, **options: asked.append(options) or FakePredictor())
    (tmp_path / "m.jsonl").write_text('{"id": "a", "text": "真好"}', encoding="utf-8")
    list(bulk.bulk(run, tmp_path / "m.jsonl", tmp_path / "out", workers=1, device="cpu", precision="bf16"))
    assert asked == [{"device": "cpu", "precision": "bf16"}]


def test_answers_of_another_config_are_not_mixed_in(run, tmp_path):
    """The weights alone do not tell how many frames are read of a clip."""
    mine, (manifest_file, out) = shutil.copytree(run, tmp_path / "run"), (tmp_path / "m.jsonl", tmp_path / "out")
    manifest_file.write_text('{"id": "a", "text": "真好"}', encoding="utf-8")
    list(bulk.bulk(mine, manifest_file, out, workers=1))
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps(config, indent=3))
    with pytest.raises(UserError, match="holds answers from a different run — choose another --out"):
        bulk.bulk(mine, manifest_file, out, workers=1)


def test_a_part_that_was_lost_is_counted_once(run, archive, undisturbed, tmp_path):
    list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    hurt(tmp_path / "part-000001.parquet")
    told = []
    options = {"workers": 1, "rows_per_part": PART, "progress": lambda *numbers: told.append(numbers)}
    list(bulk.bulk(run, archive, tmp_path, **options))
    assert told == [(ROWS, ROWS), (ROWS, ROWS)]  # its end is sound: that it is lost shows when it is read
