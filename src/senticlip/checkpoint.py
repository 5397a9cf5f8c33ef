"""The RUN folder: model, tokenizer, resolved experiment, metrics, model card; and the temperatures fitted on valid."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from senticlip.config import Config, from_dict
from senticlip.data.loader import ClipSet, to_batch
from senticlip.models.base import SentimentModel
from senticlip.models.clip_ca_msa import classes
from senticlip.structures import Output, UserError

TEMPERATURES = torch.logspace(-1.5, 2, 701)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@torch.inference_mode()
def outputs(model: SentimentModel, data: ClipSet, batch_size: int = 64) -> Output:
    """The model's output for a whole split, in its order, on the CPU."""
    model.eval()
    parts = []
    for begin in range(0, len(data), batch_size):
        inputs = data.__getitems__(list(range(begin, min(begin + batch_size, len(data)))))
        output = model(to_batch({name: value.to(model.device) for name, value in inputs.items()}))
        parts.append(output)

    def joined(field: str) -> dict[str, torch.Tensor]:
        return {name: torch.cat([getattr(p, field)[name].cpu() for p in parts]) for name in getattr(parts[0], field)}

    log_probs, score = parts[0].log_probs, parts[0].score
    return Output(
        joined("logits"),
        None if log_probs is None else torch.cat([p.log_probs.cpu() for p in parts]),
        joined("weights"),
        None if score is None else torch.cat([p.score.cpu() for p in parts]),
    )


def calibrate(model: SentimentModel, valid: ClipSet) -> None:
    """Fit each head's τ on valid: the temperature with the least cross-entropy (Guo et al. 2017).

    Models without a ``temperature`` are left as they are.
    """
    if not hasattr(model.network, "temperature"):
        return
    output = outputs(model, valid)
    scores = torch.from_numpy(valid.labels[model.experiment.target])
    for i, (name, logits) in enumerate(output.logits.items()):
        rows = ~scores.isnan() & (output.weights[name] > 0)
        if rows.any():
            spread = (logits[rows][None] / TEMPERATURES[:, None, None]).log_softmax(-1)  # temperatures×n×C
            target = classes(scores[rows])[None, :, None].expand(len(TEMPERATURES), -1, 1)
            model.network.temperature[i] = TEMPERATURES[spread.gather(2, target).mean((1, 2)).argmax()]


def save_run(
    out: Path, model: SentimentModel, tokenizer: Any, config: Config, data: str | Path, result: dict[str, Any]
) -> None:
    """Write the RUN beside its place, then move file by file; ``metrics.json`` comes last and says: finished."""
    from senticlip.card import model_card

    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial / "tokenizer")
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            target = out / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    shutil.rmtree(partial)
    write_text(out / "README.md", model_card(config, data, result))
    record = {**result, "data": str(data), "experiment": config.to_dict()}
    write_text(out / "metrics.json", json.dumps(record, ensure_ascii=False, indent=1))


def is_finished(out: Path, config: Config) -> dict[str, Any] | None:
    """The result of a finished run of this experiment, or None.

    Raises:
        UserError: there is a run of another experiment.
    """
    try:
        record = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if from_dict(record["experiment"]) != config:
        raise UserError(f"{out}: holds a finished run of another config — choose another --out, or leave out --resume")
    return {name: record[name] for name in ("best_epoch", "valid", "seconds", "history")}


def read_metrics(run: Path) -> dict[str, Any]:
    """What training wrote about a run; empty if nothing."""
    try:
        return json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def as_probabilities(output: Output) -> np.ndarray | None:
    """n×C, or None for a regression model."""
    return None if output.log_probs is None else output.log_probs.exp().numpy()
