"""Evaluate a checkpoint on a split (metrics, predictions file), or compare two checkpoints on the same split."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from senticlip import metrics
from senticlip.checkpoint import outputs, read_metrics, rows_digest
from senticlip.config import Config
from senticlip.data.loader import ClipSet
from senticlip.data.sims import read_clips
from senticlip.data.table import canonical_split
from senticlip.files import write_text
from senticlip.precision import values_and_classes
from senticlip.predictor import Predictor
from senticlip.progress import console
from senticlip.sources import clip_set
from senticlip.structures import LABELS, SURFACE, TARGETS, Clip, Output, UsageError, UserError, polarity


class Answers(NamedTuple):
    """A run's predictions on a split: true and predicted class indices, n each, in the order of ``clips``."""

    clips: list[Clip]
    truth: np.ndarray
    predicted: np.ndarray
    result: dict[str, Any]


def evaluate(
    run: str | Path,
    data: str | Path,
    split: str = "test",
    device: str | None = None,
    target: str | None = None,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Metrics of a run on a split; writes ``RUN/predictions-<split>.csv`` (not for a hub id).

    Args:
        run: the checkpoint folder, or a hub id.
        data: a CH-SIMS folder or your own CSV.
        split: train, valid, test or all.
        device: cpu, cuda, cuda:N.
        target: the label to compare with (M, T, A, V); by default the one it was trained on.
        precision: fp32, bf16 or int8.

    Returns:
        accuracy, macro_f1, weighted_f1, precision, recall, per_class, confusion, ece, n, target; MMSA's acc_2 and
        f1_2, also as ``…_nonzero``; ``interval`` (95 % bootstrap of accuracy); ``heads`` (each head alone, on the clips
        that have its modality) and ``equal_weights``; regression metrics; ``disagreement`` of a reduced precision;
        ``unread``, the number of clips without any input for the model, if there are any; ``predictions``, the path of
        the predictions file.

    Raises:
        UsageError: no such run, split, device, target or precision. UserError: the data cannot be read or lacks
            the label.
    """
    return _predict_split(run, data, split, device, target, precision).result


def _predict_split(
    run: str | Path, data: str | Path, split: str, device: str | None, target: str | None, precision: str
) -> Answers:
    if target is not None and target not in TARGETS:
        raise UsageError(f"--target {target}: choose one of {', '.join(TARGETS)}")
    predictor = Predictor(run, device, precision)
    config = predictor.config
    target = target or config.target
    split = canonical_split(split)
    all_clips = read_clips(data, split, config.protocol, config.seed)
    clips = [clip for clip in all_clips if target in clip.labels]
    if not clips:
        raise UserError(f"{data}: no clip in {split} has label {target}")
    if missing := len(all_clips) - len(clips):
        message = f"{data}: {missing} of {len(all_clips)} clips in {split} have no label {target} and are left out"
        console.print(message, soft_wrap=True)
    rows = clip_set(clips, predictor.model, data=data)
    output = outputs(predictor.model, rows)
    if nan_ids := [clip.id for clip, good in zip(clips, output.are_numbers(), strict=True) if not good]:
        message = f"{len(nan_ids)} of {len(clips)} answers are NaN, the first for {nan_ids[0]}"
        raise UserError(f"{run}: {message} — its weights or input features are broken")
    _warn_of_changed_rows(Path(run), data, config)
    truth = polarity(rows.labels[target])
    result = judge(output, truth, rows.labels[target]) | {"target": target}
    values, predicted = values_and_classes(output)
    if unread := _report_unread(data, rows, predicted):
        result["unread"] = unread
    if predictor.disagreement:
        result["disagreement"] = predictor.disagreement
    temperature = getattr(predictor.model.network, "temperature", None)
    if temperature is not None and len(output.logits) > 1:
        heads = {name: output.logits[name] / tau for name, tau in zip(output.logits, temperature.cpu(), strict=True)}
        present = {name: output.weights[name] > 0 for name in heads}
        result["heads"] = {
            SURFACE[name]: _accuracy_and_f1(truth[present[name].numpy()], logits[present[name]].argmax(-1).numpy())
            for name, logits in heads.items()
            if present[name].any()
        }
        votes = [logits * present[name][:, None] for name, logits in heads.items()]
        result["equal_weights"] = _accuracy_and_f1(truth, sum(votes).argmax(-1).numpy())
    if Path(run).is_dir():
        suffixes = [word for word, default in ((target, config.target), (precision, "fp32")) if word != default]
        file = Path(run) / f"predictions-{'-'.join([split, *suffixes])}.csv"
        if os.access(run, os.W_OK):
            write_text(file, _predictions_csv(clips, truth, predicted, values))
            result["predictions"] = str(file)
        else:  # a read-only RUN can be evaluated, too
            console.print(f"{file}: not written, {run} is read-only", soft_wrap=True)
    return Answers(clips, truth, predicted, result)


def _report_unread(data: str | Path, rows: ClipSet, predicted: np.ndarray) -> int:
    """Count and report the clips without any input for the model: their predictions are arbitrary, but still count."""
    without_input = np.all([store.lengths == 0 for store in rows.stores.values()], axis=0)
    if without_input.any():
        labels = " or ".join(LABELS[index] for index in np.unique(predicted[without_input]))
        message = f"{data}: {without_input.sum()} of {len(rows)} clips have no input that this model reads"
        console.print(f"{message}; they are predicted as {labels!r}", soft_wrap=True)
    return int(without_input.sum())


def _warn_of_changed_rows(run: Path, data: str | Path, config: Config) -> None:
    """Warn if the data's rows have changed since training: random splits may have changed with them."""
    trained = read_metrics(run)
    if "rows" not in trained or Path(trained["data"]).resolve() != Path(data).resolve():
        return
    if trained["rows"] != rows_digest(data, read_clips(data, None, config.protocol, config.seed)):
        message = f"{data}: its rows have changed since {run} was trained; this split may contain training clips"
        console.print(f"{message}, if splits are drawn at random", soft_wrap=True)


def judge(output: Output, truth: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """All metrics of an output against true class indices and label scores."""
    values, predicted = values_and_classes(output)
    if output.score is not None:
        result = metrics.classification(truth, predicted) | metrics.regression(scores, values[:, 0])
    else:
        result = metrics.classification(truth, predicted, values) | metrics.binary(truth, values)
    low, high = metrics.bootstrap_interval(truth, predicted)["accuracy"]
    return result | {"interval": [low, high]}


def _accuracy_and_f1(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    result = metrics.classification(truth, predicted)
    return {name: result[name] for name in ("accuracy", "macro_f1")}


def _predictions_csv(clips: list[Clip], truth: np.ndarray, predicted: np.ndarray, values: np.ndarray) -> str:
    """CSV: id, text, truth, predicted, a probability per class (or the score)."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["id", "text", "truth", "predicted", *(LABELS if values.shape[1] > 1 else ["score"])])
    for clip, true_class, predicted_class, row in zip(clips, truth, predicted, values, strict=True):
        writer.writerow(
            [clip.id, clip.text or "", LABELS[true_class], LABELS[predicted_class], *(f"{value:.6f}" for value in row)]
        )
    return text.getvalue()


def compare(
    run_a: str | Path,
    run_b: str | Path,
    data: str | Path,
    split: str = "test",
    device: str | None = None,
    target: str | None = None,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Two runs on the same clips: the metrics of both, and the difference A − B with its interval and p.

    Raises:
        UserError: the runs split the data differently, so their clips differ.
        UsageError: they were trained on different labels, and no ``target`` is given.
    """
    a, b = (_predict_split(run, data, split, device, target, precision) for run in (run_a, run_b))
    if [clip.id for clip in a.clips] != [clip.id for clip in b.clips]:
        raise UserError(f"{run_a} and {run_b} split {data} differently (protocol, seed or target): not comparable")
    if (a.truth != b.truth).any():
        raise UsageError(f"{run_a} and {run_b} were trained on different labels — choose one with --target")
    return {"a": a.result, "b": b.result, "difference": metrics.paired_bootstrap(a.truth, a.predicted, b.predicted)}
