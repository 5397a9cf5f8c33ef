"""A folder of clips → a feature file, with small random encoders."""

from __future__ import annotations

import csv
import pickle

import av
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

import tiny
from senticlip.config import Config
from senticlip.data.loader import ArrayRows
from senticlip.data.mmsa import read_features
from senticlip.data.sims import read_clips
from senticlip.encoders.text import tokenize
from senticlip.features import _labels, _padded, _tokens, features
from senticlip.models import create_model
from senticlip.structures import Clip, Sequence, UsageError


@pytest.fixture
def encoder(tmp_path):
    """The folder of a random text encoder of width 16."""
    folder = tmp_path / "bert"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"今天真好坏这句话的情感是消极中性积"]
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Six clips, one without a text."""
    random = np.random.default_rng(0)
    with (tmp_path / "label.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["video_id", "clip_id", "text", "label", "label_T", "mode"])
        for i in range(6):
            table.writerow(
                ["v", f"{i:04}", "今天真好" if i else "", i / 5 - 0.4, 0.2, ["train", "valid", "test"][i % 3]]
            )
            (tmp_path / "Raw" / "v").mkdir(parents=True, exist_ok=True)
            with av.open(str(tmp_path / "Raw" / "v" / f"{i:04}.mp4"), "w") as video:
                stream = video.add_stream("mpeg4", rate=10)
                stream.width = stream.height = 64
                for _ in range(8):
                    picture = random.integers(0, 255, (64, 64, 3), dtype=np.uint8)
                    video.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                video.mux(stream.encode())
    return tmp_path


def small_config(encoder):
    vision = {"vision.encoder": "timm/test_resnet.r160_in1k", "vision.pretrained": False, "vision.size": 32}
    return Config().override({**vision, "text.encoder": str(encoder), "vision.frames": 3})


def test_features_of_a_trained_run(tmp_path, folder, encoder):
    torch.manual_seed(1)
    sizes = {"text.max_length": 12, "width": 8, "heads": 2, "protocol": "tenth", "seed": 5}
    model = create_model(small_config(encoder).override(sizes)).eval()
    with torch.no_grad():
        model.encoders["text"].prefix.normal_()  # unlike the prompt of any preset
    model.save_pretrained(tmp_path / "run")
    features(folder, tmp_path / "f.pkl", Config(), run=tmp_path / "run", protocol="official")
    ids, mask = tokenize(model.tokenizer, ["今天真好"], 12)
    expected = model.encoders["text"](Sequence(ids, mask)).values[0].detach()
    with (tmp_path / "f.pkl").open("rb") as file:
        states = pickle.load(file)["train"]["text"][1]
    np.testing.assert_allclose(states, expected, atol=2e-3)  # kept in fp16
    features(folder, tmp_path / "f.pkl", Config(), run=tmp_path / "run")  # split as for training
    with (tmp_path / "f.pkl").open("rb") as file:
        split_ids = {split: part["id"] for split, part in pickle.load(file).items()}
    clips = read_clips(folder, None, "tenth", 5)
    assert split_ids == {
        split: [c.id.replace("/", "$_$") for c in clips if c.split == split] for split in ("train", "valid", "test")
    }
    sizes = {"text.encoder": "features", "vision.encoder": "features", "head": "linear", "text.train": "frozen"}
    reader = create_model(Config().override({**sizes, "vision.train": "frozen"}), {"text": 4, "vision": 4})
    reader.save_pretrained(tmp_path / "reader")
    with pytest.raises(UsageError, match="reader: reads a modality without an encoder"):
        features(folder, tmp_path / "g.pkl", Config(), run=tmp_path / "reader")
    half = {"vision.encoder": str(tiny.timm_folder(tmp_path / "net")), "vision.train": "full"}
    create_model(reader.experiment.override(half), {"text": 4}).save_pretrained(tmp_path / "half")
    with pytest.raises(UsageError, match="half: reads a modality without an encoder"):
        features(folder, tmp_path / "g.pkl", Config(), run=tmp_path / "half")


def test_feature_file_has_mmsa_keys_and_can_be_read_back(tmp_path, folder, encoder):
    config = small_config(encoder).override({"stages": {"text": {"modalities": ["text"]}}})
    assert features(folder, tmp_path / "f.pkl", config) == {"clips": 6, "file": str(tmp_path / "f.pkl")}
    with (tmp_path / "f.pkl").open("rb") as file:
        data = pickle.load(file)
    train = data["train"]
    assert train["id"] == ["v$_$0000", "v$_$0003"]
    assert train["text"].shape == (2, 6, 16)
    assert train["text_bert"].shape == (2, 3, 6)
    assert train["text_lengths"] == [0, 6]
    assert train["vision"].shape[:2] == (2, 3)
    assert train["audio"].shape[2] == 33
    assert train["audio_lengths"] == [0, 0]
    assert train["annotations"] == ["Negative", "Positive"]
    assert "regression_labels_V" not in train
    loaded = read_features(tmp_path / "f.pkl", tmp_path / "cache")
    assert [clip.id for clip in loaded.clips][:2] == ["v/0000", "v/0003"]
    values, mask = loaded.rows["vision"].gather(np.array([1]))
    assert mask.all()
    np.testing.assert_allclose(values[0], train["vision"][1])


def test_empty_split_and_missing_videos(tmp_path, encoder):
    table = tmp_path / "own.csv"
    table.write_text("text,label,split\n今天真好,1,train\n今天真坏,-1,train\n", encoding="utf-8")
    out = tmp_path / "new" / "folder" / "f.pkl"
    features(table, out, small_config(encoder), device="cpu")
    data = pickle.loads(out.read_bytes())
    assert data["test"]["regression_labels"].shape == (0,)
    assert data["train"]["vision"].shape[2] == create_model(small_config(encoder)).encoders["vision"].dim
    assert len(read_features(out, tmp_path / "cache", ("text", "vision")).rows["text"]) == 2


def test_suffix_of_another_format_is_rejected(tmp_path):
    with pytest.raises(UsageError, match=r"f\.npz: a feature file is a pickle — give a name that ends in \.pkl"):
        features(tmp_path, tmp_path / "f.npz", Config())


def test_long_sound_is_averaged_and_not_cut_off():
    values = np.arange(20, dtype=np.float32).reshape(1, 10, 2)
    sound = ArrayRows(values, np.ones((1, 10), bool))
    padded = _padded("audio", sound, np.array([0]), 2, 5)
    assert padded["audio_lengths"] == [5]
    np.testing.assert_allclose(padded["audio"][0], values[0].reshape(5, 2, 2).mean(1))


def test_tokens_are_ids_mask_and_types_for_bert(encoder):
    tokenizer = BertTokenizer.from_pretrained(encoder)
    tokens = _tokens(tokenizer, [Clip("a", text="今天真好"), Clip("b", text="好")], 12)["text_bert"]
    assert tokens[:, 1].tolist() == [[1] * 6, [1] * 3 + [0] * 3]
    assert tokens[1, 0].tolist() == [*tokenizer("好")["input_ids"], 0, 0, 0]
    assert not tokens[:, 2].any()


def test_missing_unimodal_label_is_replaced_by_joint_label():
    labels = _labels([Clip("a", labels={"M": 0.4, "T": -0.6}), Clip("b", labels={"M": -1.0})])
    assert labels["regression_labels"].tolist() == pytest.approx([0.4, -1.0])
    assert labels["regression_labels_T"].tolist() == pytest.approx([-0.6, -1.0])
    assert set(labels) == {"regression_labels", "regression_labels_T", "classification_labels", "annotations"}
    assert (labels["classification_labels"].tolist(), labels["annotations"]) == ([2, 0], ["Positive", "Negative"])


def test_requested_protocol_assigns_the_splits(tmp_path, folder, encoder):
    for protocol in ("official", "tenth", "video"):
        features(folder, tmp_path / "f.pkl", small_config(encoder), protocol=protocol)
        ids = {split: part["id"] for split, part in pickle.loads((tmp_path / "f.pkl").read_bytes()).items()}
        clips = read_clips(folder, None, protocol)
        assert ids == {s: [c.id.replace("/", "$_$") for c in clips if c.split == s] for s in ids}
