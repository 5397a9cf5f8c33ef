"""Metrics: pure functions on numpy arrays; fractions in [0, 1], never per cent.

Classes are indices into LABELS. Regression scores are in label units and follow MMSA's definitions for CH-SIMS
(github.com/thuiar/MMSA, ``utils/metricsTop.py``). Bootstraps: Efron & Tibshirani, An Introduction to the Bootstrap;
randomisation: Noreen, Computer-Intensive Methods for Testing Hypotheses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from senticlip.structures import LABELS

ACC_3_BINS = (-0.1, 0.1)
"""MMSA's Acc-3 cuts: negative (-1, -0.1], neutral (-0.1, 0.1], positive (0.1, 1]."""

ACC_5_BINS = (-0.7, -0.1, 0.1, 0.7)
"""MMSA's Acc-5 cuts."""

SAMPLES, EDGES = 4000, (0.025, 0.975)
"""The number of bootstrap resamplings (and random exchanges), and the quantiles that bound the interval."""


def score_class(score: ArrayLike, bins: tuple[float, ...] = ACC_3_BINS) -> NDArray[np.int64]:
    """The class of each score (clipped to [-1, 1]); an upper edge belongs to the class below it, as in MMSA.

    In float32, like the labels: in float64, a float32 label of 0.1 would lie above the edge.
    """
    return np.digitize(np.clip(np.asarray(score, np.float32), -1, 1), np.asarray(bins, np.float32), right=True)


def confusion(truth: ArrayLike, predicted: ArrayLike, classes: int = len(LABELS)) -> NDArray[np.int64]:
    """C×C counts: rows are the truth, columns the prediction."""
    cells = np.asarray(truth, dtype=np.int64) * classes + np.asarray(predicted, dtype=np.int64)
    return np.bincount(cells.ravel(), minlength=classes * classes).reshape(classes, classes)


def classification(truth: ArrayLike, predicted: ArrayLike, probabilities: ArrayLike | None = None) -> dict[str, Any]:
    """Accuracy; P, R and F1 (macro, weighted, per class); confusion matrix; ECE (None without ``probabilities``).

    Args:
        truth: n class indices.
        predicted: n class indices.
        probabilities: n×C, each row sums to 1.

    Macro averages are over the classes that occur in truth or prediction; 0/0 counts as 0 (both as in scikit-learn).
    """
    counts = confusion(truth, predicted)
    scores = from_confusion(counts)
    per_class = {
        label: {name: float(scores[f"class_{name}"][i]) for name in ("precision", "recall", "f1")}
        | {"support": int(counts[i].sum())}
        for i, label in enumerate(LABELS)
    }
    names = ("accuracy", "macro_f1", "weighted_f1", "precision", "recall", "weighted_precision", "weighted_recall")
    return {
        **{name: float(scores[name]) for name in names},
        "per_class": per_class,
        "confusion": counts.tolist(),
        "ece": None if probabilities is None else calibration_error(truth, probabilities),
        "n": int(counts.sum()),
    }


def from_confusion(counts: ArrayLike) -> dict[str, NDArray[np.float64]]:
    """The scores of confusion matrices …×C×C, each as an array of shape … (``class_*``: …×C)."""
    counts = np.asarray(counts, dtype=np.float64)
    hits, truth, predicted = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    precision, recall, f1 = _ratio(hits, predicted), _ratio(hits, truth), _ratio(2 * hits, truth + predicted)
    total, present = truth.sum(-1), (truth + predicted > 0).sum(-1)
    scores = {"accuracy": _ratio(hits.sum(-1), total)}
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        scores["class_" + name] = values
        scores["macro_f1" if name == "f1" else name] = _ratio(values.sum(-1), present)
        scores["weighted_" + name] = _ratio((values * truth).sum(-1), total)
    return scores


def calibration_error(truth: ArrayLike, probabilities: ArrayLike) -> float:
    """Expected calibration error (ECE) of the top class, in 15 bins of equal width (Guo et al. 2017)."""
    bins = 15
    truth, probabilities = np.asarray(truth), np.asarray(probabilities, dtype=np.float64)
    confidence, correct = probabilities.max(-1), probabilities.argmax(-1) == truth
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.abs(np.bincount(index, correct, bins) - np.bincount(index, confidence, bins))
    return float(_ratio(gaps.sum(), len(truth)))


