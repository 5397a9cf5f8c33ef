"""The model card of a RUN: model, training data, metrics, limits, and prohibited uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from senticlip import __version__
from senticlip.config import FROM_FILE, Config

CALIBRATED = (
    "Its answer's probabilities are calibrated on the validation split of that data (one temperature per head) and on "
    "no other data; those of a single modality are not calibrated."
)
UNCALIBRATED = "It is not calibrated: its confidence is not the share of right answers."
LIMITS = """## Limits

* It reads the sentiment *expressed* in a clip (a face, a line of text), not what a person feels. Faces differ between
  people and cultures; lighting, pose, cutaways, irony and several faces in a frame mislead it.
* It was measured on the data named above and on nothing else. Measure it on your own before you rely on it.
* {calibrated}

## What it must not be used for

Decisions about people: hiring, schooling, credit, insurance, policing, border control, medicine; watching people at
work or in class (the EU AI Act forbids emotion recognition there); lie detection; anything done to people
without their knowledge.
"""


def _how_trained(config: Config, name: str) -> str:
    """How an encoder was trained."""
    if getattr(config, name).encoder in FROM_FILE:
        return "read from a file"
    has_stage = any(name in config.stage(stage).modalities for stage in config.stages)
    return "fine-tuned in its own stage" if has_stage else getattr(config, name).train


def model_card(config: Config, data: str | Path, result: dict[str, Any]) -> str:
    """Markdown with YAML front matter, as the hub expects it."""
    parts = [f"* text: `{config.text.encoder}` ({_how_trained(config, 'text')})"] if "text" in config.modalities else []
    if "vision" in config.modalities:
        shots = " of the main shot" if config.vision.cutaways == "drop" else ""
        frames = f"{config.vision.frames} frames{shots}"
        parts.append(f"* video: `{config.vision.encoder}` ({_how_trained(config, 'vision')}), {frames}")
    if "audio" in config.modalities:
        parts.append(f"* audio: log-mel with {config.audio.bands} bands, or from a feature file")
    is_clip_ca_msa = config.model == "clip_ca_msa"  # peers have none of these parts, and no temperature
    if is_clip_ca_msa:
        parts.append(
            f"* temporal: {config.temporal}, fusion: {config.fusion}, head: {config.head}, loss: {config.loss},"
        )
        parts.append(f"  prompt: {config.prompt}")
    valid = "\n".join(f"| {name} | {value:.4f} |" for name, value in result["valid"].items())
    return f"""---
language: zh
library_name: senticlip
tags: [multimodal, sentiment-analysis, CH-SIMS]
---
# {config.model} by senticlip {__version__}

Classifies a video clip and the Chinese words spoken in it as negative, neutral or positive.

```python
import senticlip
senticlip.load("RUN")("clip.mp4", text="…")
```

## Model

{chr(10).join(parts)}
* the full config: `experiment.yaml`

## Data and metrics

Trained on `{Path(data).name}` (protocol {config.protocol}, label {config.target}), seed {config.seed};
best epoch {result["best_epoch"]}, chosen by {config.train.metric} on valid:

| valid{", before calibration" if is_clip_ca_msa else ""} | |
|---|---|
{valid}

{LIMITS.format(calibrated=CALIBRATED if is_clip_ca_msa else UNCALIBRATED)}"""
