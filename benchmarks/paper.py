"""The paper's sizes with random weights: Chinese-CLIP ViT-B/16 reads 6 frames, RoBERTa base the text."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks import timing
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from senticlip.config import Config, from_dict
from senticlip.encoders.text import load_tokenizer
from senticlip.models import create_model
from senticlip.predictor import Predictor
from senticlip.structures import Batch, Output, Sequence

TEXT = "今天的天气真不错，我们一起去公园散步吧，好不好呀？"


def config(train: str = "full") -> Config:
    """The paper's preset, without downloads."""
    part = {"pretrained": False, "train": train}
    return from_dict({"text": part, "vision": {**part, "frames": 6}, "label": {"pretrained": False}})


@functools.cache
def run_folder() -> Path:
    """A RUN of this model, removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="senticlip-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(0)
    create_model(config()).save_pretrained(folder)
    load_tokenizer(None).save_pretrained(folder / "tokenizer")
    return folder


@functools.cache
def predictor(precision: str) -> Predictor:
    """The predictor of ``run_folder()``, loaded once."""
    return Predictor(run_folder(), "cpu", precision)


@functools.cache
def _as_published(vision: Any) -> Any:
    """transformers' own image tower with the same weights: with its complete last layer and its own activation."""
    from transformers import ChineseCLIPVisionModel

    body = ChineseCLIPVisionModel(vision.body.config).eval().to(vision.std.device)
    body.load_state_dict(vision.body.state_dict())
    return body


def naive_images(vision: Any, pixels: Tensor) -> Tensor:
    """The naive peer's states N×d of normalised frames N×3×S×S."""
    return vision.projection(_as_published(vision)(pixel_values=pixels).pooler_output)


@torch.no_grad()
def frame_by_frame(model: Any, batch: Batch, pixels: Tensor | None = None) -> Output:
    """The naive peer: torch's default fp32, one frame at a time; ``pixels`` m×3×S×S are already normalised."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    vision = model.encoders["vision"]
    try:
        if pixels is None:
            pixels = vision.normalize(batch.modalities["vision"].values[0])
        states = torch.cat([naive_images(vision, frame[None]) for frame in pixels])[None]
        features = {
            "text": model.encoders["text"](batch.modalities["text"]),
            "vision": Sequence(states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)),
        }
        return model.fuse(Batch(features, {}))
    finally:
        torch.set_float32_matmul_precision(before)


def counted(call: Callable[[], Any]) -> float:
    """GFLOP of a call, with attention as plain products: the counter does not see the CPU's fused attention."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def work(model: Any, batch: Batch) -> float:
    """GFLOP of our forward pass."""
    return counted(lambda: model(batch))


def ceiling(precision: str) -> float:
    """GFLOP per CPU second of this machine's matrix product at a precision, measured now and printed."""
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    top = timing.ceiling(kinds[precision]) if precision in kinds else timing.int8_ceiling()
    print(f"{'GEMM ceiling':22} {precision:26} {top:.0f} GFLOP/cpu-s", flush=True)
    return top


def gap(one: Output, two: Output) -> float:
    """The largest difference of any probability."""
    assert one.log_probs is not None
    assert two.log_probs is not None
    return float((one.log_probs.exp() - two.log_probs.exp()).abs().max())


@functools.cache
def precisions(quick: bool) -> list[str]:
    """All precisions; if quick, without int8 (slow to export), and without bf16 on processors without bf16 units."""
    if not quick:
        return ["fp32", "bf16", "int8"]
    fp32, bf16 = (timing.ceiling(kind, 256, 3) for kind in (torch.float32, torch.bfloat16))
    return ["fp32", "bf16"] if bf16 > fp32 else ["fp32"]


LIMIT = {"fp32": 1e-4, "bf16": 0.02, "int8": 0.1}
"""How far a probability may be from the naive peer's (int8 is judged by the labels of a trained model)."""
