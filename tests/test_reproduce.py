"""The runner (with stand-ins for training and evaluation, which have their own tests) and the report."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest

from senticlip import cli, layout, results
from senticlip import evaluate as evaluate_module
from senticlip import reproduce as reproduce_module
from senticlip import train as train_module
from senticlip.config import Config
from senticlip.data.sims import read_clips
from senticlip.files import folder_lock
from senticlip.structures import LABELS, Clip, UsageError, UserError, polarity
from senticlip.tables import RunSettings, digest, load_preset, load_tables

PRESET = """
text: {train: frozen}
vision: {train: frozen}
stages:
  text: {modalities: [text], target: T, text.train: full}
  vision: {modalities: [vision], target: V, vision.train: full}
"""


@pytest.fixture
def fake_training(tmp_path, monkeypatch):
    """A data set of 30 clips, and stand-ins for training and evaluation: ``run``, the training calls, the folder."""
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
    calls: list[tuple[str, int]] = []
    failures: dict[str, Exception] = {}

    def train(config, data, out, seed=None, resume=False, device=None, as_stage=None):
        assert resume
        if config.temporal == "lstm":
            raise UserError("no such thing")
        if failures and config.temporal in failures:
            raise failures[config.temporal]
        calls.append((digest(config), seed))
        out.mkdir(parents=True, exist_ok=True)
        for name in config.stages:
            assert (out / "stages" / name / reproduce_module.WEIGHTS).is_file()
        (out / reproduce_module.WEIGHTS).touch()
        (out / "metrics.json").touch()
        return {}

    def evaluate(run, data, split, device=None):
        with (run / "predictions-test.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "text", "truth", "predicted"])
            for i in range(10):
                truth = LABELS[i % 3]
                writer.writerow([f"c{i}", "话", truth, truth if "tfn" not in run.name else LABELS[0]])
        score = 1.0 if "tfn" not in run.name else 0.4
        return {"accuracy": score, "macro_f1": score, "per_class": {}, "ece": None, "n": 10}

    monkeypatch.setattr("senticlip.train.train", train)
    monkeypatch.setattr("senticlip.evaluate.evaluate", evaluate)

    def run(**options):
        options = {"tables": ["1", "5"], "seeds": 2, **options}
        options = {"data": data, "preset": str(tmp_path / "preset.yaml"), **options}
        return reproduce_module.reproduce(out=tmp_path / "out", **options)

    run.failures, run.data = failures, data
    return run, calls, tmp_path / "out"


def test_each_model_runs_once_per_seed_and_the_report_is_complete(fake_training):
    run, calls, out = fake_training
    result = run()
    assert len(calls) == len(set(calls)) == 2 * (2 + 7 + 1)  # 2 stages, Table 1, MeanP; LSTM fails
    assert result["tables"]["1"]["TFN"]["accuracy"] == {"mean": pytest.approx(0.4), "std": 0.0}
    assert result["tables"]["5"]["Transformer"] == result["tables"]["1"]["CLIP-CA-MSA"]
    assert result["tables"]["5"]["LSTM"] == {"error": "no such thing"}
    text = (out / "report.md").read_text(encoding="utf-8")
    for piece in (
        "| TFN | 40.00 ± 0.00 (64.83, −24.83)",
        "CLIP-CA-MSA is above TFN",
        "LSTM: not run — no such thing",
        "Majority baseline: always answering “negative” scores 60.00",
        "k/228",
    ):
        assert piece in text
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    latex = (out / "tables.tex").read_text(encoding="utf-8")
    assert "\\textbf{100.00 $\\pm$ 0.00}" in latex
    caption = r"\caption{Multimodal models, scored against the joint label M; per cent, mean $\pm$ standard deviation"
    assert f"{caption} over 2 seeds}}" in latex
    assert "k/228" in page
    versus = json.loads((out / "results.json").read_text())["tables"]["1"]["M"]["TFN"]["versus"]
    assert versus["accuracy"]["difference"] == pytest.approx(0.6)


def test_missing_split_is_reported_before_training(fake_training, tmp_path):
    table = tmp_path / "own.csv"
    table.write_text("text,label,split\n好,1,train\n坏,-1,train\n好,1,valid\n", encoding="utf-8")
    with pytest.raises(UserError, match="no clips in split 'test', only in train, valid"):
        reproduce_module.reproduce(table, tmp_path / "out", "tiny", ["1"], 1)
    assert not (tmp_path / "out").exists()


def test_second_run_reuses_results_and_weights_are_deleted(fake_training):
    run, calls, out = fake_training
    first = run(tables=["1", "6"])
    assert not list(out.rglob(reproduce_module.WEIGHTS))
    before = len(calls)
    assert run(tables=["1", "6"]) == first
    assert len(calls) == before
    run(tables=["1", "6"], seeds=3)
    assert {seed for _, seed in calls[before:]} == {2}


def test_results_of_other_data_are_rejected(fake_training):
    run, calls, out = fake_training
    run(tables=["6"], seeds=1)
    before = (out / "results.json").read_bytes()
    table = out.parent / "data.csv"
    other = out.parent / "other.csv"
    other.write_text(table.read_text(encoding="utf-8"), encoding="utf-8")
    trained = len(calls)
    with pytest.raises(UserError, match=r"has runs with different data.*data\.csv"):
        run(tables=["6"], seeds=1, data=other)
    with pytest.raises(UserError, match="has runs with different data, labels or protocol"):
        run(tables=["6"], seeds=1, protocol="tenth")
    table.write_text(table.read_text(encoding="utf-8").replace("4.mp4,话4,-1.0", "4.mp4,话4,0.2"), encoding="utf-8")
    with pytest.raises(UserError, match="has runs with different data, labels"):
        run(tables=["6"], seeds=1)
    assert len(calls) == trained
    assert (out / "results.json").read_bytes() == before


def test_results_of_changed_encoders_are_rejected(fake_training, tmp_path):
    run, calls, _ = fake_training
    options = {"tables": ["6"], "seeds": 1, "overrides": [f"text.encoder={tmp_path / 'bert'}"]}
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"one")
    run(**options)
    trained = len(calls)
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"two")
    with pytest.raises(UserError, match=r"has runs made when .*bert had different contents — choose another --out"):
        run(**options)
    run(tables=["6"], seeds=1)  # for the preset's own encoder, no contents are recorded
    assert len(calls) > trained


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("mat1 and mat2\ndo not fit"), "RuntimeError: mat1 and mat2 do not fit"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_crash_fails_only_its_row(fake_training, error, message):
    run, _, _ = fake_training
    run.failures["mean"] = error
    rows = run(tables=["5"], seeds=1)["tables"]["5"]
    assert rows["MeanP"]["error"] == message
    assert rows["Transformer"]["accuracy"]["mean"] == 1.0


def test_second_reproduce_in_the_same_folder_is_rejected(fake_training):
    run, calls, out = fake_training
    with folder_lock(out, "reproduce"), pytest.raises(UserError, match="another reproduce is writing here"):
        run()
    assert not calls


def test_moved_folder_resumes(fake_training, monkeypatch):
    run, calls, out = fake_training
    original_reproduce, original_train = reproduce_module.reproduce, train_module.train

    def killed_train(config, *rest, **options):
        if config.stages:
            raise KeyboardInterrupt
        return original_train(config, *rest, **options)

    monkeypatch.setattr(train_module, "train", killed_train)
    with pytest.raises(KeyboardInterrupt):
        run(tables=["6"], seeds=1)
    monkeypatch.setattr(train_module, "train", original_train)
    assert len(calls) == 2  # its stages
    moved = out.with_name("elsewhere")
    out.rename(moved)
    monkeypatch.setattr(reproduce_module, "reproduce", lambda out, **options: original_reproduce(out=moved, **options))
    assert "error" not in run(tables=["6"], seeds=1)["tables"]["6"]["concat"]
    assert len(calls) == 2 + 2  # the rows, but no stages


def test_majority_baseline_is_averaged_over_seeds(fake_training):
    run, _, out = fake_training
    run(tables=["6"], seeds=2, protocol="tenth")
    text = (out / "report.md").read_text(encoding="utf-8")
    shares = []
    for seed in (0, 1):
        clips = read_clips(run.data, "test", "tenth", seed)
        shares.append(100 * np.mean([polarity(clip.labels["M"]) == 0 for clip in clips]))
    assert f"“negative” scores {np.mean(shares):.2f} ± {np.std(shares, ddof=1):.2f} accuracy" in text
    assert text.count("for seed 0; each seed draws its own split") == 2


def test_results_of_changed_feature_file_are_rejected(fake_training):
    run, _, _ = fake_training
    root = run.data.parent
    (root / "Processed").mkdir()
    (root / "Processed" / "own.pkl").write_bytes(b"one")
    (root / "label.csv").write_text(
        "video_id,clip_id,text,label,mode\n"
        + "\n".join(f"v,{i},话,{i % 3 - 1},{('train', 'valid', 'test')[i % 3]}" for i in range(9)),
        encoding="utf-8",
    )
    options = {"tables": ["6"], "seeds": 1, "data": root, "overrides": ["stages={}", "text.encoder=features"]}
    run(**options)
    assert run(**options)
    (root / "Processed" / "own.pkl").write_bytes(b"two")
    with pytest.raises(UserError, match=r"has runs made when .*own\.pkl had different contents — choose another --out"):
        run(**options)


def test_results_survive_overwritten_predictions(fake_training):
    run, calls, out = fake_training
    first, before = run(tables=["1"], seeds=1, keep=True), len(calls)
    tables = json.loads((out / "results.json").read_text())["tables"]

    def overwrite():
        for file in out.rglob("predictions-test.csv"):
            file.write_text("id,text,truth,predicted\nother,话,negative,positive\n", encoding="utf-8")

    overwrite()
    assert run(tables=["1"], seeds=1) == first
    assert json.loads((out / "results.json").read_text())["tables"] == tables
    for file in out.rglob(reproduce_module.RESULT):  # a result without predictions is not reused
        result = json.loads(file.read_text())
        del result["predictions"]
        file.write_text(json.dumps(result))
    overwrite()
    assert run(tables=["1"], seeds=1) == first  # evaluated again
    assert json.loads((out / "results.json").read_text())["tables"] == tables
    assert len(calls) == before


def test_overrides_and_the_rows_they_do_not_reach_are_reported(fake_training):
    run, _, out = fake_training
    changes = ["train.epochs=4", "modalities=[text,vision]", "label.names=[a,b,c]", "vision.frames=7"]
    run(tables=["1", "2"], seeds=1, overrides=changes)
    text, page, latex = (
        (out / name).read_text(encoding="utf-8") for name in ("report.md", "report.html", "tables.tex")
    )
    assert json.loads((out / "results.json").read_text())["changed"] == changes
    changed = (
        "(changed: train.epochs=4, modalities=[text,vision], label.names=[a,b,c], vision.frames=7), protocol official"
    )
    not_for_peers = (
        "The change to train.epochs does not apply to TFN, LMF, MulT, Self-MM, MMAF, MMAF+T+A+V: their own value stays."
    )
    not_for_openface = "The change to vision.frames does not apply to OpenFace2.0: "
    for report in (text, page, latex):
        assert changed in report
        assert not_for_peers in report
        assert not_for_openface in report
        assert report.count("The change to") == 2
    run(tables=["1"], seeds=1)
    assert "hange" not in (out / "report.md").read_text(encoding="utf-8").split("##")[0]


def test_target_label_and_its_majority_are_reported(fake_training):
    run, _, out = fake_training
    lines = run.data.read_text(encoding="utf-8").splitlines()
    cells = [line.split(",") for line in lines[1:]]
    run.data.write_text("\n".join([lines[0], *(",".join([*c[:3], "0.9", *c[4:]]) for c in cells)]), encoding="utf-8")
    run(tables=["6"], seeds=1, overrides=["target=T"])
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "always answering “positive” scores 100.00 accuracy" in text
    assert "on test (10 clips), scored against the text's own label T." in text
    assert "Scored against the text's own label T:" in text
    with pytest.raises(UserError, match="no clip in train has label A"):
        run(tables=["6"], seeds=1, overrides=["target=A"])


def test_protocol_comes_from_the_preset_and_seed_cannot_be_set(fake_training):
    run, _, out = fake_training
    run(tables=["6"], seeds=1, overrides=["protocol=tenth"])
    assert json.loads((out / "results.json").read_text())["protocol"] == "tenth"
    run(tables=["6"], seeds=1, overrides=["protocol=tenth"], protocol="tenth")
    with pytest.raises(UsageError, match="--set protocol=tenth: conflicts with --protocol official — leave one out"):
        run(overrides=["protocol=tenth"], protocol="official")
    with pytest.raises(UsageError, match="--set seed: seeds run from 0 to --seeds minus 1"):
        run(overrides=["seed=5"])


def test_dropped_tables_are_reported_and_an_empty_list_is_rejected(fake_training, capsys):
    run, _, out = fake_training
    assert list(run(tables=["6", "1", "6"], seeds=1)["tables"]) == ["6", "1"]
    capsys.readouterr()
    run(tables=["6"], seeds=1)
    message = (
        f"{out}: the report now has Tables 6 and no longer 1 — --tables 1,6 includes all, and reuses finished rows\n"
    )
    assert message in capsys.readouterr().err
    run(tables=["1", "6"], seeds=1)
    assert "no longer" not in capsys.readouterr().err
    command = ["reproduce", "--data", str(run.data), "--out", str(out), "--seeds", "1"]
    command += ["--preset", str(out.parent / "preset.yaml")]
    for tables in ("", " , "):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*command, "--tables", tables])
        assert "--tables without a number: the paper has Tables 1, 2" in capsys.readouterr().err


def test_interrupt_stops_all_rows(fake_training):
    run, calls, _ = fake_training
    run.failures["mean"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(tables=["5"], seeds=1)
    assert len(calls) == 2  # the stages of the first row


def test_stage_with_deleted_weights_is_retrained_for_a_new_row(fake_training):
    run, calls, _ = fake_training
    run(tables=["1"], seeds=1)
    before = len(calls)
    run(tables=["6"], seeds=1)
    assert len(calls) - before == 2 + 1  # both stages, and concat


def test_no_report_if_no_row_runs(fake_training, monkeypatch):
    run, _, out = fake_training

    def fail(*_, **__):
        raise UserError("the hub is away")

    monkeypatch.setattr("senticlip.train.train", fail)
    with pytest.raises(UserError, match="no row could be run: the hub is away"):
        run(tables=["6"], seeds=1)
    assert not (out / "report.html").exists()


def test_keep_keeps_weights(fake_training):
    run, _, out = fake_training
    run(tables=["6"], seeds=1, keep=True)
    assert len(list((out / "runs").glob(f"*/*/{reproduce_module.WEIGHTS}"))) == 4


def test_kept_weights_survive_a_run_without_keep(fake_training):
    run, _, out = fake_training
    run(tables=["6"], seeds=1, keep=True)
    kept = {*out.rglob(reproduce_module.WEIGHTS)}
    run(tables=["5", "6"], seeds=2)  # uses the stages that were kept
    assert {*out.rglob(reproduce_module.WEIGHTS)} == kept


@pytest.mark.parametrize("keep", [False, True])
def test_stages_of_a_killed_call_are_kept_if_the_next_keeps(fake_training, keep):
    run, calls, out = fake_training
    run.failures["mean"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(tables=["5"], seeds=1)
    run.failures.clear()
    assert len(list((out / "runs").glob(f"*/*/{reproduce_module.WEIGHTS}"))) == len(calls) == 2  # the stages
    run(tables=["5"], seeds=1, keep=keep)
    run(tables=["5"], seeds=1)
    assert len(list((out / "runs").glob(f"*/*/{reproduce_module.WEIGHTS}"))) == (4 if keep else 0)


def test_already_deleted_weights_are_reported(fake_training, capsys):
    run, _, out = fake_training
    run(tables=["6"], seeds=1)
    run(tables=["6"], seeds=2, keep=True)
    message = f"{out}: 2 of 4 finished rows no longer have weights: they were run without --keep — choose another --out"
    assert message in capsys.readouterr().err
    run(tables=["6"], seeds=2)
    assert "no longer have weights" not in capsys.readouterr().err


def test_mean_and_std_over_seeds():
    runs = [{"accuracy": 0.5, "ece": None}, {"accuracy": 0.7, "ece": None}]
    assert results.spread(runs) == {"accuracy": {"mean": pytest.approx(0.6), "std": pytest.approx(0.02**0.5)}}
    assert results.spread([]) == {}
    mixed = [
        {"accuracy": 0.5, "mae": 0.3, "ece": None},
        {"accuracy": 0.7, "ece": 0.1},
    ]  # regression, classification
    assert list(results.spread(mixed)) == list(results.spread(mixed[::-1])) == ["accuracy"]


def predicted(*classes, ids="abcd"):
    return {"predictions": {"id": list(ids), "truth": [0, 0, 0, 0], "predicted": list(classes)}}


def test_runs_are_paired_by_seed():
    ours = {1: predicted(0, 0, 0, 0), 2: predicted(0, 0, 0, 1)}  # seed 0 failed
    theirs = {0: predicted(1, 1, 1, 1), 1: predicted(0, 0, 0, 1), 2: predicted(0, 0, 1, 1)}
    # by seed: 4/4 − 3/4 and 3/4 − 2/4; by position it would be 4/4 − 0 and 3/4 − 3/4
    assert results.versus(ours, theirs)["accuracy"]["difference"] == pytest.approx(1 / 4)


def test_bootstrap_resamples_clips_not_seeds():
    truth, ours, theirs = np.random.default_rng(0).integers(0, 3, (3, 60)).tolist()
    ids = [str(i) for i in range(60)]
    first, second = ({"predictions": {"id": ids, "truth": truth, "predicted": classes}} for classes in (ours, theirs))
    once = results.versus({0: first}, {0: second})
    twice = results.versus({0: first, 1: first}, {0: second, 1: second})
    for metric in ("accuracy", "macro_f1"):
        for bound in ("low", "high"):
            assert twice[metric][bound] == pytest.approx(once[metric][bound]), (metric, bound)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {0: predicted(0, 0, 0, 0)}),
        ({0: predicted(0, 0, 0, 0)}, {1: predicted(0, 0, 0, 0)}),
        ({0: predicted(0, 0, 0, 0)}, {0: predicted(0, 0, 0, 0, ids="abce")}),
    ],
)
def test_runs_without_common_seeds_or_clips_are_not_compared(ours, theirs):
    assert results.versus(ours, theirs) is None


def test_random_weights_are_marked_and_get_no_verdict():
    preset = Config().override({"text.train": "frozen", "vision.train": "frozen"})
    tables = load_tables(preset, ["4"], {"M"}, random=True)
    runs = {}
    for row in tables[0].rows:
        classes = (0, 0, 0, 0) if row.name == tables[0].reference else (1, 1, 1, 1)
        accuracy = {"accuracy": float(classes[0] == 0), "macro_f1": 0.5}
        runs[digest(row.configs["M"]), 0] = {**accuracy, **predicted(*classes)}
    collected = results.collect(tables, runs, 1)
    text = layout.as_markdown(results._table_blocks(tables[0], collected["4"], 1))
    for row in tables[0].rows:
        assert (f"| {row.name} † |" in text) == (row.name != tables[0].reference)
    assert "† random weights, not pretrained: tests the code, not the paper" in text
    assert "For:" not in text  # although every interval excludes zero
    latex = results.in_latex(tables, collected, 1, RunSettings(preset, "small", [], "data"))
    assert r"the joint label M; per cent, one seed; $^\dagger$ random weights}" in latex
    pretrained = results.collect(load_tables(preset, ["4"], {"M"}, random=False), runs, 1)
    assert not any(entry["random"] for entry in pretrained["4"]["M"].values())


def test_failed_seeds_are_counted():
    (table,) = load_tables(Config(), ["6"], {"M"}, random=False)
    first, last = (row.configs["M"] for row in table.rows)
    result = {"accuracy": 1.0, "macro_f1": 1.0, **predicted(0, 0, 0, 0)}
    runs = {(digest(c), s): result for c in (first, last) for s in (0, 1)} | {(digest(first), 1): {"error": "no room"}}
    text = layout.as_markdown(results._table_blocks(table, results.collect([table], runs, 2)["6"], 2))
    assert f"{table.rows[0].name}: not run for 1 of 2 seeds — no room" in text
    collected = results.collect([table], runs, 2)
    assert [row["seeds"] for row in collected["6"]["M"].values()] == [1, 2]
    latex = results.in_latex([table], collected, 2, RunSettings(Config(), "paper", [], "data"))
    assert f"\n{table.rows[0].name} (1 of 2 seeds) & \\textbf{{100.00}} & " in latex
    assert f"\n{table.rows[1].name} & " in latex
    assert f"| {table.rows[0].name} (1 of 2 seeds) |" in text


def test_majority_class_may_differ_between_seeds():
    def split_clips(*splits):
        labels = zip((-1.0, 1.0, -1.0), splits, strict=True)
        return [Clip(str(i), text="好", labels={"M": label}, split=split) for i, (label, split) in enumerate(labels)]

    first, second = split_clips("train", "valid", "test"), split_clips("valid", "train", "test")
    calls = RunSettings(load_preset("tiny"), "tiny", [], "d.csv")
    for seeds, answer in (([first, second], "the most frequent training class"), ([second], "“positive”")):
        sentences = [text for _, text in results.report_blocks([], {}, seeds, calls) if "Majority" in text]
        assert sentences[0].startswith(f"Majority baseline: always answering {answer} scores ")


def test_majority_and_label_figure_count_clips():
    clips = [
        Clip(str(i), labels={"M": s, "T": s}, split=split)
        for i, (s, split) in enumerate(
            [(-1.0, "train"), (-0.2, "train"), (0.4, "train"), (0.4, "test"), (-0.4, "test")]
        )
    ]
    assert results.majority(clips) == {"label": "negative", "accuracy": 0.5, "macro_f1": pytest.approx(1 / 3), "n": 2}
    figure = results.label_figure(clips)
    assert figure.count("<rect") == 3 + 4 * 3
    assert re.findall(r">([MT] \w+)<", figure) == ["M train", "M test", "T train", "T test"]
    bars = [float(width) for width in re.findall(r'width="([\d.]+)" height="10"', figure)][3:]  # after the legend
    assert bars == 2 * [420, 0, 210, 210, 0, 210]


def test_verdict_follows_the_intervals():
    def row(low, high, random=False):
        return {"versus": {"accuracy": {"low": low, "high": high, "seeds": [low, high]}}, "random": random}

    rows = {"a": row(0.1, 0.2), "b": row(-0.2, -0.1), "c": row(-1, 1), "d": row(0.1, 0.2, random=True)}
    sentences = results.verdict("ours", {**rows, "ours": {"versus": None, "random": False}})
    assert [line.split(":")[0] for line in sentences] == ["For", "Against", "Open"]
    assert sentences[0].startswith("For: ours is above a (+10.00, +20.00) in these runs (")
    assert results.verdict("ours", {**rows, "ours": {"versus": None, "random": True}}) == []


def entry(**scores):
    return {
        "scores": {name: {"mean": mean, "std": 0.01} for name, mean in scores.items()},
        "runs": {0: {}, 1: {}},
        "random": False,
        "paper": {"accuracy": 70.0},
        "versus": None,
        "errors": {},
    }


def test_best_of_each_column():
    rows = {
        "one": entry(accuracy=0.5, macro_f1=0.61234, mae=0.4, corr=-0.1),
        "two": entry(accuracy=0.6, macro_f1=0.61232, mae=0.5, corr=0.2),
        "none": entry(),
    }
    assert list(results.columns_of(rows).values())[-2:] == ["MAE", "Corr"]
    assert list(results.columns_of({"a": rows["none"]}).values()) == list(results.NAMES.values())
    # values that are shown alike are all best; a metric that only one row has has no best
    assert results.best(rows) == {(1, 1), (0, 2), (1, 2), (0, 6), (1, 7)}
    assert results.best({"one": rows["one"]}) == set()
    chance = entry(accuracy=0.9) | {"random": True}
    assert results.best({**rows, "chance": chance}) == results.best(rows)
    line = results._row_cells("one", rows["one"], results.columns_of(rows))
    assert line[1] == "50.00 ± 1.00 (70.00, −20.00)"
    assert line[-4:] == ["0.4000 ± 0.0100", "−0.1000 ± 0.0100", "", ""]


def test_differences_have_a_true_minus_and_no_negative_zero():
    gap = {"difference": -0.00004, "low": -0.1, "high": 0.1}
    rows = {"one": entry(accuracy=0.5) | {"versus": {"accuracy": gap, "macro_f1": gap}}}
    assert results._row_cells("one", rows["one"], results.NAMES)[-1] == "0.00 [−10.00, +10.00]"


def test_device_reaches_training_and_evaluation(fake_training, monkeypatch):
    run, _, _ = fake_training
    train, evaluate, seen = train_module.train, evaluate_module.evaluate, []

    def record_train(*args, **options):
        seen.append(("train", options["device"]))
        return train(*args, **options)

    def record_evaluate(folder, data, split, device=None):
        seen.append(("evaluate", device))
        return evaluate(folder, data, split, device)

    monkeypatch.setattr(train_module, "train", record_train)
    monkeypatch.setattr(evaluate_module, "evaluate", record_evaluate)
    run(tables=["6"], seeds=1, device="cuda:1")
    assert set(seen) == {("train", "cuda:1"), ("evaluate", "cuda:1")}


@pytest.mark.parametrize(("preset", "random"), [("tiny", True), ("small", True), ("paper", False)])
def test_only_tiny_and_small_presets_use_random_weights(fake_training, monkeypatch, preset, random):
    run, _, _ = fake_training
    seen = []

    def record(*args, random):
        seen.append(random)
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce_module, "load_tables", record)
    with pytest.raises(KeyboardInterrupt):
        run(preset=preset)
    assert seen == [random]


def test_single_encoder_is_scored_on_its_own_label_first():
    (table,) = load_tables(Config(), ["3"], {"M", "T"}, random=False)
    accuracy = {"T": 0.7, "M": 0.6}
    runs = {
        (digest(config), 0): {"accuracy": accuracy[target], "macro_f1": 0.5, **predicted(0, 0, 0, 0)}
        for row in table.rows
        for target, config in row.configs.items()
    }
    rows = results.numbers(results.collect([table], runs, 1))["3"]
    assert list(rows) == [row.name for row in table.rows]
    for row in rows.values():
        assert (row["accuracy"]["mean"], row["on_M"]["accuracy"]["mean"]) == (0.7, 0.6)
