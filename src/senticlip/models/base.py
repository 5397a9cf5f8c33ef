"""Encoders + network in one PreTrainedModel: save_pretrained, from_pretrained and push_to_hub work on any of them."""

from __future__ import annotations

import os
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
from senticlip.structures import Batch, Output, Sequence, UsageError, UserError

FORMAT = 1


class SenticlipConfig(PreTrainedConfig):
    """The experiment, the specs that rebuild its encoders offline, the feature width of each modality."""

    model_type = "senticlip"

    def __init__(
        self,
        experiment: dict[str, Any] | None = None,
        encoders: dict[str, Any] | None = None,
        dims: dict[str, int] | None = None,
        format_version: int = FORMAT,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.experiment = experiment or Config().to_dict()
        self.encoders = encoders or {}
        self.dims = dims or {}
        self.format_version = format_version


def train_part(module: nn.Module, how: str | int, key: str = "train") -> None:
    """Let nothing, everything or the top k layers of an encoder learn, with what comes after them.

    Raises:
        UsageError: it has fewer layers.
    """
    for parameter in module.parameters():
        parameter.requires_grad_(how == "full")
    if not isinstance(how, int):
        return
    layers = _layers(module)
    if not 0 < how <= len(layers):
        raise UsageError(f"{key}: top {how} layers of an encoder that has {len(layers)}")
    names = {id(p) for p in layers[len(layers) - how].parameters()}
    learning = False
    for parameter in module.parameters():  # in the order of definition, which is the order of depth
        learning = learning or id(parameter) in names
        parameter.requires_grad_(learning)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The layers of an encoder: the stack of several that holds most of the parameters; ALBERT has one layer only."""
    stacks = [stack for part in module.modules() if (stack := _stack(part))]
    return max(stacks, key=lambda stack: (len(stack) > 1, sum(map(_size, stack))), default=[])


def _stack(module: nn.Module) -> list[nn.Module]:
    """The layers of a module, one after the other: a list's items, or lists of a kind side by side (ResNet's layer1 …
    layer4, but not its stem)."""
    lists = nn.ModuleList | nn.Sequential
    parts = [part for part in module.children() if _size(part)]  # an activation is no layer
    if isinstance(module, lists):
        return parts
    kinds: dict[type, list[nn.Module]] = {}
    for part in parts:
        if isinstance(part, lists):
            kinds.setdefault(type(part[0]), []).append(part)
    return max(kinds.values(), key=lambda kind: sum(map(_size, kind)), default=[])


def _rest(module: nn.Module) -> None:
    """Put the parts in which nothing learns into eval mode."""
    learning = {parameter.requires_grad for parameter in module.parameters()}
    if learning == {False}:
        module.eval()
    elif False in learning:
        for child in module.children():
            _rest(child)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def run_folder(run: str | Path) -> Path:
    """The local folder of a RUN: itself, or the snapshot of a hub id.

    Raises:
        UsageError: neither.
    """
    if Path(run).is_dir():
        return Path(run)
    return hub.fetch(str(run), "RUN", "give a folder that senticlip train wrote")


def only(features: Batch, kept: Collection[str]) -> Batch:
    """The same rows with some modalities, the others masked."""
    parts = features.modalities.items()
    masked = {name: s if name in kept else Sequence(s.values, torch.zeros_like(s.mask)) for name, s in parts}
    return Batch(masked, features.labels, features.rows)


class SentimentModel(PreTrainedModel):
    """``encode`` (token ids, pixels → features), then ``fuse`` (features → Output); ``forward`` does both.

    What is features already (float) passes the encoders, so cached features and raw input take one path.
    ``tokenizer`` is what its text encoder reads with (None without one); it is saved, loaded and pushed with the model.
    """

    config_class = SenticlipConfig
    main_input_name = "batch"

    def __init__(self, config: SenticlipConfig) -> None:
        super().__init__(config)
        from senticlip.models import MODELS

        self.tokenizer: Any = None
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
            train_part(encoder.body, how, f"{name}.train")
            if how == "frozen" and (name == "vision" or self._settled(name)):
                encoder.requires_grad_(False)
        self.post_init()

    def _settled(self, name: str) -> bool:
        """Whether a frozen text encoder's prompt rests, too: a stage has taught it, or the network is a peer."""
        experiment = self.experiment
        staged = any(name in experiment.stage(stage).modalities for stage in experiment.stages)
        return staged or experiment.model != "clip_ca_msa"

    def _init_weights(self, module: nn.Module) -> None:
        """Every part has set its own weights when it was built."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> SentimentModel:  # type: ignore[override]
        """Load a saved model from a folder or a hub id, exactly: every parameter and buffer, or an error.

        transformers' own loader builds on ``meta`` and leaves what a file lacks as uninitialised memory.

        Raises:
            UsageError: no such folder or hub id, no model in it. UserError: a file of it is broken or missing.
        """
        path = run_folder(folder)
        if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
            raise UsageError(
                f"{path}: no trained model here (config.json and model.safetensors) — senticlip train makes one"
            )
        model = cls._described(path)
        if not os.access(path / "model.safetensors", os.R_OK):
            raise UserError(f"{path}/model.safetensors: cannot be read (permission denied) — ask its owner")
        try:
            model.load_state_dict(load_file(path / "model.safetensors"))
        except (RuntimeError, OSError, ValueError, SafetensorError) as error:
            lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
            reason = lines[:2][-1][:200]  # torch tells below a heading which keys are wrong
            file = path / "model.safetensors"
            raise UserError(f"{file}: broken, or not its config's ({reason}) — copy it again") from None
        if "text" in model.encoders:
            model.tokenizer = load_tokenizer(path / "tokenizer")
            encoder: Any = model.encoders["text"]
            words, known = model.tokenizer.vocab_size, encoder.body.get_input_embeddings().num_embeddings
            if words > known:
                told = f"{words} words, the model has {known}"
                raise UserError(f"{path}/tokenizer: {told} — copy it again, it is another model's")
        return model.eval()

    @classmethod
    def _described(cls, path: Path) -> SentimentModel:
        """The architecture that a folder's config.json describes."""
        try:
            config = SenticlipConfig.from_pretrained(path)
            if config.model_type != "senticlip" or config.format_version > FORMAT:
                raise UserError(
                    f"format {config.format_version} of {config.model_type!r}; this senticlip reads up to {FORMAT}"
                )
            return cls(config)
        except UserError as error:
            raise UserError(f"{path}/config.json: {error}") from None
        except Exception as error:
            # a broken description can fail anywhere
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise UserError(f"{path}/config.json: describes no model ({reason}) — copy it again") from error

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config, weights and, in ``tokenizer/``, the tokenizer; ``push_to_hub`` sends what this writes."""
        super().save_pretrained(save_directory, **kwargs)
        for weights in Path(save_directory).glob("*.safetensors"):  # which safetensors lets nobody else read
            weights.chmod((Path(save_directory) / "config.json").stat().st_mode)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(Path(save_directory) / "tokenizer")

    def train(self, mode: bool = True) -> SentimentModel:
        """What does not learn stays in eval mode: its dropout and its batch norms must not move."""
        super().train(mode)
        for encoder in self.encoders.values():
            _rest(encoder)
        return self

    def frozen(self, name: str) -> bool:
        """Whether this modality's encoder is there and nothing in it learns, so that its output may be cached."""
        return name in self.encoders and not any(p.requires_grad for p in self.encoders[name].parameters())

    def compile_encoders(self) -> None:
        """Have torch.compile fuse what the encoders do, in place; the weights stay where and what they are.

        Each layer: one graph serves all of a kind, which takes seconds, not a minute; those of text, for any length.
        """
        torch._dynamo.config.recompile_limit = 64  # kinds of layers × learning or not × shapes; beyond it all is slow
        for name, encoder in self.encoders.items():
            for part in _layers(encoder.get_submodule("body")):
                part.compile(dynamic=True if name == "text" else None)

    def encode(self, batch: Batch) -> Batch:
        """Token ids and pixels → features by modality; modalities that the model does not use are dropped."""
        features = {}
        # frames first: a GPU is busy with them while it is told the rest
        for name in sorted(self.experiment.modalities, key=lambda name: name != "vision"):
            if (sequence := batch.modalities.get(name)) is None:
                continue
            if sequence.values.is_floating_point():
                features[name] = sequence
            elif name in self.encoders:
                with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen(name)):
                    features[name] = self.encoders[name](Sequence(*sequence))
            else:
                raise UsageError(f"{name}: this model was trained on feature files and cannot read raw {name}")
        ordered = {name: features[name] for name in self.experiment.modalities if name in features}
        return Batch(ordered, batch.labels, batch.rows)

    def fuse(self, features: Batch, attention: bool = False) -> Output:
        """Features → Output."""
        return self.network(features, attention=attention)

    def forward(self, batch: Batch, attention: bool = False, alone: bool = False) -> Output:
        """Raw input or features → Output."""
        features = self.encode(batch)
        output = self.fuse(features, attention)
        if not alone:
            return output
        said = {name: one.log_probs for name, one in self.alone(features).items() if one.log_probs is not None}
        return output._replace(alone=said)

    def alone(self, features: Batch) -> dict[str, Output]:
        """What is answered with all modalities but one taken away, by that one; encoded once, fused for each."""
        return {name: self.fuse(only(features, [name])) for name in features.modalities}

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The network's loss and its parts for the log."""
        return self.network.loss(output, batch)
