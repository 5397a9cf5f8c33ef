"""Heat maps over frames (Ablation-CAM, Grad-CAM, attention rollout) that explain the whole model's answer for a clip.

Ablation-CAM (Desai & Ramaswamy 2020, doi 10.1109/WACV45572.2020.00106): A_k is channel k of one frame's activations, y
the fused probability of a class, and y_k the same with A_k set to zero in that frame, the other frames unchanged; then
w_k = (y − y_k) / y, and the map is ReLU(Σ_k w_k A_k). The layer is a ViT's last LayerNorm before attention (zeroed in
all tokens, including the class token), or a CNN's first stage at the final resolution, since later stages on the same
grid (dilated ones) only widen the receptive field. The part before the layer is computed once; the channels go through
the rest in batches. Chinese-CLIP's last block is computed for the class token only, where zeroing a channel changes
queries, keys and values by one column each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from senticlip.cut import Split, is_vit, to_grid
from senticlip.encoders.vision import VisionEncoder
from senticlip.structures import Batch, Output, Sequence, UsageError

if TYPE_CHECKING:
    from senticlip.models.base import SentimentModel

CHUNK = 128
"""Number of ablated channels in a batch."""


def log_odds(network: Any, output: Output) -> Tensor:
    """The value that heat maps explain, B×3 float64: ln(p / (1 − p)) of each class, where p is its fused probability.

    Computed from the logits in float64: for p near 1, differences of p itself would be rounding errors. For the score s
    of a regression model, −s, −|s|, s for negative, neutral, positive.
    """
    if output.score is not None:
        score = output.score.double()
        return torch.stack([-score, -score.abs(), score], 1)
    assert output.log_probs is not None
    if not hasattr(network, "decide"):
        scores = output.logits["fused"].double()
    else:
        scores = network.decide({name: logits.double() for name, logits in output.logits.items()}, output.weights)
    others = [scores[:, [i for i in range(scores.shape[1]) if i != c]].logsumexp(1) for c in range(scores.shape[1])]
    return scores - torch.stack(others, 1)


def drop(output: Output, y: Tensor, without: Tensor) -> Tensor:
    """The drop (p − p_k) / p caused by an ablation, from the log-odds ``y`` and ``without``; for a score, y − y_k."""
    if output.score is not None:
        return y - without
    return -torch.expm1(nn.functional.softplus(-y) - nn.functional.softplus(-without))


def repeat(features: Batch, rows: int) -> Batch:
    """A batch of one clip expanded to ``rows`` rows, without copying."""
    return Batch(
        {
            name: Sequence(s.values.expand(rows, *s.values.shape[1:]), s.mask.expand(rows, -1))
            for name, s in features.modalities.items()
        },
        {},
    )


def seen_frames(model: SentimentModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The unmasked frames of a batch of one clip, normalised (k×3×S×S), and their indices among all frames (k)."""
    pixels, mask = batch.modalities["vision"]
    encoder: Any = model.encoders["vision"]
    return encoder.normalize(pixels[0][mask[0]]), mask[0].nonzero()[:, 0]


@torch.no_grad()
def ablation_cam(
    model: SentimentModel, batch: Batch, index: int, advance: Callable[[int, int], None] | None = None
) -> Tensor:
    """Maps k×h×w (non-negative, not scaled) for class ``index``, of the k unmasked frames of one clip.

    ``advance`` is called with (channels done, total channels).
    """
    split = Split(_copy_encoder(model))
    images, frame_indices = seen_frames(model, batch)
    activations, residual = split.before(images)
    features = model.encode(batch)
    output = model.fuse(features)
    y = log_odds(model.network, output)[0, index]
    grid, done = split.grid(activations).double(), 0  # k×C×h×w
    count = grid.shape[1]
    weights = torch.zeros(len(images), count, dtype=torch.float64, device=y.device)
    for i, frame in enumerate(frame_indices):
        frame_residual = None if residual is None else residual[i : i + 1]
        for channels in torch.arange(count, device=images.device).split(CHUNK):
            states = split.ablated(activations[i : i + 1], frame_residual, channels)
            rows = repeat(features, len(channels))
            vision = rows.modalities["vision"]
            changed = vision.values.clone()
            changed[:, frame] = states
            rows.modalities["vision"] = Sequence(changed, vision.mask)
            without = log_odds(model.network, model.fuse(rows))[:, index]
            weights[i, channels] = drop(output, y, without)
            done += len(channels)
            if advance is not None:
                advance(done, weights.numel())
    return torch.einsum("nc,nchw->nhw", weights, grid).relu().float()


