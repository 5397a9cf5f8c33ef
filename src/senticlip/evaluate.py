"""A checkpoint on a split → metrics and a predictions file; two checkpoints on the same split → their difference."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from senticlip import metrics
from senticlip.checkpoint import as_probabilities, outputs, write_text
from senticlip.data.loader import ClipSet
from senticlip.data.sims import read_clips
from senticlip.predictor import Predictor
from senticlip.sources import clip_set
from senticlip.structures import LABELS, SURFACE, Output, UserError


def evaluate(
    run: str | Path, data: str | Path, split: str = "test", device: str | None = None, target: str | None = None
) -> dict[str, Any]:
    """Metrics of a run on a split; writes ``RUN/predictions-<split>.csv``.

    Args:
        run: the checkpoint folder.
        data: a CH-SIMS folder or a CSV of one's own.
        split: train, valid or test.
        device: cpu, cuda, cuda:N.
        target: the label to compare with (M, T, A, V); the one it was trained for by default.

    Returns:
        accuracy, macro_f1, weighted_f1, precision, recall, per_class, confusion, ece, n; ``interval`` (95 %
        bootstrap of accuracy); ``heads`` (each head alone) and ``equal_weights``; a regression model's
        scores, too.
    """
    predictor = Predictor(run, device)
    config = predictor.config
    target = target or config.target
    clips = [clip for clip in read_clips(data, split, config.protocol, config.seed) if target in clip.labels]
    if not clips:
        raise UserError(f"{data}: no clip of {split} has a label {target}")
    rows = clip_set(clips, predictor.model, predictor.tokenizer, data=data)
    output = outputs(predictor.model, rows)
    truth = np.sign(rows.labels[target]).astype(int) + 1
    result = judge(output, truth, rows.labels[target])
    temperature = getattr(predictor.model.network, "temperature", None)
    if temperature is not None and len(output.logits) > 1:
        heads = {name: output.logits[name] / tau for name, tau in zip(output.logits, temperature.cpu(), strict=True)}
        alone = {SURFACE[name]: logits.argmax(-1).numpy() for name, logits in heads.items()}
        result["heads"] = {name: _short(truth, predicted) for name, predicted in alone.items()}
        result["equal_weights"] = _short(truth, sum(heads.values()).argmax(-1).numpy())
    write_text(Path(run) / f"predictions-{split}.csv", _table(rows, output, truth))
    return result


def judge(output: Output, truth: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """All metrics of an output against class indices and label scores."""
    if output.score is not None:
        found = output.score.numpy()
        predicted = metrics.score_class(found)
        result = metrics.classification(truth, predicted) | metrics.regression(scores, found)
    else:
        probabilities = as_probabilities(output)
        assert probabilities is not None
        predicted = probabilities.argmax(-1)
        result = metrics.classification(truth, predicted, probabilities)
    low, high = metrics.bootstrap_interval(truth, predicted)["accuracy"]
    return result | {"interval": [low, high]}


def _short(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    found = metrics.classification(truth, predicted)
    return {name: found[name] for name in ("accuracy", "macro_f1")}


def _table(rows: ClipSet, output: Output, truth: np.ndarray) -> str:
    """id, text, truth, predicted, a probability per class (or the score)."""
    text = io.StringIO()
    writer = csv.writer(text)
    probabilities = as_probabilities(output)
    writer.writerow(["id", "text", "truth", "predicted", *(LABELS if probabilities is not None else ["score"])])
    for i, clip in enumerate(rows.clips):
        if probabilities is not None:
            predicted, values = int(probabilities[i].argmax()), [f"{p:.6f}" for p in probabilities[i]]
        else:
            assert output.score is not None
            predicted, values = int(metrics.score_class(output.score[i].numpy())), [f"{output.score[i]:.6f}"]
        writer.writerow([clip.id, clip.text or "", LABELS[truth[i]], LABELS[predicted], *values])
    return text.getvalue()


def compare(run_a: str | Path, run_b: str | Path, data: str | Path, split: str = "test") -> dict[str, Any]:
    """Two runs on the same clips: both metrics, the difference A − B and its paired bootstrap.

    Raises:
        UserError: the runs split the data differently, so that their clips are not the same.
    """
    results = [evaluate(run, data, split) for run in (run_a, run_b)]
    tables = [_read(Path(run) / f"predictions-{split}.csv") for run in (run_a, run_b)]
    if [row["id"] for row in tables[0]] != [row["id"] for row in tables[1]]:
        raise UserError(f"{run_a} and {run_b} split {data} differently (protocol, seed or target): nothing to compare")
    truth, a, b = (
        np.array([LABELS.index(row[k]) for row in t])
        for t, k in zip(tables[:1] + tables, ("truth", "predicted", "predicted"), strict=True)
    )
    return {"a": results[0], "b": results[1], "difference": metrics.paired_bootstrap(truth, a, b)}


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