def regression(truth: ArrayLike, score: ArrayLike) -> dict[str, float]:
    """MAE, Corr, Acc-5, Acc-3, Acc-2 and F1 of scores in [-1, 1], by MMSA's definitions for CH-SIMS.

    ``acc_2`` and ``f1_2`` (weighted) separate ≤ 0 from > 0. ``acc_2_nonzero`` and ``f1_2_nonzero`` leave out clips
    whose true score is 0, another common convention. Truth and scores are clipped to [-1, 1]. Corr of a constant is 0.
    """
    truth = np.clip(np.asarray(truth, dtype=np.float64), -1, 1)
    score = np.clip(np.asarray(score, dtype=np.float64), -1, 1)
    truth_centred, score_centred = truth - truth.mean(), score - score.mean()
    scale = np.sqrt((truth_centred**2).sum() * (score_centred**2).sum())
    result = {
        "mae": float(np.abs(truth - score).mean()),
        "corr": float(_ratio((truth_centred * score_centred).sum(), scale)),
        "acc_5": float((score_class(truth, ACC_5_BINS) == score_class(score, ACC_5_BINS)).mean()),
        "acc_3": float((score_class(truth) == score_class(score)).mean()),
    }
    nonzero = truth != 0
    return result | _acc_2(truth > 0, score > 0) | _acc_2(truth[nonzero] > 0, score[nonzero] > 0, "_nonzero")


def binary(truth: ArrayLike, probabilities: ArrayLike) -> dict[str, float]:
    """Acc-2 and F1 of a classifier, under the same names as in :func:`regression`.

    Over all rows, a prediction is positive if that class is the most likely; neutral counts as negative, as in truth.
    Over the rows that are not neutral (``_nonzero``), it is positive if P(positive) > P(negative), whatever P(neutral).
    MMSA's classifiers use the second rule for all rows, which turns many correct neutral predictions into positive.

    Args:
        truth: n class indices.
        probabilities: n×C.
    """
    truth, probabilities = np.asarray(truth), np.asarray(probabilities)
    negative, neutral, positive = range(len(LABELS))
    not_neutral = truth != neutral
    forced = probabilities[not_neutral, positive] > probabilities[not_neutral, negative]
    return _acc_2(truth == positive, probabilities.argmax(-1) == positive) | _acc_2(
        truth[not_neutral] == positive, forced, "_nonzero"
    )


def _acc_2(truth: NDArray[np.bool_], predicted: NDArray[np.bool_], suffix: str = "") -> dict[str, float]:
    """Acc-2 and weighted F1 of positive against the rest."""
    scores = from_confusion(confusion(truth, predicted, 2))
    return {"acc_2" + suffix: float(scores["accuracy"]), "f1_2" + suffix: float(scores["weighted_f1"])}


def paired_bootstrap(
    truth: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    groups: ArrayLike | None = None,
    runs: ArrayLike | None = None,
) -> dict[str, dict[str, float]]:
    """How much better ``first`` is than ``second`` on the same rows: paired bootstrap and randomisation test.

    Args:
        truth: n class indices.
        first: n class indices, one system's predictions.
        second: n class indices, the other's.
        groups: n ids; rows with the same id are resampled together. With predictions of several seeds, pass the clip
            ids, so that k predictions for one clip do not count as k clips.
        runs: n indices from 0, the seed of each row; the difference is then the mean over seeds.

    Returns:
        For ``accuracy`` and ``macro_f1``: ``difference`` (first − second), ``low`` and ``high`` of the 95 % percentile
        interval over SAMPLES resamplings, and the two-sided ``p`` of the randomisation test: the share of SAMPLES
        random exchanges of the two systems' predictions (within a group, all or none) whose difference is at least as
        large, with one added to count and total. If few predictions differ, the interval is too narrow; ``p`` holds.
    """
    classes = len(LABELS)
    truth, first, second = (np.asarray(values, dtype=np.int64) for values in (truth, first, second))
    table = _by_group([truth * classes + first, truth * classes + second], groups, runs)
    resampled_scores, swapped_scores = from_confusion(_resample(table)), from_confusion(_swap_systems(table))
    observed = from_confusion(table.sum(0).reshape(1, -1, classes, classes))
    result = {}
    for name in ("accuracy", "macro_f1"):
        difference, resampled, swapped = (
            (x[name][:, ::2] - x[name][:, 1::2]).mean(1) for x in (observed, resampled_scores, swapped_scores)
        )
        low, high = np.quantile(resampled, EDGES)
        # tolerance: the same numbers are summed in another order
        as_large = np.abs(swapped) >= np.abs(difference) - 1e-12
        result[name] = {
            "difference": float(difference[0]),
            "low": float(low),
            "high": float(high),
            "p": float((as_large.sum() + 1) / (SAMPLES + 1)),
        }
    return result


