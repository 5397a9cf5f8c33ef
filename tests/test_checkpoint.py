"""The RUN folder: a kill at any moment, what a resumed training must be of, a full disk, the card."""

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
from tests.test_train import assert_same, furnish, losses, relabelled, settings, weights
from transformers import Trainer, TrainerState

from senticlip import checkpoint as room
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
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("checkpoint"))


class Killed(BaseException):
    """Ends a training where it is, as a signal does."""


def dies(patch, place, name, at):
    """Let the call number ``at`` of a function be the last thing that happens."""
    calls, real = itertools.count(1), getattr(place, name)

    def or_die(*args, **kwargs):
        if next(calls) == at:
            raise Killed
        return real(*args, **kwargs)

    patch.setattr(place, name, or_die)


def stopping(place):
    """Ends after 7 of 9 epochs, of which number 5 is the best; every epoch draws its rows anew."""
    changes = {"dropout": 0.2, "train.epochs": 9, "train.patience": 2, "train.lr": 0.03, "train.balance": "sampler"}
    return settings(place, **changes)


@pytest.fixture(scope="module")
def stopped(place, tmp_path_factory):
    """An uninterrupted training that early stopping ends, and its result."""
    root = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SENTICLIP_CACHE", str(root / "cache"))
        return root / "whole", train(stopping(place), place / "data", root / "whole")


