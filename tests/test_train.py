"""Training: reproducibility, resuming, stages, several processes, learning rates, and what is reported."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tests.tiny import clip_folder, data_folder, text_folder, timm_folder

from senticlip import config as configs
from senticlip import train as training
from senticlip.checkpoint import newest_checkpoint, outputs
from senticlip.data.loader import BalancedSampler, ClipSet
from senticlip.data.sims import read_clips
from senticlip.fit import Fitter, parameter_groups, score
from senticlip.models import create_model
from senticlip.models.base import SentimentModel
from senticlip.models.self_mm import SelfMM
from senticlip.sources import clip_set
from senticlip.structures import UsageError, UserError
from senticlip.train import stages_of, train
from senticlip.trainee import Trainee


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("train"))


def make_assets(root):
    """Make a data set and two encoders to train with."""
    data_folder(root / "data")
    text_folder(root / "text")
    timm_folder(root / "vision")
    return root


def settings(assets, **changes):
    base = {
        "width": 16, "heads": 2, "dropout": 0.0, "prompt": "discrete",
        "text.encoder": str(assets / "text"), "text.train": "frozen", "text.max_length": 24,
        "vision.encoder": str(assets / "vision"), "vision.train": "frozen", "vision.frames": 2, "vision.size": 32,
        "train.epochs": 3, "train.batch_size": 4, "train.lr": 1e-3, "train.patience": 9, "train.metric": "nll",
    }  # fmt: skip
    return configs.Config().override({**base, **changes})


def weights(run):
    return load_file(run / "model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_start_takes_over_all_weights(assets, tmp_path):
    """At learning rate 0, the weights stay those of the RUN; neither stages nor encoder folders are needed."""
    root = make_assets(tmp_path / "place")
    data_folder(root / "data", counts=(10, 6, 6))  # an unequal number of clips per class
    changes = {
        "stages": {"text": {"modalities": ["text"], "train.epochs": 1}},
        "modalities": ["text", "vision", "audio"],
    }
    first = settings(root, **changes, **{"text.train": "full", "train.epochs": 1, "train.balance": "weights"})
    train(first, root / "data", tmp_path / "first")
    shutil.rmtree(root / "text")
    shutil.rmtree(root / "vision")
    zero_rates = {f"{part}.lr": 0 for part in ("text", "vision", "audio", "label", "train")} | {"train.scalar_lr": 0}
    again = first.override({"start": str(tmp_path / "first"), "target": "V", "train.balance": "none", **zero_rates})
    data_folder(tmp_path / "other", counts=(8, 4, 4))
    train(again, tmp_path / "other", tmp_path / "again")
    before, after = weights(tmp_path / "first"), weights(tmp_path / "again")
    assert before["network.class_weights"].tolist() != [1, 1, 1]
    recomputed = {"network.temperature", "network.class_weights"}
    assert_same(*({k: v for k, v in state.items() if k not in recomputed} for state in (before, after)))
    assert after["network.class_weights"].tolist() == [1, 1, 1]
    assert not (tmp_path / "again" / "stages").exists()
    train(again.override({"train.lr": 1e-2}), tmp_path / "other", tmp_path / "learned")
    assert any(not torch.equal(value, before[name]) for name, value in weights(tmp_path / "learned").items())


def test_start_rejects_incompatible_run(assets, tmp_path):
    text_only = settings(assets, **{"modalities": ["text"], "train.epochs": 1})
    train(text_only, assets / "data", tmp_path / "words")
    for change, message in [({"width": 32}, "width is 16"), ({"modalities": ["text", "vision"]}, "modalities is")]:
        with pytest.raises(UsageError, match=f"start: {message}"):
            create_model(text_only.override({"start": str(tmp_path / "words"), **change}))
    before = weights(tmp_path / "words")
    with pytest.raises(UserError, match="starts from"):
        train(text_only.override({"start": str(tmp_path / "words")}), assets / "data", tmp_path / "words")
    assert_same(before, weights(tmp_path / "words"))


def test_start_rejects_run_trained_on_valid_or_test_clips(assets, tmp_path):
    """Another seed draws another split."""
    table = tmp_path / "own.csv"
    rows = [f"{clip.video},{clip.text},{clip.labels['M']}" for clip in read_clips(assets / "data")]
    table.write_text("\n".join(["path,text,label", *rows]), encoding="utf-8")
    text_only = settings(assets, **{"modalities": ["text"], "train.epochs": 1})
    train(text_only, table, tmp_path / "words")
    again = text_only.override({"start": str(tmp_path / "words"), "seed": 1})
    learned = {clip.id for clip in read_clips(table, "train", seed=0)}
    held_out = [clip.id for split in ("valid", "test") for clip in read_clips(table, split, seed=1)]
    message = f"was trained on {len(learned.intersection(held_out))} of the {len(held_out)} clips in valid and test"
    with pytest.raises(UsageError, match=f"{message} — use --set protocol=official --set seed=0"):
        train(again, table, tmp_path / "again")
    train(again.override({"seed": 0}), table, tmp_path / "again")


def test_same_seed_gives_identical_weights(assets, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(settings(assets, dropout=0.2), assets / "data", tmp_path / name, seed)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    different = weights(tmp_path / "c")
    assert any(not torch.equal(value, different[name]) for name, value in weights(tmp_path / "a").items())


def test_resume_after_kill_gives_identical_weights(assets, tmp_path):
    experiment = settings(assets, **{"dropout": 0.2, "train.epochs": 12, "train.ema": 0.9})
    train(experiment, assets / "data", tmp_path / "whole")
    (tmp_path / "e.yaml").write_text(experiment.to_yaml(), encoding="utf-8")
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "senticlip", "train", tmp_path / "e.yaml", "--data", assets / "data", "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while newest_checkpoint(out / "checkpoints") is None and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "metrics.json").exists()
    train(experiment, assets / "data", out, resume=True)
    assert_same(weights(tmp_path / "whole"), weights(out))
    written = (out / "metrics.json").stat().st_mtime_ns
    train(experiment, assets / "data", out, resume=True)  # already finished: not changed
    assert (out / "metrics.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="a different config"):
        train(experiment.override({"width": 32}), assets / "data", out, resume=True)


@pytest.mark.parametrize(
    "changes", [{"train.epochs": 3}, {"train.epochs": 30, "train.lr": 0.0, "train.scalar_lr": 0.0}]
)
def test_resume_after_last_epoch_does_not_train_further(assets, tmp_path, monkeypatch, terminal, changes):
    """Whether training used all epochs or stopped early, with its patience used up."""
    experiment = settings(assets, **{"train.patience": 2, "train.ema": 0.9, **changes})
    train(experiment, assets / "data", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Fitter, "_load_best_model", lambda _: 1 / 0)  # before the last epoch's checkpoint is deleted
        with pytest.raises(ZeroDivisionError):
            train(experiment, assets / "data", tmp_path / "killed")
    before = terminal.getvalue()
    train(experiment, assets / "data", tmp_path / "killed", resume=True)
    assert not re.search(r"epoch +\d", terminal.getvalue().removeprefix(before))
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_csv_without_splits_and_unimodal_labels(assets, tmp_path, capsys):
    clips = read_clips(assets / "data")
    rows = [f"{clip.video},{clip.text},{clip.labels['M']}" for clip in clips]
    table = tmp_path / "own.csv"
    table.write_text("\n".join(["path,text,label", *rows]), encoding="utf-8")
    stage = {"modalities": ["text"], "target": "T", "train.epochs": 1}
    # train.mislead and audio.own are not reported, as the model reads no audio
    changes = {"train.epochs": 1, "train.recombine": 0.5, "train.mislead": 0.5, "audio.own": 0.5}
    train(settings(assets, stages={"text": stage}, **changes), table, tmp_path / "run")
    message = "no label T, V: stage text is trained on label M; train.recombine has no effect without it\n"
    assert capsys.readouterr().err.count(message) == 1
    experiment = json.loads((tmp_path / "run" / "stages" / "text" / "metrics.json").read_text())["experiment"]
    assert (experiment["target"], experiment["modalities"]) == ("M", ["text"])


def test_single_step_training_learns(assets, tmp_path):
    """A warm-up rounded up to that one step would train at learning rate 0."""
    for rate in (1e-9, 0.1):
        changes = {"train.epochs": 1, "train.batch_size": 12, "train.lr": rate}
        train(settings(assets, modalities=["text"], **changes), assets / "data", tmp_path / str(rate))
    one, two = (weights(tmp_path / str(rate)) for rate in (1e-9, 0.1))
    name = next(name for name in one if name.startswith("network.heads") and name.endswith("weight"))
    assert not torch.allclose(one[name], two[name], atol=1e-2)


def test_warns_of_labels_that_scores_cannot_match(assets, tmp_path, capsys):
    table = tmp_path / "own.csv"
    rows = [
        f"{c.video},{c.text},{c.labels['M'] / 15 if c.split == 'train' else 0.5},{c.split}"
        for c in read_clips(assets / "data")
    ]
    table.write_text("\n".join(["path,text,label,split", *rows]), encoding="utf-8")
    for model, count in (("lmf", 1), ("clip_ca_msa", 0)):  # a regression model and a classifier
        train(settings(assets, model=model, **{"train.epochs": 1}), table, tmp_path / model)
        message = "8 labels M between -0.1 and 0.1 are not neutral, but such scores are predicted as neutral"
        assert capsys.readouterr().err.count(message) == count


def test_run_keeps_stage_encoder(assets, tmp_path, capsys):
    stage = {"modalities": ["text"], "target": "T", "text.train": "full", "text.lr": 1e-2, "train.epochs": 1}
    train(settings(assets, stages={"text": stage}, **{"train.epochs": 2}), assets / "data", tmp_path / "run")
    message = "2 training runs: text (epochs: up to 1), all together (epochs: up to 2)\n"
    assert capsys.readouterr().err.count(message) == 1
    stage_encoder, run_encoder = (
        {name: value for name, value in weights(run).items() if name.startswith("encoders.text.")}
        for run in (tmp_path / "run" / "stages" / "text", tmp_path / "run")
    )
    assert_same(stage_encoder, run_encoder)
    key = "embeddings.word_embeddings.weight"
    assert not torch.equal(
        run_encoder[f"encoders.text.body.{key}"], load_file(assets / "text" / "model.safetensors")[key]
    )


def test_stages_are_limited_to_encoders_in_use(assets, tmp_path):
    stages = {name: {"modalities": [name], "train.epochs": 1} for name in ("text", "vision")}
    needed = stages_of(settings(assets, modalities=["vision", "audio"], stages=stages), assets / "data")
    assert {name: (stage.modalities, stage.target) for name, stage in needed.items()} == {"vision": (["vision"], "M")}
    from_file = {"vision.encoder": "features", "head": "linear"}  # no video encoder to train
    assert list(stages_of(settings(assets, stages=stages, **from_file), assets / "data")) == ["text"]
    experiment = settings(assets, modalities=["vision"], stages=stages, **{"train.epochs": 1})
    train(experiment, assets / "data", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "stages").iterdir()] == ["vision"]


def test_position_embeddings_need_same_frame_size_in_stage(assets, tmp_path):
    """Reported before the stage is trained rather than when its weights do not fit."""
    stages = {"vision": {"modalities": ["vision"], "vision.size": 64}}
    for name, fits in (("test_vit", False), ("test_efficientnet", True)):
        folder = str(timm_folder(tmp_path / name, name))
        experiment = settings(assets, stages=stages, **{"vision.encoder": folder, "train.epochs": 1})
        if fits:
            train(experiment, assets / "data", tmp_path / "run")
        else:
            with pytest.raises(UsageError, match=r"stages\.vision: vision\.size is 64, but 32 in the main training"):
                train(experiment, assets / "data", tmp_path / "run")
            assert not list(tmp_path.glob("run/stages/*"))


@pytest.mark.parametrize("terminal", [True, False], indirect=True)
def test_log_shows_stages_epochs_and_early_stopping(assets, tmp_path, terminal):
    stage = {"modalities": ["vision"], "target": "V", "train.epochs": 1}
    changes = {"train.lr": 0.0, "train.scalar_lr": 0.0, "train.patience": 2, "train.epochs": 30}
    train(settings(assets, stages={"vision": stage}, **changes), assets / "data", tmp_path / "run")
    log = re.findall(r"training [\w+ ]+\(label \w\)|epoch +\d+|stopped .*epochs", terminal.getvalue())
    last = ["epoch   1", "epoch   2", "epoch   3", "stopped early: no improvement for 2 epochs"]
    assert log == ["training stage vision (label V)", "epoch   1", "training text+video (label M)", *last]


def test_unreadable_video_is_reported_before_text_stage(assets, tmp_path):
    shutil.copytree(assets / "data", tmp_path / "data")
    next(clip.video for clip in read_clips(tmp_path / "data", "train")).write_bytes(b"no video")
    stages = {name: {"modalities": [name], f"{name}.train": "full", "train.epochs": 1} for name in ("text", "vision")}
    with pytest.raises(UserError, match="mp4"):
        train(settings(assets, stages=stages), tmp_path / "data", tmp_path / "run")
    assert not (tmp_path / "run" / "stages" / "text").exists()


def test_indivisible_batch_size_is_reported_before_stages(assets, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    experiment = settings(assets, stages={"text": {"modalities": ["text"]}}, **{"train.batch_size": 3})
    with pytest.raises(UserError, match="batch_size 3 is not divisible by 2 processes"):
        train(experiment, assets / "data", tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


def test_diverged_training_writes_no_run(assets, tmp_path, terminal):
    diverging = settings(assets, **{"train.lr": 1e9, "train.clip_norm": 0, "text.train": "full", "text.lr": 1e9})
    with pytest.raises(UserError, match=r"training diverged"):
        train(diverging, assets / "data", tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()
    hidden, shown = (terminal.getvalue().rfind(f"\x1b[?25{sign}") for sign in "lh")  # escape codes of the cursor
    assert 0 <= hidden < shown


def test_missing_encoder_is_reported_before_stages(assets, tmp_path):
    stages = {"text": {"modalities": ["text"], "train.epochs": 1}}
    with pytest.raises(UserError, match=r"vision\.encoder: "):
        train(
            settings(assets, stages=stages, **{"vision.encoder": "no/such/one/here"}), assets / "data", tmp_path / "run"
        )
    assert not (tmp_path / "run" / "stages").exists()


def test_audio_only_model_needs_audio(assets, tmp_path):
    with pytest.raises(UserError, match=r"data: no audio in any of \d+ clips, .* reads nothing else — train"):
        train(settings(assets, modalities=["audio"]), assets / "data", tmp_path)


def test_balanced_sampler_depends_on_seed_and_epoch():
    classes = np.repeat([0, 1, 2], [600, 300, 100])

    def draw(seed, epoch):
        sampler = BalancedSampler(classes, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert len(draw(0, 0)) == 1000
    counts = np.bincount(classes[draw(0, 0)])
    assert (abs(counts - 1000 / 3) < 75).all()  # 5 standard deviations
    assert draw(0, 3) == draw(0, 3)
    assert len({tuple(draw(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert BalancedSampler(np.array([0, 2, 2]), 0).chances.tolist() == [0.5, 0.25, 0.25]  # a class without rows


def test_balanced_sampler_draws_new_rows_each_epoch(assets, tmp_path, monkeypatch):
    drawn = []
    original = BalancedSampler.__iter__

    def recorded(self):
        drawn.append(list(original(self)))
        return iter(drawn[-1])

    monkeypatch.setattr(BalancedSampler, "__iter__", recorded)
    balanced = settings(assets, **{"train.balance": "sampler"})
    train(balanced, assets / "data", tmp_path / "run")
    assert len(drawn) == len({tuple(rows) for rows in drawn}) == 3
    train(balanced.override({"seed": 1, "train.epochs": 1}), assets / "data", tmp_path / "other")
    assert drawn[3] not in drawn[:3]


def relabelled(folder, assets, value, rows, column="label"):
    """A copy of the data set with ``value`` in one column (the label) of these rows of its table."""
    shutil.copytree(assets / "data", folder)
    with (folder / "label.csv").open(encoding="utf-8", newline="") as file:
        header, *table = csv.reader(file)
    for i in rows:
        table[i][header.index(column)] = value
    with (folder / "label.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *table])
    return folder


def read_history(run):
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))["history"]


def losses(run):
    history = read_history(run)
    return [row["nll"] for row in history if "nll" in row], [row["loss"] for row in history if "grad_norm" in row]


def test_two_processes_match_one(assets, tmp_path):
    data = relabelled(tmp_path / "data", assets, "", range(0, 24, 3), column="text")  # every third clip has no text
    # the stage trains only the prefix, as an encoder's own dropout would differ between one and two processes
    stage = {"modalities": ["text"], "target": "T", "train.epochs": 1}
    experiment = settings(assets, prompt="learned", stages={"text": stage}, **{"train.balance": "sampler"})
    train(experiment, data, tmp_path / "one")
    (tmp_path / "e.yaml").write_text(experiment.to_yaml(), encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "senticlip", "train"]
    arguments = [tmp_path / "e.yaml", "--data", data, "--out", tmp_path / "two", "--device", "cpu", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, *command, *arguments], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads(process.stdout)["best_epoch"]  # a single object, not one per process
    assert losses(tmp_path / "two" / "stages" / "text")[0] == pytest.approx(
        losses(tmp_path / "one" / "stages" / "text")[0], abs=1e-4
    )
    assert losses(tmp_path / "two")[0] == pytest.approx(losses(tmp_path / "one")[0], abs=1e-4)
    assert losses(tmp_path / "two")[1] == pytest.approx(losses(tmp_path / "one")[1], abs=1e-4)


def test_gradient_accumulation_matches_larger_batch(assets, tmp_path):
    train(settings(assets), assets / "data", tmp_path / "one")
    train(settings(assets, **{"train.batch_size": 2, "train.accumulation": 2}), assets / "data", tmp_path / "two")
    assert losses(tmp_path / "two")[0] == pytest.approx(losses(tmp_path / "one")[0], abs=1e-4)


@pytest.mark.parametrize(("trained", "expected"), [("frozen", set()), (1, {"1"}), ("full", {"embeddings", "0", "1"})])
def test_trained_encoder_layers(assets, tmp_path, trained, expected):
    changes = {"modalities": ["text"], "text.train": trained, "text.lr": 1e-2}
    train(settings(assets, **changes), assets / "data", tmp_path / "run")
    before, after = load_file(assets / "text" / "model.safetensors"), weights(tmp_path / "run")
    changed = set()
    for name, value in before.items():
        keys = [key for key in after if key.startswith("encoders.text.") and key.endswith(name)]
        if keys and not torch.equal(after[keys[0]], value):
            changed.add("embeddings" if "embeddings" in name else name.split("layer.")[1].split(".")[0])
    assert changed == expected


def test_compiled_training_matches_eager(assets, tmp_path, monkeypatch):
    """torch.compile traces the graphs but torch's own kernels run them, so that no C compiler is needed."""
    traced = []
    layers = "self_modules_attention_modules_self_", "self_modules_self_attn_"  # of the text, of the vision encoder

    def backend(graph, inputs):
        traced.append({node.target for node in graph.graph.nodes if node.op == "placeholder"})
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(training.runtime, "check_compiler", lambda device: None)
    clip_folder(assets / "clip")
    full_training = {"text.train": "full", "vision.train": "full", "vision.encoder": str(assets / "clip")}
    for name in ("eager", "compiled"):
        changes = {**full_training, "train.compile": name == "compiled", "prompt": "learned", "train.epochs": 2}
        train(settings(assets, **changes), assets / "data", tmp_path / name)
        for layer in layers:
            assert any(layer in str(names) for names in traced) == (name == "compiled"), layer
    eager, compiled = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(value, compiled[name], atol=1e-5, rtol=1e-4, msg=name)