def bootstrap_interval(truth: ArrayLike, predicted: ArrayLike) -> dict[str, tuple[float, float]]:
    """The 95 % percentile interval of ``accuracy`` and ``macro_f1``; n class indices each."""
    classes = len(LABELS)
    cells = np.asarray(truth, dtype=np.int64) * classes + np.asarray(predicted, dtype=np.int64)
    drawn = from_confusion(_resample(_by_group([cells], None)))
    low_high = {name: np.quantile(drawn[name][:, 0], EDGES) for name in ("accuracy", "macro_f1")}
    return {name: (float(low), float(high)) for name, (low, high) in low_high.items()}


def _by_group(
    cells: list[NDArray[np.int64]], groups: ArrayLike | None, runs: ArrayLike | None = None
) -> NDArray[np.int64]:
    """Confusion cells n of k systems → counts groups×(runs·k)×C²; the systems of a run are adjacent."""
    rows, systems = len(cells[0]), len(cells)
    group = np.arange(rows) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
    run = np.zeros(rows, np.int64) if runs is None else np.asarray(runs, dtype=np.int64)
    shape = (int(group.max(initial=-1)) + 1, systems * (int(run.max(initial=0)) + 1), len(LABELS) ** 2)
    table = np.zeros(shape, np.int64)
    for system, cell in enumerate(cells):
        np.add.at(table, (group, systems * run + system, cell), 1)
    return table


def _resample(table: NDArray[np.int64]) -> NDArray[np.float64]:
    """Confusion matrices SAMPLES×k×C×C of groups drawn with replacement (whole groups)."""
    groups, random = len(table), np.random.default_rng(0)
    return _weighted_sums(table, lambda size: random.multinomial(groups, np.full(groups, 1 / groups), size))


def _swap_systems(table: NDArray[np.int64]) -> NDArray[np.float64]:
    """Confusion matrices SAMPLES×k×C×C with the answers of each pair of systems exchanged in random groups."""
    random = np.random.default_rng(0)
    swapped = table.reshape(len(table), -1, 2, table.shape[-1])[:, :, ::-1].reshape(table.shape)
    changes = _weighted_sums(swapped - table, lambda size: random.integers(0, 2, (size, len(table))))
    return changes + table.sum(0).reshape(changes.shape[1:])


def _weighted_sums(table: NDArray[np.int64], draw: Callable[[int], NDArray[np.int64]]) -> NDArray[np.float64]:
    """SAMPLES weighted sums over a table's groups; ``draw(size)`` gives their weights, size×groups."""
    groups, systems, cells = table.shape
    flat, classes = table.reshape(groups, -1).astype(np.float64), round(cells**0.5)
    step = max(1, 4_000_000 // max(groups, 1))  # keeps the drawn weights below 32 MB
    sizes = [min(step, SAMPLES - start) for start in range(0, SAMPLES, step)]
    drawn = np.concatenate([draw(size) @ flat for size in sizes])
    return drawn.reshape(SAMPLES, systems, classes, classes)


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> NDArray[np.float64]:
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(top, bottom, out=np.zeros(np.broadcast(top, bottom).shape), where=bottom != 0)
