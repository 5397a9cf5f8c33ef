"""An archive → its rows, in one process and on Ray, despite bad rows, damaged files and killed processes."""

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
    """A RUN folder with random weights."""
    folder = tmp_path_factory.mktemp("bulk")
    vision_spec = {
        "model_type": "chinese_clip",
        "projection_dim": 12,
        "text_config": {"model_type": "chinese_clip_text_model", "vocab_size": 22000, **SMALL},
        "vision_config": {"patch_size": 8, "image_size": 32, **SMALL},
    }
    keys = {"width": 16, "heads": 2, "vision.frames": 3, "text.max_length": 24, "text.prefix_length": 2}
    for name, spec in (("text", {"model_type": "bert", "vocab_size": 22000, **SMALL}), ("vision", vision_spec)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(spec))
        keys |= {f"{name}.encoder": str(folder / name), f"{name}.pretrained": False}
    torch.manual_seed(0)
    create_model(Config().override({**keys, "label.pretrained": False})).save_pretrained(folder / "run")
    load_tokenizer(None).save_pretrained(folder / "run" / "tokenizer")
    return folder / "run"


@pytest.fixture(scope="module")
def archive(run) -> Path:
    """A manifest of good clips, with seven bad rows among them."""
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
    rows[14] |= {"text": "", "subtitles": "字" * 300 + ".srt"}  # too long for any file system
    rows[15] |= {"path": "", "text": ""}
    rows[17] |= {"path": "", "text": "", "subtitles": "0.srt"}
    with (folder / "archive.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "path", "text", "subtitles", "start", "end"])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "archive.csv"


@pytest.fixture(scope="module")
def reference(run, archive) -> dict[str, bytes]:
    """The part files of an uninterrupted run in one process."""
    list(bulk.bulk(run, archive, run.parent / "out", workers=1, rows_per_part=PART))
    return part_files(run.parent / "out")


def part_files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("part-*.parquet")}


