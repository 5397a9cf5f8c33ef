"""PIFT: the characters' states, compared with the pretrained encoder applied directly to prompt + words."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.tiny import KINDS, WORDS, text_folder, tokenizer, with_and_without_sync
from transformers import AutoModel, AutoTokenizer

from senticlip.config import Config, TextConfig
from senticlip.data.loader import ArrayRows
from senticlip.encoders.text import (
    ACCEPTS_4D_MASK,
    TextEncoder,
    build_body,
    load_body,
    load_tokenizer,
    text_spec,
    tokenize,
)
from senticlip.models import create_model
from senticlip.sources import clip_set, fingerprint
from senticlip.structures import Clip, Sequence, UsageError, UserError

TEXTS = ["天气很好", None, "这句话的情感是很高兴，天气坏", "好"]
PROMPT = "这句话的情感是"
PREFIX = 10  # longer than the prompt, whose tokens are then repeated


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request, tmp_path_factory):
    return text_folder(tmp_path_factory.mktemp(request.param), request.param)


def encoder_of(folder, prompt, **changes):
    settings = TextConfig(**{"encoder": str(folder), "max_length": 20, "prefix_length": PREFIX, **changes})
    encoder = TextEncoder(text_spec(settings)[0], settings, prompt, len(PROMPT))
    encoder.body.load_state_dict(load_body(folder).state_dict())
    encoder.start_prompt(torch.tensor(ids_of(PROMPT)))
    return encoder.eval()


def ids_of(words):
    return [WORDS.index(word) for word in words]


def reference_states(folder, text, prompt):
    """States of [CLS], the characters and [SEP], computed by transformers from unpadded ids."""
    body = AutoModel.from_pretrained(folder).eval()
    row = [*ids_of(["[CLS]"]), *prompt, *ids_of(text), *ids_of(["[SEP]"])]
    states = body(input_ids=torch.tensor([row])).last_hidden_state[0]
    return torch.cat([states[:1], states[1 + len(prompt) :]])


@torch.inference_mode()
@pytest.mark.parametrize("prompt", ["learned", "discrete", "none"])
def test_characters_keep_their_offsets(folder, prompt):
    words = {"learned": (2 * ids_of(PROMPT))[:PREFIX], "discrete": ids_of(PROMPT), "none": []}[prompt]
    ids, mask = tokenize(tokenizer(), TEXTS, 20)
    states = encoder_of(folder, prompt)(Sequence(ids, mask))
    assert mask.sum(1).tolist() == [6, 0, 16, 3]
    assert states.mask is mask
    assert states.values.isfinite().all()
    for row, text in enumerate(TEXTS):
        if text is not None:
            torch.testing.assert_close(
                states.values[row, : len(text) + 2], reference_states(folder, text, words), atol=1e-5, rtol=1e-5
            )


@torch.inference_mode()
def test_learned_prompt_precedes_characters(folder):
    """The prompt has the width of the word embeddings, which in ALBERT is not that of the states."""
    encoder, body = encoder_of(folder, "learned"), AutoModel.from_pretrained(folder).eval()
    words = body.get_input_embeddings()
    assert encoder.prefix.shape == (PREFIX, words.embedding_dim)
    encoder.prefix.copy_(torch.randn(encoder.prefix.shape, generator=torch.Generator().manual_seed(1)))
    ids, mask = tokenize(tokenizer(), ["天气很好"], 20)
    x = words(ids[0])
    states = body(inputs_embeds=torch.cat([x[:1], encoder.prefix, x[1:]])[None]).last_hidden_state[0]
    wanted = torch.cat([states[:1], states[1 + PREFIX :]])
    torch.testing.assert_close(encoder(Sequence(ids, mask)).values[0], wanted, atol=1e-5, rtol=1e-5)


def test_prompt_gets_gradients_except_from_rows_without_text(folder):
    encoder = encoder_of(folder, "learned")
    ids, mask = tokenize(tokenizer(), TEXTS, 20)
    encoder(Sequence(ids, mask)).values[mask].sum().backward()
    assert encoder.prefix.grad.abs().sum(1).gt(0).all()
    encoder.zero_grad()
    encoder(Sequence(ids, mask)).values[mask & (torch.arange(4) == 1)[:, None]].sum().backward()
    assert not encoder.prefix.grad.any()


def test_training_without_gpu_sync_gives_same_gradients(folder, monkeypatch):
    """On a GPU the body gets a pairwise mask: there, too, padding and rows without text have no effect."""
    encoder = encoder_of(folder, "learned")
    assert encoder.body.config.model_type in ACCEPTS_4D_MASK
    results = with_and_without_sync(encoder, Sequence(*tokenize(tokenizer(), TEXTS, 20)), monkeypatch)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_when_gpu_sync_is_avoided(folder):
    gpu, encoder = SimpleNamespace(device=torch.device("cuda")), encoder_of(folder, "none")
    assert not encoder._avoids_sync(gpu)
    assert encoder.train()._avoids_sync(gpu)
    assert not encoder._avoids_sync(torch.zeros(1))
    encoder.body.set_attn_implementation("eager")
    assert not encoder._avoids_sync(gpu)


def test_prompt_and_words_must_fit_the_positions(folder):
    with pytest.raises(UsageError, match=r"text\.max_length: 31 is more than the encoder allows \(30\)"):
        encoder_of(folder, "learned", max_length=31)
    with pytest.raises(UsageError, match=r"allows \(33\)"):
        encoder_of(folder, "discrete", max_length=34)
    encoder = encoder_of(folder, "learned", max_length=30)
    ids, mask = tokenize(tokenizer(), ["好" * 99], 30)
    assert encoder(Sequence(ids, mask)).values.shape == (1, 30, 16)


def test_relative_positions_have_no_limit():
    spec = {"model_type": "xlnet", "vocab_size": 50, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}
    encoder = TextEncoder(spec, TextConfig(max_length=64, prefix_length=6), "learned", 0).eval()
    ids, mask = torch.full((1, 64), 5), torch.ones(1, 64, dtype=torch.bool)
    assert encoder(Sequence(ids, mask)).values.isfinite().all()


def test_roberta_positions_start_after_padding_index():
    spec = {**KINDS["bert"].to_dict(), "model_type": "xlm-roberta", "pad_token_id": 1, "max_position_embeddings": 20}
    with pytest.raises(UsageError, match=r"allows \(12\)"):
        TextEncoder(spec, TextConfig(max_length=13, prefix_length=6), "learned", 0)
    encoder = TextEncoder(spec, TextConfig(max_length=12, prefix_length=6), "learned", 0)
    ids, mask = torch.full((1, 12), 5), torch.ones(1, 12, dtype=torch.bool)
    assert encoder(Sequence(ids, mask)).values.isfinite().all()


def test_prompt_without_tokens_is_rejected(folder):
    changes = {"modalities": ["text"], "text.encoder": str(folder), "text.max_length": 20}
    with pytest.raises(UsageError, match=r"text\.prefix_text: '\\u200b' has no token"):
        create_model(Config().override({**changes, "text.prefix_text": "\u200b"}))


@pytest.mark.parametrize("prompt", ["discrete", "learned"])
def test_changed_prompt_misses_the_cache(tmp_path, prompt):
    text_folder(tmp_path / "bert")
    clips = [Clip("a", None, "天气很好"), Clip("b", None, "好")]

    def features(words):
        changes = {"modalities": ["text"], "prompt": prompt, "width": 16, "heads": 2, "text.max_length": 20}
        stage = {"text": {"modalities": ["text"]}}  # a prompt learned in a stage is frozen, too
        names = {"text.encoder": str(tmp_path / "bert"), "text.train": "frozen", "text.prefix_text": words}
        model = create_model(Config().override({**changes, **names, "stages": stage}))
        with torch.inference_mode():
            direct = model.encoders["text"].eval()(Sequence(*tokenize(model.tokenizer, ["天气很好"], 20))).values[0]
        store = clip_set(clips, model, tmp_path / "cache").stores["text"]
        np.testing.assert_allclose(store.gather(np.array([0]))[0][0], direct, atol=5e-3)  # cached in fp16
        return fingerprint(model.encoders["text"], model.config.encoders["text"])

    first = features(PROMPT)
    assert features("天气很好") != first
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert features(PROMPT) == first
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_left_padding_tokenizer_is_read_with_right_padding(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"padding_side": "left"}))
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"
    ids, mask = tokenize(load_tokenizer(tmp_path), ["好", "天气很好"], 20)
    values, real = ArrayRows(ids.numpy(), mask.numpy()).gather(np.array([0]))
    assert real.all()
    assert values.tolist() == [ids_of(["[CLS]", "好", "[SEP]"])]


def test_tokenizer_folder_cannot_run_code(tmp_path, monkeypatch):
    tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with contextlib.suppress(UserError):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_missing_or_broken_tokenizer_gives_one_line_error(tmp_path):
    with pytest.raises(UserError, match="gone: the tokenizer folder is missing"):
        load_tokenizer(tmp_path / "gone")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be read") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_default_tokenizer_splits_into_characters():
    ids, mask = tokenize(load_tokenizer(None), ["我爱。", None], 20)
    assert mask.sum(1).tolist() == [5, 0]
    assert len(set(ids[0].tolist())) == 5
    ids, mask = tokenize(load_tokenizer(None), [None, None], 20)
    assert not mask.any()


@pytest.mark.parametrize(
    "spec",
    [
        {"model_type": "timm_wrapper", "architecture": "hf-hub:someone/net", "hidden_size": 16},
        {"model_type": "timm_backbone", "backbone": "hf-hub:someone/net", "use_pretrained_backbone": True},
        {"model_type": "detr"},  # uses a network from the hub by default
    ],
)
def test_spec_with_external_network_is_rejected(spec):
    """A RUN may come from an untrusted source."""
    with pytest.raises(UsageError, match=r"text\.encoder: \w+ reads images through an external network"):
        build_body(spec)


def test_spec_cannot_run_code(tmp_path, monkeypatch):
    """For a model type it does not know, transformers would ask whether to run the repository's code."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (tmp_path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    parts = {"encoder": {"model_type": "bert"}, "decoder": {"model_type": "bert"}}
    with pytest.raises(ValueError, match="Unrecognized"):
        build_body({"model_type": "encoder-decoder", **parts, "auto_map": {"AutoModel": f"{tmp_path}--modeling.Evil"}})
    assert not (tmp_path / "ran").exists()