class _Answer(nn.Module):
    """The model passed to grad-cam: images k×3×S×S → the explained value, with the other modalities fixed."""

    def __init__(self, model: SentimentModel, batch: Batch, index: int) -> None:
        super().__init__()
        self.model, self.index = model, index
        self.split = Split(_copy_encoder(model))
        with torch.no_grad():
            self.features = model.encode(batch)
        self.mask = batch.modalities["vision"].mask

    def forward(self, images: Tensor) -> Tensor:
        """The class's log-odds, a scalar: its gradient is the probability's up to a factor common to all frames."""
        states = self.split(images)
        zeros = states.new_zeros(*self.mask.shape, states.shape[-1])
        vision = Sequence(zeros.masked_scatter(self.mask[..., None], states), self.mask)
        features = Batch({**self.features.modalities, "vision": vision}, {})
        return log_odds(self.model.network, self.model.fuse(features))[0, self.index]


def grad_cam(model: SentimentModel, batch: Batch, index: int) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) by the grad-cam package: k×h×w, non-negative, not scaled."""
    from pytorch_grad_cam import GradCAM

    answer = _Answer(model, batch, index)
    images = seen_frames(model, batch)[0].requires_grad_()
    cam = GradCAM(model=answer, target_layers=[answer.split.layer], reshape_transform=answer.split.grid)
    capture = cam.activations_and_grads
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # cuDNN's LSTM has no backward in eval
        torch.autograd.grad(capture(images), images)
    # not cam(images): that scales each frame separately, so that frames could not be compared
    maps, gradients = (part[0].float().numpy() for part in (capture.activations, capture.gradients))
    heat_map = cam.get_cam_image(images, answer.split.layer, [], maps, gradients, False)
    return torch.from_numpy(heat_map).float().relu()


def _attention_maps(encoder: VisionEncoder, images: Tensor) -> list[Tensor]:
    """Attention weights of each layer, N×heads×T×T (Chinese-CLIP's last: N×heads×1×T); ``encoder`` keeps the hooks."""
    maps: list[Tensor] = []
    if encoder.kind == "chinese_clip":
        encoder.body.set_attn_implementation("eager")
        *layers, last = encoder.body.encoder.layers
        for layer in layers:
            layer.self_attn.register_forward_hook(lambda module, inputs, output: maps.append(output[1]))
        last.attention_weights.register_forward_hook(lambda module, inputs, output: maps.append(output))
    else:
        for block in encoder.body.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: maps.append(output))
    encoder.images(images)
    return maps


@torch.no_grad()
def rollout(model: SentimentModel, batch: Batch, index: int = 0) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020) of a ViT, k×h×w: the class token's row of Π (½ mean of heads + ½ I).

    It depends neither on the class nor on the other frames.

    Raises:
        UsageError: the encoder is not a ViT.
    """
    encoder = _copy_encoder(model)
    if encoder.kind != "chinese_clip" and not (is_vit(encoder.body) and hasattr(encoder.body.blocks[0].attn, "qkv")):
        raise UsageError("attention rollout needs a ViT as vision.encoder")
    prefix = 1 if encoder.kind == "chinese_clip" else encoder.body.num_prefix_tokens
    flow = None
    for attention in _attention_maps(encoder, seen_frames(model, batch)[0]):
        rows, tokens = attention.shape[-2:]
        matrix = attention.mean(1) / 2 + torch.eye(rows, tokens, device=attention.device) / 2
        flow = matrix if flow is None else matrix @ flow
    assert flow is not None
    row = flow[:, 0] if prefix else flow.mean(1)
    return to_grid(row[:, prefix:]).cpu()


METHODS: dict[str, Callable[..., Tensor]] = {"ablation-cam": ablation_cam, "grad-cam": grad_cam, "rollout": rollout}
"""Heat map methods by name; each takes (model, batch of one clip, class index) and returns k×h×w."""


def methods_for(model: SentimentModel) -> list[str]:
    """The heat map methods that a model supports; none without a vision encoder."""
    if "vision" not in model.encoders:
        return []
    encoder: Any = model.encoders["vision"]
    if encoder.kind == "chinese_clip" or is_vit(encoder.body):
        return list(METHODS)
    return ["ablation-cam", "grad-cam"] if hasattr(encoder.body, "forward_features") else []


def _copy_encoder(model: SentimentModel) -> Any:
    """A copy of the encoder that shares its tensors: heat maps add hooks, and other threads may use the model."""
    encoder: Any = model.encoders["vision"]
    shared = {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())}
    return copy.deepcopy(encoder, shared)
