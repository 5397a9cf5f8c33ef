"""Training: the same seed, a kill, two processes, what learns and what does not."""

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
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("train"))


def furnish(root):
    """A place to train: clips and two encoders."""
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


def test_a_training_that_starts_from_a_run_begins_with_all_of_it(place, tmp_path):
    """At a rate of 0 it ends with the RUN's weights; neither stages nor the encoders' folders are needed again."""
    root = furnish(tmp_path / "place")
    data_folder(root / "data", counts=(10, 6, 6))  # not as many of each class
    own = {"stages": {"text": {"modalities": ["text"], "train.epochs": 1}}, "modalities": ["text", "vision", "audio"]}
    first = settings(root, **own, **{"text.train": "full", "train.epochs": 1, "train.balance": "weights"})
    train(first, root / "data", tmp_path / "first")
    shutil.rmtree(root / "text")
    shutil.rmtree(root / "vision")
    rates = {f"{part}.lr": 0 for part in ("text", "vision", "audio", "label", "train")} | {"train.scalar_lr": 0}
    again = first.override({"start": str(tmp_path / "first"), "target": "V", "train.balance": "none", **rates})
    data_folder(tmp_path / "other", counts=(8, 4, 4))
    train(again, tmp_path / "other", tmp_path / "again")
    before, after = weights(tmp_path / "first"), weights(tmp_path / "again")
    assert before["network.class_weights"].tolist() != [1, 1, 1]
    set_anew = {"network.temperature", "network.class_weights"}
    assert_same(*({k: v for k, v in one.items() if k not in set_anew} for one in (before, after)))
    assert after["network.class_weights"].tolist() == [1, 1, 1]
    assert not (tmp_path / "again" / "stages").exists()
    train(again.override({"train.lr": 1e-2}), tmp_path / "other", tmp_path / "learned")
    assert any(not torch.equal(value, before[name]) for name, value in weights(tmp_path / "learned").items())


def test_a_run_of_other_parts_is_no_start(place, tmp_path):
    words = settings(place, **{"modalities": ["text"], "train.epochs": 1})
    train(words, place / "data", tmp_path / "words")
    for change, told in [({"width": 32}, "width is 16"), ({"modalities": ["text", "vision"]}, "modalities is")]:
        with pytest.raises(UsageError, match=f"start: {told}"):
            create_model(words.override({"start": str(tmp_path / "words"), **change}))
    kept = weights(tmp_path / "words")
    with pytest.raises(UserError, match="starts from"):
        train(words.override({"start": str(tmp_path / "words")}), place / "data", tmp_path / "words")
    assert_same(kept, weights(tmp_path / "words"))


def test_a_start_has_not_learned_what_judges_it(place, tmp_path):
    """Another seed draws another tenth."""
    table = tmp_path / "own.csv"
    rows = [f"{clip.video},{clip.text},{clip.labels['M']}" for clip in read_clips(place / "data")]
    table.write_text("\n".join(["path,text,label", *rows]), encoding="utf-8")
    words = settings(place, **{"modalities": ["text"], "train.epochs": 1})
    train(words, table, tmp_path / "words")
    again = words.override({"start": str(tmp_path / "words"), "seed": 1})
    learned = {clip.id for clip in read_clips(table, "train", seed=0)}
    judges = [clip.id for split in ("valid", "test") for clip in read_clips(table, split, seed=1)]
    told = f"was trained on {len(learned.intersection(judges))} of the {len(judges)} clips in valid and test"
    with pytest.raises(UsageError, match=f"{told} — use --set protocol=official --set seed=0"):
        train(again, table, tmp_path / "again")
    train(again.override({"seed": 0}), table, tmp_path / "again")


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
    with pytest.raises(UserError, match="a different config"):
        train(experiment.override({"width": 32}), place / "data", out, resume=True)


