"""Encoders and network in one PreTrainedModel, for save_pretrained, from_pretrained and push_to_hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from senticlip.config import Config, from_dict
from senticlip.encoders import hub
from senticlip.encoders.text import TextEncoder, load_tokenizer
from senticlip.encoders.vision import VisionEncoder
from senticlip.structures import MODALITIES, Batch, Output, Sequence, UsageError, UserError

FORMAT = 1


class SenticlipConfig(PreTrainedConfig):
    """The experiment, specs to rebuild its encoders offline, and the feature width of each modality."""

    model_type = "senticlip"

    def __init__(
        self,
        experiment: dict[str, Any] | None = None,
        encoders: dict[str, Any] | None = None,
        dims: dict[str, int] | None = None,
        format_version: int = FORMAT,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{name: value for name, value in kwargs.items() if not hub.is_code(name)})
        self.experiment = experiment or Config().to_dict()
        self.encoders = encoders or {}
        self.dims = dims or {}
        self.format_version = format_version


def set_trainable_layers(module: nn.Module, how: str | int, key: str = "train") -> None:
    """Set which parameters of an encoder are trained: "frozen" none, "full" all, k the top k layers and all after them.

    Raises:
        UsageError: the encoder has fewer than k layers.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(how == "full")
    if not isinstance(how, int):
        return
    layers = _layers(module)
    if not 0 < how <= len(layers):
        raise UsageError(f"{key}: top {how} layers, but the encoder has {len(layers)}")
    first = {id(p) for p in layers[len(layers) - how].parameters()}
    reached = False
    for parameter in module.parameters():  # definition order is depth order
        reached = reached or id(parameter) in first
        parameter.requires_grad_(reached)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The layers of an encoder: its stack of modules with the most parameters, preferring stacks of several layers."""
    stacks = [stack for part in module.modules() if (stack := _stack(part))]
    return max(stacks, key=lambda stack: (len(stack) > 1, sum(map(_count_parameters, stack))), default=[])


def _stack(module: nn.Module) -> list[nn.Module]:
    """The layers of one module: the items of a list, or sibling lists of one kind (as ResNet's layer1 … layer4)."""
    lists = nn.ModuleList | nn.Sequential
    parts = [part for part in module.children() if _count_parameters(part)]  # modules without parameters are not layers
    if isinstance(module, lists):
        return parts
    kinds: dict[type, list[nn.Module]] = {}
    for part in parts:
        if isinstance(part, lists):
            kinds.setdefault(type(part[0]), []).append(part)
    return max(kinds.values(), key=lambda kind: sum(map(_count_parameters, kind)), default=[])


def _eval_frozen(module: nn.Module) -> None:
    """Put submodules without trainable parameters into eval mode."""
    trainable = {parameter.requires_grad for parameter in module.parameters()}
    if trainable == {False}:
        module.eval()
    elif False in trainable:
        for child in module.children():
            _eval_frozen(child)


def _count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def run_folder(run: str | Path) -> Path:
    """The local folder of a RUN: the folder itself, or the snapshot of a hub id.

    Raises:
        UsageError: it is neither.
    """
    if Path(run).is_dir():
        return Path(run)
    return hub.fetch(str(run), "RUN", "give a folder written by senticlip train")


def keep_modalities(features: Batch, kept: Collection[str]) -> Batch:
    """The same rows with only the modalities ``kept``; each other one becomes a single masked position."""
    parts = features.modalities.items()
    masked = {name: Sequence(s.values[:, :1], torch.zeros_like(s.mask[:, :1])) for name, s in parts if name not in kept}
    return Batch({**features.modalities, **masked}, features.labels, features.rows)


class SentimentModel(PreTrainedModel):
    """``encode`` (token ids, pixels → features), then ``fuse`` (features → Output); ``forward`` does both.

    Float input counts as features and skips the encoders, so cached features and raw input share one path.
    ``tokenizer`` is the text encoder's (None without one); it is saved, loaded and pushed with the model.
    """

    config_class = SenticlipConfig
    main_input_name = "batch"

    def __init__(self, config: SenticlipConfig) -> None:
        super().__init__(config)
        from senticlip.models import MODELS

        self.tokenizer: Any = None
        self.card: Path | None = None  # the model card of the RUN it was loaded from
        self.experiment = experiment = from_dict(config.experiment)
        encoders = config.encoders
        self.encoders = nn.ModuleDict()
        if "text" in encoders:
            part = encoders["text"]
            self.encoders["text"] = TextEncoder(part["spec"], experiment.text, experiment.prompt, part["prompt_length"])
        if "vision" in encoders:
            sampled = experiment.vision.train_frames is not None
            self.encoders["vision"] = VisionEncoder(encoders["vision"]["spec"], sampled)
        label = {"label": encoders["label"]} if "label" in encoders else {}
        self.network: Any = MODELS[experiment.model](experiment, dict(config.dims), **label)
        encoder: Any
        for name, encoder in self.encoders.items():
            how = getattr(experiment, name).train
            set_trainable_layers(encoder.body, how, f"{name}.train")
            if how == "frozen" and (name == "vision" or self._prompt_is_frozen(name)):
                encoder.requires_grad_(False)
        self.post_init()

    def _prompt_is_frozen(self, name: str) -> bool:
        """Whether a frozen encoder's prompt is frozen too: a stage has trained it, or the network is a peer."""
        experiment = self.experiment
        staged = any(name in experiment.stage(stage).modalities for stage in experiment.stages)
        return staged or experiment.model != "clip_ca_msa"

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: every part initialises its own weights."""

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SentimentModel:  # type: ignore[override]
        """Load a saved model from a folder or a hub id, exactly: every parameter and buffer, or an error.

        transformers' own loader builds on ``meta`` and leaves tensors missing from the file uninitialised. Its options
        (``dtype``, ``revision`` and so on) are rejected rather than silently ignored.

        Raises:
            UsageError: no such folder or hub id, or no model in it. UserError: a file in it is broken or missing.
        """
        path = run_folder(folder)
        if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
            raise UsageError(
                f"{path}: no trained model here (config.json and model.safetensors) — create one with senticlip train"
            )
        model = cls._build_from_folder(path)
        if not os.access(path / "model.safetensors", os.R_OK):
            raise UserError(f"{path}/model.safetensors: cannot be read (permission denied) — ask its owner")
        try:
            model.load_state_dict(load_file(path / "model.safetensors"))
        except (RuntimeError, OSError, ValueError, SafetensorError) as error:
            lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
            reason = lines[:2][-1][:200]  # torch lists the mismatched keys below a heading
            file = path / "model.safetensors"
            raise UserError(f"{file}: broken, or does not match its config ({reason}) — copy it again") from None
        model.card = path / "README.md"
        if "text" in model.encoders:
            model.tokenizer = load_tokenizer(path / "tokenizer")
            encoder: Any = model.encoders["text"]
            vocabulary, embeddings = len(model.tokenizer), encoder.body.get_input_embeddings().num_embeddings
            if vocabulary > embeddings:
                problem = f"{vocabulary} words, but the model has {embeddings}"
                raise UserError(f"{path}/tokenizer: {problem} — copy it again, it belongs to another model")
        return model.eval()

    @classmethod
    def _build_from_folder(cls, path: Path) -> SentimentModel:
        """The model that a folder's config.json describes, without loading its weights."""
        try:
            config = SenticlipConfig.from_pretrained(path)
            if config.model_type != "senticlip" or config.format_version > FORMAT:
                raise UserError(
                    f"format {config.format_version} of {config.model_type!r}; this version reads up to {FORMAT}"
                )
            with torch.random.fork_rng(devices=[]):  # keeps the caller's random state
                return cls(config)
        except UserError as error:
            raise UserError(f"{path}/config.json: {error}") from None
        except Exception as error:
            # a broken config can fail anywhere
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise UserError(f"{path}/config.json: not a valid model config ({reason}) — copy it again") from error

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config, weights and, in ``tokenizer/``, the tokenizer; ``push_to_hub`` uploads this."""
        super().save_pretrained(save_directory, **{**kwargs, "max_shard_size": 1 << 50})  # one file: no shards are read
        for weights in Path(save_directory).glob("*.safetensors"):  # safetensors makes them readable only by the owner
            weights.chmod((Path(save_directory) / "config.json").stat().st_mode)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(Path(save_directory) / "tokenizer")

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Upload our model card instead of transformers' empty template; a card already on the hub stays."""
        card = Path(working_dir) / "README.md"
        empty = not card.exists() or "[More Information Needed]" in card.read_text(encoding="utf-8")
        if empty and self.card is not None and self.card.is_file():
            shutil.copyfile(self.card, card)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def train(self, mode: bool = True) -> SentimentModel:
        """As in torch, but frozen parts stay in eval mode: no dropout, fixed batch-norm statistics."""
        super().train(mode)
        for encoder in self.encoders.values():
            _eval_frozen(encoder)
        return self

    def frozen(self, name: str) -> bool:
        """Whether this modality has an encoder without trainable parameters, whose output can be cached."""
        return name in self.encoders and not any(p.requires_grad for p in self.encoders[name].parameters())

    def compile_encoders(self) -> None:
        """Compile the encoders in place with torch.compile, layer by layer; parameters keep their names.

        All layers of a kind share one graph, which takes seconds, not a minute. Text layers accept any length.
        """
        torch._dynamo.config.recompile_limit = 64  # layer kinds × frozen or not × shapes; beyond it, uncompiled
        for name, encoder in self.encoders.items():
            for layer in _layers(encoder.get_submodule("body")):
                layer.compile(dynamic=True if name == "text" else None)

    def encode(self, batch: Batch) -> Batch:
        """Token ids and pixels → features by modality; modalities that the model does not use are dropped.

        Raises:
            UsageError: an unknown modality, or raw input of a modality for which the model has no encoder.
        """
        if unknown := sorted(batch.modalities.keys() - {*MODALITIES}):
            raise UsageError(f"{unknown[0]}: not a modality — choose from {', '.join(MODALITIES)}")
        features = {}
        # frames first: they keep the GPU busy while the CPU launches the rest
        for name in sorted(self.experiment.modalities, key=lambda name: name != "vision"):
            if (sequence := batch.modalities.get(name)) is None:
                continue
            if sequence.values.is_floating_point():
                features[name] = sequence
            elif name in self.encoders:
                with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen(name)):
                    features[name] = self.encoders[name](sequence)
            else:
                raise UsageError(f"{name}: this model was trained on feature files and cannot read raw {name}")
        ordered = {name: features[name] for name in self.experiment.modalities if name in features}
        return Batch(ordered, batch.labels, batch.rows)

    def fuse(self, features: Batch, attention: bool = False) -> Output:
        """Features B×L×d by modality → Output."""
        return self.network(features, attention=attention)

    def forward(self, batch: Batch, attention: bool = False, alone: bool = False) -> Output:
        """Raw input or features by modality → Output; with ``alone``, also for each modality on its own."""
        features = self.encode(batch)
        output = self.fuse(features, attention)
        if not alone:
            return output
        log_probs = {name: one.log_probs for name, one in self.alone(features).items() if one.log_probs is not None}
        return output._replace(alone=log_probs)

    def alone(self, features: Batch) -> dict[str, Output]:
        """The output for each modality of ``features`` on its own."""
        return {name: self.fuse(keep_modalities(features, [name])) for name in features.modalities}

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The network's loss (a scalar), and its parts by name for the log."""
        return self.network.loss(output, batch)