def all_rows(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_rows_match_predict(run, archive, reference):
    rows = {row["id"]: row for row in all_rows(run.parent / "out")}
    assert list(rows) == [f"{i:02}" for i in range(ROWS)]
    predict, folder = senticlip.load(run), archive.parent
    for name, inputs in {
        "02": {"video": folder / "2.mp4", "text": "第2句话真好"},
        "09": {"text": "第9句话真好"},
        "10": {"video": folder / "1.mp4"},
        "17": {"text": "真好 太坏"},
        "11": {"video": folder / "0.mp4", "text": "真好 太坏"},
        "12": {"video": folder / "0.mp4", "text": "太坏", "start": 0.32, "end": 0.6},
    }.items():
        expected = answers.record(predict(**inputs))
        assert {k: v for k, v in rows[name].items() if k != "id"} == pytest.approx(expected, abs=1e-6), name


def test_sentiment_is_the_clipped_score():
    rows = [answers.record(Prediction("positive", {}, {}, {}, score)) for score in (-3.0, 0.25, 2.5)]
    assert [row["sentiment"] for row in rows] == [-1.0, 0.25, 1.0]


def test_folder_reads_as_one_table(run, reference):
    assert pq.read_table(run.parent / "out").to_pylist() == all_rows(run.parent / "out")


def test_failed_row_is_a_row_with_its_error(run, reference):
    rows = all_rows(run.parent / "out")
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


def test_segment_that_ends_at_zero_has_no_text(tmp_path):
    (tmp_path / "a.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\n真好\n", encoding="utf-8")
    (tmp_path / "m.csv").write_text("id,path,subtitles,end\nx,a.mp4,a.srt,0\n", encoding="utf-8")
    worker = object.__new__(bulk.Worker)
    worker.root, worker.lines = tmp_path, subtitles.read
    (row,) = manifest.read(tmp_path / "m.csv")
    assert worker._clip(row) == Clip("x", tmp_path / "a.mp4", None, end=0.0)


def test_subtitle_file_is_read_once(run, archive, tmp_path, monkeypatch):
    paths_read, read = [], subtitles.read
    monkeypatch.setattr(subtitles, "read", lambda path: paths_read.append(path.name) or read(path))
    list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert paths_read.count("0.srt") == 1


def test_unexpected_error_costs_one_row(run, archive, reference, tmp_path, monkeypatch):
    real = senticlip.load(run)

    class FailingFor03:
        def batch(self, clips, **options):
            if any(clip.id == "03" for clip in clips):
                raise KeyError("a surprise")
            return real.batch(clips, **options)

        output, predictions = staticmethod(real.output), staticmethod(real.predictions)

    monkeypatch.setattr("senticlip.predictor.load", lambda run, **options: FailingFor03())
    rows = list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert rows[3]["error"] == "03: KeyError: 'a surprise'"
    expected = all_rows(run.parent / "out")
    for i in (0, 2, 4):
        assert rows[i] == pytest.approx(expected[i], abs=1e-6)


@pytest.mark.parametrize("error", [av.error.MemoryError(12, "no memory"), RuntimeError("conv2d"), MemoryError()])
def test_machine_error_for_one_clip_costs_one_row(error):
    class FailingForB(FakePredictor):
        def batch(self, clips, **options):
            if any(clip.id == "b" for clip in clips):
                raise error
            return super().batch(clips, **options)

    results = list(answers.answer(FailingForB(), [Clip(name, None, "好") for name in "abc"]))
    assert [result[0] is None for result in results] == [False, True, False]
    assert str(results[1][1]).startswith(f"b: {type(error).__name__}")
    ((alone, _, _),) = answers.answer(FailingForB(), [Clip("b", None, "好")])
    assert alone is None


def test_machine_error_for_all_clips_is_raised_but_not_file_errors():
    class AlwaysFailing(FakePredictor):
        def batch(self, clips, **options):
            self.batches += 1
            raise self.error

    clips, predictor = [Clip(name, None, "好") for name in "ab"], AlwaysFailing()
    predictor.error = RuntimeError("CUDA error")
    with pytest.raises(RuntimeError, match="CUDA error"):
        list(answers.answer(predictor, clips))
    predictor.error = av.error.BugError(1, "bug")
    assert ["BugError" in str(error) for _, error, _ in answers.answer(predictor, clips)] == [True, True]


def test_clips_of_a_failed_batch_are_tried_once_each():
    predictor = FakePredictor()
    results = list(answers.answer(predictor, [Clip(text, None, text) for text in ("好", "broken", "坏")]))
    assert [error is None for _, error, _ in results] == [True, False, True]
    assert predictor.batches == 1 + 3  # all in one batch, then each alone


def test_machine_error_is_retried_once():
    class FailsTwice(FakePredictor):
        def batch(self, clips, **options):
            if self.batches < 2:
                self.batches += 1
                raise RuntimeError("out of memory")
            return super().batch(clips, **options)

    (result,) = answers.answer(FailsTwice(), [Clip("a", None, "好")])  # in its batch, then again
    assert result[0] is None
    assert [error for _, error, _ in answers.answer(FailsTwice(), [Clip("a", None, "好"), Clip("b", None, "坏")])] == [
        None
    ] * 2


def test_same_call_resumes(run, archive, reference, tmp_path, monkeypatch):
    parts_made = []
    real = bulk.Worker.make
    monkeypatch.setattr(bulk.Worker, "make", lambda self, number: parts_made.append(number) or real(self, number))
    stream = senticlip.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART)
    assert next(stream)["id"] == "00"
    with pytest.raises(UserError, match="another bulk is writing here"):
        bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART)
    stream.close()
    (tmp_path / ".part-000003.parquet.0123.partial").write_text("what a kill leaves")
    assert parts_made == [0]
    calls = []
    stream = bulk.bulk(
        run, archive, tmp_path, workers=1, rows_per_part=PART, progress=lambda done, total: calls.append((done, total))
    )
    rows = list(stream)
    assert calls == [(done, ROWS) for done in (4, 8, 12, 16, 20, 24, 26)]
    assert parts_made == list(range(7))
    assert rows == all_rows(run.parent / "out")
    assert part_files(tmp_path) == reference
    assert {path.name for path in tmp_path.glob(".*")} == {".bulk", ".lock"}
    list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert parts_made == list(range(7))