def test_missing_compiler_is_reported_before_training(assets, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UsageError, match=r"train.compile: .*No working C.. compiler found.* — install gcc"):
        train(settings(assets, **{"train.compile": True}), assets / "data", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_trains_on_fewer_clips_than_a_batch(assets, tmp_path):
    result = train(settings(assets, **{"train.batch_size": 64}), assets / "data", tmp_path / "run")
    assert sum("grad_norm" in row for row in result["history"]) == 3


@pytest.mark.parametrize(("name", "error"), [("clip_ca_msa", "nll"), ("lmf", "mae")])
def test_keeps_best_epoch_by_metric(assets, tmp_path, capsys, name, error):
    changes = {"train.lr": 0.3, "train.epochs": 6, "train.patience": 2, "train.metric": "nll", "model": name}
    result = train(settings(assets, **changes), assets / "data", tmp_path / "run")
    curve = [row[error] for row in result["history"] if error in row]
    assert f"valid: {error} {curve[0]:.4f}  accuracy" in capsys.readouterr().err
    assert result["best_epoch"] == 1 + curve.index(min(curve))
    assert result["valid"][error] == pytest.approx(min(curve), abs=1e-6)
    assert len(curve) <= result["best_epoch"] + 2


def test_no_early_stopping_while_mae_improves(assets, tmp_path, monkeypatch):
    """At first, all clips are predicted as one class, so that the metric does not change."""

    def biased_model(*args):
        model = create_model(*args)
        torch.nn.init.constant_(model.network.fusion.bias, 3)
        return model

    monkeypatch.setattr(training, "create_model", biased_model)
    changes = {"model": "lmf", "train.metric": "accuracy", "train.patience": 1, "train.epochs": 4}
    result = train(settings(assets, **changes), assets / "data", tmp_path / "run")
    curve = [(row["accuracy"], row["mae"]) for row in result["history"] if "mae" in row]
    assert len({accuracy for accuracy, _ in curve}) == 1
    assert [mae for _, mae in curve] == sorted((mae for _, mae in curve), reverse=True)
    assert (len(curve), result["best_epoch"]) == (4, 4)


def test_moving_average_respects_bounds_of_s_and_is_saved(assets, tmp_path):
    changes = {"train.ema": 0.9, "train.scalar_lr": 100.0, "train.lr": 0.01}
    result = train(settings(assets, **changes), assets / "data", tmp_path / "run")
    curve = losses(tmp_path / "run")[0]
    assert len(set(curve)) == 3  # the average changed
    model = SentimentModel.from_pretrained(tmp_path / "run")
    assert 1 < max(abs(s.item()) for s in model.network.combine.s.values()) <= 5
    model.network.temperature.fill_(1)  # as during training
    clips = clip_set(read_clips(assets / "data", "valid"), model, data=assets / "data")
    recomputed = score(outputs(model, clips).log_probs.numpy(), clips.labels["M"])
    assert recomputed["nll"] == pytest.approx(result["valid"]["nll"], abs=1e-5)


def test_self_mm_receives_epoch_numbers(assets, tmp_path, monkeypatch):
    epochs = []
    original = SelfMM.epoch_started

    def recorded(self, epoch):
        epochs.append(epoch)
        original(self, epoch)

    monkeypatch.setattr(SelfMM, "epoch_started", recorded)
    train(settings(assets, model="self_mm", modalities=["text"], prompt="none"), assets / "data", tmp_path / "run")
    assert epochs == [1, 2, 3]


@pytest.mark.parametrize(("balance", "expected"), [("weights", [12 / 21, 12 / 9, 12 / 6]), ("none", [1, 1, 1])])
def test_class_weights_favour_rare_classes(assets, tmp_path, balance, expected):
    data = relabelled(tmp_path / "data", assets, "-0.4", [1, 2, 5])  # train: 7 negative, 3 neutral, 2 positive
    train(settings(assets, **{"train.balance": balance, "train.epochs": 1}), data, tmp_path / "run")
    scores = [clip.labels["M"] for clip in read_clips(data, "train")]
    assert np.bincount(np.sign(scores).astype(int) + 1).tolist() == [7, 3, 2]
    assert weights(tmp_path / "run")["network.class_weights"].tolist() == pytest.approx(expected)


def test_history_contains_valid_weights_and_losses(assets, tmp_path):
    changes = {"text.train": "full", "train.scalar_lr": 0.1, "train.batch_size": 4}
    train(settings(assets, **changes), assets / "data", tmp_path / "run")
    rows = [row for row in read_history(tmp_path / "run") if "nll" in row]
    for row in rows:
        assert row["weight_text"] + row["weight_vision"] == pytest.approx(1)
        assert row["loss_text"] > 0
        assert row["loss_vision"] > 0
    assert rows[0]["weight_text"] != rows[-1]["weight_text"]
    best = min(rows, key=lambda row: row["nll"])
    s = {name: weights(tmp_path / "run")[f"network.combine.s.{name}"] for name in ("text", "vision")}
    assert best["weight_text"] == pytest.approx(float(torch.sigmoid(s["vision"] - s["text"])), abs=1e-6)


def test_logged_values_are_per_row(assets):
    torch.manual_seed(0)
    trainee = Trainee(create_model(settings(assets), {})).eval()
    label = torch.tensor([-1.0, 0.0, 1.0, 1.0, 0.4])
    text, mask = torch.randint(5, 20, (5, 9)), torch.ones(5, 9, dtype=torch.bool)
    pixels = torch.randint(0, 256, (5, 2, 3, 32, 32), dtype=torch.uint8)
    inputs = {"text": text, "text_mask": mask, "vision": pixels, "vision_mask": mask[:, :2], "label_M": label}
    with torch.no_grad():
        full = trainee(**inputs)
        parts = [trainee(**{name: value[rows] for name, value in inputs.items()}) for rows in (slice(3), slice(3, 5))]
    assert list(full["log"]) == ["weight_text", "weight_vision", "loss_text", "loss_vision"]
    for name, rows in full["log"].items():
        assert rows.shape == (5,)
        assert torch.cat([part["log"][name] for part in parts]).mean() == pytest.approx(float(rows.mean()), abs=1e-5)


def test_parameter_groups_have_their_own_learning_rates(assets, tmp_path):
    changes = {
        "modalities": ["text", "vision", "audio"], "prompt": "learned", "text.train": "full", "vision.train": "full",
        "vision.encoder": str(clip_folder(tmp_path / "clip")), "label.train": True, "train.weight_decay": 0.5,
        "train.lr": 1.0, "text.lr": 2.0, "vision.lr": 3.0, "audio.lr": 4.0, "label.lr": 5.0, "train.scalar_lr": 6.0,
    }  # fmt: skip
    trainee = Trainee(create_model(settings(assets, **changes), {"audio": 33}))
    groups = parameter_groups(trainee)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    parts_by_rate: dict[tuple[float, float], set[str]] = {}
    for name, parameter in trainee.model.named_parameters():
        kind = "scalar or vector" if parameter.ndim < 2 else "matrix"
        part = "audio" if "entrances.audio" in name else ".".join(name.split(".")[:2])
        part = "prefix" if name.endswith("prefix") else part
        parts_by_rate.setdefault(rates[id(parameter)], set()).add(f"{part} {kind}")
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(list(trainee.model.parameters()))
    assert parts_by_rate[2.0, 0.5] == {"encoders.text matrix"}
    assert parts_by_rate[3.0, 0.5] == {"encoders.vision matrix"}
    assert parts_by_rate[4.0, 0.5] == {"audio matrix"}
    assert parts_by_rate[5.0, 0.5] == {"network.labels matrix"}
    assert parts_by_rate[6.0, 0.0] == {"network.combine scalar or vector"}
    assert "prefix matrix" in parts_by_rate[1.0, 0.0]
    assert "network.fusion matrix" in parts_by_rate[1.0, 0.5]
    assert not any("matrix" in part for part in parts_by_rate[1.0, 0.0] - {"prefix matrix"})


def test_peer_encoder_has_its_own_learning_rate(assets):
    changes = {"model": "lmf", "text.train": "full", "text.lr": 2.0, "train.lr": 1.0, "train.weight_decay": 0.5}
    trainee = Trainee(create_model(settings(assets, **changes, **{"options.factor_lr": 3.0})))
    groups = parameter_groups(trainee)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    trainable = {name: p for name, p in trainee.model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(trainable)
    rate_by_name = {name: rates[id(p)] for name, p in trainable.items()}
    assert {rate for name, rate in rate_by_name.items() if name.startswith("encoders.text.")} == {2.0}
    assert {rate for name, rate in rate_by_name.items() if name.startswith("network.")} == {1.0, 3.0}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trainer_receives_precision(assets, tmp_path, precision):
    arguments = training._training_arguments(
        settings(assets, **{"train.precision": precision}), tmp_path, torch.device("cpu")
    )
    assert arguments.bf16 == (precision == "bf16")


def test_single_process_uses_requested_gpu(assets, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    arguments = training._training_arguments(settings(assets), tmp_path, torch.device("cpu"))
    arguments._n_gpu = 2  # as TrainingArguments sets it if there are two
    training._use_only(arguments, torch.device("cuda:1"))
    assert chosen == [arguments.device] == [torch.device("cuda:1")]
    assert Accelerator().device == torch.device("cuda:1")  # where batches go
    assert arguments.n_gpu == 1  # no DataParallel
    assert arguments.train_batch_size == 4


def test_trainer_receives_schedule(assets, tmp_path):
    changes = {"train.schedule": "linear", "train.warmup": 0.5, "train.clip_norm": 0.3, "train.epochs": 4}
    arguments = training._training_arguments(settings(assets, **changes), tmp_path, torch.device("cpu"))
    assert arguments.max_grad_norm == 0.3
    train(settings(assets, **changes), assets / "data", tmp_path / "run")
    rates = [row["learning_rate"] for row in read_history(tmp_path / "run") if "learning_rate" in row]
    # 12 steps, 3 per epoch: the rate rises for 6 steps, then falls for 6; each epoch logs the rate of its last step
    assert rates == pytest.approx([1e-3 * share for share in (2 / 6, 5 / 6, 4 / 6, 1 / 6)])


def test_temperatures_are_fitted_on_valid_in_eval_mode(assets, tmp_path, monkeypatch):
    calls = []

    def record(model, data):
        calls.append((model.training, {clip.split for clip in data.clips}))

    monkeypatch.setattr(training, "calibrate", record)
    train(settings(assets, **{"train.epochs": 1}), assets / "data", tmp_path / "run")
    assert calls == [(False, {"valid"})]  # with dropout, they would be fitted to noisy logits


def test_seed_determines_row_order(assets, tmp_path, monkeypatch):
    orders, original = [], ClipSet.__getitems__
    monkeypatch.setattr(
        ClipSet, "__getitems__", lambda self, rows: orders[-1].append(tuple(rows)) or original(self, rows)
    )
    for seed in (0, 1, 1):
        orders.append([])
        train(settings(assets, **{"train.epochs": 1}), assets / "data", tmp_path / str(len(orders)), seed)
    assert orders[0] != orders[1] == orders[2]
