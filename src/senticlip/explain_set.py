"""Explains a whole split on one page: the worst errors, accuracy by kind of clip, the effect of each modality."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from senticlip import metrics
from senticlip.answers import shown
from senticlip.data.loader import to_batch
from senticlip.data.sims import read_clips
from senticlip.explain import explanation, inline, load, write
from senticlip.files import make_folder, write_text
from senticlip.models.base import keep_modalities
from senticlip.occlusion import prediction_distance
from senticlip.pages import page
from senticlip.progress import bar
from senticlip.sources import BATCH, clip_modalities, clip_set
from senticlip.structures import LABELS, SURFACE, Clip, Prediction, UsageError, UserError, bounded, polarity

KINDS = {
    "agree": "文本与视频一致",
    "text only": "只有文本有情感",
    "video only": "只有视频有情感",
    "conflict": "文本与视频相反",
    "neutral": "都是中性",
}
"""How the sentiments of text and video relate."""


class ClipAnswers(NamedTuple):
    """A clip, its label in [-1, 1], and its predictions: of the whole clip, without each modality, given each alone.

    ``without`` and ``alone`` are by surface name, and empty for a clip that has one modality only; ``blank``: it has
    none.
    """

    clip: Clip
    label: float
    whole: Prediction
    without: dict[str, Prediction]
    alone: dict[str, Prediction]
    blank: bool = False

    @property
    def truth(self) -> int:
        """The class index of the label."""
        return polarity(self.label)


class Worst(NamedTuple):
    """A listed error: the clip, its true label, the prediction, the kind of clip, a picture and a link to its page."""

    clip: Clip
    truth: str
    prediction: Prediction
    kind: str
    picture: str | None
    href: str | None


def kind(text: int, face: int) -> str:
    """The kind of a clip (see KINDS), given the class indices of text and video."""
    if text != 1 and face != 1:
        return "agree" if text == face else "conflict"
    return "text only" if text != 1 else "video only" if face != 1 else "neutral"


def explain_set(
    run: Any,
    data: str | Path,
    out: str | Path,
    split: str = "test",
    worst: int = 20,
    method: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Explain the worst errors of a split and the effect of each modality; writes ``OUT/index.html``.

    Args:
        run: a RUN folder or a Predictor.
        data: a CH-SIMS folder or the user's own CSV.
        out: the folder to write to; each error gets its own subfolder.
        split: train, valid, test or all.
        worst: how many errors to explain, those with the lowest probability of the true class first (for a regression
            model, those with the largest error of the score).
        method: the heat maps, see ``explain``.
        device: cpu, cuda, cuda:N.

    Returns:
        ``html``; ``n``; ``accuracy``; ``worst`` (paths of pages); ``kinds`` (kind → n, accuracy, confusion) and ``by``
        (what the kinds are based on: labels or model); ``modalities`` (name → change, share, flips, weight), over clips
        with several modalities; ``single`` (the number of clips with one or none).

    Raises:
        UsageError, UserError: wrong arguments, bad data.
    """
    if worst < 0:
        raise UsageError(f"--worst {worst}: must be 0 or more")
    predictor = load(run, device)
    config = predictor.config
    clips = [clip for clip in read_clips(data, split, config.protocol, config.seed) if config.target in clip.labels]
    if not clips:
        raise UserError(f"{data}: no clip in {split} has label {config.target}")
    folder = make_folder(out)
    with bar(transient=True) as progress:
        task = progress.add_task("clips", total=len(clips))
        rows = answered(predictor, clips, data, lambda n: progress.advance(task, n))
        by, kinds = _kinds(rows)
        wrong = [i for i, row in enumerate(rows) if LABELS.index(row.whole.label) != row.truth]
        errors = sorted(wrong, key=lambda i: _truth_score(rows[i]))[:worst]
        task = progress.add_task("worst errors", total=len(errors))
        listed = []
        for number, i in enumerate(errors, 1):
            listed.append(_write_error_page(predictor, rows[i], kinds[i], folder, f"worst-{number:02}", method))
            progress.advance(task)
    result = _summary(rows, kinds) | {"by": by}
    target = folder / "index.html"
    scored = rows[0].whole.score is not None
    html = page("explain_set.html", **result, worst=listed, KINDS=KINDS, split=split, data=shown(data), scored=scored)
    write_text(target, html)
    _remove_old_pages(folder, {Path(item.href).parent.name for item in listed if item.href})
    return {"html": str(target), **result, "worst": [str(folder / item.href) for item in listed if item.href]}


