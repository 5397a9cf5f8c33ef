"""The RUN folder: kills and resuming, other trainings and files in it, full disks, its model card; file writing."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.test_train import assert_same, losses, make_assets, relabelled, settings, weights
from transformers import Trainer, TrainerState

from senticlip import checkpoint as checkpoints
from senticlip import config as configs
from senticlip import files
from senticlip import train as training
from senticlip.card import model_card
from senticlip.checkpoint import newest_checkpoint
from senticlip.fit import Hooks
from senticlip.models.base import SentimentModel
from senticlip.structures import Clip, UserError
from senticlip.train import train


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("checkpoint"))


class Killed(BaseException):
    """Stops a training wherever it is, as a signal would."""


def kill_at_call(patch, owner, name, number):
    """Make call ``number`` of ``owner``'s function ``name`` raise Killed."""
    calls, original = itertools.count(1), getattr(owner, name)

    def wrapper(*args, **kwargs):
        if next(calls) == number:
            raise Killed
        return original(*args, **kwargs)

    patch.setattr(owner, name, wrapper)


def early_stopping_config(assets):
    """A training that stops after 7 of 9 epochs, of which the fifth is the best; every epoch draws new rows."""
    changes = {"dropout": 0.2, "train.epochs": 9, "train.patience": 2, "train.lr": 0.03, "train.balance": "sampler"}
    return settings(assets, **changes)


