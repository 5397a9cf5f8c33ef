"""Heat maps over frames: Ablation-CAM, Grad-CAM and attention rollout, of what the whole model answers for the clip.

Ablation-CAM (Desai & Ramaswamy 2020, doi 10.1109/WACV45572.2020.00106): A_k is channel k of one frame's activations, y
the fused probability of a class, y_k the same with A_k set to zero in that frame, the other frames kept as they are;
w_k = (y − y_k) / y and the map is ReLU(Σ_k w_k A_k). The layer: a ViT's last LayerNorm before attention (zeroed in all
tokens, the class token, too); a CNN's first stage of its final resolution, since those that follow on the same grid
(dilated ones) only widen what a cell sees. What lies before the layer is computed once, the channels go through the
rest in batches, and Chinese-CLIP's last block only for its class token, where zeroing a channel changes queries, keys
and values by one column each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from senticlip.encoders.vision import VisionEncoder
from senticlip.models.base import SentimentModel
from senticlip.structures import Batch, Output, Sequence, UsageError

CHUNK = 128
"""Ablated channels that go through the model together."""


def log_odds(network: Any, output: Output) -> Tensor:
    """What is explained, B×3 float64: ln p / (1 − p) of each class, p its fused probability.

    From the logits and in float64: where p is all but 1, differences of p itself would be rounding errors. A regression
    model has a score s instead: −s, −|s|, s speak for negative, neutral, positive.
    """
    if output.score is not None:
        score = output.score.double()
        return torch.stack([-score, -score.abs(), score], 1)
    assert output.log_probs is not None
    if not hasattr(network, "decide"):
        said = output.logits["fused"].double()
    else:
        said = network.decide({name: logits.double() for name, logits in output.logits.items()}, output.weights)
    others = [said[:, [i for i in range(said.shape[1]) if i != c]].logsumexp(1) for c in range(said.shape[1])]
    return said - torch.stack(others, 1)


def drop(output: Output, y: Tensor, without: Tensor) -> Tensor:
    """How much went, from log-odds: (p − p_k) / p of a probability, y − y_k of a score."""
    if output.score is not None:
        return y - without
    return -torch.expm1(nn.functional.softplus(-y) - nn.functional.softplus(-without))


def repeat(features: Batch, rows: int) -> Batch:
    """A batch of one clip, ``rows`` times (no copy)."""
    return Batch(
        {
            name: Sequence(s.values.expand(rows, *s.values.shape[1:]), s.mask.expand(rows, -1))
            for name, s in features.modalities.items()
        },
        {},
    )


class Split(nn.Module):
    """A frame encoder cut at the layer that is explained: ``before`` it, ``after`` it.

    ``layer`` is an Identity where the activations pass, N×C×h×w or N×tokens×C: what grad-cam hooks.

    Raises:
        UsageError: a network that is neither a plain ViT nor one that ends with feature maps.
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
        """Normalised images N×3×S×S → the activations, and what passes by them (a ViT's residual stream)."""
        if self.block is None:
            found = self._feature_map(images.contiguous(memory_format=torch.channels_last))
            if found.ndim != 4:
                raise UsageError(f"no heat maps for {type(self.body).__name__}: neither a ViT nor a CNN")
            return found, None
        seen: list[Tensor] = []
        handle = self.norm.register_forward_hook(lambda module, inputs, output: seen.extend((output, inputs[0])))
        try:
            self.encoder.images(images)
        finally:
            handle.remove()
        return seen[0], seen[1]

    def _feature_map(self, images: Tensor) -> Tensor:
        """The map of ``stage``; the network's last, where what follows the stage is no plain chain."""
        if self.stage is None:
            return self.body.forward_features(images)
        seen: list[Tensor] = []
        handle = self.body.get_submodule(self.stage).register_forward_hook(lambda m, i, output: seen.append(output))
        try:
            states = self.body(images)
        finally:
            handle.remove()
        with torch.no_grad():
            try:
                chain = torch.allclose(self.after(seen[0].clone(), None), states, rtol=1e-3, atol=1e-4)
            except (RuntimeError, TypeError):
                chain = False
        if chain:
            return seen[0]
        self.stage = None
        return self.body.forward_features(images)

    def after(self, activations: Tensor, residual: Tensor | None) -> Tensor:
        """Activations → states N×d."""
        if self.stage is not None:
            with passing(self.body, self.stage):
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
        """What ``encoder.images`` gives."""
        activations, residual = self.before(images)
        return self.after(self.layer(activations), residual)

    def grid(self, activations: Tensor) -> Tensor:
        """Activations → N×C×h×w; the class token has no place in it."""
        if self.block is None:
            return activations.permute(0, 3, 1, 2) if self.last_map == "NHWC" else activations
        return to_grid(activations[:, self.prefix :].transpose(1, 2))

    def channels(self, activations: Tensor) -> int:
        """How many there are."""
        return self.grid(activations).shape[1]

    def ablated(self, activations: Tensor, residual: Tensor | None, channels: Tensor) -> Tensor:
        """The states K×d of one frame (N = 1) with each of K channels zeroed in turn."""
        if self.encoder.kind == "chinese_clip" and residual is not None:
            return self._ablated_clip(activations[0], residual[0], channels)
        rows = activations.repeat(len(channels), *[1] * (activations.ndim - 1))
        axis = 1 if self.block is None and self.last_map == "NCHW" else rows.ndim - 1
        rows.transpose(1, axis)[torch.arange(len(channels)), channels] = 0
        return self.after(rows, None if residual is None else residual.expand(len(channels), -1, -1))

    def _ablated_clip(self, x: Tensor, residual: Tensor, channels: Tensor) -> Tensor:
        """Chinese-CLIP's last block for its class token: x T×D; q, k and v each lose one column of their matrix."""
        attention = self.block.self_attn
        heads, width = attention.num_heads, attention.head_dim

        def column(layer: nn.Linear) -> Tensor:
            return layer.weight[:, channels].T.reshape(len(channels), heads, width)

        gone = x[:, channels].T  # K×T
        q = attention.q_proj(x[0]).view(heads, width) - gone[:, :1, None] * column(attention.q_proj)  # K×H×w
        k = attention.k_proj(x).view(-1, heads, width)  # T×H×w
        v = attention.v_proj(x).view(-1, heads, width)
        scores = torch.einsum("khw,thw->kht", q, k) - gone[:, None] * (q * column(attention.k_proj)).sum(-1)[..., None]
        looks = (scores * attention.scale).softmax(-1)  # K×H×T
        heard = torch.einsum("kht,thw->khw", looks, v)
        heard = heard - (looks * gone[:, None]).sum(-1)[..., None] * column(attention.v_proj)
        token = residual[0] + attention.out_proj(heard.flatten(1))  # K×D
        return self._project(token + self.block.mlp(self.block.layer_norm2(token)))


