"""The runner (with a stand-in for the training, which has its own tests) and the report."""

from __future__ import annotations

import csv
import json

import pytest

from senticlip import reproduce as room
from senticlip import results
from senticlip.structures import LABELS, Clip, UserError
from senticlip.tables import digest

PRESET = """
text: {train: frozen}
vision: {train: frozen}
stages:
  text: {modalities: [text], target: T, text.train: full}
  vision: {modalities: [vision], target: V, vision.train: full}
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A data set of 30 clips, and a training that only notes that it was asked for."""
    scores = [-0.6, 0.0, 0.4, -0.2, -1.0]
    rows = [
        f"{i}.mp4,话{i},{scores[i % 5]},{scores[i % 5]},{scores[i % 5]},{s}"
        for i, s in enumerate(["train"] * 15 + ["valid"] * 5 + ["test"] * 10)
    ]
    data = tmp_path / "data.csv"
    data.write_text("path,text,label,label_T,label_V,split\n" + "\n".join(rows), encoding="utf-8")
    for i in range(30):
        (tmp_path / f"{i}.mp4").touch()
    (tmp_path / "preset.yaml").write_text(PRESET, encoding="utf-8")
    asked = []

    def train(config, data, out, seed=None, resume=False, device=None):
        assert resume
        if config.temporal == "lstm":
            raise UserError("no such thing")
        asked.append((digest(config), seed))
        out.mkdir(parents=True, exist_ok=True)
        for name in config.stages:
            assert (out / "stages" / name / room.WEIGHTS).is_file()
        (out / room.WEIGHTS).touch()
        (out / "metrics.json").touch()
        return {}

    def evaluate(run, data, split, device=None):
        with (run / "predictions-test.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "text", "truth", "predicted"])
            for i in range(10):
                truth = LABELS[i % 3]
                writer.writerow([f"c{i}", "话", truth, truth if "tfn" not in run.name else LABELS[0]])
        good = 1.0 if "tfn" not in run.name else 0.4
        return {"accuracy": good, "macro_f1": good, "per_class": {}, "ece": None, "n": 10}

    monkeypatch.setattr("senticlip.train.train", train)
    monkeypatch.setattr("senticlip.evaluate.evaluate", evaluate)

    def run(**options):
        options = {"tables": ["1", "5"], "seeds": 2, **options}
        return room.reproduce(data, tmp_path / "out", preset=str(tmp_path / "preset.yaml"), **options)

    return run, asked, tmp_path / "out"


def test_each_model_is_run_once_a_seed_and_the_report_is_complete(world):
    run, asked, out = world
    result = run()
    assert len(asked) == len(set(asked)) == 2 * (2 + 7 + 1)  # 2 stages, Table 1, MeanP; LSTM fails
    assert result["tables"]["1"]["TFN"]["accuracy"] == {"mean": pytest.approx(0.4), "std": 0.0}
    assert result["tables"]["5"]["Transformer"] == result["tables"]["1"]["CLIP-CA-MSA"]
    assert result["tables"]["5"]["LSTM"] == {"error": "no such thing"}
    text = (out / "report.md").read_text(encoding="utf-8")
    for piece in (
        "| TFN | 40.00 ± 0.00 (64.83, -24.83)",
        "CLIP-CA-MSA is above TFN",
        "LSTM: not run — no such thing",
        "Majority baseline: always answering “negative” scores 60.00",
        "k/228",
    ):
        assert piece in text
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "k/228" in page
    versus = json.loads((out / "results.json").read_text())["tables"]["1"]["M"]["TFN"]["versus"]
    assert versus["accuracy"]["difference"] == pytest.approx(0.6)


def test_a_second_run_reads_and_weights_are_not_kept(world):
    run, asked, out = world
    first = run(tables=["1", "6"])
    assert not list(out.rglob(room.WEIGHTS))
    before = len(asked)
    assert run(tables=["1", "6"]) == first
    assert len(asked) == before
    run(tables=["1", "6"], seeds=3)
    assert {seed for _, seed in asked[before:]} == {2}


def test_a_stage_whose_weights_went_is_trained_again_for_a_new_row(world):
    run, asked, _ = world
    run(tables=["1"], seeds=1)
    before = len(asked)
    run(tables=["6"], seeds=1)
    assert len(asked) - before == 2 + 1  # both stages, and concat


def test_if_no_row_runs_there_is_no_report(world, monkeypatch):
    run, _, out = world

    def fail(*_, **__):
        raise UserError("the hub is away")

    monkeypatch.setattr("senticlip.train.train", fail)
    with pytest.raises(UserError, match="no row could be run: the hub is away"):
        run(tables=["6"], seeds=1)
    assert not (out / "report.html").exists()


def test_keep_keeps(world):
    run, _, out = world
    run(tables=["6"], seeds=1, keep=True)
    assert len(list((out / "runs").glob(f"*/*/{room.WEIGHTS}"))) == 4


def test_mean_and_std_over_seeds():
    runs = [{"accuracy": 0.5, "ece": None}, {"accuracy": 0.7, "ece": None}]
    assert results.spread(runs) == {"accuracy": {"mean": pytest.approx(0.6), "std": pytest.approx(0.02**0.5)}}
    assert results.spread([]) == {}


def test_the_figure_and_the_majority_count_clips():
    clips = [
        Clip(str(i), labels={"M": s, "T": s}, split=split)
        for i, (s, split) in enumerate(
            [(-1.0, "train"), (-0.2, "train"), (0.4, "train"), (0.4, "test"), (-0.4, "test")]
        )
    ]
    assert results.majority(clips) == {"label": "negative", "accuracy": 0.5, "macro_f1": pytest.approx(1 / 3), "n": 2}
    figure = results.label_figure(clips)
    assert figure.count("<rect") == 3 + 4 * 3
    assert "M train" in figure


def test_what_the_report_says_follows_the_intervals():
    def row(low, high):
        return {"versus": {"accuracy": {"low": low, "high": high}}}

    told = results.verdict(
        "ours", {"a": row(0.1, 0.2), "b": row(-0.2, -0.1), "c": row(-1, 1), "ours": {"versus": None}}
    )
    assert [line.split(":")[0] for line in told] == ["For", "Against", "Open"]


def test_markup_in_a_name_is_text():
    page = results.as_html([("#", "<b>")], None)
    assert "<h1>&lt;b&gt;</h1>" in page
