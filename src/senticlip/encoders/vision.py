"""Frames → states (eq. 6 and 7): the image tower of Chinese-CLIP, or any timm network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senticlip.config import VisionConfig
from senticlip.encoders import hub
from senticlip.structures import Sequence, UsageError, first_line


def vision_spec(config: VisionConfig) -> tuple[dict[str, Any], Path | None]:
    """The JSON spec of the network (config, pixel size, mean, std, width) and, for pretrained weights, its folder."""
    known = config.encoder in hub.KNOWN or _timm_name(config.encoder) is not None
    if config.pretrained or Path(config.encoder).is_dir() or not known:
        folder = hub.fetch(config.encoder, "vision.encoder")
        data = hub.read_config(folder, "vision.encoder")
        weights = folder if config.pretrained else None
    else:
        folder, weights = None, None
        data = hub.KNOWN.get(config.encoder) or {"architecture": _timm_name(config.encoder)}
    if data.get("model_type") == "chinese_clip":
        return _clip_spec(data, folder, config.size), weights
    if _timm_name(str(data.get("architecture"))):
        return _timm_spec(data, config.size), weights
    raise UsageError(f"vision.encoder: {config.encoder} is neither a Chinese-CLIP model nor a timm network")


def _clip_spec(data: dict[str, Any], folder: Path | None, size: int | None) -> dict[str, Any]:
    config = hub.hf_config(data)
    has_file = folder is not None and (folder / "preprocessor_config.json").is_file()
    processor = hub.read_config(folder, "vision.encoder", "preprocessor_config.json") if folder and has_file else {}
    mean, std = processor.get("image_mean") or hub.OPENAI_MEAN, processor.get("image_std") or hub.OPENAI_STD
    default_size, patch = config.vision_config.image_size, config.vision_config.patch_size
    if size and size < patch:
        raise UsageError(f"vision.size: {size} is smaller than one patch of this network ({patch} pixels)")
    return {
        "kind": "chinese_clip",
        "config": data,
        "size": size or default_size,
        "mean": mean,
        "std": std,
        "dim": config.projection_dim,
    }


def _timm_name(encoder: str) -> str | None:
    """The timm architecture that a name refers to (also ``timm/vit_base_patch32_224.augreg``), or None."""
    import timm

    name = encoder.rsplit("/", 1)[-1].split(".")[0]
    return name if timm.is_model(name) else None


def _timm_spec(data: dict[str, Any], size: int | None) -> dict[str, Any]:
    import timm

    default_cfg: Any = timm.get_pretrained_cfg(data["architecture"])
    pretrained = data.get("pretrained_cfg") or default_cfg.to_dict()
    spec: dict[str, Any] = {
        "kind": "timm",
        "config": {"architecture": data["architecture"], "model_args": data.get("model_args") or {}},
        "size": size or pretrained["input_size"][-1],
        "mean": list(pretrained["mean"]),
        "std": list(pretrained["std"]),
    }
    with torch.device("meta"):
        body = _timm_body(spec).eval()
    try:
        with torch.no_grad():
            states = body(torch.zeros(1, 3, spec["size"], spec["size"], device="meta"))
        _, dim = states.shape
    except Exception as error:
        problem = f"{data['architecture']} cannot turn {spec['size']}×{spec['size']} pixels into one vector"
        reason = first_line(error)[:80]
        raise UsageError(f"vision.encoder: {problem} ({reason}) — choose another network or vision.size") from None
    return {**spec, "dim": dim}


FRAMES_PER_PASS = 6
"""Frames per forward pass in CPU inference: the activations of more would not fit into the CPU caches
(EfficientNet-Lite0 at 160 pixels: 9 ms per frame, against 20 ms in passes of 192)."""


QUICK_GELU = 1.702


class QuickGelu(nn.Module):
    """x · sigmoid(1.702 x), CLIP's activation.

    In inference it works in place, since nothing else reads its input: the plain formula makes four passes over memory,
    a tenth of the forward pass on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → same shape."""
        if torch.is_inference_mode_enabled():
            return nn.functional.silu(x.mul_(QUICK_GELU), inplace=True).div_(QUICK_GELU)
        return x * torch.sigmoid(QUICK_GELU * x)


class Patches(nn.Conv2d):
    """A CLIP tower's patch embedding as one matrix product instead of a convolution.

    This makes a training step on a GPU 4 % faster.

    Shape:
        N×3×H×W → N×D×H/P×W/P
    """

    def forward(self, input: Tensor) -> Tensor:
        """Equal to the convolution up to rounding; pixels at the right and bottom that fill no patch are ignored."""
        p = self.kernel_size[0]
        h, w = (side // p * p for side in input.shape[-2:])
        rows = input[..., :h, :w].unflatten(2, (-1, p)).unflatten(4, (-1, p)).permute(0, 2, 4, 1, 3, 5)  # N×h×w×3×P×P
        return nn.functional.linear(rows.flatten(3), self.weight.flatten(1)).permute(0, 3, 1, 2)


class ClassTokenLayer(nn.Module):
    """A CLIP tower's last layer, computed for the class token only: nothing reads the layer's other outputs.

    A single query needs no keys and values: q · (W_k x) = (W_kᵀ q) · x, and Σ a W_v x = W_v Σ a x. This saves nearly
    all of the layer's time. It reuses the layer's parameters and their names; the softmax cancels the key bias.

    Shape:
        N×T×D → N×1×D; the submodule ``attention_weights`` returns N×heads×1×T (hooked by heat maps)
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        # in the layer's order: saved optimizer states identify parameters by position
        self.self_attn, self.layer_norm1 = layer.self_attn, layer.layer_norm1
        self.mlp, self.layer_norm2 = layer.mlp, layer.layer_norm2
        self.attention_weights = nn.Softmax(-1)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output for the first token: N×T×D → N×1×D."""
        attention, x = self.self_attn, self.layer_norm1(hidden_states)
        parts = attention.k_proj.weight, attention.v_proj.weight
        to_keys, to_values = (part.unflatten(0, (attention.num_heads, -1)) for part in parts)  # H×w×D
        q = attention.q_proj(x[:, 0]).unflatten(1, (attention.num_heads, -1))  # N×H×w
        key_queries = (q.transpose(0, 1) @ to_keys).transpose(0, 1)  # N×H×D
        weights = self.attention_weights(attention.scale * (key_queries @ x.transpose(1, 2))[:, :, None])  # N×H×1×T
        kept = nn.functional.dropout(weights, attention.dropout, self.training)[:, :, 0]
        context = ((kept @ x).transpose(0, 1) @ to_values.transpose(1, 2)).transpose(0, 1)  # N×H×w
        context = context + kept.sum(-1, keepdim=True) * attention.v_proj.bias.unflatten(0, q.shape[1:])
        token = hidden_states[:, 0] + attention.out_proj(context.flatten(1))
        return (token + self.mlp(self.layer_norm2(token)))[:, None]


class VisionEncoder(nn.Module):
    """One state per frame.

    Padding has no effect, not even in a batch norm: either only the real frames are encoded, or frames do not influence
    each other.

    Args:
        spec: from ``vision_spec``.
        sampled: whether training masks most of the frames (``vision.train_frames``).

    Shape:
        pixels B×m×3×H×W uint8 (squashed to size×size), mask B×m → Sequence B×m×d
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: dict[str, Any], sampled: bool = False) -> None:
        super().__init__()
        self.kind, self.size, self.sampled = spec["kind"], spec["size"], sampled
        self.dim: int = spec["dim"]
        self.projection: nn.Module = nn.Identity()
        if self.kind == "chinese_clip":
            from transformers import ChineseCLIPVisionModel
            from transformers.activations import QuickGELUActivation

            config = hub.hf_config(spec["config"])
            self.body: Any = ChineseCLIPVisionModel(config.vision_config)
            for module in self.body.modules():
                if isinstance(getattr(module, "activation_fn", None), QuickGELUActivation):
                    module.activation_fn = QuickGelu()
            self.body.embeddings.patch_embedding.__class__ = Patches  # keeps the weights that transformers initialised
            layers = self.body.encoder.layers
            layers[-1] = ClassTokenLayer(layers[-1])
            self.projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
            self.resized = self.size != config.vision_config.image_size
        else:
            self.body = _timm_body(spec)
        self.register_buffer("mean", 255 * torch.tensor(spec["mean"])[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(spec["std"])[:, None, None])

    def load_folder(self, folder: Path) -> None:
        """Load the folder's weights."""
        with hub.loading(folder, "vision.encoder"):
            if self.kind == "chinese_clip":
                from transformers import ChineseCLIPModel

                weights = hub.read_weights(ChineseCLIPModel, folder)
                hub.load_pretrained(self.body, weights, "vision.encoder", "vision_model.")
                hub.load_pretrained(self.projection, weights, "vision.encoder", "visual_projection.")
            else:
                import timm

                # let timm load them: it resizes position embeddings to the image size
                size_args = {"img_size": self.size} if _takes_size(self.body) else {}
                pretrained = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, **size_args)
                hub.load_pretrained(self.body, pretrained.state_dict(), "vision.encoder")

    def normalize(self, pixels: Tensor) -> Tensor:
        """N×3×H×W in 0 … 255 → normalised as in the network's pretraining."""
        return (pixels.to(self.std.dtype) - self.mean) / self.std

    def images(self, pixels: Tensor) -> Tensor:
        """N×3×H×W normalised → N×d."""
        if self.kind == "chinese_clip":
            state = self.body(pixel_values=pixels, interpolate_pos_encoding=self.resized).pooler_output
            return self.projection(state)
        # twice as fast for convolutions on a CPU, and not slower elsewhere
        return self.body(pixels.contiguous(memory_format=torch.channels_last))

    def _avoids_sync(self, pixels: Tensor) -> bool:
        """Whether to encode masked frames, too: when training on a GPU, faster than synchronising to read the mask.

        Only if few frames are masked and frames do not influence each other (timm networks may have batch norms).
        """
        independent = self.kind == "chinese_clip" and not self.sampled
        return independent and self.training and pixels.device.type == "cuda"

    def forward(self, vision: Sequence) -> Sequence:
        """Encode the real frames; the others are zero."""
        pixels, mask = vision
        if self._avoids_sync(pixels):
            states = self.images(self.normalize(pixels.flatten(0, 1))).unflatten(0, mask.shape)
            return Sequence(states.masked_fill(~mask[..., None], 0.0), mask)
        apart = pixels.device.type == "cpu" and not (torch.is_grad_enabled() or self.body.training)
        empty = self.std.new_zeros(0, self.dim)
        return real_frames(vision, lambda part: self.images(self.normalize(part)), empty, apart)


