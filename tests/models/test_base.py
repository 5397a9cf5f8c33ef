"""Which parts of an encoder are trained; what a saved model contains; errors of broken ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file
from tests.tiny import KINDS, clip_folder, text_folder, timm_folder
from transformers import AutoModel

from senticlip.config import Config
from senticlip.encoders.text import load_tokenizer
from senticlip.models import create_model
from senticlip.models.base import SentimentModel, set_trainable_layers
from senticlip.structures import Batch, Sequence, UsageError, UserError


def trainable(module):
    """The names of trainable parameters, cut after the layer's number."""
    return {".".join(n.split(".")[:2]) for n, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "k", "trained", "frozen"),
    [
        ("resnet50", 1, {"layer4.0"}, {"conv1.weight", "layer3.5"}),
        ("resnet50", 3, {"layer2.0", "layer3.0", "layer4.2"}, {"layer1.2"}),
        ("resnet50", 4, {"layer1.0", "layer4.2"}, {"conv1.weight", "bn1.weight"}),
        ("resnet50d", 4, {"layer1.0"}, {"conv1.0"}),
        ("convnext_tiny", 2, {"stages.2", "stages.3"}, {"stem.0", "stages.1"}),
        ("tf_efficientnet_lite0", 5, {"blocks.2", "blocks.6", "conv_head.weight"}, {"conv_stem.weight", "blocks.1"}),
        ("vit_base_patch32_224", 3, {"blocks.9", "blocks.11", "norm.weight"}, {"blocks.8", "pos_embed"}),
    ],
)
def test_train_part_top_k_layers_of_timm_networks(name, k, trained, frozen):
    with torch.device("meta"):
        body = timm.create_model(name, num_classes=0)
    set_trainable_layers(body, k)
    assert trained <= trainable(body)
    assert not frozen & trainable(body)


@pytest.mark.parametrize(("kind", "layers"), [("bert", 2), ("ernie", 2), ("albert", 1)])
def test_train_part_top_k_layers_of_text_encoders(kind, layers):
    body = AutoModel.from_config(KINDS[kind], add_pooling_layer=False)
    set_trainable_layers(body, 1)
    assert not any(p.requires_grad for p in body.embeddings.parameters())
    assert all(p.requires_grad for n, p in body.named_parameters() if f"layer.{layers - 1}." in n)
    assert not any(p.requires_grad for n, p in body.named_parameters() if "layer.0." in n and layers > 1)
    with pytest.raises(UsageError, match=rf"text\.train: top {layers + 1} layers, but the encoder has {layers}"):
        set_trainable_layers(body, layers + 1, "text.train")


def test_train_part_does_not_count_activations_as_layers():
    body = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2), torch.nn.ReLU())
    set_trainable_layers(body, 1)
    assert trainable(body) == {"2.weight", "2.bias"}


def config(folder, **changes):
    base = {"width": 16, "heads": 2, "text.encoder": str(folder / "text"), "text.max_length": 20, "vision.size": 32}
    return Config().override({**base, "vision.encoder": str(folder / "vision"), "vision.frames": 2, **changes})


@pytest.fixture
def folder(tmp_path):
    text_folder(tmp_path / "text")
    timm_folder(tmp_path / "vision")
    return tmp_path


@pytest.mark.parametrize("vision", [timm_folder, clip_folder])
def test_label_weights_are_random_if_their_encoder_is(folder, vision):
    vision(folder / "labels")
    key = "vision" if vision is clip_folder else "text"
    changes = {"label.train": True, "vision.encoder": str(folder / "labels")}
    source = load_file(folder / ("labels" if key == "vision" else "text") / "model.safetensors")
    words = next(value for name, value in source.items() if name.endswith("word_embeddings.weight"))

    def has_pretrained_embeddings(**more):
        tower = create_model(config(folder, **changes, **more)).network.labels.tower
        return torch.equal(tower.body.get_input_embeddings().weight[1:], words[1:])  # 0 pads

    assert has_pretrained_embeddings()
    assert not has_pretrained_embeddings(**{f"{key}.pretrained": False})
    assert not has_pretrained_embeddings(**{"label.pretrained": False})


def test_save_and_push_include_tokenizer_and_keep_card(folder, monkeypatch):
    model = create_model(config(folder))
    model.save_pretrained(folder / "run", max_shard_size="1KB")  # ignored: always one file
    (folder / "run" / "README.md").write_text("# What it is for, and what not\n")
    loaded = SentimentModel.from_pretrained(folder / "run")
    assert loaded.tokenizer("天气好")["input_ids"] == model.tokenizer("天气好")["input_ids"]
    assert loaded.tokenizer.padding_side == "right"

    pushed, cards = [], []

    def create_repo(name, **_):
        return SimpleNamespace(repo_id=name)

    def create_commit(operations, **_):
        pushed.extend(operation.path_in_repo for operation in operations)
        cards.extend(Path(o.path_or_fileobj).read_text() for o in operations if o.path_in_repo == "README.md")

    card = ModelCard.from_template(ModelCardData())  # what transformers creates if the hub has none
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    hub = SimpleNamespace(create_repo=create_repo, create_commit=create_commit)
    for name, stub in {"hf_api": lambda: hub, **vars(hub)}.items():  # newer and older versions of transformers
        monkeypatch.setattr(f"transformers.utils.hub.{name}", stub, raising=False)
    loaded.push_to_hub("someone/run")
    assert {"config.json", "model.safetensors", "tokenizer/tokenizer_config.json"} <= set(pushed)
    assert cards == ["# What it is for, and what not\n"]
    card.text = "Edited on the hub."
    loaded.push_to_hub("someone/run")
    assert "Edited on the hub." in cards[1]