@pytest.fixture(scope="module")
def uninterrupted(assets, tmp_path_factory):
    """The RUN folder and the result of an uninterrupted training that early stopping ends."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SENTICLIP_CACHE", str(folder / "cache"))
        return folder / "whole", train(early_stopping_config(assets), assets / "data", folder / "whole")


KILL_POINTS = {
    "in the second epoch": (Hooks, "on_step_end", 5),
    "before the first checkpoint": (Trainer, "_save_checkpoint", 1),
    "in the second checkpoint": (TrainerState, "save_to_json", 2),
    "as the third epoch begins": (Hooks, "on_epoch_begin", 3),
    "with one epoch's patience left": (Hooks, "on_epoch_begin", 7),
    "after the training": (training, "calibrate", 1),
    "before the run is written": (SentimentModel, "save_pretrained", 1),
    "before the last file": (checkpoints, "write_text", 4),
}


@pytest.mark.parametrize("kill_point", KILL_POINTS)
def test_resume_after_kill_matches_uninterrupted_training(assets, tmp_path, uninterrupted, monkeypatch, kill_point):
    reference, expected = uninterrupted
    assert 1 < expected["best_epoch"] < len(losses(reference)[0]) < 9  # stopped early, after the best epoch
    with monkeypatch.context() as patch:
        kill_at_call(patch, *KILL_POINTS[kill_point])
        with pytest.raises(Killed):
            train(early_stopping_config(assets), assets / "data", tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()
    resumed = train(early_stopping_config(assets), assets / "data", tmp_path / "run", resume=True)
    assert resumed["best_epoch"] == expected["best_epoch"]
    assert losses(tmp_path / "run") == losses(reference)
    assert_same(weights(reference), weights(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_resume_works_after_moving_the_run_folder(assets, tmp_path, uninterrupted, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at_call(patch, training, "calibrate", 1)
        with pytest.raises(Killed):
            train(early_stopping_config(assets), assets / "data", tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    train(early_stopping_config(assets), assets / "data", tmp_path / "there", resume=True)
    assert_same(weights(uninterrupted[0]), weights(tmp_path / "there"))


def truncate(file):
    """Replace a file by its first half. A new file is made, as the old one may be memory-mapped."""
    first_half = file.read_bytes()[: file.stat().st_size // 2]
    file.unlink()
    file.write_bytes(first_half)


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_resume_ignores_incomplete_checkpoints(assets, tmp_path, uninterrupted, monkeypatch, name, damage):
    """Trainer would silently continue with fresh weights or a fresh optimizer, or fail with an error of torch."""
    with monkeypatch.context() as patch:
        kill_at_call(patch, Hooks, "on_epoch_begin", 3)
        with pytest.raises(Killed):
            train(early_stopping_config(assets), assets / "data", tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob(f"*/{name}"):
        damage(file)
    train(early_stopping_config(assets), assets / "data", tmp_path / "run", resume=True)
    assert_same(weights(uninterrupted[0]), weights(tmp_path / "run"))


@pytest.mark.parametrize("kill_point", [(Hooks, "on_epoch_begin", 7), (Trainer, "_load_best_model", 1)])
def test_missing_weights_of_best_epoch_are_reported(assets, tmp_path, monkeypatch, kill_point):
    with monkeypatch.context() as patch:
        kill_at_call(patch, *kill_point)
        with pytest.raises(Killed):
            train(early_stopping_config(assets), assets / "data", tmp_path / "run")
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    (best,) = {*(tmp_path / "run" / "checkpoints").glob("checkpoint-*")} - {newest}
    (best / "model.safetensors").unlink()
    with pytest.raises(UserError, match="the best epoch's weights are missing"):
        train(early_stopping_config(assets), assets / "data", tmp_path / "run", resume=True)


def test_finished_run_survives_kill_while_removing_checkpoints(assets, tmp_path, uninterrupted, monkeypatch):
    original = shutil.rmtree

    def killed_rmtree(folder, **options):
        if Path(folder).name == "checkpoints" and (folder.parent / "metrics.json").is_file():
            for weights_file in folder.glob("*/model.safetensors"):
                weights_file.unlink()
            raise Killed
        original(folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed_rmtree)
        with pytest.raises(Killed):
            train(early_stopping_config(assets), assets / "data", tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    written = (tmp_path / "run" / "metrics.json").stat().st_mtime_ns
    train(early_stopping_config(assets), assets / "data", tmp_path / "run", resume=True)
    assert_same(weights(uninterrupted[0]), weights(tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.json").stat().st_mtime_ns == written
    assert not (tmp_path / "run" / "checkpoints").exists()
    # of a killed training that would have replaced this run
    other_checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    other_checkpoint.mkdir(parents=True)
    (other_checkpoint.parent / "origin.json").write_text('{"experiment": {}, "data": "another"}')
    train(early_stopping_config(assets), assets / "data", tmp_path / "run", resume=True)
    assert other_checkpoint.exists()


def test_run_and_stage_without_weights_are_retrained(assets, tmp_path):
    experiment = settings(assets, stages={"text": {"modalities": ["text"], "train.epochs": 1}}, **{"train.epochs": 1})
    train(experiment, assets / "data", tmp_path / "run")
    before = weights(tmp_path / "run")
    for path in (tmp_path / "run" / "model.safetensors", tmp_path / "run" / "stages" / "text" / "model.safetensors"):
        truncate(path)
    train(experiment, assets / "data", tmp_path / "run", resume=True)
    assert_same(before, weights(tmp_path / "run"))


@pytest.mark.parametrize("partial_file", [False, True])
def test_trains_into_leftover_empty_folder(assets, tmp_path, partial_file):
    """A full disk leaves an empty folder, a kill one with a partially written file."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    if partial_file:
        (tmp_path / "run" / "checkpoints" / ".origin.json.3e2ccf788eb6.partial").write_text("{")
    assert (
        train(settings(assets, **{"train.epochs": 1}), assets / "data", tmp_path / "run", resume=True)["best_epoch"]
        == 1
    )


@pytest.mark.parametrize("name", ["checkpoints/mine.pt", "tensorboard/events", "README.md", "config.json"])
def test_foreign_files_are_not_overwritten(assets, tmp_path, name):
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with pytest.raises(UserError, match=rf"out: holds {name.split('/')[0]} from something else — choose another --out"):
        train(settings(assets), assets / "data", tmp_path / "out")
    assert foreign.read_text() == "mine"