def real_frames(vision: Sequence, encode: Callable[[Tensor], Tensor], empty: Tensor, apart: bool) -> Sequence:
    """Encode the real frames of a batch; the others are zero.

    Args:
        vision: pixels B×m×3×H×W and mask B×m.
        encode: N×3×H×W → N×d.
        empty: the result for no frames, 0×d.
        apart: encode ``FRAMES_PER_PASS`` frames at a time.
    """
    pixels, mask = vision
    rows = mask.flatten().nonzero()[:, 0]  # synchronises with a GPU
    states = empty
    if len(rows):
        real = pixels.flatten(0, 1)[rows]
        states = torch.cat([encode(part) for part in real.split(FRAMES_PER_PASS if apart else len(real))])  # N×d
    out = states.new_zeros(mask.numel(), states.shape[1]).index_copy(0, rows, states)
    return Sequence(out.unflatten(0, mask.shape), mask)  # B×m×d


def _takes_size(body: nn.Module) -> bool:
    """Whether a timm network is built for a fixed image size."""
    return "img_size" in inspect.signature(type(body).__init__).parameters


FILE_ARGUMENTS = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments that would make timm read other files: a RUN may be untrusted, so it must not name any."""


def _timm_body(spec: dict[str, Any]) -> Any:
    import timm

    name = spec["config"]["architecture"]
    args = {key: value for key, value in spec["config"]["model_args"].items() if key not in FILE_ARGUMENTS}
    if not timm.is_model(name):  # "hf-hub:…" would access the network
        raise UsageError(f"vision.encoder: timm has no network {name}")
    body = timm.create_model(name, pretrained=False, num_classes=0, **args)
    if _takes_size(body):
        patch = getattr(getattr(body, "patch_embed", None), "patch_size", 1)
        sides = patch if isinstance(patch, tuple | list) else (patch,)
        if any(spec["size"] % side for side in sides):
            raise UsageError(f"vision.size: {name} cannot read {spec['size']} pixels — use a multiple of {sides[0]}")
        body = timm.create_model(name, pretrained=False, num_classes=0, **{**args, "img_size": spec["size"]})
    return body
