"""Training: the same seed, a kill, two processes, what learns and what does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import data_folder, text_folder, timm_folder

from senticlip import config as configs
from senticlip.structures import UserError
from senticlip.train import newest_checkpoint, train


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SENTICLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    data_folder(root / "data")
    text_folder(root / "text")
    timm_folder(root / "vision")
    return root


def settings(place, **changes):
    base = {
        "width": 16, "heads": 2, "dropout": 0.0, "prompt": "discrete",
        "text.encoder": str(place / "text"), "text.train": "frozen", "text.max_length": 24,
        "vision.encoder": str(place / "vision"), "vision.train": "frozen", "vision.frames": 2, "vision.size": 32,
        "train.epochs": 3, "train.batch_size": 4, "train.lr": 1e-3, "train.patience": 9, "train.metric": "nll",
    }  # fmt: skip
    return configs.Config().override({**base, **changes})


def weights(run):
    return load_file(run / "model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_the_seed_decides_every_bit(place, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(settings(place, dropout=0.2), place / "data", tmp_path / name, seed)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    different = weights(tmp_path / "c")
    assert any(not torch.equal(value, different[name]) for name, value in weights(tmp_path / "a").items())


def test_resume_after_a_kill_ends_in_the_same_weights(place, tmp_path):
    experiment = settings(place, **{"dropout": 0.2, "train.epochs": 12, "train.ema": 0.9})
    train(experiment, place / "data", tmp_path / "whole")
    (tmp_path / "e.yaml").write_text(experiment.to_yaml(), encoding="utf-8")
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "senticlip", "train", tmp_path / "e.yaml", "--data", place / "data", "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while newest_checkpoint(out / "checkpoints") is None and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "metrics.json").exists()
    train(experiment, place / "data", out, resume=True)
    assert_same(weights(tmp_path / "whole"), weights(out))
    written = (out / "metrics.json").stat().st_mtime_ns
    train(experiment, place / "data", out, resume=True)  # finished: left alone
    assert (out / "metrics.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="another config"):
        train(experiment.override({"width": 32}), place / "data", out, resume=True)


def losses(run):
    history = json.loads((run / "metrics.json").read_text())["history"]
    return [row["nll"] for row in history if "nll" in row], [row["loss"] for row in history if "grad_norm" in row]


def test_two_processes_learn_what_one_does(place, tmp_path):
    experiment = settings(place)
    train(experiment, place / "data", tmp_path / "one")
    (tmp_path / "e.yaml").write_text(experiment.to_yaml(), encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "senticlip", "train"]
    where = [tmp_path / "e.yaml", "--data", place / "data", "--out", tmp_path / "two", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command, *where], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "two")[0] == pytest.approx(losses(tmp_path / "one")[0], abs=1e-4)
    assert losses(tmp_path / "two")[1] == pytest.approx(losses(tmp_path / "one")[1], abs=1e-4)


def test_accumulated_batches_are_one_batch(place, tmp_path):
    train(settings(place), place / "data", tmp_path / "one")
    train(settings(place, **{"train.batch_size": 2, "train.accumulation": 2}), place / "data", tmp_path / "two")
    assert losses(tmp_path / "two")[0] == pytest.approx(losses(tmp_path / "one")[0], abs=1e-4)


@pytest.mark.parametrize(("learns", "moved"), [("frozen", set()), (1, {"1"}), ("full", {"embeddings", "0", "1"})])
def test_what_learns_of_an_encoder(place, tmp_path, learns, moved):
    changes = {"modalities": ["text"], "text.train": learns, "text.lr": 1e-2}
    train(settings(place, **changes), place / "data", tmp_path / "run")
    before, after = load_file(place / "text" / "model.safetensors"), weights(tmp_path / "run")
    found = set()
    for name, value in before.items():
        mine = [key for key in after if key.startswith("encoders.text.") and key.endswith(name)]
        if mine and not torch.equal(after[mine[0]], value):
            found.add("embeddings" if "embeddings" in name else name.split("layer.")[1].split(".")[0])
    assert found == moved


def test_fewer_clips_than_a_batch_still_teach(place, tmp_path):
    result = train(settings(place, **{"train.batch_size": 64}), place / "data", tmp_path / "run")
    assert sum("grad_norm" in row for row in result["history"]) == 3


def test_the_best_epoch_by_the_metric_is_kept(place, tmp_path):
    changes = {"train.lr": 0.3, "train.epochs": 6, "train.patience": 2, "train.metric": "nll"}
    result = train(settings(place, **changes), place / "data", tmp_path / "run")
    curve = [row["nll"] for row in result["history"] if "nll" in row]
    assert result["best_epoch"] == 1 + curve.index(min(curve))
    assert result["valid"]["nll"] == pytest.approx(min(curve), abs=1e-6)
    assert len(curve) <= result["best_epoch"] + 2


@pytest.mark.parametrize("balance", ["weights", "sampler"])
def test_class_imbalance_has_two_remedies(place, tmp_path, balance):
    train(settings(place, **{"train.balance": balance}), place / "data", tmp_path / balance)
    train(settings(place), place / "data", tmp_path / "plain")
    equal = torch.ones(3)
    assert torch.allclose(weights(tmp_path / balance)["network.class_weights"], equal)  # the tiny set is balanced


def test_a_full_disk_is_one_line(place, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("senticlip.train.save_run", full)
    with pytest.raises(UserError, match=r"disk is full .* --resume"):
        train(settings(place), place / "data", tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run" / "checkpoints") is not None