@pytest.mark.parametrize("ends", [{"train.epochs": 3}, {"train.epochs": 30, "train.lr": 0.0, "train.scalar_lr": 0.0}])
def test_a_kill_right_after_the_last_epoch_trains_no_further(place, tmp_path, monkeypatch, terminal, ends):
    """Whether all epochs are done or it stopped early: the counter of epochs without improvement is full."""
    experiment = settings(place, **{"train.patience": 2, "train.ema": 0.9, **ends})
    train(experiment, place / "data", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Fitter, "_load_best_model", lambda _: 1 / 0)  # before the last epoch's checkpoint is deleted
        with pytest.raises(ZeroDivisionError):
            train(experiment, place / "data", tmp_path / "killed")
    before = terminal.getvalue()
    train(experiment, place / "data", tmp_path / "killed", resume=True)
    assert not re.search(r"epoch +\d", terminal.getvalue().removeprefix(before))
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_a_table_of_ones_own_has_one_label_and_no_splits(place, tmp_path, capsys):
    clips = read_clips(place / "data")
    rows = [f"{clip.video},{clip.text},{clip.labels['M']}" for clip in clips]
    table = tmp_path / "own.csv"
    table.write_text("\n".join(["path,text,label", *rows]), encoding="utf-8")
    stage = {"modalities": ["text"], "target": "T", "train.epochs": 1}
    changes = {"train.epochs": 1, "train.recombine": 0.5, "train.mislead": 0.5, "audio.own": 0.5}  # there is no sound
    train(settings(place, stages={"text": stage}, **changes), table, tmp_path / "run")
    told = "no label T, V: stage text is trained on label M; train.recombine has no effect without it\n"
    assert capsys.readouterr().err.count(told) == 1
    learned = json.loads((tmp_path / "run" / "stages" / "text" / "metrics.json").read_text())["experiment"]
    assert (learned["target"], learned["modalities"]) == ("M", ["text"])


def test_a_training_of_one_step_learns(place, tmp_path):
    """A warm-up of a tenth would be that step, at a rate of 0."""
    for rate in (1e-9, 0.1):
        changes = {"train.epochs": 1, "train.batch_size": 12, "train.lr": rate}
        train(settings(place, modalities=["text"], **changes), place / "data", tmp_path / str(rate))
    one, two = (weights(tmp_path / str(rate)) for rate in (1e-9, 0.1))
    name = next(name for name in one if name.startswith("network.heads") and name.endswith("weight"))
    assert not torch.allclose(one[name], two[name], atol=1e-2)


def test_labels_that_no_score_can_hit_are_told(place, tmp_path, capsys):
    table = tmp_path / "own.csv"
    rows = [
        f"{c.video},{c.text},{c.labels['M'] / 15 if c.split == 'train' else 0.5},{c.split}"
        for c in read_clips(place / "data")
    ]
    table.write_text("\n".join(["path,text,label,split", *rows]), encoding="utf-8")
    for model, count in (("lmf", 1), ("clip_ca_msa", 0)):  # a score, and classes
        train(settings(place, model=model, **{"train.epochs": 1}), table, tmp_path / model)
        told = "8 labels M between -0.1 and 0.1 are not neutral, but such scores are predicted as neutral"
        assert capsys.readouterr().err.count(told) == count


def test_the_encoder_of_a_stage_is_the_one_of_the_run(place, tmp_path, capsys):
    stage = {"modalities": ["text"], "target": "T", "text.train": "full", "text.lr": 1e-2, "train.epochs": 1}
    train(settings(place, stages={"text": stage}, **{"train.epochs": 2}), place / "data", tmp_path / "run")
    told = "2 training runs: text (up to 1 epochs), all together (up to 2 epochs)\n"
    assert capsys.readouterr().err.count(told) == 1
    first, whole = (
        {name: value for name, value in weights(run).items() if name.startswith("encoders.text.")}
        for run in (tmp_path / "run" / "stages" / "text", tmp_path / "run")
    )
    assert_same(first, whole)
    words = "embeddings.word_embeddings.weight"
    assert not torch.equal(whole[f"encoders.text.body.{words}"], load_file(place / "text" / "model.safetensors")[words])


def test_only_what_is_read_is_trained_first(place, tmp_path):
    stages = {name: {"modalities": [name], "train.epochs": 1} for name in ("text", "vision")}
    found = stages_of(settings(place, modalities=["vision", "audio"], stages=stages), place / "data")
    assert {name: (stage.modalities, stage.target) for name, stage in found.items()} == {"vision": (["vision"], "M")}
    files = {"vision.encoder": "features", "head": "linear"}  # there is no encoder that could learn
    assert list(stages_of(settings(place, stages=stages, **files), place / "data")) == ["text"]
    experiment = settings(place, modalities=["vision"], stages=stages, **{"train.epochs": 1})
    train(experiment, place / "data", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "stages").iterdir()] == ["vision"]