def test_folder_of_another_job_is_rejected(run, archive, reference, tmp_path):
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
    for wrong, message in (({"workers": 0}, "at least 1"), ({"rows_per_part": 0}, "at least 1")):
        with pytest.raises(UsageError, match=message):
            bulk.bulk(run, other, tmp_path, **wrong)
    with pytest.raises(UserError, match="a different precision"):
        bulk.bulk(run, archive, run.parent / "out", workers=1, rows_per_part=PART, precision="bf16")
    with pytest.raises(UsageError, match="--precision fp8: choose one of fp32, bf16, int8"):
        bulk.bulk(run, other, tmp_path, precision="fp8")
    with pytest.raises(UsageError, match="no trained model"):
        bulk.bulk(tmp_path, other, tmp_path)
    with pytest.raises(UsageError, match="no such manifest"):
        bulk.bulk(run, tmp_path / "none.csv", tmp_path)


def test_split_manifest_of_a_killed_job_is_not_reused(run, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": name, "text": "好"}), encoding="utf-8")

    def kill(path, write):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bulk, "write_text", kill)  # which writes the job's stamp
        with pytest.raises(KeyboardInterrupt):
            bulk.bulk(run, tmp_path / "one.jsonl", tmp_path / "out", workers=1)
    assert (tmp_path / "out" / ".bulk" / "rows.parquet").is_file()
    assert [row["id"] for row in bulk.bulk(run, tmp_path / "two.jsonl", tmp_path / "out", workers=1)] == ["two"]


def test_exported_file_as_run(run, tmp_path, monkeypatch):
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


def test_without_ray_runs_in_one_process(run, archive, reference, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    list(bulk.bulk(run, archive, tmp_path, rows_per_part=PART))
    assert part_files(tmp_path) == reference
    for wrong in ({"workers": 2}, {"address": "10.0.0.1:6379"}):
        with pytest.raises(UsageError, match=r"pip install 'senticlip\[ray\]'"):
            bulk.bulk(run, archive, tmp_path, rows_per_part=PART, **wrong)


def test_video_that_kills_workers_costs_only_its_rows(run, archive, reference, tmp_path, monkeypatch):
    code = "import os, sys; sys.argv[1].endswith('/2.mp4') and os.kill(os.getpid(), 9)"
    monkeypatch.setattr(crashes, "_DECODE_SCRIPT", code)
    stream = bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART)
    (tmp_path / ".part-000000.parquet.begun").write_text("|" * bulk.PATIENCE)  # as left by that many killed workers
    (tmp_path / ".part-000002.parquet.begun").write_text("|" * (bulk.PATIENCE - 1))
    rows = list(stream)
    assert [row["id"] for row in rows if "crashes" in (row["error"] or "")] == ["02"]
    expected = all_rows(run.parent / "out")
    assert [row for row in rows if row["id"] != "02"] == [
        pytest.approx(row, abs=1e-6) for row in expected if row["id"] != "02"
    ]
    assert {path.name for path in tmp_path.glob(".*")} == {".bulk", ".lock"}


