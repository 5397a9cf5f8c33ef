"""Do heat maps point at the reason? Tested on generated clips, where mouth and brows are known in each frame.

    senticlip demo --out demo
    python benchmarks/localisation.py demo/run --data demo/data --shuffled shuffled

Uses test clips that the model answers correctly and whose face shows a sentiment. For each method: the pointing game
(Zhang et al. 2018: is the map's maximum in a box of mouth or brows) and the share of the map's energy in these boxes,
both compared with a random map, a centre bias (a Gaussian) and the mean of these boxes in the training clips; and the
same for models trained on shuffled labels (Adebayo et al. 2018). Then deletion and insertion: frames and characters are
removed, or added to an empty clip, in order of importance, and the probability of the class is averaged.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import senticlip
from senticlip import cam
from senticlip.data.made import read_truth
from senticlip.data.sims import read_clips
from senticlip.explain import batch_of
from senticlip.occlusion import characters, occlude, support
from senticlip.structures import LABELS, Clip, Sequence, polarity
from senticlip.tables import load_preset
from senticlip.train import train

SIZE = 96
"""Side at which maps and boxes are compared."""
TOLERANCE = 1 / 24
"""Tolerance of the pointing game, as a share of the frame's width: half a cell of the demo's feature map."""
PARTS = ("mouth", "brow_left", "brow_right")


def mask_of(boxes: dict[str, list[float]], margin: float = 0.0) -> np.ndarray:
    """SIZE×SIZE bool: True in the boxes of mouth and brows, each widened by ``margin``."""
    centres = (np.arange(SIZE) + 0.5) / SIZE
    inside = np.zeros((SIZE, SIZE), bool)
    for name in PARTS:
        if name in boxes:
            x0, y0, x1, y1 = boxes[name]
            across = (centres >= x0 - margin) & (centres <= x1 + margin)
            inside |= ((centres >= y0 - margin) & (centres <= y1 + margin))[:, None] & across
    return inside


def boxes_of(clip: Clip, truth: dict[str, Any], times: list[float]) -> list[dict[str, list[float]]]:
    """The boxes of each frame that the model reads."""
    about = truth["clips"][clip.id if clip.id in truth["clips"] else clip.id.replace("$_$", "/")]
    return [about["frames"][min(round(t * about["rate"]), len(about["frames"]) - 1)] for t in times]


def upsampled(maps: torch.Tensor) -> np.ndarray:
    """k×h×w → k×SIZE×SIZE, bilinear."""
    return torch.nn.functional.interpolate(maps[:, None].float(), (SIZE, SIZE), mode="bilinear")[:, 0].numpy()


def judge(maps: np.ndarray, boxes: list[dict[str, list[float]]]) -> tuple[float, float]:
    """Pointing accuracy (over frames with a visible mouth) and energy ratio of one clip's maps k×SIZE×SIZE."""
    hits, inside, total = [], 0.0, 0.0
    for heat, box in zip(maps, boxes, strict=True):
        if "mouth" not in box:
            continue
        inside += float(heat[mask_of(box)].sum())
        total += float(heat.sum())
        hits.append(bool(heat.max() > 0 and mask_of(box, TOLERANCE).flat[heat.argmax()]))
    return float(np.mean(hits)), inside / total if total else 0.0