def test_a_network_that_knows_positions_has_one_size(place, tmp_path):
    """Told before the stage is trained, not when its weights do not fit."""
    stages = {"vision": {"modalities": ["vision"], "vision.size": 64}}
    for name, fits in (("test_vit", False), ("test_efficientnet", True)):
        folder = str(timm_folder(tmp_path / name, name))
        experiment = settings(place, stages=stages, **{"vision.encoder": folder, "train.epochs": 1})
        if fits:
            train(experiment, place / "data", tmp_path / "run")
        else:
            with pytest.raises(UsageError, match=r"stages\.vision: vision\.size is 64, but 32 in the main training"):
                train(experiment, place / "data", tmp_path / "run")
            assert not list(tmp_path.glob("run/stages/*"))


@pytest.mark.parametrize("terminal", [True, False], indirect=True)
def test_what_is_trained_and_why_it_ends_is_told(place, tmp_path, terminal):
    stage = {"modalities": ["vision"], "target": "V", "train.epochs": 1}
    changes = {"train.lr": 0.0, "train.scalar_lr": 0.0, "train.patience": 2, "train.epochs": 30}
    train(settings(place, stages={"vision": stage}, **changes), place / "data", tmp_path / "run")
    told = re.findall(r"training [\w+ ]+\(label \w\)|epoch +\d+|stopped .*epochs", terminal.getvalue())
    last = ["epoch   1", "epoch   2", "epoch   3", "stopped early: no improvement for 2 epochs"]
    assert told == ["training stage vision (label V)", "epoch   1", "training text+video (label M)", *last]


def test_a_video_that_cannot_be_read_is_told_before_texts_are_trained(place, tmp_path):
    shutil.copytree(place / "data", tmp_path / "data")
    next(clip.video for clip in read_clips(tmp_path / "data", "train")).write_bytes(b"no video")
    stages = {name: {"modalities": [name], f"{name}.train": "full", "train.epochs": 1} for name in ("text", "vision")}
    with pytest.raises(UserError, match="mp4"):
        train(settings(place, stages=stages), tmp_path / "data", tmp_path / "run")
    assert not (tmp_path / "run" / "stages" / "text").exists()


