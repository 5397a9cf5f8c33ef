"""``senticlip demo`` with stand-ins for its parts, which have tests of their own."""

import csv
import re

import pytest
from tests.tiny import data_folder

from senticlip.config import Config
from senticlip.data.sims import read_clips
from senticlip.demo import demo, example_clips, page
from senticlip.structures import LABELS, UsageError, UserError


class StopDemo(Exception):
    """Raised by a stand-in to end a demo early."""


def test_second_demo_in_the_same_folder_is_rejected(tmp_path, monkeypatch):
    def make(*args, **options):
        with pytest.raises(UserError, match=r"out: another demo is writing here — wait, or choose another --out"):
            demo(tmp_path / "out")
        raise StopDemo

    monkeypatch.setattr("senticlip.demo.make", make)
    for _ in range(2):  # the first call has released the lock
        with pytest.raises(StopDemo):
            demo(tmp_path / "out")


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (False, False)], indirect=["terminal"])
def test_progress_of_making_clips_is_shown_on_a_terminal_only(tmp_path, monkeypatch, terminal, shown):
    def make(*args, progress, **options):
        progress(30, 1080)
        raise StopDemo

    monkeypatch.setattr("senticlip.demo.make", make)
    with pytest.raises(StopDemo):
        demo(tmp_path / "out")
    assert ("clips" in terminal.getvalue() and "30/1080" in terminal.getvalue()) == shown


def test_report_names_kinds_and_labels_in_both_languages(tmp_path):
    clips = read_clips(data_folder(tmp_path / "data", (1, 1, 3)), "test")  # text and video have the same label in each
    with (tmp_path / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "truth", "predicted", *LABELS])
        writer.writerows([clip.id, clip.text, LABELS[i], "neutral", 0.1, 0.7, 0.2] for i, clip in enumerate(clips))
    shown = example_clips(tmp_path / "predictions.csv", {clip.id: clip for clip in clips})
    assert [(clip["kind"], clip["path"]) for clip in shown] == [
        ("agree", clips[0].video),
        ("agree", clips[2].video),
        ("neutral", clips[1].video),
    ]
    counts = {"n": 3, "interval": [0.1, 0.9], "macro_f1": 0.3, "confusion": [[0, 1, 0]] * 3}
    result = {**counts, "accuracy": 1 / 3, "best": 1.0, "history": [{"epoch": 1, "accuracy": 0.5}]}
    report = page({"fused": result, "text": result, "video": result}, shown)
    names = re.findall(r'<span class="soft">([^<]+)</span></figcaption>', report)
    assert names == ["文本与视频一致 agree", "文本与视频一致 agree", "都是中性 neutral"]
    assert (report.count("✓ 中性 neutral 0.70"), report.count("✗ 中性 neutral 0.70")) == (1, 2)


def test_explained_clip_comes_from_the_configured_split(tmp_path, monkeypatch):
    explained_videos = []

    def fake_evaluate(run, data):
        clips = read_clips(data, "test", "tenth", 3)
        with (run.parent / "run" / "predictions-test.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "text", "truth", "predicted", *LABELS])
            writer.writerows([clip.id, clip.text, "neutral", "neutral", 0.1, 0.7, 0.2] for clip in clips)
        return {"accuracy": 0.5, "macro_f1": 0.4}

    def fake_explain(run, video, *rest):
        explained_videos.append(video)
        raise StopDemo

    def fake_make(out, seed, sound, progress):
        data_folder(out, (4, 4, 12))
        return {"best": {"test": dict.fromkeys(("fused", "text", "video"), 1.0)}}

    monkeypatch.setattr("senticlip.demo.make", fake_make)
    monkeypatch.setattr("senticlip.demo.train", lambda config, data, run, resume: run.mkdir())
    monkeypatch.setattr("senticlip.demo.evaluate", fake_evaluate)
    monkeypatch.setattr("senticlip.demo.read_metrics", lambda run: {"history": []})
    monkeypatch.setattr("senticlip.demo.stages_of", lambda experiment, data: [])
    monkeypatch.setattr("senticlip.demo.kind", lambda words, face: "conflict")
    monkeypatch.setattr("senticlip.demo.load", lambda run: None)
    monkeypatch.setattr("senticlip.demo.explain", fake_explain)
    with pytest.raises(StopDemo):
        demo(tmp_path / "out", Config(protocol="tenth", seed=3))
    assert explained_videos == [read_clips(tmp_path / "out" / "data", "test", "tenth", 3)[0].video]


@pytest.mark.parametrize("started", [False, True])
def test_folder_that_is_not_a_run_is_not_deleted(tmp_path, monkeypatch, started):
    folder = tmp_path / "out" / "run-video"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"run-video: not a run, and would be deleted — choose another --out"):
        demo(tmp_path / "out")
    assert (folder / "deep" / "notes.txt").read_text() == "mine"
    (folder / "deep" / "notes.txt").rename(folder / ".notes")  # a killed run may leave hidden files
    if started:
        (folder / "config.json").touch()
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "origin.json").write_text('{"rows": ""}')
    (tmp_path / "out" / "run-text").mkdir()
    folders = []

    def fake_train(config, data, run, resume):
        folders.append({path.name for path in run.parent.iterdir()} - {".lock"})
        if run.name == "run-video":
            raise StopDemo

    best = {"best": {"test": dict.fromkeys(("fused", "text", "video"))}}
    monkeypatch.setattr("senticlip.demo.make", lambda *_, **__: best)
    monkeypatch.setattr("senticlip.demo.train", fake_train)
    monkeypatch.setattr("senticlip.demo.evaluate", lambda *_: {})
    monkeypatch.setattr("senticlip.demo.read_metrics", lambda run: {"history": []})
    monkeypatch.setattr("senticlip.demo.stages_of", lambda *_: [])
    with pytest.raises(StopDemo):
        demo(tmp_path / "out")
    assert folders == [{"run-text", "run-video"}, {"run-video"}, set()]


def test_demo_needs_text_and_video(tmp_path):
    for modalities in (["text"], ["vision", "audio"]):
        with pytest.raises(UsageError, match="modalities: the demo compares text and video"):
            demo(tmp_path / "out", Config(modalities=modalities))
    assert not (tmp_path / "out").exists()


def test_report_gets_the_best_possible_accuracy_of_each_model(tmp_path, monkeypatch):
    results, best = {}, {"fused": 1.0, "text": 0.66, "video": 0.74}

    def fake_page(found, shown):
        results.update(found)
        raise StopDemo

    for name, stub in {
        "make": lambda *_, **__: {"best": {"test": best}},
        "train": lambda *_, **__: None,
        "evaluate": lambda run, data: {"run": run.name},
        "read_metrics": lambda run: {"history": [run.name]},
        "stages_of": lambda *_: [],
        "read_clips": lambda *_: [],
        "example_clips": lambda *_: [{"kind": "conflict", "path": "p", "text": "t"}],
        "load": lambda run: None,
        "explain": lambda *_: None,
        "page": fake_page,
    }.items():
        monkeypatch.setattr(f"senticlip.demo.{name}", stub)
    with pytest.raises(StopDemo):
        demo(tmp_path / "out")
    runs = {"fused": "run", "text": "run-text", "video": "run-video"}
    assert results == {name: {"run": run, "history": [run], "best": best[name]} for name, run in runs.items()}