def baseline_maps(shape: tuple[int, ...], prior: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Baseline maps, independent of the clip: noise at the feature map's size, a Gaussian, the mean of the boxes."""
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE - 0.5
    centre = np.exp(-(x**2 + y**2) / (2 * 0.2**2))
    noise = upsampled(torch.from_numpy(rng.random(shape)))
    return {
        "random": noise,
        "centre bias": np.repeat(centre[None], shape[0], 0),
        "mean of the boxes": np.repeat(prior[None], shape[0], 0),
    }


def prior_of(data: Path) -> np.ndarray:
    """The mean mask of the training clips' frames."""
    clips = [c for c in read_truth(data)["clips"].values() if c["split"] == "train"]
    return np.mean([mask_of(box) for c in clips[::4] for box in c["frames"][::4] if "mouth" in box], 0)


def choose_clips(predictor: Any, data: Path, count: int, right: bool = True) -> list[Clip]:
    """At most ``count`` test clips whose face shows a sentiment and (if ``right``) that the model answers correctly."""
    clips = [c for c in read_clips(data, "test") if c.labels["V"]]
    predictions = predictor.predict(clips)
    return [
        c for c, p in zip(clips, predictions, strict=True) if not right or p.label == LABELS[polarity(c.labels["M"])]
    ][:count]


def localise(predictor: Any, clips: list[Clip], data: Path, compare: bool) -> dict[str, np.ndarray]:
    """Pointing accuracy and energy ratio by method, clips×2 each."""
    truth, prior, rng = read_truth(data), prior_of(data), np.random.default_rng(0)
    scores: dict[str, list[tuple[float, float]]] = {}
    for clip in clips:
        batch, times = batch_of(predictor, clip)
        boxes = boxes_of(clip, truth, times)
        if not any("mouth" in box for box in boxes):
            continue
        label = predictor.predictions(predictor.output(batch))[0].label
        shape: tuple[int, ...] = ()
        for name in cam.methods_for(predictor.model):
            maps = cam.METHODS[name](predictor.model, batch, LABELS.index(label))
            shape = tuple(maps.shape)
            scores.setdefault(name, []).append(judge(upsampled(maps), boxes))
        if compare:
            for name, maps in baseline_maps(shape, prior, rng).items():
                scores.setdefault(name, []).append(judge(maps, boxes))
    return {name: np.array(rows) for name, rows in scores.items()}


def shuffled_run(data: Path, out: Path, scratch: bool) -> Path:
    """The tiny preset, trained on the same clips with labels shuffled within each split."""
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "Raw").exists():
        (folder / "Raw").symlink_to((data / "Raw").resolve())
    with (data / "label.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    rng, names = np.random.default_rng(0), ["label", "label_T", "label_A", "label_V"]
    for split in ("train", "valid", "test"):
        part = [row for row in rows if row["mode"] == split]
        shuffled = [{name: part[i][name] for name in names} for i in rng.permutation(len(part))]
        for row, labels in zip(part, shuffled, strict=True):
            row |= labels
    with (folder / "label.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    config = load_preset("tiny")
    if scratch:
        config = config.override({"vision.pretrained": False, "vision.train": "full", "vision.lr": 1e-3})
    run = out / ("scratch" if scratch else "head")
    train(config, folder, run, 0, resume=True)
    return run


def energy(predictor: Any, batch: Any, index: int) -> list[float]:
    """The map's energy in each frame."""
    return cam.ablation_cam(predictor.model, batch, index).sum((1, 2)).tolist()


@torch.no_grad()
def frame_curves(predictor: Any, clips: list[Clip], rng: np.random.Generator) -> dict[str, list[tuple[float, float]]]:
    """Deletion and insertion, clips×2: the mean probability of the class while frames are removed, and while added."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for clip in clips:
        batch = predictor.batch([clip])
        cases = occlude(predictor, batch, None)
        label = cases[0].prediction.label
        features = predictor.model.encode(batch)
        frame_indices = features.modalities["vision"].mask[0].nonzero()[:, 0].tolist()
        drops = [-support(case.prediction, label) for case in cases if case.kind == "frame"]
        orders = {
            "occlusion": np.argsort(drops)[::-1],
            "ablation-cam": np.argsort(energy(predictor, batch, LABELS.index(label)))[::-1],
            "random": rng.permutation(len(frame_indices)),
        }
        for name, order in orders.items():
            rows = cam.repeat(features, 2 * len(order))
            vision = rows.modalities["vision"]
            mask = torch.zeros_like(vision.mask)
            for step in range(1, len(order) + 1):
                mask[step - 1, [frame_indices[i] for i in order[step:]]] = True
                mask[len(order) + step - 1, [frame_indices[i] for i in order[:step]]] = True
            rows.modalities["vision"] = Sequence(vision.values, mask)
            p = [support(answer, label) for answer in predictor.predictions(predictor.model.fuse(rows))]
            curves.setdefault(name, []).append((float(np.mean(p[: len(order)])), float(np.mean(p[len(order) :]))))
    return curves


@torch.no_grad()
def character_curves(
    predictor: Any, clips: list[Clip], rng: np.random.Generator
) -> dict[str, list[tuple[float, float]]]:
    """The same for the characters of the text."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for clip in clips:
        assert clip.text is not None
        cases = occlude(predictor, predictor.batch([clip]), clip.text)
        label = cases[0].prediction.label
        spans = characters(predictor.tokenizer, clip.text, predictor.config.text.max_length)
        drops = [-support(case.prediction, label) for case in cases if case.kind == "character"]
        for name, order in {
            "occlusion": np.argsort(drops)[::-1],
            "random": rng.permutation(len(spans)),
        }.items():
            kept = [order[step:] for step in range(1, len(order) + 1)] + [
                order[:step] for step in range(1, len(order) + 1)
            ]
            texts = ["".join(clip.text[spans[i].start : spans[i].end] for i in sorted(subset)) for subset in kept]
            p = [support(a, label) for a in predictor.predict([clip._replace(text=text) for text in texts], 64)]
            curves.setdefault(name, []).append((float(np.mean(p[: len(order)])), float(np.mean(p[len(order) :]))))
    return curves


def show(title: str, columns: tuple[str, str], results: dict[str, Any]) -> None:
    """A Markdown table with the 95 % interval of each mean."""
    print(f"\n{title}\n\n| | {columns[0]} | {columns[1]} |\n| --- | --- | --- |")
    for name, rows in results.items():
        values = np.asarray(rows)
        half = 1.96 * values.std(0, ddof=1) / np.sqrt(len(values))
        cells = " | ".join(f"{m:.3f} ± {h:.3f}" for m, h in zip(values.mean(0), half, strict=True))
        print(f"| {name} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--shuffled", type=Path, help="train on shuffled labels here (finished runs are taken up)")
    options = parser.parse_args()
    predictor, rng = senticlip.load(options.run, "cpu"), np.random.default_rng(0)
    clips = choose_clips(predictor, options.data, options.clips)
    started = time.monotonic()
    columns = ("pointing game", "energy inside")
    scores = localise(predictor, clips, options.data, True)
    show(f"Trained; {len(next(iter(scores.values())))} clips", columns, scores)
    if options.shuffled:
        for scratch, name in ((False, "its head"), (True, "all of it")):
            run = shuffled_run(options.data, options.shuffled, scratch)
            scores = localise(senticlip.load(run, "cpu"), clips, options.data, False)
            show(f"{name} trained on shuffled labels; {len(next(iter(scores.values())))} clips", columns, scores)
    subset = clips[:100]
    show(f"Frames; {len(subset)} clips", ("deletion", "insertion"), frame_curves(predictor, subset, rng))
    text_clips = [clip for clip in read_clips(options.data, "test") if clip.labels["T"] and not clip.labels["V"]]
    answers = predictor.predict(text_clips)
    right = [c for c, p in zip(text_clips, answers, strict=True) if p.label == LABELS[polarity(c.labels["M"])]]
    subset = right[:100]
    show(f"Characters; {len(subset)} clips", ("deletion", "insertion"), character_curves(predictor, subset, rng))
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
