"""A run on a split: the file, the numbers against scikit-learn, two runs against each other, a hub id."""

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
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    data_folder(root / "data", (3, 3, 9))
    text_folder(root / "text")
    for name, seed, target in (("a", 0, "M"), ("b", 1, "M"), ("t", 0, "T")):
        changes = {"modalities": ["text"], "width": 16, "heads": 2, "seed": seed, "target": target}
        model = create_model(Config().override({**changes, "text.encoder": str(root / "text"), "text.max_length": 20}))
        model.save_pretrained(root / name)
    return root


def rows_of(run):
    with (run / "predictions-test.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_are_those_of_the_file(place):
    result = evaluate(place / "a", place / "data")
    rows = rows_of(place / "a")
    truth, predicted = ([LABELS.index(row[name]) for row in rows] for name in ("truth", "predicted"))
    assert result["n"] == len(rows) == 9
    assert result["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert result["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    probabilities = np.array([[float(row[name]) for name in LABELS] for row in rows])
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert probabilities.argmax(1).tolist() == predicted
    clips = read_clips(place / "data", "test")
    assert [(row["id"], row["text"]) for row in rows] == [(clip.id, clip.text) for clip in clips]
    assert truth == [1 + int(np.sign(clip.labels["M"])) for clip in clips]


def test_somebody_elses_run_is_judged_and_not_written_into(place, tmp_path, monkeypatch, capsys):
    shutil.copytree(place / "a", tmp_path / "a", ignore=shutil.ignore_patterns("*.csv"))
    monkeypatch.setattr(os, "access", lambda path, how: how != os.W_OK)  # as root everything can be written
    assert evaluate(tmp_path / "a", place / "data")["n"] == 9
    assert not list((tmp_path / "a").glob("*.csv"))
    assert "predictions-test.csv: not written" in capsys.readouterr().err


def test_what_is_no_number_is_no_answer(place, tmp_path):
    shutil.copytree(place / "a", tmp_path / "a", ignore=shutil.ignore_patterns("*.csv"))
    state = load_file(tmp_path / "a" / "model.safetensors")
    next(value for name, value in state.items() if name.startswith("network.heads"))[:] = float("nan")
    save_file(state, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="9 of 9 answers are NaN, the first for v"):
        evaluate(tmp_path / "a", place / "data")
    with pytest.raises(UserError, match="the model's answer is NaN"):
        senticlip.load(tmp_path / "a")(text="好")


def test_rows_that_have_changed_are_told(place, tmp_path, capsys):
    """A tenth that is drawn at random is another one then."""
    table = tmp_path / "own.csv"
    table.write_text("text,label\n" + "".join(f"今天{i},{i % 3 - 1}\n" for i in range(30)), encoding="utf-8")
    shutil.copytree(place / "a", tmp_path / "a", ignore=shutil.ignore_patterns("*.csv"))
    config = senticlip.load(tmp_path / "a").config
    (tmp_path / "a" / "metrics.json").write_text(json.dumps(origin(config, table)), encoding="utf-8")
    evaluate(tmp_path / "a", table)
    assert "have changed" not in capsys.readouterr().err
    table.write_text(table.read_text(encoding="utf-8") + "再见,1\n", encoding="utf-8")
    evaluate(tmp_path / "a", table)
    assert f"{table}: its rows have changed since {tmp_path / 'a'} was trained" in capsys.readouterr().err


def test_two_runs_differ_by_what_each_is(place):
    found = compare(place / "a", place / "b", place / "data", device="cpu")
    apart = [evaluate(place / name, place / "data") for name in "ab"]
    assert (found["a"], found["b"]) == tuple(apart)
    difference = apart[0]["accuracy"] - apart[1]["accuracy"]
    assert found["difference"]["accuracy"]["difference"] == pytest.approx(difference)


def test_runs_of_two_labels_need_one(place, tmp_path):
    (place / "data" / "label.csv").rename(tmp_path / "label.csv")
    text = (tmp_path / "label.csv").read_text(encoding="utf-8")
    head, *lines = text.splitlines()
    turned = [",".join([*parts[:4], str(-float(parts[4])), *parts[5:]]) for parts in (ln.split(",") for ln in lines)]
    (place / "data" / "label.csv").write_text("\n".join([head, *turned]), encoding="utf-8")
    try:
        with pytest.raises(UserError, match="were trained on different labels — choose one with --target"):
            compare(place / "a", place / "t", place / "data")
        chosen = compare(place / "a", place / "t", place / "data", target="T")
        assert chosen["a"]["accuracy"] == evaluate(place / "a", place / "data", target="T")["accuracy"]
    finally:
        (tmp_path / "label.csv").replace(place / "data" / "label.csv")


def test_a_hub_id_is_read_and_not_written_into(place, tmp_path, monkeypatch):
    monkeypatch.setattr("senticlip.encoders.hub.fetch", lambda name, *_: place / name.split("/")[1])
    monkeypatch.chdir(tmp_path)
    (place / "b" / "predictions-test.csv").unlink(missing_ok=True)
    found = evaluate("someone/b", place / "data")
    assert not Path("someone").exists()
    assert not (place / "b" / "predictions-test.csv").exists()
    file = {"predictions": str(place / "b" / "predictions-test.csv")}
    assert found | file == evaluate(place / "b", place / "data")
    assert compare("someone/a", "someone/b", place / "data")["b"] == found


def test_clips_that_say_nothing_and_clips_without_the_label_are_told(place, tmp_path, capsys):
    shutil.copytree(place / "a", tmp_path / "a", ignore=shutil.ignore_patterns("*.csv"))
    videos = [clip.video for clip in read_clips(place / "data", "test")]
    table = tmp_path / "own.csv"
    rows = [f"{videos[0]},天气好,1,1,val", f"{videos[1]},,-1,-1,val", f"{videos[2]},nan,1,,val"]
    table.write_text("\n".join(["path,text,label,label_T,split", *rows]), encoding="utf-8")
    found = evaluate(tmp_path / "a", table, "val")
    assert (found["n"], found["unread"], Path(found["predictions"]).name) == (3, 2, "predictions-valid.csv")
    with Path(found["predictions"]).open(encoding="utf-8", newline="") as file:
        (said,) = {row["predicted"] for row in list(csv.DictReader(file))[1:]}
    told = capsys.readouterr().err
    assert told == f"{table}: 2 of 3 clips have no input that this model reads; they are predicted as {said!r}\n"
    assert evaluate(tmp_path / "a", table, "valid", target="T")["n"] == 2
    assert f"{table}: 1 of 3 clips in valid have no label T and are left out\n" in capsys.readouterr().err
    assert "unread" not in evaluate(place / "a", place / "data")
    assert capsys.readouterr().err == ""


def test_what_cannot_be_asked(place):
    with pytest.raises(UsageError, match="--target Q: choose one of M, T, A, V"):
        evaluate(place / "a", place / "data", target="Q")
    with pytest.raises(UsageError, match="split 'tset': unknown"):
        evaluate(place / "a", place / "data", "tset")


def test_a_split_that_has_no_video_or_nothing_at_all(place, tmp_path):
    clips, text = clip_folder(tmp_path / "clip"), str(place / "text")
    changes = {"vision.encoder": str(clips), "text.encoder": text, "text.max_length": 20, "width": 16, "heads": 2}
    for how in ("frozen", "full"):
        model = create_model(Config().override({**changes, "vision.train": how, "text.train": how, "vision.frames": 2}))
        model.save_pretrained(tmp_path / how)
        table = tmp_path / "own.csv"
        table.write_text("text,label,split\n天气好,1,test\n天气坏,-1,test\n", encoding="utf-8")
        predictor = senticlip.load(tmp_path / how, device="cpu")
        wanted = [predictor(None, words).probabilities["positive"] for words in ("天气好", "天气坏")]
        assert evaluate(tmp_path / how, table, device="cpu")["n"] == 2
        rows = [float(row["positive"]) for row in rows_of(tmp_path / how)]
        np.testing.assert_allclose(rows, wanted, atol=1e-3 if how == "frozen" else 1e-6)
    picture = create_model(Config().override({**changes, "modalities": ["vision"], "vision.frames": 2}))
    picture.save_pretrained(tmp_path / "v")
    with pytest.raises(UserError, match=r"own\.csv: no video in any of 2 clips"):
        evaluate(tmp_path / "v", table, device="cpu")


def test_each_head_alone_and_all_with_equal_weights(place, tmp_path):
    """Heads that say one class of every clip: words negative, with most of the weight, frames positive."""
    changes = {"vision.encoder": str(timm_folder(tmp_path / "timm")), "vision.frames": 2, "vision.size": 32}
    changes |= {"text.encoder": str(place / "text"), "text.max_length": 20, "width": 16, "heads": 2, "head": "linear"}
    model = create_model(Config().override(changes))
    with torch.no_grad():
        for name, said in (("text", [3.0, 0.0, 0.0]), ("vision", [0.0, 0.0, 2.0])):
            model.network.heads[name].classify.weight.zero_()
            model.network.heads[name].classify.bias.copy_(torch.tensor(said))
        model.network.combine.s["text"].fill_(-3)
        model.network.temperature.copy_(torch.tensor([2.0, 1.0]))  # 3 / 2 is less than 2
    model.save_pretrained(tmp_path / "run")
    videos = [clip.video for clip in read_clips(place / "data", "test")]
    rows = [f"{video},天气,{score},test" for video, score in zip(videos, [-1, -1, -1, 0, 0, 1, 1, 1, 1], strict=True)]
    table = tmp_path / "own.csv"
    table.write_text("\n".join(["path,text,label,split", *rows, ",天气,-1,valid"]), encoding="utf-8")
    found = evaluate(tmp_path / "run", table, device="cpu")
    assert found["accuracy"] == found["heads"]["text"]["accuracy"] == pytest.approx(3 / 9)
    assert found["equal_weights"]["accuracy"] == found["heads"]["video"]["accuracy"] == pytest.approx(4 / 9)
    unseen = evaluate(tmp_path / "run", table, "valid", device="cpu")
    assert unseen["equal_weights"]["accuracy"] == 1  # without frames there are words alone


def test_another_question_has_a_file_of_its_own(place):
    evaluate(place / "a", place / "data")
    before = (place / "a" / "predictions-test.csv").read_bytes()
    evaluate(place / "a", place / "data", target="V")
    assert (place / "a" / "predictions-test.csv").read_bytes() == before
    assert (place / "a" / "predictions-test-V.csv").is_file()


def test_the_difference_of_two_runs_is_the_first_minus_the_second(tmp_path, monkeypatch):
    clips, truth = [Clip(str(i)) for i in range(8)], np.array([0, 1, 2, 0, 1, 2, 0, 1])
    runs = {"a": truth, "b": np.zeros(8, int)}  # a is always right, b three times
    monkeypatch.setattr("senticlip.evaluate._answers", lambda run, *rest: Answers(clips, truth, runs[run], {}))
    found = compare("a", "b", tmp_path)["difference"]["accuracy"]
    assert found["difference"] == pytest.approx(5 / 8)
    assert 0 < found["low"] < found["high"]


def test_what_is_judged_by_hand():
    scores = np.array([-0.8, -0.05, 0.0, 0.3, 0.9, 0.4], np.float32)
    said = np.array([-0.5, 0.05, 0.2, -0.3, 0.7, 0.5], np.float32)
    found = judge(Output(score=torch.from_numpy(said)), polarity(scores), scores)
    assert found["mae"] == pytest.approx(np.abs(scores - said).mean(), rel=1e-5)
    assert found["f1_2"] == pytest.approx(f1_score(scores > 0, said > 0, average="weighted"))
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["ece"] is None
    chances = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.61, 0.29, 0.1], [0.2, 0.1, 0.7]]).repeat(10, 1)
    truth = np.tile([0, 2, 2, 2], 10)
    found = judge(Output(log_probs=chances.log()), truth, truth - 1.0)
    assert found["ece"] == pytest.approx((2 * 0.3 + 0.5 + 0.61) / 4, abs=1e-5)
    assert found["acc_2"] == pytest.approx(2 / 4)
    low, high = found["interval"]
    assert [low, high] == list(metrics.bootstrap_interval(truth, np.tile([0, 1, 0, 2], 10))["accuracy"])


def test_a_head_is_judged_on_the_clips_that_have_its_modality(tmp_path):
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
        for head in model.network.heads.values():  # positive, whatever it reads
            head.classify.weight.zero_()
            head.classify.bias.copy_(torch.tensor([0.0, 0.0, 2.0]))
    model.save_pretrained(tmp_path / "run")
    rows = [*(f"{clip.video},天气,1,test" for clip in clips), ",天气,-1,test", ",天气,0,test"]
    (tmp_path / "own.csv").write_text("\n".join(["path,text,label,split", *rows]), encoding="utf-8")
    found = evaluate(tmp_path / "run", tmp_path / "own.csv", device="cpu")
    assert (found["heads"]["text"]["accuracy"], found["heads"]["video"]["accuracy"]) == (0.5, 1.0)
