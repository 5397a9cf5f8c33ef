"""Encoders + network in one PreTrainedModel: save_pretrained, from_pretrained and push_to_hub work on any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from senticlip.config import Config, from_dict
from senticlip.encoders.text import TextEncoder
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


def train_part(module: nn.Module, how: str | int) -> None:
    """Let nothing, everything or the top k layers of an encoder learn, with what comes after them."""
    for parameter in module.parameters():
        parameter.requires_grad_(how == "full")
    if not isinstance(how, int):
        return
    layers = max(
        (m for m in module.modules() if isinstance(m, nn.ModuleList | nn.Sequential)), key=_weight, default=None
    )
    if layers is None or not 0 < how <= len(layers):
        raise UsageError(f"train: top {how} layers of an encoder that has {len(layers or [])}")
    names = {id(p) for p in layers[len(layers) - how].parameters()}
    learning = False
    for parameter in module.parameters():  # in the order of definition, which is the order of depth
        learning = learning or id(parameter) in names
        parameter.requires_grad_(learning)


def _weight(layers: nn.Module) -> tuple[bool, int]:
    """The stack of layers of an encoder: the list of several modules that holds most of the parameters."""
    return len(list(layers.children())) > 1, sum(p.numel() for p in layers.parameters())


class SentimentModel(PreTrainedModel):
    """``encode`` (token ids, pixels → features), then ``fuse`` (features → Output); ``forward`` does both.

    What is features already (float) passes the encoders, so cached features and raw input take one path.
    """

    config_class = SenticlipConfig
    main_input_name = "batch"

    def __init__(self, config: SenticlipConfig) -> None:
        super().__init__(config)
        from senticlip.models import network_class

        self.experiment = experiment = from_dict(config.experiment)
        encoders = config.encoders
        self.encoders = nn.ModuleDict()
        if "text" in encoders:
            part = encoders["text"]
            self.encoders["text"] = TextEncoder(part["spec"], experiment.text, experiment.prompt, part["prompt_length"])
        if "vision" in encoders:
            self.encoders["vision"] = VisionEncoder(encoders["vision"]["spec"])
        label = {"label": encoders["label"]} if "label" in encoders else {}
        self.network: Any = network_class(experiment.model)(experiment, dict(config.dims), **label)
        encoder: Any
        for name, encoder in self.encoders.items():
            how = getattr(experiment, name).train
            train_part(encoder.body, how)
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
        """
        path = Path(folder)
        if not path.is_dir():
            from senticlip.encoders.hub import fetch

            path = fetch(str(folder), "RUN")
        if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
            raise UsageError(
                f"{path}: no trained model here (config.json and model.safetensors) — senticlip train makes one"
            )
        config = SenticlipConfig.from_pretrained(path)
        if config.model_type != "senticlip" or config.format_version > FORMAT:
            raise UserError(
                f"{path}: format {config.format_version} of {config.model_type!r}; this senticlip reads up to {FORMAT}"
            )
        model = cls(config)
        try:
            model.load_state_dict(load_file(path / "model.safetensors"))
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"{path}/model.safetensors does not fit its config: {str(error).splitlines()[0]}") from None
        return model.eval()

    def train(self, mode: bool = True) -> SentimentModel:
        """What does not learn stays in eval mode: its dropout and its batch norms must not move."""
        super().train(mode)
        for encoder in self.encoders.values():
            for module in encoder.modules():
                parameters = list(module.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()
        return self

    def frozen(self, name: str) -> bool:
        """Whether this modality's encoder is there and nothing in it learns, so that its output may be cached."""
        return name in self.encoders and not any(p.requires_grad for p in self.encoders[name].parameters())

    def encode(self, batch: Batch) -> Batch:
        """Token ids and pixels → features by modality; modalities that the model does not use are dropped."""
        features = {}
        for name in self.experiment.modalities:
            if (sequence := batch.modalities.get(name)) is None:
                continue
            if sequence.values.is_floating_point():
                features[name] = sequence
            elif name in self.encoders:
                with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen(name)):
                    features[name] = self.encoders[name](Sequence(*sequence))
            else:
                raise UsageError(f"{name}: this model was trained on feature files and cannot read raw {name}")
        return Batch(features, batch.labels, batch.rows)

    def fuse(self, features: Batch, attention: bool = False) -> Output:
        """Features → Output."""
        return self.network(features, attention=attention)

    def forward(self, batch: Batch, attention: bool = False) -> Output:
        """Raw input or features → Output."""
        return self.fuse(self.encode(batch), attention)

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The network's loss and its parts for the log."""
        return self.network.loss(output, batch)
