"""A run on a split: the predictions file, metrics against scikit-learn, two runs compared, a hub id."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, f1_score
from tests.tiny import clip_folder, data_folder, text_folder, timm_folder

import senticlip
from senticlip import metrics
from senticlip.checkpoint import origin
from senticlip.config import Config
from senticlip.data.sims import read_clips
from senticlip.evaluate import Answers, compare, evaluate, judge
from senticlip.models import create_model
from senticlip.structures import LABELS, Clip, Output, UsageError, UserError, polarity


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    data_folder(root / "data", (3, 3, 9))
    text_folder(root / "text")
    for name, seed, target in (("a", 0, "M"), ("b", 1, "M"), ("t", 0, "T")):
        changes = {"modalities": ["text"], "width": 16, "heads": 2, "seed": seed, "target": target}
        model = create_model(Config().override({**changes, "text.encoder": str(root / "text"), "text.max_length": 20}))
        model.save_pretrained(root / name)
    return root


def read_predictions(run):
    with (run / "predictions-test.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_match_the_predictions_file(assets):
    result = evaluate(assets / "a", assets / "data")
    rows = read_predictions(assets / "a")
    truth, predicted = ([LABELS.index(row[name]) for row in rows] for name in ("truth", "predicted"))
    assert result["n"] == len(rows) == 9
    assert result["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert result["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    probabilities = np.array([[float(row[name]) for name in LABELS] for row in rows])
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert probabilities.argmax(1).tolist() == predicted
    clips = read_clips(assets / "data", "test")
    assert [(row["id"], row["text"]) for row in rows] == [(clip.id, clip.text) for clip in clips]
    assert truth == [1 + int(np.sign(clip.labels["M"])) for clip in clips]


def test_read_only_run_is_evaluated_but_not_written_to(assets, tmp_path, monkeypatch, capsys):
    shutil.copytree(assets / "a", tmp_path / "a", ignore=shutil.ignore_patterns("*.csv"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root can write everywhere
    assert evaluate(tmp_path / "a", assets / "data")["n"] == 9
    assert not list((tmp_path / "a").glob("*.csv"))
    assert "predictions-test.csv: not written" in capsys.readouterr().err


def test_nan_outputs_are_reported(assets, tmp_path):
    shutil.copytree(assets / "a", tmp_path / "a", ignore=shutil.ignore_patterns("*.csv"))
    state = load_file(tmp_path / "a" / "model.safetensors")
    next(value for name, value in state.items() if name.startswith("network.heads"))[:] = float("nan")
    save_file(state, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="9 of 9 answers are NaN, the first for v"):
        evaluate(tmp_path / "a", assets / "data")
    with pytest.raises(UserError, match="the model's answer is NaN"):
        senticlip.load(tmp_path / "a")(text="好")


def test_changed_rows_are_reported(assets, tmp_path, capsys):
    """A split drawn at random may then be a different one."""
    table = tmp_path / "own.csv"
    table.write_text("text,label\n" + "".join(f"今天{i},{i % 3 - 1}\n" for i in range(30)), encoding="utf-8")
    shutil.copytree(assets / "a", tmp_path / "a", ignore=shutil.ignore_patterns("*.csv"))
    config = senticlip.load(tmp_path / "a").config
    (tmp_path / "a" / "metrics.json").write_text(json.dumps(origin(config, table)), encoding="utf-8")
    evaluate(tmp_path / "a", table)
    assert "have changed" not in capsys.readouterr().err
    table.write_text(table.read_text(encoding="utf-8") + "再见,1\n", encoding="utf-8")
    evaluate(tmp_path / "a", table)
    assert f"{table}: its rows have changed since {tmp_path / 'a'} was trained" in capsys.readouterr().err


def test_compare_matches_two_evaluations(assets):
    result = compare(assets / "a", assets / "b", assets / "data", device="cpu")
    separate = [evaluate(assets / name, assets / "data") for name in "ab"]
    assert (result["a"], result["b"]) == tuple(separate)
    difference = separate[0]["accuracy"] - separate[1]["accuracy"]
    assert result["difference"]["accuracy"]["difference"] == pytest.approx(difference)


def test_comparing_runs_of_different_labels_needs_a_target(assets, tmp_path):
    (assets / "data" / "label.csv").rename(tmp_path / "label.csv")
    text = (tmp_path / "label.csv").read_text(encoding="utf-8")
    head, *lines = text.splitlines()
    flipped = [",".join([*parts[:4], str(-float(parts[4])), *parts[5:]]) for parts in (ln.split(",") for ln in lines)]
    (assets / "data" / "label.csv").write_text("\n".join([head, *flipped]), encoding="utf-8")
    try:
        with pytest.raises(UserError, match="were trained on different labels — choose one with --target"):
            compare(assets / "a", assets / "t", assets / "data")
        result = compare(assets / "a", assets / "t", assets / "data", target="T")
        assert result["a"]["accuracy"] == evaluate(assets / "a", assets / "data", target="T")["accuracy"]
    finally:
        (tmp_path / "label.csv").replace(assets / "data" / "label.csv")


def test_hub_id_is_evaluated_but_not_written_to(assets, tmp_path, monkeypatch):
    monkeypatch.setattr("senticlip.encoders.hub.fetch", lambda name, *_: assets / name.split("/")[1])
    monkeypatch.chdir(tmp_path)
    (assets / "b" / "predictions-test.csv").unlink(missing_ok=True)
    result = evaluate("someone/b", assets / "data")
    assert not Path("someone").exists()
    assert not (assets / "b" / "predictions-test.csv").exists()
    predictions = {"predictions": str(assets / "b" / "predictions-test.csv")}
    assert result | predictions == evaluate(assets / "b", assets / "data")
    assert compare("someone/a", "someone/b", assets / "data")["b"] == result


def test_clips_without_input_or_label_are_reported(assets, tmp_path, capsys):
    shutil.copytree(assets / "a", tmp_path / "a", ignore=shutil.ignore_patterns("*.csv"))
    videos = [clip.video for clip in read_clips(assets / "data", "test")]
    table = tmp_path / "own.csv"
    rows = [f"{videos[0]},天气好,1,1,val", f"{videos[1]},,-1,-1,val", f"{videos[2]},nan,1,,val"]
    table.write_text("\n".join(["path,text,label,label_T,split", *rows]), encoding="utf-8")
    result = evaluate(tmp_path / "a", table, "val")
    assert (result["n"], result["unread"], Path(result["predictions"]).name) == (3, 2, "predictions-valid.csv")
    with Path(result["predictions"]).open(encoding="utf-8", newline="") as file:
        (label,) = {row["predicted"] for row in list(csv.DictReader(file))[1:]}
    stderr = capsys.readouterr().err
    assert stderr == f"{table}: 2 of 3 clips have no input that this model reads; they are predicted as {label!r}\n"
    assert evaluate(tmp_path / "a", table, "valid", target="T")["n"] == 2
    assert f"{table}: 1 of 3 clips in valid have no label T and are left out\n" in capsys.readouterr().err
    assert "unread" not in evaluate(assets / "a", assets / "data")
    assert capsys.readouterr().err == ""


def test_unknown_target_and_split_are_rejected(assets):
    with pytest.raises(UsageError, match="--target Q: choose one of M, T, A, V"):
        evaluate(assets / "a", assets / "data", target="Q")
    with pytest.raises(UsageError, match="split 'tset': unknown"):
        evaluate(assets / "a", assets / "data", "tset")


def test_split_without_video(assets, tmp_path):
    clip_model, text = clip_folder(tmp_path / "clip"), str(assets / "text")
    changes = {"vision.encoder": str(clip_model), "text.encoder": text, "text.max_length": 20, "width": 16, "heads": 2}
    for training in ("frozen", "full"):
        model = create_model(
            Config().override({**changes, "vision.train": training, "text.train": training, "vision.frames": 2})
        )
        model.save_pretrained(tmp_path / training)
        table = tmp_path / "own.csv"
        table.write_text("text,label,split\n天气好,1,test\n天气坏,-1,test\n", encoding="utf-8")
        predictor = senticlip.load(tmp_path / training, device="cpu")
        expected = [predictor(None, words).probabilities["positive"] for words in ("天气好", "天气坏")]
        assert evaluate(tmp_path / training, table, device="cpu")["n"] == 2
        rows = [float(row["positive"]) for row in read_predictions(tmp_path / training)]
        np.testing.assert_allclose(rows, expected, atol=1e-3 if training == "frozen" else 1e-6)
    vision_model = create_model(Config().override({**changes, "modalities": ["vision"], "vision.frames": 2}))
    vision_model.save_pretrained(tmp_path / "v")
    with pytest.raises(UserError, match=r"own\.csv: no video in any of 2 clips"):
        evaluate(tmp_path / "v", table, device="cpu")


def test_heads_alone_and_equal_weights(assets, tmp_path):
    """Each head always predicts one class: text negative, with most of the weight, and vision positive."""
    changes = {"vision.encoder": str(timm_folder(tmp_path / "timm")), "vision.frames": 2, "vision.size": 32}
    changes |= {"text.encoder": str(assets / "text"), "text.max_length": 20, "width": 16, "heads": 2, "head": "linear"}
    model = create_model(Config().override(changes))
    with torch.no_grad():
        for name, bias in (("text", [3.0, 0.0, 0.0]), ("vision", [0.0, 0.0, 2.0])):
            model.network.heads[name].classify.weight.zero_()
            model.network.heads[name].classify.bias.copy_(torch.tensor(bias))
        model.network.combine.s["text"].fill_(-3)
        model.network.temperature.copy_(torch.tensor([2.0, 1.0]))  # 3 / 2 is less than 2
    model.save_pretrained(tmp_path / "run")
    videos = [clip.video for clip in read_clips(assets / "data", "test")]
    rows = [f"{video},天气,{score},test" for video, score in zip(videos, [-1, -1, -1, 0, 0, 1, 1, 1, 1], strict=True)]
    table = tmp_path / "own.csv"
    table.write_text("\n".join(["path,text,label,split", *rows, ",天气,-1,valid"]), encoding="utf-8")
    result = evaluate(tmp_path / "run", table, device="cpu")
    assert result["accuracy"] == result["heads"]["text"]["accuracy"] == pytest.approx(3 / 9)
    assert result["equal_weights"]["accuracy"] == result["heads"]["video"]["accuracy"] == pytest.approx(4 / 9)
    without_video = evaluate(tmp_path / "run", table, "valid", device="cpu")
    assert without_video["equal_weights"]["accuracy"] == 1  # without frames, only the text head votes


def test_another_target_has_its_own_predictions_file(assets):
    evaluate(assets / "a", assets / "data")
    before = (assets / "a" / "predictions-test.csv").read_bytes()
    evaluate(assets / "a", assets / "data", target="V")
    assert (assets / "a" / "predictions-test.csv").read_bytes() == before
    assert (assets / "a" / "predictions-test-V.csv").is_file()


def test_compare_reports_first_minus_second(tmp_path, monkeypatch):
    clips, truth = [Clip(str(i)) for i in range(8)], np.array([0, 1, 2, 0, 1, 2, 0, 1])
    runs = {"a": truth, "b": np.zeros(8, int)}  # a is always right, b three times
    monkeypatch.setattr("senticlip.evaluate._predict_split", lambda run, *rest: Answers(clips, truth, runs[run], {}))
    accuracy = compare("a", "b", tmp_path)["difference"]["accuracy"]
    assert accuracy["difference"] == pytest.approx(5 / 8)
    assert 0 < accuracy["low"] < accuracy["high"]


def test_judge_matches_values_computed_by_hand():
    scores = np.array([-0.8, -0.05, 0.0, 0.3, 0.9, 0.4], np.float32)
    predicted = np.array([-0.5, 0.05, 0.2, -0.3, 0.7, 0.5], np.float32)
    result = judge(Output(score=torch.from_numpy(predicted)), polarity(scores), scores)
    assert result["mae"] == pytest.approx(np.abs(scores - predicted).mean(), rel=1e-5)
    assert result["f1_2"] == pytest.approx(f1_score(scores > 0, predicted > 0, average="weighted"))
    assert result["accuracy"] == pytest.approx(3 / 6)
    assert result["ece"] is None
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.61, 0.29, 0.1], [0.2, 0.1, 0.7]]).repeat(10, 1)
    truth = np.tile([0, 2, 2, 2], 10)
    result = judge(Output(log_probs=probabilities.log()), truth, truth - 1.0)
    assert result["ece"] == pytest.approx((2 * 0.3 + 0.5 + 0.61) / 4, abs=1e-5)
    assert result["acc_2"] == pytest.approx(2 / 4)
    low, high = result["interval"]
    assert [low, high] == list(metrics.bootstrap_interval(truth, np.tile([0, 1, 0, 2], 10))["accuracy"])


def test_heads_are_scored_on_clips_that_have_their_modality(tmp_path):
    clips = read_clips(data_folder(tmp_path / "data", (0, 0, 2)), "test")
    text_folder(tmp_path / "text"), timm_folder(tmp_path / "timm")
    changes = {
        "vision.encoder": str(tmp_path / "timm"),
        "vision.frames": 2,
        "vision.size": 32,
        "head": "linear",
        "text.encoder": str(tmp_path / "text"),
        "text.max_length": 20,
        "width": 16,
        "heads": 2,
    }
    model = create_model(Config().override(changes))
    with torch.no_grad():
        for head in model.network.heads.values():  # positive for any input
            head.classify.weight.zero_()
            head.classify.bias.copy_(torch.tensor([0.0, 0.0, 2.0]))
    model.save_pretrained(tmp_path / "run")
    rows = [*(f"{clip.video},天气,1,test" for clip in clips), ",天气,-1,test", ",天气,0,test"]
    (tmp_path / "own.csv").write_text("\n".join(["path,text,label,split", *rows]), encoding="utf-8")
    result = evaluate(tmp_path / "run", tmp_path / "own.csv", device="cpu")
    assert (result["heads"]["text"]["accuracy"], result["heads"]["video"]["accuracy"]) == (0.5, 1.0)