def last_stage(body: Any) -> str | None:
    """The first stage of a timm CNN that has its final resolution; None where timm does not name the stages."""
    stages = [dict(stage) for stage in getattr(body, "feature_info", None) or []]
    names = dict(body.named_modules())
    found = [s["module"] for s in stages if s["reduction"] == stages[-1]["reduction"]]
    return found[0] if found and found[0] in names else None


@contextmanager
def passing(body: Any, stage: str) -> Iterator[None]:
    """Let the modules up to ``stage`` pass their input on, so that ``body(activations)`` is what follows the stage."""
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
        raise UsageError(f"no heat maps: {tokens.shape[-1]} patches are no square")
    return tokens.unflatten(-1, (side, side))


def seen_frames(model: SentimentModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The real frames of a batch of one clip, normalised (k×3×S×S), and where they stand (k)."""
    pixels, mask = batch.modalities["vision"]
    encoder: Any = model.encoders["vision"]
    return encoder.normalize(pixels[0][mask[0]]), mask[0].nonzero()[:, 0]


@torch.no_grad()
def ablation_cam(
    model: SentimentModel, batch: Batch, index: int, advance: Callable[[int, int], None] | None = None
) -> Tensor:
    """Maps k×h×w (not negative, not scaled) of the k real frames of one clip, for class ``index``.

    ``advance`` hears how many channels are done, and how many there are.
    """
    split = Split(_encoder(model))
    images, places = seen_frames(model, batch)
    activations, residual = split.before(images)
    features = model.encode(batch)
    output = model.fuse(features)
    y = log_odds(model.network, output)[0, index]
    count = split.channels(activations)
    done = 0
    weights = torch.zeros(len(images), count, dtype=torch.float64, device=y.device)
    for i, place in enumerate(places):
        rest = None if residual is None else residual[i : i + 1]
        for channels in torch.arange(count, device=images.device).split(CHUNK):
            states = split.ablated(activations[i : i + 1], rest, channels)
            rows = repeat(features, len(channels))
            vision = rows.modalities["vision"]
            changed = vision.values.clone()
            changed[:, place] = states
            rows.modalities["vision"] = Sequence(changed, vision.mask)
            without = log_odds(model.network, model.fuse(rows))[:, index]
            weights[i, channels] = drop(output, y, without)
            done += len(channels)
            if advance is not None:
                advance(done, weights.numel())
    return torch.einsum("nc,nchw->nhw", weights, split.grid(activations).double()).relu().float()


class _Answer(nn.Module):
    """Images k×3×S×S → what is explained, with the other modalities kept: the model that grad-cam sees."""

    def __init__(self, model: SentimentModel, batch: Batch, index: int) -> None:
        super().__init__()
        self.model, self.index = model, index
        self.split = Split(_encoder(model))
        with torch.no_grad():
            self.features = model.encode(batch)
        self.mask = batch.modalities["vision"].mask

    def forward(self, images: Tensor) -> Tensor:
        """The log-odds of the class, a scalar: its gradient is the probability's, up to one factor for all frames."""
        states = self.split(images)
        empty = states.new_zeros(*self.mask.shape, states.shape[-1])
        vision = Sequence(empty.masked_scatter(self.mask[..., None], states), self.mask)
        features = Batch({**self.features.modalities, "vision": vision}, {})
        return log_odds(self.model.network, self.model.fuse(features))[0, self.index]


def grad_cam(model: SentimentModel, batch: Batch, index: int) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) by the grad-cam package: k×h×w, not negative, not scaled."""
    from pytorch_grad_cam import GradCAM

    answer = _Answer(model, batch, index)
    images = seen_frames(model, batch)[0].requires_grad_()
    cam = GradCAM(model=answer, target_layers=[answer.split.layer], reshape_transform=answer.split.grid)
    try:
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # cuDNN's LSTM has no backward in eval
            value = cam.activations_and_grads(images)
            torch.autograd.grad(value, images)
        seen = cam.activations_and_grads
        # not cam(images): that scales each frame by itself, and frames could not be compared
        found = cam.get_cam_image(
            images, answer.split.layer, [], seen.activations[0].numpy(), seen.gradients[0].numpy(), False
        )
    finally:
        cam.activations_and_grads.release()
    return torch.from_numpy(found).float().relu()


@contextmanager
def _watched(encoder: VisionEncoder) -> Iterator[list[Tensor]]:
    """Collect every layer's attention N×heads×T×T while the encoder runs."""
    maps: list[Tensor] = []
    if encoder.kind == "chinese_clip":
        was = encoder.body.config._attn_implementation
        encoder.body.set_attn_implementation("eager")
        handles = [
            layer.self_attn.register_forward_hook(lambda module, inputs, output: maps.append(output[1]))
            for layer in encoder.body.encoder.layers
        ]
    else:
        parts = [block.attn for block in encoder.body.blocks]
        fused = [part.fused_attn for part in parts]
        for part in parts:
            part.fused_attn = False
        handles = [
            part.attn_drop.register_forward_hook(lambda m, inputs, output: maps.append(output)) for part in parts
        ]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
        if encoder.kind == "chinese_clip":
            encoder.body.set_attn_implementation(was)
        else:
            for part, flag in zip(parts, fused, strict=True):
                part.fused_attn = flag