@pytest.mark.parametrize("finished", [True, False])
def test_resume_rejects_other_config_or_data(assets, tmp_path, monkeypatch, finished):
    data = relabelled(tmp_path / "data", assets, "0", [])
    with monkeypatch.context() as patch:
        if not finished:
            kill_at_call(patch, Hooks, "on_epoch_begin", 2)
        try:
            train(settings(assets), data, tmp_path / "run")
        except Killed:
            assert newest_checkpoint(tmp_path / "run" / "checkpoints")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"run.*a different config.*--out.*--resume"):
        train(settings(assets, width=32), data, tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=r"run.*different data \(.*data.*--out.*--resume"):
        train(settings(assets), assets / "data", tmp_path / "run", resume=True)
    relabelled(tmp_path / "other", assets, "0.4", [0])
    shutil.copy(tmp_path / "other" / "label.csv", data / "label.csv")
    with pytest.raises(UserError, match="labels have changed"):
        train(settings(assets), data, tmp_path / "run", resume=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    replacement = train(settings(assets, width=32), data, tmp_path / "run")  # without --resume, the run is replaced
    assert replacement["best_epoch"]
    assert weights(tmp_path / "run")["network.temporal.cls"].shape == (32,)


@pytest.mark.parametrize("record", [{}, {"experiment": {"a key of another version": 1}}])
def test_unreadable_experiment_counts_as_different_config(tmp_path, record):
    (tmp_path / "metrics.json").write_text(json.dumps({"rows": "", "data": "", **record}))
    origin = {"experiment": configs.Config().to_dict(), "encoders": {}, "features": {}, "rows": "", "data": ""}
    with pytest.raises(UserError, match="holds a run with a different config — choose another --out"):
        checkpoints.is_finished(tmp_path, origin)


def test_run_without_config_json_is_not_finished(tmp_path):
    origin = {"experiment": configs.Config().to_dict(), "encoders": {}, "features": {}, "rows": "", "data": ""}
    result = {"best_epoch": 2, "valid": {}, "seconds": 1.0, "history": []}
    (tmp_path / "metrics.json").write_text(json.dumps({**result, **origin}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert checkpoints.is_finished(tmp_path, origin) is None
    (tmp_path / "config.json").touch()
    assert checkpoints.is_finished(tmp_path, origin) == result


def test_old_run_is_kept_until_new_one_is_finished(assets, tmp_path, monkeypatch, capsys):
    train(settings(assets), assets / "data", tmp_path / "run")
    assert "will replace" not in capsys.readouterr().err  # there was no run yet
    (tmp_path / "run" / "predictions-test-T.csv").write_text("id,truth,predicted", encoding="utf-8")
    kept = [tmp_path / "run" / name for name in ("model.safetensors", "experiment.yaml", "metrics.json", "README.md")]
    before = [path.read_bytes() for path in kept]
    with monkeypatch.context() as patch:
        kill_at_call(patch, training, "calibrate", 1)
        with pytest.raises(Killed):
            train(settings(assets, width=32), assets / "data", tmp_path / "run")
    assert [path.read_bytes() for path in kept] == before
    assert f"{tmp_path / 'run'}: holds a finished run, which this one will replace\n" in capsys.readouterr().err
    assert (tmp_path / "run" / "predictions-test-T.csv").exists()
    # continue the training that was started last
    train(settings(assets, width=32), assets / "data", tmp_path / "run", resume=True)
    assert configs.load(tmp_path / "run" / "experiment.yaml").width == 32
    assert not (tmp_path / "run" / "predictions-test-T.csv").exists()  # it belonged to the old model


def test_discarded_training_is_reported(assets, tmp_path, monkeypatch, capsys):
    def train_until_epoch(epoch, **changes):
        with monkeypatch.context() as patch:
            kill_at_call(patch, Hooks, "on_epoch_begin", epoch)
            with pytest.raises(Killed):
                train(settings(assets, **changes), assets / "data", tmp_path / "run")
        return [line for line in capsys.readouterr().err.splitlines() if "discarded" in line]

    assert train_until_epoch(1) == train_until_epoch(2) == []  # there was no checkpoint to resume from
    step = newest_checkpoint(tmp_path / "run" / "checkpoints").name.rpartition("-")[2]
    message = f"{tmp_path / 'run'}: starting over; the training up to step {step} is discarded"
    assert train_until_epoch(2) == [f"{message} — train --resume would have continued it"]
    assert train_until_epoch(2, width=32) == [f"{message}; it had a different config"]
    train(settings(assets, width=32), assets / "data", tmp_path / "run", resume=True)
    assert "discarded" not in capsys.readouterr().err


def test_resume_rejects_changed_encoder_weights(tmp_path):
    assets = make_assets(tmp_path / "place")
    train(settings(assets, **{"train.epochs": 1}), assets / "data", tmp_path / "run")
    weights_file = assets / "text" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights_file).items()}, weights_file, {"format": "pt"})
    with pytest.raises(UserError, match=r"run.*different encoders.*--out.*--resume"):
        train(settings(assets, **{"train.epochs": 1}), assets / "data", tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("encoder", "name"),
    [("features", "Processed/own.pkl"), ("openface", "Processed/own.pkl"), ("openface", "OpenFace/v0/c.csv")],
)
def test_resume_rejects_changed_features(assets, tmp_path, encoder, name):
    shutil.copy(assets / "data" / "label.csv", tmp_path)
    (tmp_path / "Processed").mkdir()
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    config = settings(assets, **{"modalities": ["vision"], "vision.encoder": encoder})

    def origin_with(content):
        file.write_text(content)
        return checkpoints.origin(config, tmp_path)

    record = origin_with("one")
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    checkpoints.is_finished(tmp_path, origin_with("one"))
    with pytest.raises(UserError, match=r"holds a run with different features.*--out.*--resume"):
        checkpoints.is_finished(tmp_path, origin_with("two"))
    del record["features"]
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    checkpoints.is_finished(tmp_path, origin_with("two"))  # older runs do not record them
    # an experiment that does not read feature files
    assert checkpoints.origin(settings(assets), tmp_path)["features"] == {}