def test_a_batch_that_processes_cannot_share_is_told_before_stages_are_trained(place, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    experiment = settings(place, stages={"text": {"modalities": ["text"]}}, **{"train.batch_size": 3})
    with pytest.raises(UserError, match="batch_size 3 is not divisible by 2 processes"):
        train(experiment, place / "data", tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


def test_a_training_that_diverges_is_no_run(place, tmp_path, terminal):
    wild = settings(place, **{"train.lr": 1e9, "train.clip_norm": 0, "text.train": "full", "text.lr": 1e9})
    with pytest.raises(UserError, match=r"training diverged"):
        train(wild, place / "data", tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()
    hidden, shown = (terminal.getvalue().rfind(f"\x1b[?25{sign}") for sign in "lh")  # the cursor
    assert 0 <= hidden < shown


def test_an_encoder_that_is_none_is_told_before_the_stages(place, tmp_path):
    stages = {"text": {"modalities": ["text"], "train.epochs": 1}}
    with pytest.raises(UserError, match=r"vision\.encoder: "):
        train(
            settings(place, stages=stages, **{"vision.encoder": "no/such/one/here"}), place / "data", tmp_path / "run"
        )
    assert not (tmp_path / "run" / "stages").exists()


def test_who_only_listens_needs_a_sound(place, tmp_path):
    with pytest.raises(UserError, match=r"data: no audio in any of \d+ clips, .* reads nothing else — train"):
        train(settings(place, modalities=["audio"]), place / "data", tmp_path)


def test_balanced_draws_hang_on_the_seed_and_the_epoch():
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
    assert BalancedSampler(np.array([0, 2, 2]), 0).chances.tolist() == [0.5, 0.25, 0.25]  # no row of a class


def test_epochs_draw_different_rows_and_each_class_as_often(place, tmp_path, monkeypatch):
    drawn = []
    real = BalancedSampler.__iter__

    def noted(self):
        drawn.append(list(real(self)))
        return iter(drawn[-1])

    monkeypatch.setattr(BalancedSampler, "__iter__", noted)
    balanced = settings(place, **{"train.balance": "sampler"})
    train(balanced, place / "data", tmp_path / "run")
    assert len(drawn) == len({tuple(rows) for rows in drawn}) == 3
    train(balanced.override({"seed": 1, "train.epochs": 1}), place / "data", tmp_path / "other")
    assert drawn[3] not in drawn[:3]


def relabelled(folder, place, cell, rows, column="label"):
    """The same clips with another label, or something else, in some rows of the table."""
    shutil.copytree(place / "data", folder)
    with (folder / "label.csv").open(encoding="utf-8", newline="") as file:
        head, *lines = csv.reader(file)
    for i in rows:
        lines[i][head.index(column)] = cell
    with (folder / "label.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *lines])
    return folder


def read_history(run):
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))["history"]


def losses(run):
    history = read_history(run)
    return [row["nll"] for row in history if "nll" in row], [row["loss"] for row in history if "grad_norm" in row]


def test_two_processes_learn_what_one_does(place, tmp_path):
    data = relabelled(tmp_path / "data", place, "", range(0, 24, 3), column="text")  # every third says nothing
    # the stage teaches the prefix only: an encoder's own dropout would draw otherwise in two processes
    stage = {"modalities": ["text"], "target": "T", "train.epochs": 1}
    experiment = settings(place, prompt="learned", stages={"text": stage}, **{"train.balance": "sampler"})
    train(experiment, data, tmp_path / "one")
    (tmp_path / "e.yaml").write_text(experiment.to_yaml(), encoding="utf-8")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "senticlip", "train"]
    where = [tmp_path / "e.yaml", "--data", data, "--out", tmp_path / "two", "--device", "cpu", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command, *where], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["best_epoch"]  # one object, not one of each process
    assert losses(tmp_path / "two" / "stages" / "text")[0] == pytest.approx(
        losses(tmp_path / "one" / "stages" / "text")[0], abs=1e-4
    )
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


def test_compiled_encoders_learn_the_same(place, tmp_path, monkeypatch):
    """Traced as torch.compile does it, but run by torch's own kernels: no C compiler is needed."""
    traced = []
    parts = "self_modules_attention_modules_self_", "self_modules_self_attn_"  # a layer of text, of the frames'

    def backend(graph, inputs):
        traced.append({node.target for node in graph.graph.nodes if node.op == "placeholder"})
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(training.runtime, "check_compiler", lambda place: None)
    clip_folder(place / "clip")
    learning = {"text.train": "full", "vision.train": "full", "vision.encoder": str(place / "clip")}
    for name in ("eager", "compiled"):
        changes = {**learning, "train.compile": name == "compiled", "prompt": "learned", "train.epochs": 2}
        train(settings(place, **changes), place / "data", tmp_path / name)
        for part in parts:
            assert any(part in str(names) for names in traced) == (name == "compiled"), part
    eager, compiled = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(value, compiled[name], atol=1e-5, rtol=1e-4, msg=name)


def test_no_compiler_is_told_before_the_training(place, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UsageError, match=r"train.compile: .*No working C.. compiler found.* — install gcc"):
        train(settings(place, **{"train.compile": True}), place / "data", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fewer_clips_than_a_batch_still_teach(place, tmp_path):
    result = train(settings(place, **{"train.batch_size": 64}), place / "data", tmp_path / "run")
    assert sum("grad_norm" in row for row in result["history"]) == 3


@pytest.mark.parametrize(("name", "error"), [("clip_ca_msa", "nll"), ("lmf", "mae")])
def test_the_best_epoch_by_the_metric_is_kept(place, tmp_path, capsys, name, error):
    changes = {"train.lr": 0.3, "train.epochs": 6, "train.patience": 2, "train.metric": "nll", "model": name}
    result = train(settings(place, **changes), place / "data", tmp_path / "run")
    curve = [row[error] for row in result["history"] if error in row]
    assert f"valid: {error} {curve[0]:.4f}  accuracy" in capsys.readouterr().err
    assert result["best_epoch"] == 1 + curve.index(min(curve))
    assert result["valid"][error] == pytest.approx(min(curve), abs=1e-6)
    assert len(curve) <= result["best_epoch"] + 2


def test_a_score_that_nears_the_labels_is_no_reason_to_stop(place, tmp_path, monkeypatch):
    """Until it is there, all clips are of one class, and the metric stands still."""

    def far_off(*args):
        model = create_model(*args)
        torch.nn.init.constant_(model.network.fusion.bias, 3)
        return model

    monkeypatch.setattr(training, "create_model", far_off)
    changes = {"model": "lmf", "train.metric": "accuracy", "train.patience": 1, "train.epochs": 4}
    result = train(settings(place, **changes), place / "data", tmp_path / "run")
    curve = [(row["accuracy"], row["mae"]) for row in result["history"] if "mae" in row]
    assert len({accuracy for accuracy, _ in curve}) == 1
    assert [mae for _, mae in curve] == sorted((mae for _, mae in curve), reverse=True)
    assert (len(curve), result["best_epoch"]) == (4, 4)


def test_the_average_moves_within_the_bounds_of_s_and_is_kept(place, tmp_path):
    changes = {"train.ema": 0.9, "train.scalar_lr": 100.0, "train.lr": 0.01}
    result = train(settings(place, **changes), place / "data", tmp_path / "run")
    curve = losses(tmp_path / "run")[0]
    assert len(set(curve)) == 3  # it moved
    model = SentimentModel.from_pretrained(tmp_path / "run")
    assert 1 < max(abs(s.item()) for s in model.network.combine.s.values()) <= 5
    model.network.temperature.fill_(1)  # as it was while it was trained
    clips = clip_set(read_clips(place / "data", "valid"), model, data=place / "data")
    found = score(outputs(model, clips).log_probs.numpy(), clips.labels["M"])
    assert found["nll"] == pytest.approx(result["valid"]["nll"], abs=1e-5)


def test_self_mm_is_told_the_number_of_each_epoch(place, tmp_path, monkeypatch):
    told = []
    real = SelfMM.epoch_started

    def noted(self, epoch):
        told.append(epoch)
        real(self, epoch)

    monkeypatch.setattr(SelfMM, "epoch_started", noted)
    train(settings(place, model="self_mm", modalities=["text"], prompt="none"), place / "data", tmp_path / "run")
    assert told == [1, 2, 3]


@pytest.mark.parametrize(("balance", "wanted"), [("weights", [12 / 21, 12 / 9, 12 / 6]), ("none", [1, 1, 1])])
def test_rare_classes_weigh_more(place, tmp_path, balance, wanted):
    data = relabelled(tmp_path / "data", place, "-0.4", [1, 2, 5])  # train: 7 negative, 3 neutral, 2 positive
    train(settings(place, **{"train.balance": balance, "train.epochs": 1}), data, tmp_path / "run")
    scores = [clip.labels["M"] for clip in read_clips(data, "train")]
    assert np.bincount(np.sign(scores).astype(int) + 1).tolist() == [7, 3, 2]
    assert weights(tmp_path / "run")["network.class_weights"].tolist() == pytest.approx(wanted)


def test_weights_and_losses_of_valid_are_in_the_history(place, tmp_path):
    changes = {"text.train": "full", "train.scalar_lr": 0.1, "train.batch_size": 4}
    train(settings(place, **changes), place / "data", tmp_path / "run")
    rows = [row for row in read_history(tmp_path / "run") if "nll" in row]
    for row in rows:
        assert row["weight_text"] + row["weight_vision"] == pytest.approx(1)
        assert row["loss_text"] > 0
        assert row["loss_vision"] > 0
    assert rows[0]["weight_text"] != rows[-1]["weight_text"]
    best = min(rows, key=lambda row: row["nll"])
    s = {name: weights(tmp_path / "run")[f"network.combine.s.{name}"] for name in ("text", "vision")}
    assert best["weight_text"] == pytest.approx(float(torch.sigmoid(s["vision"] - s["text"])), abs=1e-6)


def test_the_logged_losses_are_means_over_the_rows(place):
    torch.manual_seed(0)
    trainee = Trainee(create_model(settings(place), {})).eval()
    label = torch.tensor([-1.0, 0.0, 1.0, 1.0, 0.4])
    text, mask = torch.randint(5, 20, (5, 9)), torch.ones(5, 9, dtype=torch.bool)
    pixels = torch.randint(0, 256, (5, 2, 3, 32, 32), dtype=torch.uint8)
    inputs = {"text": text, "text_mask": mask, "vision": pixels, "vision_mask": mask[:, :2], "label_M": label}
    with torch.no_grad():
        whole = trainee(**inputs)
        parts = [trainee(**{name: value[rows] for name, value in inputs.items()}) for rows in (slice(3), slice(3, 5))]
    assert list(whole["log"]) == ["weight_text", "weight_vision", "loss_text", "loss_vision"]
    for name, rows in whole["log"].items():
        assert rows.shape == (5,)
        assert torch.cat([part["log"][name] for part in parts]).mean() == pytest.approx(float(rows.mean()), abs=1e-5)


def test_every_part_learns_at_its_own_rate(place, tmp_path):
    changes = {
        "modalities": ["text", "vision", "audio"], "prompt": "learned", "text.train": "full", "vision.train": "full",
        "vision.encoder": str(clip_folder(tmp_path / "clip")), "label.train": True, "train.weight_decay": 0.5,
        "train.lr": 1.0, "text.lr": 2.0, "vision.lr": 3.0, "audio.lr": 4.0, "label.lr": 5.0, "train.scalar_lr": 6.0,
    }  # fmt: skip
    trainee = Trainee(create_model(settings(place, **changes), {"audio": 33}))
    groups = parameter_groups(trainee)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    found: dict[tuple[float, float], set[str]] = {}
    for name, parameter in trainee.model.named_parameters():
        kind = "scalar or vector" if parameter.ndim < 2 else "matrix"
        part = "audio" if "entrances.audio" in name else ".".join(name.split(".")[:2])
        part = "prefix" if name.endswith("prefix") else part
        found.setdefault(rates[id(parameter)], set()).add(f"{part} {kind}")
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(list(trainee.model.parameters()))
    assert found[2.0, 0.5] == {"encoders.text matrix"}
    assert found[3.0, 0.5] == {"encoders.vision matrix"}
    assert found[4.0, 0.5] == {"audio matrix"}
    assert found[5.0, 0.5] == {"network.labels matrix"}
    assert found[6.0, 0.0] == {"network.combine scalar or vector"}
    assert "prefix matrix" in found[1.0, 0.0]
    assert "network.fusion matrix" in found[1.0, 0.5]
    assert not any("matrix" in part for part in found[1.0, 0.0] - {"prefix matrix"})


def test_the_encoder_under_a_peer_learns_at_its_own_rate(place):
    changes = {"model": "lmf", "text.train": "full", "text.lr": 2.0, "train.lr": 1.0, "train.weight_decay": 0.5}
    trainee = Trainee(create_model(settings(place, **changes, **{"options.factor_lr": 3.0})))
    groups = parameter_groups(trainee)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    learning = {name: p for name, p in trainee.model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(learning)
    found = {name: rates[id(p)] for name, p in learning.items()}
    assert {rate for name, rate in found.items() if name.startswith("encoders.text.")} == {2.0}
    assert {rate for name, rate in found.items() if name.startswith("network.")} == {1.0, 3.0}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_reaches_the_trainer(place, tmp_path, precision):
    arguments = training._arguments(settings(place, **{"train.precision": precision}), tmp_path, torch.device("cpu"))
    assert arguments.bf16 == (precision == "bf16")


def test_one_process_stays_on_the_gpu_that_was_asked_for(place, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    arguments = training._arguments(settings(place), tmp_path, torch.device("cpu"))
    arguments._n_gpu = 2  # what TrainingArguments says where there are two
    training._stay_on(arguments, torch.device("cuda:1"))
    assert chosen == [arguments.device] == [torch.device("cuda:1")]
    assert Accelerator().device == torch.device("cuda:1")  # where batches go
    assert arguments.n_gpu == 1  # no DataParallel
    assert arguments.train_batch_size == 4


def test_the_schedule_reaches_the_trainer(place, tmp_path):
    changes = {"train.schedule": "linear", "train.warmup": 0.5, "train.clip_norm": 0.3, "train.epochs": 4}
    arguments = training._arguments(settings(place, **changes), tmp_path, torch.device("cpu"))
    assert arguments.max_grad_norm == 0.3
    train(settings(place, **changes), place / "data", tmp_path / "run")
    rates = [row["learning_rate"] for row in read_history(tmp_path / "run") if "learning_rate" in row]
    # 12 steps of 3 an epoch: the rate rises through 6 and falls through 6; each epoch tells that of its last step
    assert rates == pytest.approx([1e-3 * share for share in (2 / 6, 5 / 6, 4 / 6, 1 / 6)])


def test_temperatures_are_fitted_on_valid(place, tmp_path, monkeypatch):
    seen = []

    def noted(model, data):
        seen.append((model.training, {clip.split for clip in data.clips}))

    monkeypatch.setattr(training, "calibrate", noted)
    train(settings(place, **{"train.epochs": 1}), place / "data", tmp_path / "run")
    assert seen == [(False, {"valid"})]  # dropout would blur what they are fitted to


def test_another_seed_reads_the_rows_in_another_order(place, tmp_path, monkeypatch):
    read, real = [], ClipSet.__getitems__
    monkeypatch.setattr(ClipSet, "__getitems__", lambda self, rows: read[-1].append(tuple(rows)) or real(self, rows))
    for seed in (0, 1, 1):
        read.append([])
        train(settings(place, **{"train.epochs": 1}), place / "data", tmp_path / str(len(read)), seed)
    assert read[0] != read[1] == read[2]
