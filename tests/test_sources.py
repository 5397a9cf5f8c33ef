"""What a frozen encoder makes of a clip is cached, and is another one where the clip is read otherwise."""

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
from senticlip.sources import clip_set, encoded
from senticlip.structures import Clip, Sequence


@pytest.fixture
def read(tmp_path):
    """(frames, size) → the features of one clip, all through one cache, and how often the encoder ran."""
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


def test_the_number_of_frames_and_their_size_are_in_the_key(read):
    features, runs = read
    wanted = [(4, 32), (2, 32), (2, 64)]
    found = [features(*kind) for kind in wanted]
    assert [len(rows) for rows in found] == [4, 2, 2]
    assert not np.allclose(found[1], found[2])
    again = [features(*kind) for kind in wanted]
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))
    assert runs == wanted  # once each


def test_an_encoder_that_computes_otherwise_with_the_same_weights_is_another_one(tmp_path):
    def features(**changes):
        folder = text_folder(tmp_path / "text")
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**described, **changes}))
        config = Config(modalities=["text"], prompt="none", width=8, heads=2)
        model = create_model(
            config.override({"text.encoder": str(folder), "text.train": "frozen", "text.max_length": 24}), {}
        )
        return clip_set([Clip("a", None, "天气好")], model, tmp_path / "cache").stores["text"].gather(np.array([0]))[0]

    first, *others = features(), features(hidden_act="relu"), features(num_attention_heads=1)
    assert not any(np.allclose(first, other) for other in others)
    assert np.array_equal(first, features())


def test_a_modality_that_no_clip_has_is_told(tmp_path, capsys):
    timm_folder(tmp_path / "vision")
    changes = {"vision.encoder": str(tmp_path / "vision"), "vision.frames": 2, "vision.size": 32}
    config = Config(modalities=["vision", "audio"], head="linear", width=8, heads=2).override(changes)
    model = create_model(config, {"audio": config.audio.bands})
    silent = [Clip("a", write_clip(tmp_path / "a.mp4", 90, 0))]
    clip_set(silent, model, tmp_path / "cache", data="DIR")
    assert "DIR: no audio in any of 1 clips; the model uses the remaining modalities\n" in capsys.readouterr().err


def test_a_batch_with_nothing_to_read_has_the_widths_that_are_known(tmp_path):
    """As of silent clips where no clip has words: the width of the words was never learnt."""
    sound = ArrayRows(np.ones((2, 3, 5), np.float32), np.array([[False] * 3, [True] * 3]))
    clips = ClipSet([Clip("a"), Clip("b")], {"text": Store(["", ""], []), "audio": sound})
    for row in (0, 1):
        batch = clips.__getitems__([row])
        assert "text" not in batch
        assert batch["audio"].shape[2] == 5
        assert bool(batch["audio_mask"].any()) == (row == 1)


def test_a_label_that_is_not_given_is_unknown():
    labels = ClipSet([Clip("a", labels={"M": 0.0}), Clip("b", labels={"M": 1.0, "T": -1.0})], {}).labels
    assert {name: np.isnan(values).tolist() for name, values in labels.items()} == {
        "M": [False, False],
        "T": [True, False],
        "A": [True, True],
        "V": [True, True],
    }


def test_what_half_precision_cannot_hold_is_its_largest_number(tmp_path):
    class Loud(torch.nn.Module):
        def forward(self, given):
            return Sequence(torch.tensor([[[1e6, -1e6, 0.5]]]), given.mask)

    config = Config(modalities=["text"])
    built = SimpleNamespace(encoders={"text": {}})
    model = SimpleNamespace(encoders={"text": Loud()}, device="cpu", experiment=config, config=built)
    rows = encoded(["key"], lambda places: [np.array([7]) for _ in places], model, "text", tmp_path)
    assert rows.gather(np.array([0]))[0][0, 0].tolist() == [65504, -65504, 0.5]