@torch.no_grad()
def answered(predictor: Any, clips: list[Clip], data: str | Path, advance: Callable[[int], None]) -> list[ClipAnswers]:
    """Predict each clip as it is, without each modality, and given each alone; features come from the cache."""
    model, target = predictor.model, predictor.config.target
    dataset = clip_set(clips, model, data=data)
    results = []
    for start in range(0, len(clips), BATCH):
        indices = list(range(start, min(start + BATCH, len(clips))))
        inputs = dataset.__getitems__(indices)
        features = model.encode(to_batch({name: value.to(model.device) for name, value in inputs.items()}))
        whole = predictor.predictions(model.fuse(features))
        present = {name: sequence.mask.any(1).tolist() for name, sequence in features.modalities.items()}
        without = {
            name: predictor.predictions(model.fuse(keep_modalities(features, present.keys() - {name})))
            for name in present
        }
        alone = {name: predictor.predictions(output) for name, output in model.alone(features).items()}
        for i, index in enumerate(indices):
            names = [name for name in present if present[name][i]]
            removable = names if len(names) > 1 else []
            without_row, alone_row = (
                {SURFACE[name]: answers[name][i] for name in removable} for answers in (without, alone)
            )
            results.append(
                ClipAnswers(clips[index], clips[index].labels[target], whole[i], without_row, alone_row, not names)
            )
        advance(len(indices))
    return results


def _truth_score(row: ClipAnswers) -> float:
    """The probability of the true class; for a score, minus its absolute error."""
    if row.whole.score is not None:
        return -abs(bounded(row.whole.score) - row.label)
    return row.whole.probabilities[LABELS[row.truth]]


def _kinds(rows: list[ClipAnswers]) -> tuple[str, list[str]]:
    """What the kinds are based on, and the kind of each row: by labels T and V; if any row lacks one, by the model's
    answers to text and video alone ("" for a row without both)."""
    if all("T" in row.clip.labels and "V" in row.clip.labels for row in rows):
        return "labels", [kind(polarity(r.clip.labels["T"]), polarity(r.clip.labels["V"])) for r in rows]
    predicted = [[LABELS.index(r.alone[name].label) for name in ("text", "video") if name in r.alone] for r in rows]
    return "model", [kind(*pair) if len(pair) == 2 else "" for pair in predicted]


def _summary(rows: list[ClipAnswers], kinds: list[str]) -> dict[str, Any]:
    """Confusion by kind, and the effect of each modality: the mean change of the prediction without it."""
    truth = np.array([row.truth for row in rows])
    predicted = np.array([LABELS.index(row.whole.label) for row in rows])
    tables = {}
    for name in KINDS:
        selected = np.array(kinds) == name
        if selected.any():
            tables[name] = {
                "n": int(selected.sum()),
                "accuracy": float((truth[selected] == predicted[selected]).mean()),
                "confusion": metrics.confusion(truth[selected], predicted[selected]).tolist(),
            }
    modalities: dict[str, dict[str, float]] = {}
    multimodal = [row for row in rows if row.without]
    for name in sorted({name for row in multimodal for name in row.without}, key=list(SURFACE.values()).index):
        pairs = [(row.whole, row.without[name]) for row in multimodal if name in row.without]
        # a missing modality counts as 0, so that the means add up to 1, as the weights of each clip do
        weights = [row.whole.weights.get(name, 0.0) for row in multimodal if row.whole.weights]
        modalities[name] = {
            "change": float(np.mean([prediction_distance(*pair) for pair in pairs])),
            "flips": float(np.mean([a.label != b.label for a, b in pairs])),
        }
        if weights:
            modalities[name]["weight"] = float(np.mean(weights))
    total = sum(part["change"] for part in modalities.values())
    for part in modalities.values():
        part["share"] = part["change"] / total if total else 0.0
    return {
        "n": len(rows),
        "accuracy": float((truth == predicted).mean()),
        "kinds": tables,
        "modalities": modalities,
        "single": len(rows) - len(multimodal),
    }


def _remove_old_pages(folder: Path, kept: set[str]) -> None:
    """Remove the pages of an earlier report with more errors, and nothing else."""
    for old in folder.glob("worst-[0-9]*"):
        if old.is_dir() and old.name not in kept:
            for file in (*old.glob("frame-*.png"), old / "explain.html"):
                file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                old.rmdir()


def _write_error_page(
    predictor: Any, row: ClipAnswers, kind: str, folder: Path, name: str, method: str | None
) -> Worst:
    """Write the page of one error; but none if the clip has nothing that the model reads, or the model reads feature
    files, since features cannot be shown."""
    entry = Worst(row.clip, LABELS[row.truth], row.whole, kind, None, None)
    if row.blank or not set(predictor.config.modalities) <= set(clip_modalities(predictor.model)):
        return entry
    explained = explanation(predictor, row.clip, method)
    write(explained, folder / name)
    picture = inline(explained.pictures[len(explained.pictures) // 2]) if explained.pictures else None
    return entry._replace(picture=picture, href=f"{name}/explain.html")
