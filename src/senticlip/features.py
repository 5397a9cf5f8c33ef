"""Clips → an MMSA-style feature file (text, audio, vision) on which our models and MMSA's can be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from senticlip import runtime
from senticlip.config import Config
from senticlip.data.audio import audio_store
from senticlip.data.loader import Rows
from senticlip.data.mmsa import LABELS, write_features
from senticlip.data.sims import read_clips
from senticlip.data.table import SPLITS
from senticlip.encoders.text import tokenize
from senticlip.models import create_model
from senticlip.models.base import SentimentModel
from senticlip.sources import cache_root, clip_set, ready_made
from senticlip.structures import LABELS as CLASSES
from senticlip.structures import Clip, UsageError, UserError, polarity

OTHER_FORMATS = (".npz", ".npy", ".h5", ".json", ".csv", ".parquet")
AUDIO_STEPS = 400
"""The audio length in MMSA's CH-SIMS features; longer audio is averaged down to it."""


def features(
    data: str | Path,
    out: str | Path,
    config: Config,
    protocol: str | None = None,
    device: str | None = None,
    run: str | Path | None = None,
) -> dict[str, Any]:
    """Write the features of all clips of a data set.

    Text: the states of ``config.text.encoder`` (frozen, with its discrete prompt or none). Vision: the states of
    ``config.vision.encoder`` for each frame. Audio: 33 log-mel bands (MMSA's own are 33 LibROSA columns: F0, MFCC,
    CQT), at most 400 steps.

    Args:
        data: a CH-SIMS folder, or your own CSV.
        out: the pickle to write.
        config: selects the encoders.
        protocol: official, tenth or video, which assigns clips to splits; by default the config's, or RUN's.
        device: cpu, cuda, cuda:N.
        run: a RUN whose trained encoders are used instead, including a learned prompt.

    Returns:
        ``{"clips": …, "file": …}``

    Raises:
        UsageError: ``out`` has the suffix of another format, RUN reads feature files or only audio, or as
            for ``read_clips`` and the encoders. UserError: a clip has no label or no split.
    """
    if Path(out).suffix.lower() in OTHER_FORMATS:
        raise UsageError(f"--out {out}: a feature file is a pickle — give a name that ends in .pkl")
    model = _pretrained_model(config) if run is None else SentimentModel.from_pretrained(run)
    config = model.experiment
    if not model.encoders or {*ready_made(config)} - {"audio"}:
        raise UsageError(f"--run {run}: reads a modality without an encoder, or only sound — choose another RUN")
    clips = read_clips(data, None, protocol or config.protocol, config.seed)
    incomplete = [clip for clip in clips if "M" not in clip.labels or clip.split is None]
    if incomplete:
        raise UserError(
            f"{data}, row {incomplete[0].row}: {incomplete[0].id} has no label or no split — a feature file needs both"
        )
    model = model.to(runtime.device(device)).requires_grad_(False).eval()
    dataset = clip_set(clips, model)
    stores = {**dataset.stores, "audio": audio_store(clips, config.audio.bands, cache_root())}
    splits = {}
    for split in SPLITS:
        indices = np.array([i for i, clip in enumerate(clips) if clip.split == split], dtype=np.int64)
        chosen = [clips[i] for i in indices]
        splits[split] = {
            "id": [clip.id.replace("/", "$_$") for clip in chosen],
            "raw_text": [clip.text or "" for clip in chosen],
            **_tokens(model.tokenizer, chosen, config.text.max_length),
            **_labels(chosen),
        }
        for name, store in stores.items():
            width = config.audio.bands if name == "audio" else model.encoders[name].dim
            splits[split] |= _padded(name, store, indices, width, AUDIO_STEPS if name == "audio" else None)
    write_features(out, splits)
    return {"clips": len(clips), "file": str(out)}


def _pretrained_model(config: Config) -> SentimentModel:
    """A model with the pretrained encoders of a config; its (small) network is not used."""
    prompt = "none" if config.prompt == "none" else "discrete"
    frozen = {"text.train": "frozen", "vision.train": "frozen"}
    lmf = {"model": "lmf", "modalities": ["text", "vision"], "stages": {}, "options": {}}
    return create_model(config.override({**lmf, **frozen, "prompt": prompt}))


def _padded(name: str, store: Rows, indices: np.ndarray, width: int, max_steps: int | None) -> dict[str, Any]:
    """Rows → values N×L×width float32, zero-padded, and lengths."""
    rows = []
    for index in indices:
        values, mask = store.gather(np.array([index]))
        row = values[0][mask[0]].astype(np.float32)
        if max_steps and len(row) > max_steps:
            row = np.stack([part.mean(0) for part in np.array_split(row, max_steps)])
        rows.append(row)
    values = np.zeros((len(rows), max([1, *map(len, rows)]), width), np.float32)
    for i, row in enumerate(rows):
        values[i, : len(row)] = row
    return {name: values, f"{name}_lengths": [len(row) for row in rows]}


def _tokens(tokenizer: Any, clips: list[Clip], max_length: int) -> dict[str, np.ndarray]:
    """Ids, mask and token types N×3×n (input for MMSA's BERT if it has these tokens); empty without a tokenizer."""
    if tokenizer is None:
        return {}
    ids, mask = tokenize(tokenizer, [clip.text for clip in clips], max_length)
    return {"text_bert": np.stack([ids.numpy(), mask.numpy(), np.zeros_like(ids.numpy())], 1).astype(np.float32)}


def _labels(clips: list[Clip]) -> dict[str, Any]:
    """Label scores; T, A or V is left out if no clip of the split has it; a clip that lacks one gets its M instead."""
    scores = {}
    for target, key in LABELS.items():
        if target == "M" or any(target in clip.labels for clip in clips):
            scores[key] = np.array([clip.labels.get(target, clip.labels["M"]) for clip in clips], np.float32)
    classes = [polarity(clip.labels["M"]) for clip in clips]
    return {
        **scores,
        "classification_labels": np.array(classes, np.float32),
        "annotations": [CLASSES[c].capitalize() for c in classes],
    }
