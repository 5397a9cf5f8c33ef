"""``senticlip demo``: make clips, train, compare with text alone and video alone, and write a report."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any

from senticlip.data.made import make
from senticlip.evaluate import evaluate
from senticlip.structures import LABELS
from senticlip.tables import load_preset
from senticlip.train import train

ALONE = {"text": "text", "video": "vision"}


def demo(out: str | Path = "demo", seed: int = 0, sound: bool = False) -> dict[str, Any]:
    """Make ``out``/data, train ``out``/run and its two single modalities, evaluate, and write ``out``/report.html.

    Returns:
        ``{"accuracy": …, "macro_f1": …, "report": path}`` of the fused model on test.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    best = make(out / "data", seed, sound)["best"]["test"]
    config = load_preset("tiny")
    train(config, out / "data", out / "run", seed)
    found = {"fused": evaluate(out / "run", out / "data")}
    for name, modality in ALONE.items():
        stages = {"text": config.stages["text"]} if name == "text" else {}
        single = config.override({"modalities": [modality], "stages": stages})
        train(single, out / "data", out / f"run-{name}", seed)
        found[name] = evaluate(out / f"run-{name}", out / "data")
    report = out / "report.html"
    temporary = out / "report.html.tmp"
    temporary.write_text(_page(found, best), encoding="utf-8")
    os.replace(temporary, report)
    fused = found["fused"]
    return {"accuracy": fused["accuracy"], "macro_f1": fused["macro_f1"], "report": str(report)}


def _page(found: dict[str, dict[str, Any]], best: dict[str, float]) -> str:
    rows = "".join(
        f"<tr><td>{name}<td>{r['accuracy']:.3f}<td>{r['macro_f1']:.3f}<td>{best[name]:.3f}" for name, r in found.items()
    )
    confusion = "".join(
        f"<tr><th>{html.escape(label)}" + "".join(f"<td>{n}" for n in row)
        for label, row in zip(LABELS, found["fused"]["confusion"], strict=True)
    )
    return (
        "<!doctype html><meta charset=utf-8><title>senticlip demo</title>"
        "<style>body{font:16px sans-serif;max-width:50em;margin:2em auto}td,th{padding:.3em 1em;text-align:left}</style>"
        "<h1>senticlip demo</h1><h2>Test accuracy</h2>"
        f"<table><tr><th>model<th>accuracy<th>macro-F1<th>best possible{rows}</table>"
        f"<h2>Confusion of the fused model (rows: truth)</h2><table><tr><th>{''.join('<th>' + n for n in LABELS)}{confusion}</table>"
    )