def test_second_training_of_the_same_run_is_rejected(assets, tmp_path, monkeypatch):
    calls = []

    def train_again(self, *args, **kwargs):
        with pytest.raises(UserError, match=r"run: another training is writing here"):
            train(settings(assets, width=32), assets / "data", tmp_path / "run")
        calls.append(args)

    with monkeypatch.context() as patch:
        patch.setattr(Hooks, "on_epoch_begin", train_again)
        train(settings(assets), assets / "data", tmp_path / "run")
    assert calls
    assert weights(tmp_path / "run")["network.temporal.cls"].shape == (16,)
    train(settings(assets, width=32), assets / "data", tmp_path / "run")  # the lock has been released
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1  # only this training's curves


@pytest.mark.parametrize("limit", [30_000, 100_000])
def test_full_disk_is_reported_in_one_line(assets, tmp_path, limit):
    """A limit on file size makes the same writes fail as a full disk."""
    train(settings(assets, **{"train.epochs": 1}), assets / "data", tmp_path / "warm")  # fill the caches
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=r"run: the disk is full — make room, then continue with --resume"):
            train(settings(assets), assets / "data", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "run" / "metrics.json").exists()
    train(settings(assets), assets / "data", tmp_path / "run", resume=True)
    train(settings(assets), assets / "data", tmp_path / "whole")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_other_errors_are_not_reported_as_full_disk(tmp_path):
    for error in (RuntimeError("shapes do not fit"), OSError(2, "No such file"), ValueError("unexpected pos 1 vs 2")):
        with pytest.raises(type(error)), files.report_full_disk(tmp_path):
            raise error


