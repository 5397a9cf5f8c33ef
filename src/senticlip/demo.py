"""``senticlip demo``: make clips, train, compare with text alone and video alone, explain a clip, write a report."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from PIL import Image

from senticlip.checkpoint import CHECKPOINTS, read_json, read_metrics, share_stage
from senticlip.config import Config
from senticlip.data.made import make
from senticlip.data.sims import read_clips
from senticlip.data.video import read_frames
from senticlip.evaluate import evaluate
from senticlip.explain import explain, inline
from senticlip.explain_set import KINDS, kind
from senticlip.files import folder_lock, staging_folder, write_text
from senticlip.pages import page as template
from senticlip.predictor import load
from senticlip.progress import counter
from senticlip.structures import Clip, UsageError, UserError, polarity
from senticlip.tables import load_preset
from senticlip.train import stages_of, train

SINGLE = {"text": "text", "video": "vision"}


def demo(out: str | Path = "demo", config: Config | None = None, sound: bool = False) -> dict[str, Any]:
    """Make ``out``/data, train ``out``/run and one run for each modality alone, evaluate, write ``out``/report.html.

    Args:
        out: the folder to write to.
        config: the experiment, which must read text and video; the tiny preset by default. Its seed is also used for
            the clips.
        sound: give the clips a voice.

    Returns:
        ``{"accuracy": …, "macro_f1": …, "report": path}`` of the fused model on test.

    Raises:
        UserError: another demo is writing there, or the folder of a run holds something else. UsageError: ``out``/data
            holds something else, or the experiment does not read both text and video.
    """
    config = config or load_preset("tiny")
    if not set(SINGLE.values()) <= set(config.modalities):
        raise UsageError("modalities: the demo compares text and video with both — keep them (audio may be added)")
    with folder_lock(Path(out), "demo"):
        return _run_demo(Path(out), config, sound)


def _run_demo(out: Path, config: Config, sound: bool) -> dict[str, Any]:
    for name in SINGLE:
        _check_is_run(out / f"run-{name}")
    with counter("clips") as progress:
        best = make(out / "data", config.seed, sound, progress=progress)["best"]["test"]
    runs = {"fused": config} | {name: config.override({"modalities": [m]}) for name, m in SINGLE.items()}
    results = {}
    for name, experiment in runs.items():
        run = out / ("run" if name == "fused" else f"run-{name}")
        if name != "fused":  # its encoder was trained before, as a stage of the fused model
            if run.exists():
                with staging_folder(run) as folder:  # moved away at once: a kill must not leave parts of it
                    run.rename(folder / run.name)
            for stage in stages_of(experiment, out / "data"):
                share_stage(run, stage, out / "run" / "stages" / stage)
        train(experiment, out / "data", run, resume=name != "fused")
        results[name] = evaluate(run, out / "data") | {"history": read_metrics(run)["history"], "best": best[name]}
    clips_by_id = {clip.id: clip for clip in read_clips(out / "data", "test", config.protocol, config.seed)}
    shown = example_clips(out / "run" / "predictions-test.csv", clips_by_id)
    conflict = next(clip for clip in shown if clip["kind"] == "conflict")
    explain(load(out / "run"), conflict["path"], conflict["text"], out / "explain")
    write_text(out / "report.html", page(results, shown))
    return {name: results["fused"][name] for name in ("accuracy", "macro_f1")} | {"report": str(out / "report.html")}


def _check_is_run(run: Path) -> None:
    """Refuse to delete anything but a run, or what a kill left of its beginning: links to stages and hidden files.

    Raises:
        UserError: it is something else.
    """
    files = (path for path in (run, *run.rglob("*")) if path.is_file() and not path.name.startswith("."))
    if any(files) and not read_metrics(run) and not read_json(run / CHECKPOINTS / "origin.json"):
        raise UserError(f"{run}: not a run, and would be deleted — choose another --out")


def example_clips(predictions: Path, clips_by_id: dict[str, Clip]) -> list[dict[str, Any]]:
    """The first two clips of each kind, with a thumbnail and their predictions."""
    chosen: dict[str, list[dict[str, Any]]] = {}
    with predictions.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            clip = clips_by_id[row["id"]]
            kind_name = kind(*(polarity(clip.labels[name]) for name in "TV"))
            clips = chosen.setdefault(kind_name, [])
            if len(clips) < 2:
                assert clip.video is not None
                middle = Image.fromarray(read_frames(clip.video, 1).pixels[0].transpose(1, 2, 0))
                clips.append({**row, "kind": kind_name, "path": clip.video, "image": inline(middle)})
    return [clip for clips in chosen.values() for clip in clips]


def curves(results: dict[str, dict[str, Any]]) -> str:
    """An SVG of each model's accuracy on valid by epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        rows = [row for row in result["history"] if "accuracy" in row]
        axes.plot([row["epoch"] for row in rows], [row["accuracy"] for row in rows], label=name)
    axes.set(xlabel="epoch", ylabel="accuracy on valid", ylim=(0.3, 1.0))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    file = io.StringIO()
    figure.savefig(file, format="svg")
    return file.getvalue()[file.getvalue().index("<svg") :]


def page(results: dict[str, dict[str, Any]], shown: list[dict[str, Any]]) -> str:
    """The report: accuracy by modality, confusion, curves, clips with their predictions."""
    return template("report.html", found=results, shown=shown, curves=curves(results), KINDS=KINDS)