def edit(change):
    """A function that applies ``change`` to a RUN's config.json."""

    def write(run):
        data = json.loads((run / "config.json").read_text())
        change(data)
        (run / "config.json").write_text(json.dumps(data))

    return write


def replace_tokenizer(run):
    load_tokenizer(None).save_pretrained(run / "tokenizer")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.json").write_text("{"), "config.json: not a valid model config"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json: not a valid model config"),
        (edit(lambda d: d["encoders"]["text"].pop("spec")), "config.json: not a valid model config (KeyError: 'spec')"),
        (edit(lambda d: d["experiment"].update(heads=0)), "config.json: config key heads: 0 — must be at least 1"),
        (edit(lambda d: d.update(format_version=9)), "config.json: format 9 of 'senticlip'; this"),
        (edit(lambda d: d["experiment"].update(width=32)), "its config (Missing key(s) in state_dict: \"network."),
        (
            edit(lambda d: d["encoders"]["vision"]["spec"]["config"].update(architecture="hf-hub:someone/net")),
            "config.json: vision.encoder: timm has no network hf-hub:someone/net",
        ),
        (replace_tokenizer, "tokenizer: 21064 words, but the model has 41 — copy it again"),
        (lambda run: (run / "config.json").unlink(), "no trained model here"),
        (lambda run: (run / "model.safetensors").write_bytes(b"\x10"), "model.safetensors: broken"),
        (lambda run: (run / "tokenizer").rename(run / "away"), "tokenizer: the tokenizer folder is missing"),
    ],
)  # fmt: skip
def test_broken_run_gives_one_line_error(folder, damage, message):
    create_model(config(folder)).save_pretrained(folder / "run")
    damage(folder / "run")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        SentimentModel.from_pretrained(folder / "run")
    assert "\n" not in str(error.value)
    assert str(folder / "run") in str(error.value)


@pytest.mark.parametrize("where", ["config.json", "text", "vision"])
def test_run_cannot_refer_to_external_code_or_files(folder, where):
    """Code on a hub (kernels) or another file: a RUN may come from an untrusted source."""
    model = create_model(config(folder)).eval()
    model.save_pretrained(folder / "run")

    def add_reference(data):
        if where == "vision":
            data["encoders"]["vision"]["spec"]["config"]["model_args"] |= {"checkpoint_path": str(folder / "none.pth")}
        else:
            (data["encoders"]["text"]["spec"] if where == "text" else data)["attn_implementation"] = "kernels/none"

    edit(add_reference)(folder / "run")
    loaded = SentimentModel.from_pretrained(folder / "run")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_loading_draws_no_random_numbers(folder):
    create_model(config(folder)).save_pretrained(folder / "run")
    before = torch.get_rng_state()
    SentimentModel.from_pretrained(folder / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_modality_is_rejected(folder):
    model = create_model(config(folder))
    words = Sequence(torch.zeros(1, 3, 16), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(UsageError, match="video: not a modality — choose from text, vision, audio"):
        model(Batch({"text": words, "video": words}, {}))


def test_from_pretrained_rejects_unsupported_options(folder):
    with pytest.raises(TypeError, match="revision"):
        SentimentModel.from_pretrained(folder / "run", revision="v2")


def test_weights_file_has_the_permissions_of_the_config(tmp_path):
    folder = text_folder(tmp_path / "text")
    changes = {"modalities": ["text"], "text.encoder": str(folder), "text.max_length": 20, "width": 16, "heads": 2}
    create_model(Config().override(changes)).save_pretrained(tmp_path / "run")
    modes = {name: (tmp_path / "run" / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert modes["config.json"] == modes["model.safetensors"]


@pytest.mark.parametrize("train", [1, "frozen"])
def test_frozen_modules_stay_in_eval_mode(tmp_path, train):
    """Even during training: no dropout and fixed batch norms in modules without trainable parameters."""
    changes = {"text.encoder": str(text_folder(tmp_path / "t")), "vision.encoder": str(timm_folder(tmp_path / "v"))}
    changes |= {
        "text.max_length": 20,
        "width": 16,
        "heads": 2,
        "vision.size": 32,
        "text.train": train,
        "vision.train": train,
    }
    model = create_model(Config().override({**changes, "prompt": "learned"})).train()
    seen_frozen = set()
    for encoder in model.encoders.values():
        for module in encoder.modules():
            if own := list(module.parameters()):
                frozen = not any(p.requires_grad for p in own)
                seen_frozen.add(frozen)
                if frozen:
                    assert not any(submodule.training for submodule in module.modules())
                elif all(p.requires_grad for p in own):
                    assert module.training
    assert True in seen_frozen


def test_which_training_learns_the_prompt_of_a_frozen_encoder(tmp_path):
    """The main training, unless a stage has; the peers read the encoder's features unchanged."""
    base = {"text.encoder": str(text_folder(tmp_path / "t")), "text.max_length": 20, "width": 16, "heads": 2}
    base |= {"modalities": ["text"], "text.train": "frozen", "prompt": "learned"}
    stage = {"text": {"modalities": ["text"], "target": "T"}}
    frozen = [
        create_model(Config().override({**base, **more})).frozen("text")
        for more in ({}, {"stages": stage}, {"model": "tfn"})
    ]
    assert frozen == [False, True, True]
