"""Cached features of frozen encoders, and batches: cache keys, missing modalities, missing labels."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.tiny import text_folder, timm_folder, write_clip

from senticlip.config import Config
from senticlip.data.cache import Store
from senticlip.data.loader import ArrayRows, ClipSet
from senticlip.models import create_model
from senticlip.sources import clip_set, encoder_features
from senticlip.structures import Clip, Sequence


@pytest.fixture
def feature_reader(tmp_path):
    """A function (frames, size) → the features of one clip, using one cache; and a list of the encoder's runs."""
    timm_folder(tmp_path / "vision")
    clip = Clip("a", write_clip(tmp_path / "a.mp4", 90, 0))
    runs = []

    def features(frames, size):
        changes = {"vision.frames": frames, "vision.size": size, "vision.encoder": str(tmp_path / "vision")}
        config = Config(modalities=["vision"], head="linear", width=8, heads=2).override(changes)
        torch.manual_seed(0)
        model = create_model(config.override({"vision.train": "frozen"}), {})
        model.encoders["vision"].register_forward_hook(lambda *_: runs.append((frames, size)))
        store = clip_set([clip], model, tmp_path / "cache").stores["vision"]
        return store.gather(np.array([0]))[0][0]

    return features, runs


def test_cache_key_includes_frame_count_and_size(feature_reader):
    features, runs = feature_reader
    settings = [(4, 32), (2, 32), (2, 64)]
    first = [features(*setting) for setting in settings]
    assert [len(rows) for rows in first] == [4, 2, 2]
    assert not np.allclose(first[1], first[2])
    second = [features(*setting) for setting in settings]
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert runs == settings  # once each


def test_cache_key_includes_encoder_config(tmp_path):
    def features(**changes):
        folder = text_folder(tmp_path / "text")
        encoder_config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**encoder_config, **changes}))
        config = Config(modalities=["text"], prompt="none", width=8, heads=2)
        model = create_model(
            config.override({"text.encoder": str(folder), "text.train": "frozen", "text.max_length": 24}), {}
        )
        return clip_set([Clip("a", None, "天气好")], model, tmp_path / "cache").stores["text"].gather(np.array([0]))[0]

    first, *others = features(), features(hidden_act="relu"), features(num_attention_heads=1)
    assert not any(np.allclose(first, other) for other in others)
    assert np.array_equal(first, features())


def test_modality_missing_in_all_clips_is_reported(tmp_path, capsys):
    timm_folder(tmp_path / "vision")
    changes = {"vision.encoder": str(tmp_path / "vision"), "vision.frames": 2, "vision.size": 32}
    config = Config(modalities=["vision", "audio"], head="linear", width=8, heads=2).override(changes)
    model = create_model(config, {"audio": config.audio.bands})
    silent = [Clip("a", write_clip(tmp_path / "a.mp4", 90, 0))]
    clip_set(silent, model, tmp_path / "cache", data="DIR")
    assert "DIR: no audio in any of 1 clips; the model uses the remaining modalities\n" in capsys.readouterr().err


def test_batch_without_text_keeps_known_widths(tmp_path):
    """A row without sound in a data set without text: the width of the text is unknown."""
    sound = ArrayRows(np.ones((2, 3, 5), np.float32), np.array([[False] * 3, [True] * 3]))
    clips = ClipSet([Clip("a"), Clip("b")], {"text": Store(["", ""], []), "audio": sound})
    for row in (0, 1):
        batch = clips.__getitems__([row])
        assert "text" not in batch
        assert batch["audio"].shape[2] == 5
        assert bool(batch["audio_mask"].any()) == (row == 1)


def test_missing_labels_are_nan():
    labels = ClipSet([Clip("a", labels={"M": 0.0}), Clip("b", labels={"M": 1.0, "T": -1.0})], {}).labels
    assert {name: np.isnan(values).tolist() for name, values in labels.items()} == {
        "M": [False, False],
        "T": [True, False],
        "A": [True, True],
        "V": [True, True],
    }


def test_features_are_clamped_to_fp16_range(tmp_path):
    class Loud(torch.nn.Module):
        def forward(self, sequence):
            return Sequence(torch.tensor([[[1e6, -1e6, 0.5]]]), sequence.mask)

    config = Config(modalities=["text"])
    built = SimpleNamespace(encoders={"text": {}})
    model = SimpleNamespace(encoders={"text": Loud()}, device="cpu", experiment=config, config=built)
    rows = encoder_features(["key"], lambda indices: [np.array([7]) for _ in indices], model, "text", tmp_path)
    assert rows.gather(np.array([0]))[0][0, 0].tolist() == [65504, -65504, 0.5]
