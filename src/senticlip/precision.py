"""Inference in fp32, bf16 or int8, and the effect of reduced precision: label flips, differences in probability."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from senticlip import compiled
from senticlip.checkpoint import read_json
from senticlip.compiled import runtime_id
from senticlip.files import folder_lock, write_text
from senticlip.metrics import score_class
from senticlip.progress import track
from senticlip.sources import cache_root, fingerprint, reads_log_mel
from senticlip.structures import Batch, Clip, Output, Sequence, UsageError, UserError

if TYPE_CHECKING:
    from senticlip.predictor import Predictor

PATIENCE = 1800.0
"""Seconds to wait for another process to make the same file: at the paper's size, an export takes a minute."""


def lower_precision(model: Any, run: Path, precision: str) -> tuple[Any, dict[str, float]]:
    """The model of a RUN with its encoders in bf16 or int8, and its ``disagreement`` with fp32 on synthetic input.

    The disagreement is measured once for these weights and kept in ``RUN/precision.json``. On a CPU, the encoders are
    compiled once, into ``RUN/openvino`` (or the cache, if RUN is read-only). int8 always runs on the CPU.

    Raises:
        UsageError: the model has no encoder, or OpenVINO is missing on a CPU. UserError: an encoder cannot be compiled;
            the output is NaN.
    """
    if not model.encoders:
        raise UsageError(f"--precision {precision}: {run} has no encoder that could run in it")
    path, weights = run / "precision.json", fingerprint(model, model.config.encoders)
    on_gpu = precision == "bf16" and model.device.type != "cpu"
    model = model if on_gpu else model.to("cpu")
    measured = _stored_disagreements(path, weights)
    key = f"{precision} on {model.device.type if on_gpu else runtime_id()}"
    batch = probe(model, model.experiment)
    reference = None if key in measured else _output(model, batch)
    # checked before compiling, as compiled encoders may hide NaN: OpenVINO's max drops it
    if reference is not None and not reference.are_numbers().all():
        raise UserError(f"{run}: its answers are NaN, so its weights are broken — train or copy it again")
    model = _to_bf16(model) if on_gpu else _with_compiled_encoders(model, run, weights, precision)
    if reference is not None:
        measured[key] = disagreement([(reference, _output(model, batch))])
        with suppress(UserError, OSError):  # in a read-only RUN it is measured each time
            write_text(path, json.dumps({"weights": weights, **measured}, indent=1))
    return model, measured[key]


@torch.inference_mode()
def _output(model: Any, batch: Batch) -> Output:
    output: Output = model(batch)
    return output


def _stored_disagreements(path: Path, weights: str) -> dict[str, Any]:
    """The disagreements already measured for these weights, by precision and device."""
    stored = read_json(path)
    return stored if stored.pop("weights", None) == weights else {}


def _with_compiled_encoders(model: Any, run: Path, weights: str, precision: str) -> Any:
    """The model with compiled encoders, which are stored in its RUN, or in the cache if RUN is read-only."""
    folder = run if os.access(run, os.W_OK) else cache_root() / "openvino" / weights
    if not compiled.is_compiled(folder, weights):
        with folder_lock(folder, "export", PATIENCE, "SENTICLIP_CACHE"):  # workers of bulk start at the same time
            if not compiled.is_compiled(folder, weights):
                compiled.write_compiled(model, folder, weights)
    return compiled.compile_encoders(model, folder, weights, precision)


def _to_bf16(model: Any) -> Any:
    """Run the encoders in bf16; pixel normalisation and the fusion network stay in fp32."""
    for name, encoder in model.encoders.items():
        if name == "text":
            encoder.bfloat16()
            continue
        body: Any = encoder.get_submodule("body")
        for part in (body, encoder.get_submodule("projection")):
            part.bfloat16()
        body.register_forward_pre_hook(_cast, with_kwargs=True)
    return model


def _cast(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cast(value: Any) -> Any:
        return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}


def disagreement(pairs: Iterable[tuple[Output, Output]]) -> dict[str, float]:
    """How the outputs of two models differ on the same rows.

    Returns:
        ``n`` rows, ``flips`` (share of rows whose label changes), ``max_difference`` and ``mean_difference`` of the
        probabilities (or of the scores of a regression model).
    """
    rows, flips, largest, total = 0, 0, 0.0, 0.0
    for first, second in pairs:
        (p, label), (q, other_label) = values_and_classes(first), values_and_classes(second)
        difference = np.abs(p - q)
        rows += len(p)
        flips += int(((label != other_label) | np.isnan(difference).any(-1)).sum())
        # NaN counts as an infinite difference
        largest = max(largest, float(np.nan_to_num(difference, nan=np.inf).max()))
        total += float(difference.mean(-1).sum())
    return {
        "n": rows,
        "flips": flips / max(rows, 1),
        "max_difference": largest,
        "mean_difference": total / max(rows, 1),
    }


def values_and_classes(output: Output) -> tuple[np.ndarray, np.ndarray]:
    """The probabilities n×C (or scores n×1) of an output, and the class index of each row, n."""
    if output.score is not None:
        scores = output.score.float().cpu().numpy()
        return scores[:, None], score_class(scores)
    assert output.log_probs is not None
    probabilities = output.log_probs.exp().float().cpu().numpy()
    return probabilities, probabilities.argmax(-1)


def compare(reference: Predictor, other: Predictor, clips: list[Clip], batch_size: int = 8) -> dict[str, float]:
    """The disagreement of two predictors on clips, each decoded once; clips without input are left out."""

    def batches(chunk: list[Clip]) -> Iterator[Batch]:
        try:
            yield reference.batch(chunk)
        except UsageError:
            for clip in chunk if len(chunk) > 1 else ():
                yield from batches([clip])

    def pairs() -> Iterable[tuple[Output, Output]]:
        begins = range(0, len(clips), batch_size)
        for begin in track(begins, "comparing", len(begins)):
            for batch in batches(clips[begin : begin + batch_size]):
                yield reference.output(batch), other.output(batch)

    return disagreement(pairs())


def probe(model: Any, config: Any, rows: int = 4) -> Batch:
    """Synthetic input for a model, always the same, on its device: smooth random images and random characters.

    It shows whether a precision works on this machine; ``compare`` measures its effect on your clips.
    """
    random = torch.Generator().manual_seed(0)
    modalities = {}
    if "text" in model.encoders:
        end = min(5000, model.encoders["text"].body.get_input_embeddings().num_embeddings)
        ids = torch.randint(end // 2, end, (rows, min(16, config.text.max_length)), generator=random)
        modalities["text"] = Sequence(ids, torch.ones_like(ids, dtype=torch.bool))
    if "vision" in model.encoders:
        m, size = config.vision.frames, model.encoders["vision"].size
        coarse = torch.rand(rows * m, 3, 6, 6, generator=random)
        smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
        pixels = (255 * smooth).to(torch.uint8).unflatten(0, (rows, m))
        modalities["vision"] = Sequence(pixels, torch.ones(rows, m, dtype=torch.bool))
    if reads_log_mel(config):
        sound = 4 * torch.randn(rows, 30, config.audio.bands, generator=random) - 2  # as loud as speech
        modalities["audio"] = Sequence(sound, torch.ones(rows, 30, dtype=torch.bool))
    on_device = {name: Sequence(*(part.to(model.device) for part in sequence)) for name, sequence in modalities.items()}
    return Batch(on_device, {})