@torch.no_grad()
def rollout(model: SentimentModel, batch: Batch, index: int = 0) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020) of a ViT: Π (½ mean heads + ½ I), the class token's row; k×h×w.

    It knows neither the class nor the other frames.

    Raises:
        UsageError: no ViT.
    """
    encoder = _encoder(model)
    if encoder.kind != "chinese_clip" and not (is_vit(encoder.body) and hasattr(encoder.body.blocks[0].attn, "qkv")):
        raise UsageError("attention rollout needs a ViT as vision.encoder")
    prefix = 1 if encoder.kind == "chinese_clip" else encoder.body.num_prefix_tokens
    with _watched(encoder) as maps:
        encoder.images(seen_frames(model, batch)[0])
    flow = None
    for attention in maps:
        mixed = attention.mean(1) / 2 + torch.eye(attention.shape[-1], device=attention.device) / 2
        flow = mixed if flow is None else mixed @ flow
    assert flow is not None
    row = flow[:, 0] if prefix else flow.mean(1)
    return to_grid(row[:, prefix:]).cpu()


METHODS: dict[str, Callable[..., Tensor]] = {"ablation-cam": ablation_cam, "grad-cam": grad_cam, "rollout": rollout}
"""Heat maps by name; each takes (model, batch of one clip, class index) and gives k×h×w."""


def methods_for(model: SentimentModel) -> list[str]:
    """The heat maps that this model can give; none where no network of ours reads frames."""
    if "vision" not in model.encoders:
        return []
    encoder = _encoder(model)
    if encoder.kind == "chinese_clip" or is_vit(encoder.body):
        return list(METHODS)
    return ["ablation-cam", "grad-cam"] if hasattr(encoder.body, "forward_features") else []


def _encoder(model: SentimentModel) -> Any:
    return model.encoders["vision"]
