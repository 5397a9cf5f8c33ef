"""Splits a frame encoder at the layer whose channels a heat map weights, into the parts before and after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from senticlip.encoders.vision import VisionEncoder
from senticlip.structures import UsageError


class Split(nn.Module):
    """A frame encoder split at the explained layer: ``before`` computes its activations, ``after`` continues from them.

    ``layer`` is an Identity that the activations (N×C×h×w or N×tokens×C) pass through, for grad-cam's hooks.

    Raises:
        UsageError: the network is neither a plain ViT nor ends with feature maps.
    """

    def __init__(self, encoder: VisionEncoder) -> None:
        super().__init__()
        self.encoder, self.body = encoder, encoder.body
        self.layer = nn.Identity()
        self.block: Any = None
        self.norm: Any = None
        self.last_map = getattr(self.body, "output_fmt", "NCHW")
        self.prefix = 1
        if encoder.kind == "chinese_clip":
            self.block = self.body.encoder.layers[-1]
            self.norm = self.block.layer_norm1
        elif is_vit(self.body):
            self.block = self.body.blocks[-1]
            self.norm, self.prefix = self.block.norm1, self.body.num_prefix_tokens
        elif not hasattr(self.body, "forward_features"):
            raise UsageError(f"no heat maps for {type(self.body).__name__}: neither a ViT nor a CNN")
        self.stage = None if self.block is not None else last_stage(self.body)

    def before(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised images N×3×S×S → the activations, and a ViT's residual stream, which bypasses them (else None)."""
        if self.block is None:
            feature_map = self._feature_map(images.contiguous(memory_format=torch.channels_last))
            if feature_map.ndim != 4:
                raise UsageError(f"no heat maps for {type(self.body).__name__}: neither a ViT nor a CNN")
            return feature_map, None
        captured: list[Tensor] = []
        handle = self.norm.register_forward_hook(lambda module, inputs, output: captured.extend((output, inputs[0])))
        try:
            self.encoder.images(images)
        finally:
            handle.remove()
        return captured[0], captured[1]

    def _feature_map(self, images: Tensor) -> Tensor:
        """The feature map of ``stage``; or the network's last, if the modules after the stage are not a plain chain."""
        if self.stage is None:
            return self.body.forward_features(images)
        captured: list[Tensor] = []
        handle = self.body.get_submodule(self.stage).register_forward_hook(lambda m, i, output: captured.append(output))
        try:
            states = self.body(images)
        finally:
            handle.remove()
        with torch.no_grad():
            try:
                is_chain = torch.allclose(self.after(captured[0].clone(), None), states, rtol=1e-3, atol=1e-4)
            except (RuntimeError, TypeError):
                is_chain = False
        if is_chain:
            return captured[0]
        self.stage = None
        return self.body.forward_features(images)

    def after(self, activations: Tensor, residual: Tensor | None) -> Tensor:
        """Activations → states N×d."""
        if self.stage is not None:
            with bypass_until(self.body, self.stage):
                return self.body(activations)
        if residual is None:
            return self.body.forward_head(activations)
        handle = self.norm.register_forward_hook(lambda module, inputs, output: activations)
        try:
            if self.encoder.kind == "chinese_clip":
                return self._project(self.block(residual, None)[:, 0])
            return self.body.forward_head(self.body.norm(self.block(residual)))
        finally:
            handle.remove()

    def _project(self, token: Tensor) -> Tensor:
        return self.encoder.projection(self.body.post_layernorm(token))

    def forward(self, images: Tensor) -> Tensor:
        """As ``encoder.images``."""
        activations, residual = self.before(images)
        return self.after(self.layer(activations), residual)

    def grid(self, activations: Tensor) -> Tensor:
        """Activations → N×C×h×w, without the class token."""
        if self.block is None:
            return activations.permute(0, 3, 1, 2) if self.last_map == "NHWC" else activations
        return to_grid(activations[:, self.prefix :].transpose(1, 2))

    def ablated(self, activations: Tensor, residual: Tensor | None, channels: Tensor) -> Tensor:
        """The states K×d of one frame (N = 1), with each of K channels zeroed in turn."""
        if self.encoder.kind == "chinese_clip" and residual is not None:
            return self._ablated_clip(activations[0], residual[0], channels)
        rows = activations.repeat(len(channels), *[1] * (activations.ndim - 1))
        axis = 1 if self.block is None and self.last_map == "NCHW" else rows.ndim - 1
        rows.transpose(1, axis)[torch.arange(len(channels)), channels] = 0
        return self.after(rows, None if residual is None else residual.expand(len(channels), -1, -1))

    def _ablated_clip(self, x: Tensor, residual: Tensor, channels: Tensor) -> Tensor:
        """Chinese-CLIP's last block for the class token, x T×D: zeroing a channel changes q, k, v by a column each."""
        attention = self.block.self_attn
        heads, width = attention.num_heads, attention.head_dim

        def column(layer: nn.Linear) -> Tensor:
            return layer.weight[:, channels].T.reshape(len(channels), heads, width)

        zeroed = x[:, channels].T  # K×T
        q = attention.q_proj(x[0]).view(heads, width) - zeroed[:, :1, None] * column(attention.q_proj)  # K×H×w
        k = attention.k_proj(x).view(-1, heads, width)  # T×H×w
        v = attention.v_proj(x).view(-1, heads, width)
        scores = (
            torch.einsum("khw,thw->kht", q, k) - zeroed[:, None] * (q * column(attention.k_proj)).sum(-1)[..., None]
        )
        weights = (scores * attention.scale).softmax(-1)  # K×H×T
        context = torch.einsum("kht,thw->khw", weights, v)
        context = context - (weights * zeroed[:, None]).sum(-1)[..., None] * column(attention.v_proj)
        token = residual[0] + attention.out_proj(context.flatten(1))  # K×D
        return self._project(token + self.block.mlp(self.block.layer_norm2(token)))


def last_stage(body: Any) -> str | None:
    """The name of a timm CNN's first stage at the final resolution; None if timm does not list its stages."""
    stages = [dict(stage) for stage in getattr(body, "feature_info", None) or []]
    names = dict(body.named_modules())
    candidates = [s["module"] for s in stages if s["reduction"] == stages[-1]["reduction"]]
    return candidates[0] if candidates and candidates[0] in names else None


@contextmanager
def bypass_until(body: Any, stage: str) -> Iterator[None]:
    """Make the modules up to ``stage`` return their input, so that ``body(activations)`` computes what follows it."""
    before, owner = [], body
    for name in stage.split("."):
        for child, module in owner.named_children():
            if child == name:
                break
            before.append(module)
        owner = owner.get_submodule(name)
    before.append(owner)
    for module in before:
        module.forward = lambda x, *more, **options: x
    try:
        yield
    finally:
        for module in before:
            del module.forward


def is_vit(body: Any) -> bool:
    """Whether a timm network is a plain pre-norm ViT: class token, blocks, norm."""
    blocks: Any = getattr(body, "blocks", None)
    return hasattr(body, "num_prefix_tokens") and bool(blocks) and hasattr(blocks[-1], "norm1")


def to_grid(tokens: Tensor) -> Tensor:
    """N×…×(h·w) → N×…×h×w, square."""
    side = round(tokens.shape[-1] ** 0.5)
    if side * side != tokens.shape[-1]:
        raise UsageError(f"no heat maps: {tokens.shape[-1]} patches do not form a square")
    return tokens.unflatten(-1, (side, side))
