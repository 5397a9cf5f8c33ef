"""Training and evaluation on ready-made features: a feature file, OpenFace's CSVs, audio."""

from __future__ import annotations

import csv
import pickle

import numpy as np
import pytest
import torch
from tests.data.test_audio import tone, write_wav
from tests.data.test_mmsa import feature_data
from tests.data.test_openface import row, write

from senticlip.config import Config
from senticlip.data.openface import WIDTH
from senticlip.data.sims import read_clips
from senticlip.evaluate import evaluate
from senticlip.models.base import SentimentModel
from senticlip.sources import feature_rows, ready_made
from senticlip.structures import Clip, UsageError, UserError
from senticlip.train import train


@pytest.fixture
def folder(tmp_path):
    """A data set that consists only of ``Processed/unaligned_39.pkl``."""
    (tmp_path / "sims" / "Processed").mkdir(parents=True)
    (tmp_path / "sims" / "Processed" / "unaligned_39.pkl").write_bytes(pickle.dumps(feature_data(rows=12)))
    return tmp_path / "sims"


def config(model="lmf", modalities=("text", "vision", "audio"), **changes):
    base = {
        "model": model,
        "modalities": list(modalities),
        "text.encoder": "features",
        "vision.encoder": "features",
        "width": 16,
        "heads": 2,
        "train.epochs": 1,
        "train.batch_size": 4,
        "head": "linear",
        "vision.frames": 7,
    }
    return Config().override({**base, **changes})


@pytest.mark.parametrize("model", ["lmf", "self_mm", "mmaf", "clip_ca_msa"])
def test_trains_on_feature_file_alone(tmp_path, folder, model):
    result = train(config(model), folder, tmp_path / "run")
    assert result["best_epoch"] == 1
    metrics = evaluate(tmp_path / "run", folder)
    assert metrics["n"] == 12
    assert ("mae" in metrics) == (model in ("lmf", "self_mm"))


def test_audio_is_whitened_by_training_set(tmp_path, folder):
    train(config("clip_ca_msa"), folder, tmp_path / "run")
    whiten = SentimentModel.from_pretrained(tmp_path / "run").network.whiten
    store, width = feature_rows(config(), read_clips(folder, "train"), folder)["audio"]
    values, mask = store.gather(np.arange(len(store)))
    np.testing.assert_allclose(whiten.mean, values[mask].mean(0, dtype=np.float64), atol=1e-5)
    covariance = np.cov(values[mask].astype(np.float64) @ np.asarray(whiten.turn), rowvar=False, bias=True)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-3
    assert len(covariance) == width


def test_start_keeps_whitening(tmp_path, folder):
    """The next layer was trained on its output. Features of another width are rejected."""
    first = config("clip_ca_msa")
    train(first, folder, tmp_path / "run")
    before = SentimentModel.from_pretrained(tmp_path / "run").network.whiten.state_dict()
    file, data = folder / "Processed" / "unaligned_39.pkl", feature_data(rows=12)
    for split in data.values():
        split["audio"] = 3 * split["audio"] + 1
    file.write_bytes(pickle.dumps(data))
    again = first.override({"start": str(tmp_path / "run")})
    train(again, folder, tmp_path / "again")
    after = SentimentModel.from_pretrained(tmp_path / "again").network.whiten.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for split in data.values():
        split["audio"] = split["audio"][..., :-1]
    file.write_bytes(pickle.dumps(data))
    with pytest.raises(UsageError, match="start: width of audio is"):
        train(again, folder, tmp_path / "third")


def test_feature_file_can_be_split_differently(folder):
    assert [len(read_clips(folder, split)) for split in ("train", "valid", "test")] == [12, 12, 12]
    assert len(read_clips(folder / "Processed" / "unaligned_39.pkl", None, "tenth", 1)) == 36


def test_rows_are_found_by_id_ignoring_zeros(folder):
    clips = [Clip("video_1/test3"), Clip("video_0001/train0"), Clip("video_0009/nobody")]
    rows, width = feature_rows(config(), clips, folder)["text"]
    values, mask = rows.gather(np.array([0, 1, 2]))
    assert (width, mask.any(1).tolist()) == (5, [True, True, False])
    np.testing.assert_array_equal(values[0, :4], feature_data(rows=12)["test"]["text"][3, :4])
    with pytest.raises(UserError, match="has none of the clips, such as x"):
        feature_rows(config(), [Clip("x")], folder)
    with pytest.raises(UsageError, match=r"vision\.frames: 2, but .* has clips of 7 frames — --set vision.frames=7"):
        feature_rows(config("clip_ca_msa", **{"vision.frames": 2}), [], folder)


def test_missing_feature_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"reads a feature file, Processed/unaligned_39\.pkl, but there is none"):
        feature_rows(config(), [], tmp_path)


def test_trains_on_openface_csvs_and_audio(tmp_path):
    random = np.random.default_rng(0)
    with (tmp_path / "label.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["video_id", "clip_id", "text", "label", "mode"])
        for i in range(24):
            table.writerow(["v", f"{i:04}", "话", 1.0 if i % 2 else -1.0, ("train", "train", "valid", "test")[i // 6]])
            (tmp_path / "Raw" / "v").mkdir(parents=True, exist_ok=True)
            write_wav(tmp_path / "Raw" / "v" / f"{i:04}.mp4", tone(300 + 100 * (i % 2), 0.2), 16000)
            write(tmp_path / "OpenFace" / "v" / f"{i:04}.csv", [row(1, float(random.random())), row(2, 0, success=0)])
    experiment = config("lmf", ["vision", "audio"], **{"vision.encoder": "openface", "text.encoder": "x"})
    assert ready_made(experiment) == ["vision", "audio"]
    rows_and_widths = feature_rows(experiment, read_clips(tmp_path, "train"), tmp_path)
    assert {name: width for name, (_, width) in rows_and_widths.items()} == {"vision": WIDTH, "audio": 33}
    assert rows_and_widths["vision"][0].gather(np.arange(3))[1].sum(1).tolist() == [1, 1, 1]
    train(experiment, tmp_path, tmp_path / "run")
    assert evaluate(tmp_path / "run", tmp_path)["n"] == 6
    write(tmp_path / "OpenFace" / "v" / "0000.csv", [row(i, 0.5) for i in range(1, 10)])
    changes = {"model": "clip_ca_msa", "vision.encoder": "openface", "text.encoder": "x"}
    with pytest.raises(UsageError, match=r"vision\.frames: 7, but .* has clips of 9 frames"):
        feature_rows(config(modalities=["vision"], **changes), read_clips(tmp_path, "train"), tmp_path)