def test_failed_write_keeps_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old", encoding="utf-8")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=r"a\.txt: the disk is full — make room"):
            files.write_text(tmp_path / "a.txt", "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["old"]


def test_workshop_removes_leftover_folders_but_no_files(tmp_path):
    user_file, leftover = tmp_path / ".run-20240101", tmp_path / ".run-abcdefgh"
    user_file.write_text("of the user")
    leftover.mkdir()
    for path in (user_file, leftover):
        os.utime(path, (0, 0))
    with files.staging_folder(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == [user_file]


def test_old_partial_files_are_removed(tmp_path):
    names = [f".a.txt.{'0' * 12}.partial", f".a.txt.{'1' * 12}.partial", ".other.of-somebody.partial"]
    for name in names:
        (tmp_path / name).write_text("half")
    for name in (names[0], names[2]):
        os.utime(tmp_path / name, (0, 0))
    files.write_text(tmp_path / "a.txt", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", *names[1:]}  # the second may still be being written


def test_model_card_describes_parts_and_calibration(assets):
    result = {"valid": {"accuracy": 0.5}, "best_epoch": 1}
    card = model_card(settings(assets), "data", result)
    audio_config = settings(assets, modalities=["text", "audio"], stages={"text": {"modalities": ["text"]}})
    audio_card = model_card(audio_config, "data", result)
    assert "(fine-tuned in its own stage)" in audio_card
    assert "* audio: log-mel with 33 bands" in audio_card
    assert "* video" not in audio_card
    assert "in its own stage" not in card
    cutaways_card = model_card(settings(assets, **{"vision.cutaways": "drop"}), "data", result)
    assert ["frames of the main shot" in each for each in (cutaways_card, card)] == [True, False]
    assert "* text" not in model_card(settings(assets, modalities=["vision"]), "data", result)
    peer_card = model_card(settings(assets, model="mmaf"), "data", result)
    assert "calibrated on the validation split" in card
    assert "fusion: cross-attention" in card
    assert f"prompt: {settings(assets).prompt}\n" in card
    assert "It is not calibrated" in peer_card
    assert "temperature" not in peer_card
    assert "fusion" not in peer_card


@pytest.mark.parametrize(
    "change",
    [
        {"id": "b"},
        {"video": Path("/d/b.mp4")},
        {"text": "坏"},
        {"labels": {"M": 0.4}},
        {"split": "test"},
        {"start": 0.4},
        {"end": 3.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_rows_digest_depends_on_every_field(change):
    clip = Clip("a", Path("/d/a.mp4"), "好", {"M": 0.2}, "train", 2, 0.5, 2.0)
    assert checkpoints.rows_digest("/d", [clip]) != checkpoints.rows_digest("/d", [clip._replace(**change)])


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "config.json", "vocab.txt"])
def test_encoder_keys_change_only_for_the_changed_folder(tmp_path, file):
    keys = ("text.encoder", "vision.encoder", "label.encoder", "start")
    for key in keys:
        (tmp_path / key).mkdir()
        (tmp_path / key / file).write_text(key)
    config = configs.Config().override({key: str(tmp_path / key) for key in keys})
    before = checkpoints.encoder_keys(config)
    assert set(before) == {str(tmp_path / key) for key in keys}
    for key in keys:
        (tmp_path / key / file).write_text("other")
        changed = {name for name, hashes in checkpoints.encoder_keys(config).items() if hashes != before[name]}
        assert changed == {str(tmp_path / key)}
        (tmp_path / key / file).write_text(key)


def test_open_reader_keeps_old_content(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with (tmp_path / "a.txt").open() as reader:
        files.write_text(tmp_path / "a.txt", "new")
        assert reader.read() == "old"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_newest_checkpoint_has_most_steps(tmp_path):
    for step in (4, 10, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_global_step": 4}))
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, folder / name)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert checkpoints.best_checkpoint(tmp_path / "checkpoint-10") == tmp_path / "checkpoint-4"


def test_alone_waits_for_other_writer(tmp_path):
    held, order = threading.Event(), []

    def hold():
        with files.folder_lock(tmp_path, "export"):
            held.set()
            time.sleep(0.3)
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    with files.folder_lock(tmp_path, "export", patience=30):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
