"""The experiment: validated dataclasses, read from YAML and written back resolved. Does not import torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from reprlib import Repr
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from senticlip.configfile import parse_overrides, read
from senticlip.structures import MODALITIES, TARGETS, UsageError

Model = Literal["clip_ca_msa", "tfn", "lmf", "mult", "self_mm", "mmaf"]
"""The names in ``models.MODELS``, repeated here to avoid importing torch."""

FROM_FILE = ("features", "openface")
"""Values of ``encoder`` that read the modality from the data set's feature file (or OpenFace's CSVs) instead."""

SHARED_KEYS = {
    "text": ("text.encoder", "prompt", "text.prefix_length", "text.prefix_text"),
    "vision": ("vision.encoder",),
}
"""Keys, by modality, that must be the same in the main training and in a stage whose encoder it takes over."""

Trainable = Literal["frozen", "full"] | int
"""How much of an encoder is trained: nothing, everything, or its top k layers."""

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 80
short = _REPR.repr
"""A value shortened for messages."""

INF = math.inf
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("width", "heads", "layers", "text.train", "text.prefix_length", "vision.train"), (1, INF)),
    **dict.fromkeys(("vision.train_frames", "audio.average", "train.epochs", "train.batch_size"), (1, INF)),
    **dict.fromkeys(("train.accumulation", "train.patience"), (1, INF)),
    **dict.fromkeys(("text.lr", "vision.lr", "audio.lr", "label.lr", "train.lr", "train.scalar_lr"), (0, INF)),
    **dict.fromkeys(("focal_gamma", "vision.augment", "audio.own", "train.weight_decay", "train.clip_norm"), (0, INF)),
    **dict.fromkeys(("train.modality_dropout", "train.recombine", "train.mislead"), (0, 1)),
    **dict.fromkeys(("dropout", "train.warmup", "train.label_smoothing"), (0, 0.99)),
    "train.ema": (0, 0.99999),
    "seed": (0, 2**32 - 1),
    "text.max_length": (4, INF),
    "vision.frames": (1, 1000),
    "vision.size": (8, 4096),
    "audio.bands": (1, 128),
}
"""The range of each number, inclusive; all must be finite. Null and words (``frozen``) are not checked."""


@dataclass
class TextConfig:
    """PIFT: a prompt and a pretrained text encoder (any hub id or folder)."""

    encoder: str = "hfl/chinese-roberta-wwm-ext"
    pretrained: bool = True
    train: Trainable = "full"
    lr: float = 2e-5
    max_length: int = 64
    prefix_length: int = 8
    prefix_text: str = "这句话的情感是"


@dataclass
class VisionConfig:
    """Frames and their encoder (a Chinese-CLIP model or any timm network).

    ``cutaways: drop`` keeps only the frames of a clip's main shot, if that fills more than half of the clip. Dropped
    frames take no temporal position.
    """

    encoder: str = "OFA-Sys/chinese-clip-vit-base-patch16"
    pretrained: bool = True
    train: Trainable = "full"
    lr: float = 1e-5
    frames: int = 6
    size: int | None = None
    cutaways: Literal["keep", "drop"] = "keep"
    train_frames: int | None = None
    augment: float = 0.0


@dataclass
class AudioConfig:
    """Log-mel frames of 20 ms; a step is the mean of ``average`` frames; ``lr`` is for the input projection.

    ``own``: the weight, in clip_ca_msa's loss, of classifying the audio alone against its own label (A).
    """

    bands: int = 33
    average: int = 1
    lr: float = 1e-3
    own: float = 0.0


@dataclass
class LabelConfig:
    """The prompted class names (eq. 3) and their encoder.

    Without an ``encoder``: CLIP's text tower if the vision encoder is a CLIP model, else the text encoder.
    """

    encoder: str | None = None
    pretrained: bool = True
    prompt: str = "这段视频的情感是{}的"
    names: list[str] = field(default_factory=lambda: ["消极", "中性", "积极"])
    train: bool = False
    lr: float = 1e-5


@dataclass
class TrainConfig:
    """Training settings; ``lr`` is for all parameters without a learning rate of their own; ``compile``: for a GPU."""

    epochs: int = 20
    batch_size: int = 32
    accumulation: int = 1
    lr: float = 1e-4
    scalar_lr: float = 1e-2
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    metric: Literal["accuracy", "macro_f1", "weighted_f1", "nll"] = "macro_f1"
    patience: int = 8
    balance: Literal["none", "weights", "sampler"] = "none"
    ema: float = 0.0
    modality_dropout: float = 0.0
    recombine: float = 0.0
    mislead: float = 0.0


@dataclass
class Config:
    """One experiment: a model, its parts, its data protocol and its training.

    ``stages`` are trained first; each is a name and the dotted keys that differ (``{"text": {"modalities": ["text"],
    "target": "T", "train.epochs": 5}}``). Their trained encoders initialise the main training. With ``start``, a RUN
    of the same architecture, its weights do so instead.
    """

    model: Model = "clip_ca_msa"
    modalities: list[str] = field(default_factory=lambda: ["text", "vision"])
    target: str = "M"
    protocol: Literal["official", "tenth", "video"] = "official"
    temporal: Literal["transformer", "lstm", "mean"] = "transformer"
    fusion: Literal["cross-attention", "concat"] = "cross-attention"
    head: Literal["similarity", "linear"] = "similarity"
    loss: Literal["uncertainty", "sum"] = "uncertainty"
    prompt: Literal["learned", "discrete", "none"] = "learned"
    width: int = 512
    heads: int = 8
    layers: int = 1
    dropout: float = 0.1
    focal_gamma: float = 2.0
    seed: int = 0
    start: str | None = None
    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    options: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check numbers against RANGES, and fields against each other."""
        for key, (low, high) in RANGES.items():
            value = attrgetter(key)(self)
            if isinstance(value, int | float) and not (low <= value <= high and math.isfinite(value)):
                allowed = f"at least {low}" if high == INF else f"from {low} to {high}"
                raise UsageError(f"config key {key}: {short(value)} — must be {allowed}")
        self.modalities = ["vision" if name == "video" else name for name in self.modalities]
        unknown = [name for name in self.modalities if name not in MODALITIES]
        if unknown or not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise UsageError(f"modalities: {short(self.modalities)} — choose from {', '.join(MODALITIES)}, each once")
        if self.target not in TARGETS:
            raise UsageError(f"target: {short(self.target)} — choose one of {', '.join(TARGETS)}")
        if self.width % self.heads:
            raise UsageError(f"width: {self.width} is not divisible by heads: {self.heads}")
        if self.model == "clip_ca_msa" and self.options:
            raise UsageError(f"options: {', '.join(map(str, self.options))[:60]} — clip_ca_msa has none, only peers do")
        t = self.train
        if self.model == "self_mm" and (t.recombine or t.mislead or t.modality_dropout or t.balance == "sampler"):
            raise UsageError(
                "train: self_mm keeps a label per row — set recombine, mislead and modality_dropout to 0, "
                "and do not use balance: sampler"
            )
        if invalid := [name for name in self.stages if not re.fullmatch(r"\w[\w-]*", name)]:
            raise UsageError(f"stages: {short(invalid[0])} becomes a folder name — use only letters, digits, - and _")
        if "{}" not in self.label.prompt or len(self.label.names) != 3:
            raise UsageError("label.prompt needs a {} for the class name, and label.names needs three names")
        if self.prompt != "none" and not self.text.prefix_text.strip():
            raise UsageError("text.prefix_text is empty — give words that initialise the prompt, or set prompt: none")

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The resolved experiment as YAML, keys in order."""
        return yaml.safe_dump(self.to_dict(), allow_unicode=True, sort_keys=False)

    def override(self, changes: dict[str, Any]) -> Config:
        """A new config with dotted keys changed, as in ``{"text.lr": 1e-4}``; an unknown key raises UsageError."""
        data = self.to_dict()
        for key, value in dotted(changes).items():
            path = str(key).split(".")
            # a stage keeps its keys dotted, as written: it inherits the others from the main training
            path = [*path[:2], ".".join(path[2:])] if path[0] == "stages" and len(path) > 2 else path
            section = data
            for i, name in enumerate(path[:-1]):
                section = section.setdefault(name, {})
                if not isinstance(section, dict):
                    raise UsageError(f"unknown config key {key}: {'.'.join(path[: i + 1])} has no keys below it")
            section[path[-1]] = value
        return from_dict(data)

    def stage(self, name: str) -> Config:
        """The config of a stage; error messages about it begin with ``stages.NAME``."""
        try:
            stage = self.override({"stages": {}, **self.stages[name]})
        except UsageError as error:
            raise UsageError(f"stages.{name}: {error}") from None
        for key in ("seed", "protocol"):
            if getattr(stage, key) != getattr(self, key):
                raise UsageError(
                    f"stages.{name}: {key} must equal the main training's — otherwise the stage may train on test clips"
                )
        shared = {*self.modalities} & {*stage.modalities}
        for key in (key for modality in shared for key in SHARED_KEYS.get(modality, ())):
            if (value := attrgetter(key)(stage)) != (expected := attrgetter(key)(self)):
                raise UsageError(
                    f"stages.{name}: {key} is {value}, but {expected} in the main training — make them the same"
                )
        return stage


def dotted(changes: dict[str, Any]) -> dict[str, Any]:
    """``{"text": {"lr": 1}}`` as ``{"text.lr": 1}``, so that a partial section keeps its other keys."""
    sections = {field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.default_factory)}
    flat: dict[str, Any] = {}
    for key, value in changes.items():
        is_section = isinstance(value, dict) and key in sections
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if is_section else {key: value}
    return flat


def from_dict(data: dict[str, Any]) -> Config:
    """Build and check a Config from plain data; raise UsageError on an unknown key or a value of the wrong type."""
    return _build(Config, data, "")


def load(source: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and apply ``a.b=c`` overrides (their values are YAML, too).

    Raises:
        UsageError: no such file, not YAML, an unknown key, a wrong value, or conflicting settings (also in a stage).
    """
    return finish(from_file(source), overrides)


