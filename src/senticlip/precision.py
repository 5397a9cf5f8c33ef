"""fp32, bf16 or int8 for inference, and what the reduced ones change: label flips, differences of probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from senticlip.structures import Batch, Clip, Output, Sequence, UsageError

if TYPE_CHECKING:
    from senticlip.predictor import Predictor

PRECISIONS = ("fp32", "bf16", "int8")


def reduced(model: Any, run: Path, precision: str) -> Any:
    """A model of a RUN at a precision: itself (bf16: its encoders converted, the network stays fp32), or its int8 twin.

    The int8 twin is an ONNX file, made once and kept in the RUN.

    Raises:
        UsageError: an unknown precision; int8 without onnxruntime, or of a model that cannot be exported.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision: {precision!r} — choose one of {', '.join(PRECISIONS)}")
    if precision == "bf16":
        for name, encoder in model.encoders.items():
            to_bf16(encoder, name)
    if precision == "int8":
        from senticlip.export import OnnxModel, export

        file, weights = run / "model-int8.onnx", run / "model.safetensors"
        if not file.is_file() or file.stat().st_mtime < weights.stat().st_mtime:
            export(run, file, int8=True)
        return OnnxModel(file)
    return model


def to_bf16(encoder: nn.Module, name: str) -> None:
    """Compute an encoder in bf16; what enters is normalised in fp32 first."""
    if name == "text":
        encoder.bfloat16()
        return
    body: Any = encoder.get_submodule("body")
    for part in (body, encoder.get_submodule("projection")):
        part.bfloat16()
    body.register_forward_pre_hook(_cast, with_kwargs=True)


def _cast(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cast(value: Any) -> Any:
        return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}


def disagreement(pairs: Iterable[tuple[Output, Output]]) -> dict[str, float]:
    """What changes between two models' outputs for the same rows.

    Returns:
        ``n`` rows, ``flips`` (share of other labels), ``max_difference`` and ``mean_difference`` of a probability.
    """
    rows, flips, most, total = 0, 0, 0.0, 0.0
    for one, two in pairs:
        if one.log_probs is None or two.log_probs is None:
            raise UsageError("precision: a model that gives a score has no probabilities to compare")
        p, q = one.log_probs.exp().float(), two.log_probs.exp().float()
        rows += len(p)
        flips += int((p.argmax(-1) != q.argmax(-1)).sum())
        most = max(most, float((p - q).abs().max()))
        total += float((p - q).abs().mean(-1).sum())
    return {"n": rows, "flips": flips / max(rows, 1), "max_difference": most, "mean_difference": total / max(rows, 1)}


def compare(reference: Predictor, other: Predictor, clips: list[Clip], batch_size: int = 8) -> dict[str, float]:
    """The disagreement of two predictors on clips, each decoded once."""

    def pairs() -> Iterable[tuple[Output, Output]]:
        for begin in range(0, len(clips), batch_size):
            batch = reference.batch(clips[begin : begin + batch_size])
            yield reference.output(batch), other.output(batch)

    return disagreement(pairs())


def probe(model: Any, config: Any, rows: int = 16) -> Batch:
    """Made input for a model, always the same: smooth random pictures and random characters.

    It tells whether a precision works at all on this machine; what it costs on your clips, ``compare`` tells.
    """
    random = torch.Generator().manual_seed(0)
    modalities = {}
    if "text" in model.encoders:
        most = min(5000, model.encoders["text"].body.get_input_embeddings().num_embeddings)
        ids = torch.randint(most // 2, most, (rows, min(16, config.text.max_length)), generator=random)
        modalities["text"] = Sequence(ids, torch.ones_like(ids, dtype=torch.bool))
    if "vision" in model.encoders:
        m, size = config.vision.frames, model.encoders["vision"].size
        coarse = torch.rand(rows * m, 3, 6, 6, generator=random)
        smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
        pixels = (255 * smooth).to(torch.uint8).unflatten(0, (rows, m))
        modalities["vision"] = Sequence(pixels, torch.ones(rows, m, dtype=torch.bool))
    return Batch(modalities, {})