MOMENTS = {
    "in the second epoch": (Hooks, "on_step_end", 5),
    "before the first checkpoint": (Trainer, "_save_checkpoint", 1),
    "in the second checkpoint": (TrainerState, "save_to_json", 2),
    "as the third epoch begins": (Hooks, "on_epoch_begin", 3),
    "with one epoch's patience left": (Hooks, "on_epoch_begin", 7),
    "after the training": (training, "calibrate", 1),
    "before the run is written": (SentimentModel, "save_pretrained", 1),
    "before the last file": (room, "write_text", 4),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_any_moment_changes_nothing(place, tmp_path, stopped, monkeypatch, moment):
    whole, result = stopped
    assert 1 < result["best_epoch"] < len(losses(whole)[0]) < 9  # the patience has been used, and not all epochs
    with monkeypatch.context() as patch:
        dies(patch, *MOMENTS[moment])
        with pytest.raises(Killed):
            train(stopping(place), place / "data", tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.json").exists()
    again = train(stopping(place), place / "data", tmp_path / "run", resume=True)
    assert again["best_epoch"] == result["best_epoch"]
    assert losses(tmp_path / "run") == losses(whole)
    assert_same(weights(whole), weights(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_was_moved_after_its_last_epoch_ends_in_the_same_weights(place, tmp_path, stopped, monkeypatch):
    with monkeypatch.context() as patch:
        dies(patch, training, "calibrate", 1)
        with pytest.raises(Killed):
            train(stopping(place), place / "data", tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    train(stopping(place), place / "data", tmp_path / "there", resume=True)
    assert_same(weights(stopped[0]), weights(tmp_path / "there"))


def cut_off(file):
    """Another file of half its bytes: the old one may be mapped into memory."""
    half = file.read_bytes()[: file.stat().st_size // 2]
    file.unlink()
    file.write_bytes(half)


@pytest.mark.parametrize("damage", [Path.unlink, cut_off])
@pytest.mark.parametrize("lost", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_that_lacks_a_file_or_a_part_of_it_is_none(place, tmp_path, stopped, monkeypatch, lost, damage):
    """Trainer would go on with fresh weights, or a fresh optimizer, and say nothing; or stop with torch's error."""
    with monkeypatch.context() as patch:
        dies(patch, Hooks, "on_epoch_begin", 3)
        with pytest.raises(Killed):
            train(stopping(place), place / "data", tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob(f"*/{lost}"):
        damage(file)
    train(stopping(place), place / "data", tmp_path / "run", resume=True)
    assert_same(weights(stopped[0]), weights(tmp_path / "run"))


@pytest.mark.parametrize("moment", [(Hooks, "on_epoch_begin", 7), (Trainer, "_load_best_model", 1)])
def test_the_best_epoch_without_its_weights_is_told(place, tmp_path, monkeypatch, moment):
    with monkeypatch.context() as patch:
        dies(patch, *moment)
        with pytest.raises(Killed):
            train(stopping(place), place / "data", tmp_path / "run")
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    (best,) = {*(tmp_path / "run" / "checkpoints").glob("checkpoint-*")} - {newest}
    (best / "model.safetensors").unlink()
    with pytest.raises(UserError, match="the best epoch's weights are missing"):
        train(stopping(place), place / "data", tmp_path / "run", resume=True)


def test_a_finished_run_stays_where_its_checkpoints_were_half_removed(place, tmp_path, stopped, monkeypatch):
    real = shutil.rmtree

    def dies_in(folder, **options):
        if Path(folder).name == "checkpoints" and (folder.parent / "metrics.json").is_file():
            for weights_file in folder.glob("*/model.safetensors"):
                weights_file.unlink()
            raise Killed
        real(folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies_in)
        with pytest.raises(Killed):
            train(stopping(place), place / "data", tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    written = (tmp_path / "run" / "metrics.json").stat().st_mtime_ns
    train(stopping(place), place / "data", tmp_path / "run", resume=True)
    assert_same(weights(stopped[0]), weights(tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.json").stat().st_mtime_ns == written
    assert not (tmp_path / "run" / "checkpoints").exists()
    another = tmp_path / "run" / "checkpoints" / "checkpoint-4"  # of a training that replaces this one, and was killed
    another.mkdir(parents=True)
    (another.parent / "origin.json").write_text('{"experiment": {}, "data": "another"}')
    train(stopping(place), place / "data", tmp_path / "run", resume=True)
    assert another.exists()


def test_a_finished_run_without_its_weights_is_trained_again_a_stage_too(place, tmp_path):
    experiment = settings(place, stages={"text": {"modalities": ["text"], "train.epochs": 1}}, **{"train.epochs": 1})
    train(experiment, place / "data", tmp_path / "run")
    before = weights(tmp_path / "run")
    for lost in (tmp_path / "run" / "model.safetensors", tmp_path / "run" / "stages" / "text" / "model.safetensors"):
        cut_off(lost)
    train(experiment, place / "data", tmp_path / "run", resume=True)
    assert_same(before, weights(tmp_path / "run"))


@pytest.mark.parametrize("killed", [False, True])
def test_an_empty_folder_is_nobodys(place, tmp_path, killed):
    """A full disk leaves one, and a kill one with a file half written."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    if killed:
        (tmp_path / "run" / "checkpoints" / ".origin.json.3e2ccf788eb6.partial").write_text("{")
    assert (
        train(settings(place, **{"train.epochs": 1}), place / "data", tmp_path / "run", resume=True)["best_epoch"] == 1
    )


@pytest.mark.parametrize("name", ["checkpoints/mine.pt", "tensorboard/events", "README.md", "config.json"])
def test_somebody_elses_files_are_left_alone(place, tmp_path, name):
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match=rf"out: holds {name.split('/')[0]} from something else — choose another --out"):
        train(settings(place), place / "data", tmp_path / "out")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("finished", [True, False])
def test_resume_is_of_the_same_config_and_data(place, tmp_path, monkeypatch, finished):
    data = relabelled(tmp_path / "data", place, "0", [])
    with monkeypatch.context() as patch:
        if not finished:
            dies(patch, Hooks, "on_epoch_begin", 2)
        try:
            train(settings(place), data, tmp_path / "run")
        except Killed:
            assert newest_checkpoint(tmp_path / "run" / "checkpoints")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"run.*a different config.*--out.*--resume"):
        train(settings(place, width=32), data, tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=r"run.*different data \(.*data.*--out.*--resume"):
        train(settings(place), place / "data", tmp_path / "run", resume=True)
    relabelled(tmp_path / "other", place, "0.4", [0])
    shutil.copy(tmp_path / "other" / "label.csv", data / "label.csv")
    with pytest.raises(UserError, match="labels have changed"):
        train(settings(place), data, tmp_path / "run", resume=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    fresh = train(settings(place, width=32), data, tmp_path / "run")  # without --resume it is replaced
    assert fresh["best_epoch"]
    assert weights(tmp_path / "run")["network.temporal.cls"].shape == (32,)


@pytest.mark.parametrize("record", [{}, {"experiment": {"a key of another version": 1}}])
def test_a_run_whose_experiment_cannot_be_read_is_another_one(tmp_path, record):
    (tmp_path / "metrics.json").write_text(json.dumps({"rows": "", "data": "", **record}))
    mine = {"experiment": configs.Config().to_dict(), "encoders": {}, "features": {}, "rows": "", "data": ""}
    with pytest.raises(UserError, match="holds a run with a different config — choose another --out"):
        room.is_finished(tmp_path, mine)


def test_a_finished_run_without_its_config_is_not_whole(tmp_path):
    mine = {"experiment": configs.Config().to_dict(), "encoders": {}, "features": {}, "rows": "", "data": ""}
    result = {"best_epoch": 2, "valid": {}, "seconds": 1.0, "history": []}
    (tmp_path / "metrics.json").write_text(json.dumps({**result, **mine}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert room.is_finished(tmp_path, mine) is None
    (tmp_path / "config.json").touch()
    assert room.is_finished(tmp_path, mine) == result


def test_a_run_is_left_alone_until_the_new_one_is_done(place, tmp_path, monkeypatch, capsys):
    train(settings(place), place / "data", tmp_path / "run")
    assert "will replace" not in capsys.readouterr().err  # there was none
    (tmp_path / "run" / "predictions-test-T.csv").write_text("id,truth,predicted", encoding="utf-8")
    kept = [tmp_path / "run" / name for name in ("model.safetensors", "experiment.yaml", "metrics.json", "README.md")]
    before = [path.read_bytes() for path in kept]
    with monkeypatch.context() as patch:
        dies(patch, training, "calibrate", 1)
        with pytest.raises(Killed):
            train(settings(place, width=32), place / "data", tmp_path / "run")
    assert [path.read_bytes() for path in kept] == before
    assert f"{tmp_path / 'run'}: holds a finished run, which this one will replace\n" in capsys.readouterr().err
    assert (tmp_path / "run" / "predictions-test-T.csv").exists()
    train(settings(place, width=32), place / "data", tmp_path / "run", resume=True)  # the one that was begun last
    assert configs.load(tmp_path / "run" / "experiment.yaml").width == 32
    assert not (tmp_path / "run" / "predictions-test-T.csv").exists()  # the older model's


def test_what_is_thrown_away_is_told(place, tmp_path, monkeypatch, capsys):
    def begun(number, **changes):
        with monkeypatch.context() as patch:
            dies(patch, Hooks, "on_epoch_begin", number)
            with pytest.raises(Killed):
                train(settings(place, **changes), place / "data", tmp_path / "run")
        return [line for line in capsys.readouterr().err.splitlines() if "discarded" in line]

    assert begun(1) == begun(2) == []  # there was nothing to go on from
    step = newest_checkpoint(tmp_path / "run" / "checkpoints").name.rpartition("-")[2]
    told = f"{tmp_path / 'run'}: starting over; the training up to step {step} is discarded"
    assert begun(2) == [f"{told} — train --resume would have continued it"]
    assert begun(2, width=32) == [f"{told}; it had a different config"]
    train(settings(place, width=32), place / "data", tmp_path / "run", resume=True)
    assert "discarded" not in capsys.readouterr().err


def test_other_weights_in_the_encoders_folder_are_another_run(tmp_path):
    place = furnish(tmp_path / "place")
    train(settings(place, **{"train.epochs": 1}), place / "data", tmp_path / "run")
    file = place / "text" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"run.*different encoders.*--out.*--resume"):
        train(settings(place, **{"train.epochs": 1}), place / "data", tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("encoder", "name"),
    [("features", "Processed/own.pkl"), ("openface", "Processed/own.pkl"), ("openface", "OpenFace/v0/c.csv")],
)
def test_other_features_are_another_run(place, tmp_path, encoder, name):
    shutil.copy(place / "data" / "label.csv", tmp_path)
    (tmp_path / "Processed").mkdir()
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    config = settings(place, **{"modalities": ["vision"], "vision.encoder": encoder})

    def of(content):
        file.write_text(content)
        return room.origin(config, tmp_path)

    first = of("one")
    (tmp_path / "metrics.json").write_text(json.dumps(first))
    room.is_finished(tmp_path, of("one"))
    with pytest.raises(UserError, match=r"holds a run with different features.*--out.*--resume"):
        room.is_finished(tmp_path, of("two"))
    del first["features"]
    (tmp_path / "metrics.json").write_text(json.dumps(first))
    room.is_finished(tmp_path, of("two"))  # older runs do not record them
    assert room.origin(settings(place), tmp_path)["features"] == {}  # that one does not read them


def test_one_training_at_a_time_writes_into_a_run(place, tmp_path, monkeypatch):
    seen = []

    def once_more(self, *args, **kwargs):
        with pytest.raises(UserError, match=r"run: another training is writing here"):
            train(settings(place, width=32), place / "data", tmp_path / "run")
        seen.append(args)

    with monkeypatch.context() as patch:
        patch.setattr(Hooks, "on_epoch_begin", once_more)
        train(settings(place), place / "data", tmp_path / "run")
    assert seen
    assert weights(tmp_path / "run")["network.temporal.cls"].shape == (16,)
    train(settings(place, width=32), place / "data", tmp_path / "run")  # the lock is open again
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1  # and the curves are this training's


@pytest.mark.parametrize("limit", [30_000, 100_000])
def test_a_full_disk_is_one_line(place, tmp_path, limit):
    """A limit on the size of a file is met by the same writers at the same places as the end of a disk."""
    train(settings(place, **{"train.epochs": 1}), place / "data", tmp_path / "warm")  # the caches
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=r"run: the disk is full — make room, then continue with --resume"):
            train(settings(place), place / "data", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "run" / "metrics.json").exists()
    train(settings(place), place / "data", tmp_path / "run", resume=True)
    train(settings(place), place / "data", tmp_path / "whole")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_other_errors_are_not_a_full_disk(tmp_path):
    for error in (RuntimeError("shapes do not fit"), OSError(2, "No such file"), ValueError("unexpected pos 1 vs 2")):
        with pytest.raises(type(error)), files.disk(tmp_path):
            raise error


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "a.txt").write_text("old", encoding="utf-8")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=r"a\.txt: the disk is full — make room"):
            files.write_text(tmp_path / "a.txt", "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()] == ["old"]


def test_a_workshop_removes_folders_alone(tmp_path):
    mine, left = tmp_path / ".run-20240101", tmp_path / ".run-abcdefgh"
    mine.write_text("of the user")
    left.mkdir()
    for path in (mine, left):
        os.utime(path, (0, 0))
    with files.workshop(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == [mine]


def test_what_a_kill_left_of_a_file_goes_once_it_is_old(tmp_path):
    names = [f".a.txt.{'0' * 12}.partial", f".a.txt.{'1' * 12}.partial", ".other.of-somebody.partial"]
    for name in names:
        (tmp_path / name).write_text("half")
    for name in (names[0], names[2]):
        os.utime(tmp_path / name, (0, 0))
    files.write_text(tmp_path / "a.txt", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", *names[1:]}  # one may still be written


def test_the_card_says_calibrated_only_where_something_was(place):
    result = {"valid": {"accuracy": 0.5}, "best_epoch": 1}
    own = model_card(settings(place), "data", result)
    heard = settings(place, modalities=["text", "audio"], stages={"text": {"modalities": ["text"]}})
    told = model_card(heard, "data", result)
    assert "(fine-tuned in its own stage)" in told
    assert "* audio: log-mel with 33 bands" in told
    assert "* video" not in told
    assert "in its own stage" not in own
    cut = model_card(settings(place, **{"vision.cutaways": "drop"}), "data", result)
    assert ["frames of the main shot" in card for card in (cut, own)] == [True, False]
    assert "* text" not in model_card(settings(place, modalities=["vision"]), "data", result)
    peer = model_card(settings(place, model="mmaf"), "data", result)
    assert "calibrated on the validation split" in own
    assert "fusion: cross-attention" in own
    assert f"prompt: {settings(place).prompt}\n" in own
    assert "It is not calibrated" in peer
    assert "temperature" not in peer
    assert "fusion" not in peer


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
def test_whatever_a_row_says_makes_it_other_data(change):
    clip = Clip("a", Path("/d/a.mp4"), "好", {"M": 0.2}, "train", 2, 0.5, 2.0)
    assert room.rows_digest("/d", [clip]) != room.rows_digest("/d", [clip._replace(**change)])


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "config.json", "vocab.txt"])
def test_the_files_of_every_encoder_and_of_the_start_are_told_apart(tmp_path, file):
    keys = ("text.encoder", "vision.encoder", "label.encoder", "start")
    for key in keys:
        (tmp_path / key).mkdir()
        (tmp_path / key / file).write_text(key)
    config = configs.Config().override({key: str(tmp_path / key) for key in keys})
    before = room.encoder_keys(config)
    assert set(before) == {str(tmp_path / key) for key in keys}
    for key in keys:
        (tmp_path / key / file).write_text("other")
        changed = {name for name, found in room.encoder_keys(config).items() if found != before[name]}
        assert changed == {str(tmp_path / key)}
        (tmp_path / key / file).write_text(key)


def test_who_reads_a_file_that_is_written_anew_reads_the_old_one(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with (tmp_path / "a.txt").open() as reader:
        files.write_text(tmp_path / "a.txt", "new")
        assert reader.read() == "old"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_the_newest_checkpoint_is_the_one_of_most_steps(tmp_path):
    for step in (4, 10, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_global_step": 4}))
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, folder / name)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert room.best_checkpoint(tmp_path / "checkpoint-10") == tmp_path / "checkpoint-4"


def test_who_is_patient_waits_for_who_writes(tmp_path):
    held, done = threading.Event(), []

    def hold():
        with files.alone(tmp_path, "export"):
            held.set()
            time.sleep(0.3)
            done.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    with files.alone(tmp_path, "export", patience=30):
        done.append("second")
    thread.join()
    assert done == ["first", "second"]