def from_file(source: str | Path) -> Config:
    """The config in a YAML file; its stages are not checked yet."""
    data = read(source)
    try:
        return from_dict(data)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None


def finish(config: Config, overrides: list[str] | None = None) -> Config:
    """Apply ``a.b=c`` overrides, and check the stages."""
    config = config.override(parse_overrides(overrides or []))
    for name in config.stages:
        config.stage(name)
    return config


def _build(cls: type, data: Any, prefix: str) -> Any:
    if not isinstance(data, dict):
        raise UsageError(f"config key {prefix.rstrip('.')}: expected keys below it, not {short(data)}")
    hints = get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in hints:
            matches = difflib.get_close_matches(str(key), hints, n=1)
            suggestion = f" — did you mean {prefix}{matches[0]}?" if matches else "."
            name = str(key) if len(str(key)) < 80 else short(key)
            raise UsageError(f"unknown config key {prefix}{name}{suggestion} Known: {', '.join(hints)}")
        values[key] = typed(hints[key], value, f"{prefix}{key}")
    return cls(**values)


def typed(kind: Any, value: Any, where: str) -> Any:
    """Convert ``value`` to ``kind``; raise UsageError, which says what was expected, if it does not fit."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build(kind, value, where + ".")
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (list, dict):
        if not isinstance(value, origin):
            raise UsageError(f"config key {where}: expected a {origin.__name__}, not {short(value)}")
        if origin is list:
            return [typed(parts[0], item, where) for item in value]
        inner = parts[1]  # the stages are dicts of dicts
        return {str(k): typed(inner, v, f"{where}.{k}") for k, v in value.items()} if get_origin(inner) else value
    options = [kind] if origin in (None, Literal) else parts
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is float and not isinstance(value, bool):
            # YAML 1.1 reads 1e-4 (no dot) as a string
            try:
                return float(value)
            except (TypeError, ValueError, OverflowError):
                continue
        if isinstance(option, type) and isinstance(value, option) and not (isinstance(value, bool) and option is int):
            return value
    choices: list[str] = []
    for option in options:
        choices += map(str, get_args(option)) if get_origin(option) is Literal else [option.__name__]
    allowed = ", ".join(choices).replace("NoneType", "null")
    raise UsageError(f"config key {where}: {short(value)} is not one of {allowed}")
