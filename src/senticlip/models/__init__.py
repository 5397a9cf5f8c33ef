"""The models by name; all have the same interface, ``Batch → Output``."""

from __future__ import annotations

from typing import Any

import torch

from senticlip.config import FROM_FILE, Config, dotted
from senticlip.encoders import text as text_encoder
from senticlip.encoders import vision as vision_encoder
from senticlip.models.base import SenticlipConfig, SentimentModel
from senticlip.models.clip_ca_msa import ClipCaMsa
from senticlip.models.lmf import LMF
from senticlip.models.mmaf import MMAF
from senticlip.models.mult import MulT
from senticlip.models.self_mm import SelfMM
from senticlip.models.tfn import TFN
from senticlip.structures import UsageError

MODELS: dict[str, Any] = {
    "clip_ca_msa": ClipCaMsa,
    "tfn": TFN,
    "lmf": LMF,
    "mult": MulT,
    "self_mm": SelfMM,
    "mmaf": MMAF,
}
"""The networks by name; ``config.Model`` must list the same names."""

TRAINING = (
    *("target", "protocol", "seed", "start", "stages", "dropout", "focal_gamma", "train."),
    *("text.train", "text.lr", "vision.train", "vision.lr", "vision.augment", "audio.lr", "label.lr"),
)
"""Prefixes of the config keys that set how a model is trained, not its architecture."""


def create_model(config: Config, dims: dict[str, int] | None = None) -> SentimentModel:
    """A model with pretrained encoders (or random ones, if the config says so) and a new network.

    With ``config.start``, all weights come from that RUN instead.

    Args:
        config: the experiment.
        dims: feature widths of the modalities that come as features (feature files, audio) and need no encoder.

    Raises:
        UsageError: an encoder cannot be found, or parts do not fit together or do not match ``start``.
    """
    widths = {name: width for name, width in (dims or {}).items() if name in config.modalities}
    if config.start is not None:
        return _continue_from_run(config, widths)
    parts: dict[str, Any] = {}
    folders: dict[str, Any] = {}
    tokens: dict[str, torch.Tensor] = {}
    tokenizer = None
    if "text" in config.modalities and "text" not in widths:
        spec, folders["text"] = text_encoder.text_spec(config.text)
        tokenizer = text_encoder.load_tokenizer(folders["text"], random=not config.text.pretrained)
        tokens["prompt"] = _token_ids(tokenizer, config.text.prefix_text)
        if config.prompt != "none" and not len(tokens["prompt"]):
            raise UsageError(f"text.prefix_text: {config.text.prefix_text!r} has no token in this encoder's tokenizer")
        parts["text"] = {"spec": spec, "prompt_length": len(tokens["prompt"])}
    if "vision" in config.modalities and "vision" not in widths:
        spec, folders["vision"] = vision_encoder.vision_spec(config.vision)
        parts["vision"] = {"spec": spec}
    if config.model == "clip_ca_msa" and config.head == "similarity" and "vision" in config.modalities:
        parts["label"], folders["label"], tokens["label"], tokens["label_mask"] = _label_part(config, parts)
    missing = [name for name in config.modalities if name not in widths and name not in parts]
    if missing:
        raise UsageError(f"modalities: {', '.join(missing)} has neither an encoder nor features here")
    if "text" in parts:
        widths["text"] = text_encoder.spec_width(parts["text"]["spec"])
    if "vision" in parts:
        widths["vision"] = parts["vision"]["spec"]["dim"]
    model = SentimentModel(SenticlipConfig(config.to_dict(), parts, widths))
    model.tokenizer = tokenizer
    _initialize(model, parts, folders, tokens)
    return model


def _continue_from_run(config: Config, widths: dict[str, int]) -> SentimentModel:
    """The model of the RUN ``config.start``, to be trained with ``config``; buffers fitted to the data are reset."""
    saved = SentimentModel.from_pretrained(str(config.start))
    old, new = _architecture(saved.experiment), _architecture(config)
    for name, width in widths.items():  # of features only: an encoder brings its own
        old[f"width of {name}"], new[f"width of {name}"] = saved.config.dims.get(name), width
    for key, value in new.items():
        if old[key] != value:
            raise UsageError(f"start: {key} is {old[key]} in {config.start}, {value} here — use its experiment.yaml")
    model = SentimentModel(SenticlipConfig(config.to_dict(), saved.config.encoders, saved.config.dims))
    model.load_state_dict(saved.state_dict())
    model.tokenizer = saved.tokenizer
    for name, buffer in model.network.named_buffers(recurse=False):
        if name in ("temperature", "class_weights"):
            buffer.fill_(1)
    return model


def _architecture(config: Config) -> dict[str, Any]:
    return {key: value for key, value in dotted(config.to_dict()).items() if not key.startswith(TRAINING)}


def _token_ids(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)


def _label_part(config: Config, parts: dict[str, Any]) -> tuple[dict[str, Any], Any, torch.Tensor, torch.Tensor]:
    """Spec and shape, weights folder (None: random), prompt ids and mask of the label encoder set in LabelConfig."""
    label = config.label
    source: Any
    key, source = "label.encoder", label
    if label.encoder is None:
        is_clip = parts.get("vision", {}).get("spec", {}).get("kind") == "chinese_clip"
        key, source = ("vision.encoder", config.vision) if is_clip else ("text.encoder", config.text)
    if source.encoder in FROM_FILE:
        raise UsageError(
            "head: similarity needs an encoder that reads the labels — set label.encoder=FOLDER or head=linear"
        )
    spec, folder = text_encoder.text_spec(source, key)
    prompts: list[str | None] = [label.prompt.replace("{}", str(name)) for name in label.names]
    weights = folder if label.pretrained and source.pretrained else None
    ids, mask = text_encoder.tokenize(text_encoder.load_tokenizer(folder, random=weights is None), prompts, 52)
    if len({tuple(row) for row in ids.tolist()}) < len(prompts):
        cause = "the same name, unknown words, or more than 52 tokens"
        raise UsageError(f"label.names, label.prompt: two labels look the same to the encoder ({cause}) — change them")
    return {"spec": spec, "shape": list(ids.shape)}, weights, ids, mask


def _initialize(
    model: SentimentModel, parts: dict[str, Any], folders: dict[str, Any], tokens: dict[str, torch.Tensor]
) -> None:
    """Load pretrained weights, initialise the prompt and encode the label prompts."""
    if "text" in parts:
        encoder: Any = model.encoders["text"]
        if folders["text"] is not None and model.experiment.text.pretrained:
            encoder.body.load_state_dict(text_encoder.load_body(folders["text"]).state_dict())
        encoder.start_prompt(tokens["prompt"])
    if "vision" in parts and folders["vision"] is not None:
        model.encoders["vision"].load_folder(folders["vision"])  # type: ignore[operator]
    if "label" in parts:
        model.network.labels.start(parts["label"]["spec"], folders["label"], tokens["label"], tokens["label_mask"])
