"""Tiny random encoders in folders laid out like hub snapshots, and tiny data sets of real video files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import timm
import torch
from safetensors.torch import save_file
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModel,
    BertConfig,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
)

CHARACTERS = "这段视频的情感是消极中性积句话一二三四五六七八九十好坏天气很高兴难过，。"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(CHARACTERS)]
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}
KINDS = {
    "bert": BertConfig(vocab_size=len(WORDS), max_position_embeddings=40, **SMALL),
    "albert": AlbertConfig(vocab_size=len(WORDS), max_position_embeddings=40, embedding_size=8, **SMALL),
    "ernie": AutoConfig.for_model(
        "ernie", vocab_size=len(WORDS), max_position_embeddings=40, use_task_id=True, **SMALL
    ),
}


def tokenizer() -> BertTokenizer:
    """A tokenizer with one token per character."""
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


def perturb(model: torch.nn.Module, seed: int) -> None:
    """Add noise to the weights, large enough that each of them affects the output."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))


def text_folder(folder: Path, kind: str = "bert", seed: int = 0) -> Path:
    """A random text encoder with its tokenizer."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(KINDS[kind])
    perturb(model, seed)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def clip_folder(folder: Path, size: int = 32, seed: int = 0) -> Path:
    """A random Chinese-CLIP model with its tokenizer and preprocessing config."""
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 40, **SMALL}
    vision = {"image_size": size, "patch_size": 8, **SMALL}
    torch.manual_seed(seed)
    model = ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    perturb(model, seed)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def timm_folder(folder: Path, name: str = "test_efficientnet", seed: int = 0, **model_args: Any) -> Path:
    """A random timm network, laid out as on the hub."""
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False, **model_args)
    folder.mkdir(parents=True, exist_ok=True)
    pretrained_cfg = {**model.pretrained_cfg, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    config = {"architecture": name, "num_classes": model.num_classes, "pretrained_cfg": pretrained_cfg}
    config |= {"model_args": model_args}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def with_and_without_sync(encoder: torch.nn.Module, sequence, monkeypatch) -> list[tuple]:
    """An encoder's states and gradients, first with a GPU synchronisation to read the mask, then without."""
    results = []
    for avoid_sync in (False, True):
        monkeypatch.setattr(type(encoder), "_avoids_sync", lambda self, x, avoid=avoid_sync: avoid)
        encoder.zero_grad()
        states = encoder(sequence).values
        states.square().sum().backward()
        results.append((states.detach(), [p.grad for p in encoder.parameters()]))
    return results


def write_clip(path: Path, shade: int, seed: int, seconds: float = 0.6, size: int = 48) -> Path:
    """Write a noisy clip in one shade of grey."""
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for _ in range(round(10 * seconds)):
            pixels = (shade + random.integers(-30, 31, (size, size, 3))).clip(0, 255).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return path


def data_folder(folder: Path, counts: tuple[int, int, int] = (12, 6, 6)) -> Path:
    """A CH-SIMS folder; the words and the shade of grey both express a clip's label."""
    random, rows = np.random.default_rng(0), []
    words = {-1: "天气坏，难过", 0: "这是一二三", 1: "天气好，很高兴"}
    for split, count in zip(("train", "valid", "test"), counts, strict=True):
        for i in range(count):
            score = i % 3 - 1
            name = f"{len(rows) + 1:04}"
            write_clip(folder / "Raw" / "video_0001" / f"{name}.mp4", 128 + 70 * score, len(rows))
            text = words[score] + "".join(random.choice(list("一二三四五六七八九十"), 3))
            rows.append(["video_0001", name, text, score, score, score, score, "", split])
    head = ["video_id", "clip_id", "text", "label", "label_T", "label_A", "label_V", "annotation", "mode"]
    with (folder / "label.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return folder
