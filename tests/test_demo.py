"""What ``senticlip demo`` is beside its parts, which have tests of their own."""

import csv
import re

import pytest
from tests.tiny import data_folder

from senticlip.config import Config
from senticlip.data.sims import read_clips
from senticlip.demo import demo, page, strip
from senticlip.structures import LABELS, UsageError, UserError


class Enough(Exception):
    """Ends a demo before it trains."""


def test_one_demo_at_a_time_writes_into_a_folder(tmp_path, monkeypatch):
    def make(*args, **options):
        with pytest.raises(UserError, match=r"out: another demo is writing here — wait, or choose another --out"):
            demo(tmp_path / "out")
        raise Enough

    monkeypatch.setattr("senticlip.demo.make", make)
    for _ in range(2):  # the lock is open again
        with pytest.raises(Enough):
            demo(tmp_path / "out")


@pytest.mark.parametrize(("terminal", "watched"), [(True, True), (False, False)], indirect=["terminal"])
def test_the_making_of_clips_is_shown_to_who_watches(tmp_path, monkeypatch, terminal, watched):
    def make(*args, progress, **options):
        progress(30, 1080)
        raise Enough

    monkeypatch.setattr("senticlip.demo.make", make)
    with pytest.raises(Enough):
        demo(tmp_path / "out")
    assert ("clips" in terminal.getvalue() and "30/1080" in terminal.getvalue()) == watched


def test_the_report_says_in_both_languages_how_words_and_face_stand(tmp_path):
    clips = read_clips(data_folder(tmp_path / "data", (1, 1, 3)), "test")  # words and face say the same in each
    with (tmp_path / "predictions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "truth", "predicted", *LABELS])
        writer.writerows([clip.id, clip.text, LABELS[i], "neutral", 0.1, 0.7, 0.2] for i, clip in enumerate(clips))
    shown = strip(tmp_path / "predictions.csv", {clip.id: clip for clip in clips})
    assert [(clip["kind"], clip["path"]) for clip in shown] == [
        ("agree", clips[0].video),
        ("agree", clips[2].video),
        ("neutral", clips[1].video),
    ]
    counts = {"n": 3, "interval": [0.1, 0.9], "macro_f1": 0.3, "confusion": [[0, 1, 0]] * 3}
    one = {**counts, "accuracy": 1 / 3, "best": 1.0, "history": [{"epoch": 1, "accuracy": 0.5}]}
    report = page({"fused": one, "text": one, "video": one}, shown)
    names = re.findall(r'<span class="soft">([^<]+)</span></figcaption>', report)
    assert names == ["文本与视频一致 agree", "文本与视频一致 agree", "都是中性 neutral"]
    assert (report.count("✓ 中性 neutral 0.70"), report.count("✗ 中性 neutral 0.70")) == (1, 2)


def test_it_shows_clips_of_the_split_that_was_asked_about(tmp_path, monkeypatch):
    asked = []

    def evaluated(run, data):
        clips = read_clips(data, "test", "tenth", 3)
        with (run.parent / "run" / "predictions-test.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "text", "truth", "predicted", *LABELS])
            writer.writerows([clip.id, clip.text, "neutral", "neutral", 0.1, 0.7, 0.2] for clip in clips)
        return {"accuracy": 0.5, "macro_f1": 0.4}

    def explained(run, video, *rest):
        asked.append(video)
        raise Enough

    def few(out, seed, sound, progress):
        data_folder(out, (4, 4, 12))
        return {"best": {"test": dict.fromkeys(("fused", "text", "video"), 1.0)}}

    monkeypatch.setattr("senticlip.demo.make", few)
    monkeypatch.setattr("senticlip.demo.train", lambda config, data, run, resume: run.mkdir())
    monkeypatch.setattr("senticlip.demo.evaluate", evaluated)
    monkeypatch.setattr("senticlip.demo.read_metrics", lambda run: {"history": []})
    monkeypatch.setattr("senticlip.demo.stages_of", lambda experiment, data: [])
    monkeypatch.setattr("senticlip.demo.kind", lambda words, face: "conflict")
    monkeypatch.setattr("senticlip.demo.load", lambda run: None)
    monkeypatch.setattr("senticlip.demo.explain", explained)
    with pytest.raises(Enough):
        demo(tmp_path / "out", Config(protocol="tenth", seed=3))
    assert asked == [read_clips(tmp_path / "out" / "data", "test", "tenth", 3)[0].video]


@pytest.mark.parametrize("begun", [False, True])
def test_what_is_no_run_is_not_deleted(tmp_path, monkeypatch, begun):
    mine = tmp_path / "out" / "run-video"
    (mine / "deep").mkdir(parents=True)
    (mine / "deep" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"run-video: not a run, and would be deleted — choose another --out"):
        demo(tmp_path / "out")
    assert (mine / "deep" / "notes.txt").read_text() == "mine"
    (mine / "deep" / "notes.txt").rename(mine / ".notes")  # as of a kill before it was begun
    if begun:
        (mine / "config.json").touch()
        (mine / "checkpoints").mkdir()
        (mine / "checkpoints" / "origin.json").write_text('{"rows": ""}')
    (tmp_path / "out" / "run-text").mkdir()
    there = []

    def train(config, data, run, resume):
        there.append({path.name for path in run.parent.iterdir()} - {".lock"})
        if run.name == "run-video":
            raise Enough

    best = {"best": {"test": dict.fromkeys(("fused", "text", "video"))}}
    monkeypatch.setattr("senticlip.demo.make", lambda *_, **__: best)
    monkeypatch.setattr("senticlip.demo.train", train)
    monkeypatch.setattr("senticlip.demo.evaluate", lambda *_: {})
    monkeypatch.setattr("senticlip.demo.read_metrics", lambda run: {"history": []})
    monkeypatch.setattr("senticlip.demo.stages_of", lambda *_: [])
    with pytest.raises(Enough):
        demo(tmp_path / "out")
    assert there == [{"run-text", "run-video"}, {"run-video"}, set()]


def test_it_needs_text_and_video(tmp_path):
    for modalities in (["text"], ["vision", "audio"]):
        with pytest.raises(UsageError, match="modalities: the demo compares text and video"):
            demo(tmp_path / "out", Config(modalities=modalities))
    assert not (tmp_path / "out").exists()


def test_each_model_is_beside_the_best_that_what_it_reads_allows(tmp_path, monkeypatch):
    seen, best = {}, {"fused": 1.0, "text": 0.66, "video": 0.74}

    def paged(found, shown):
        seen.update(found)
        raise Enough

    for name, stub in {
        "make": lambda *_, **__: {"best": {"test": best}},
        "train": lambda *_, **__: None,
        "evaluate": lambda run, data: {"run": run.name},
        "read_metrics": lambda run: {"history": [run.name]},
        "stages_of": lambda *_: [],
        "read_clips": lambda *_: [],
        "strip": lambda *_: [{"kind": "conflict", "path": "p", "text": "t"}],
        "load": lambda run: None,
        "explain": lambda *_: None,
        "page": paged,
    }.items():
        monkeypatch.setattr(f"senticlip.demo.{name}", stub)
    with pytest.raises(Enough):
        demo(tmp_path / "out")
    runs = {"fused": "run", "text": "run-text", "video": "run-video"}
    assert seen == {name: {"run": run, "history": [run], "best": best[name]} for name, run in runs.items()}