def test_full_disk_is_not_blamed_on_videos(run, archive, tmp_path, monkeypatch):
    """Restarting a job on a full disk must not lead to checking each video for crashes."""

    def disk_full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq, "write_table", disk_full)
    for _ in range(bulk.PATIENCE):
        with pytest.raises(UserError, match="the disk is full"):
            list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert not list(tmp_path.glob(".*.begun"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupt_is_not_blamed_on_videos(run, archive, tmp_path, monkeypatch, error):
    def interrupt(*_):
        raise error

    monkeypatch.setattr(bulk.Worker, "answer", interrupt)
    with pytest.raises(error):
        list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert not list(tmp_path.glob(".*.begun"))


def start_bulk(run: Path, archive: Path, out: Path, workers: int) -> subprocess.Popen:
    code = (
        "import sys, time; from senticlip.bulk import bulk\n"
        # otherwise, so small an archive would be finished before the test can kill the process
        f"for row in bulk(*sys.argv[1:], workers={workers}, rows_per_part={PART}): time.sleep(0.03)"
    )
    return subprocess.Popen([sys.executable, "-c", code, run, archive, out], env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_when(process: subprocess.Popen, condition) -> None:
    """Kill -9 as soon as a condition holds."""
    deadline = time.monotonic() + 300
    try:
        while not condition():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()


def test_survives_kill_at_any_moment(run, archive, reference, tmp_path):
    conditions = [
        lambda: (tmp_path / ".bulk" / "job.json").exists(),
        lambda: any(tmp_path.glob("part-*")),
        lambda: any(tmp_path.glob(".part-00000[3-5]*.partial")) or len(part_files(tmp_path)) > 3,
    ]
    for condition in conditions:
        kill_when(start_bulk(run, archive, tmp_path, 1), condition)
    assert len(part_files(tmp_path)) < len(reference)
    assert start_bulk(run, archive, tmp_path, 1).wait() == 0
    assert part_files(tmp_path) == reference


def descendants(pid: int) -> dict[int, str]:
    """All descendants of a process: pid → command line."""
    parents, command_lines = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command_lines[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    pending, commands = [pid], {}
    while pending:
        parent = pending.pop()
        for child in [p for p, parent_pid in parents.items() if parent_pid == parent]:
            pending.append(child)
            commands[child] = command_lines.get(child, "")
    return commands


def test_ray_survives_kill_of_a_worker(run, archive, reference, tmp_path):
    import ray

    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path, killed))
    killer.start()
    rows = list(bulk.bulk(run, archive, tmp_path, workers=2, rows_per_part=PART))
    killer.join()
    assert not ray.is_initialized()
    assert killed
    assert sorted(row["id"] for row in rows) == [f"{i:02}" for i in range(ROWS)]
    assert part_files(tmp_path) == reference


def test_ray_survives_kill_of_the_driver(run, archive, reference, tmp_path):
    kill_when(start_bulk(run, archive, tmp_path, 2), lambda: any(tmp_path.glob("part-*")))
    list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert part_files(tmp_path) == reference


def test_ray_sigterm_is_not_blamed_on_videos(run, archive, tmp_path):
    code = (
        "import sys, time; from senticlip.bulk import bulk; from senticlip.files import terminable\n"
        f"with terminable():\n for row in bulk(*sys.argv[1:], workers=2, rows_per_part={PART}): time.sleep(1)"
    )
    command, env = [sys.executable, "-c", code, run, archive, tmp_path], {**os.environ, "HOME": str(tmp_path / "home")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    marker = tmp_path / ".part-000006.parquet.begun"
    deadline = time.monotonic() + 300
    while not any(tmp_path.glob("part-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    marker.write_text("|")  # as left by a worker that is killed with this job
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors.endswith("KeyboardInterrupt\n")
    assert "SIGTERM received" not in errors  # Ray's own handler would print it
    assert not (tmp_path / "home" / ".ray").exists()  # where Ray would keep a token; HOME may not be writable
    assert not list(tmp_path.glob(".*.begun"))


def test_ray_model_that_cannot_be_loaded_is_one_line(run, archive, tmp_path, capfd):
    broken = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(UserError, match=r"^[^\n]*tokenizer: the tokenizer folder is missing[^\n]*$"):
        list(bulk.bulk(broken, archive, tmp_path / "out", workers=2, rows_per_part=PART))
    assert "Traceback" not in "".join(capfd.readouterr())


def kill_a_worker(out: Path, killed: list[int]) -> None:
    """Kill -9 a worker as soon as a part is being written."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list(out.glob("*.parquet*")):
        time.sleep(0.001)
    for pid, command in descendants(os.getpid()).items():
        if command.startswith("ray::") and "Worker" in command and not killed:
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)


def test_unreachable_cluster(run, archive, tmp_path):
    with pytest.raises(UserError, match="no Ray cluster answers"):
        list(bulk.bulk(run, archive, tmp_path, address="127.0.0.1:1", rows_per_part=PART))
    with pytest.raises(UsageError, match="give the HOST:PORT of ray start --head"):
        list(bulk.bulk(run, archive, tmp_path, address="ray://127.0.0.1:10001", rows_per_part=PART))


def corrupt(path):
    """Change bytes in the data of a Parquet file; its metadata, at the end, stays intact."""
    data = bytearray(path.read_bytes())
    data[8:40] = bytes(byte ^ 0xA5 for byte in data[8:40])
    path.write_bytes(data)


def test_damaged_files_are_redone(run, archive, reference, tmp_path):
    list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    (tmp_path / "part-000000.parquet").write_bytes(b"")
    for damaged in (tmp_path / "part-000002.parquet", tmp_path / ".bulk" / "rows.parquet"):
        damaged.write_bytes(damaged.read_bytes()[:-50])
    rows = list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert sorted(row["id"] for row in rows) == [f"{i:02}" for i in range(ROWS)]
    assert part_files(tmp_path) == reference
    corrupt(tmp_path / "part-000001.parquet")
    for retry in (False, True):
        rows = list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART, retry=retry))
        assert sorted(row["id"] for row in rows) == [f"{i:02}" for i in range(ROWS)]
    assert part_files(tmp_path) == reference
    corrupt(tmp_path / ".bulk" / "rows.parquet")
    (tmp_path / "part-000000.parquet").unlink()
    with pytest.raises(UserError, match=r"rows\.parquet: was damaged — run the same command again"):
        list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    assert part_files(tmp_path) == reference
    for wrong in ("[]", "{"):
        (tmp_path / ".bulk" / "job.json").write_text(wrong)
        with pytest.raises(UserError, match=r"job\.json: damaged, .* choose another --out"):
            bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART)


def test_retry_redoes_parts_with_failed_rows(run, tmp_path, monkeypatch):
    rows = [{"id": name, "text": "好"} for name in "abc"] + [{"id": "d", "path": "late.mp4"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    parts_made = []
    real = bulk.Worker.make
    monkeypatch.setattr(bulk.Worker, "make", lambda self, number: parts_made.append(number) or real(self, number))

    def run_bulk(**options):
        parts_made.clear()
        answered = bulk.bulk(run, tmp_path / "m.jsonl", tmp_path / "out", workers=1, rows_per_part=2, **options)
        return {row["id"]: row["error"] for row in answered}

    assert "no such video" in run_bulk()["d"]
    write_clip(tmp_path / "late.mp4", 60, 0, size=32)
    assert "no such video" in run_bulk()["d"]
    assert parts_made == []
    before = part_files(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(bulk.answers, "write_parquet", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_bulk(retry=True)
    assert part_files(tmp_path / "out") == before  # a part stays until it is replaced
    assert run_bulk(retry=True) == dict.fromkeys("abcd")
    assert parts_made == [1]
    assert run_bulk(retry=True) == dict.fromkeys("abcd")
    assert parts_made == []


def raise_interrupt(*_):
    raise KeyboardInterrupt


def test_model_that_changes_meanwhile_is_an_error(run, archive, tmp_path, monkeypatch):
    run_copy, real = shutil.copytree(run, tmp_path / "run"), senticlip.predictor.load

    def load_then_change(*args, **options):
        loaded, weights = real(*args, **options), load_file(run_copy / "model.safetensors")
        save_file({name: value + 1 for name, value in weights.items()}, run_copy / "model.safetensors")
        return loaded

    monkeypatch.setattr(senticlip.predictor, "load", load_then_change)
    with pytest.raises(UserError, match="the model has changed since this began"):
        list(bulk.bulk(run_copy, archive, tmp_path / "out", workers=1, rows_per_part=PART))
    assert not list((tmp_path / "out").glob("part-*"))


def test_non_utf8_folders_and_windows_paths(run, tmp_path):
    folder = tmp_path / os.fsdecode(b"\xb5\xe7")
    write_clip(folder / "clips" / "0.mp4", 60, 0, size=32)
    (folder / "m.csv").write_text("id,path\na,clips\\0.mp4\nb,none.mp4\n")
    answered, failed = bulk.bulk(run, folder / "m.csv", folder / "out", workers=1)
    assert answered["error"] is None
    assert "/??/none.mp4: no such video file" in failed["error"]
    assert answers.read_parquet(folder / "out" / "part-000000.parquet").to_pylist() == [answered, failed]
    (folder / "m.parquet").write_bytes(as_parquet(folder / "m.csv"))
    assert [row["id"] for row in bulk.bulk(run, folder / "m.parquet", folder / "more", workers=1)] == ["a", "b"]


def as_parquet(csv_file: Path) -> bytes:
    """A CSV as Parquet."""
    sink = io.BytesIO()
    with csv_file.open(encoding="utf-8", newline="") as file:
        pq.write_table(pa.Table.from_pylist(list(csv.DictReader(file))), sink)
    return sink.getvalue()


def test_segment_text_is_of_overlapping_lines(tmp_path):
    """A line that crosses an edge of the segment belongs to it; one that only touches it does not."""
    times = ((0, 1), (1, 2), (2, 4), (4, 5))
    lines = [f"{i}\n00:00:0{a},000 --> 00:00:0{b},000\n{'甲乙丙丁'[i]}\n" for i, (a, b) in enumerate(times)]
    (tmp_path / "a.srt").write_text("\n".join(lines), encoding="utf-8")
    worker = bulk.Worker.__new__(bulk.Worker)
    worker.root, worker.lines = tmp_path, subtitles.read
    row = {"id": "x", "path": "a.mp4", "text": None, "subtitles": "a.srt", "start": "1.0", "end": "3.0", "error": None}
    clip = worker._clip(row)
    assert (clip.text.split(), clip.start, clip.end) == (["乙", "丙"], 1.0, 3.0)


def test_precision_and_device_reach_the_model(run, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr("senticlip.predictor.load", lambda _, **options: used.append(options) or FakePredictor())
    (tmp_path / "m.jsonl").write_text('{"id": "a", "text": "真好"}', encoding="utf-8")
    list(bulk.bulk(run, tmp_path / "m.jsonl", tmp_path / "out", workers=1, device="cpu", precision="bf16"))
    assert used == [{"device": "cpu", "precision": "bf16"}]


def test_other_config_is_another_run(run, tmp_path):
    """The config, too, determines the answers, such as by the number of frames."""
    run_copy, (manifest_file, out) = shutil.copytree(run, tmp_path / "run"), (tmp_path / "m.jsonl", tmp_path / "out")
    manifest_file.write_text('{"id": "a", "text": "真好"}', encoding="utf-8")
    list(bulk.bulk(run_copy, manifest_file, out, workers=1))
    config = json.loads((run_copy / "config.json").read_text())
    (run_copy / "config.json").write_text(json.dumps(config, indent=3))
    with pytest.raises(UserError, match="holds answers from a different run — choose another --out"):
        bulk.bulk(run_copy, manifest_file, out, workers=1)


def test_redone_part_is_counted_once(run, archive, reference, tmp_path):
    list(bulk.bulk(run, archive, tmp_path, workers=1, rows_per_part=PART))
    corrupt(tmp_path / "part-000001.parquet")
    progress_calls = []
    options = {"workers": 1, "rows_per_part": PART, "progress": lambda *numbers: progress_calls.append(numbers)}
    list(bulk.bulk(run, archive, tmp_path, **options))
    assert progress_calls == [(ROWS, ROWS), (ROWS, ROWS)]  # the damage shows only when the part is read
