"""Training-time augmentation, the same for all frames of a clip; runs batched on the device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from senticlip.structures import Sequence


def sample_frames(vision: Sequence, k: int) -> Sequence:
    """Mask all but k random real frames of each clip (or all it has); each keeps its temporal position."""
    chance = torch.rand(vision.mask.shape, device=vision.mask.device).masked_fill(~vision.mask, -1.0)
    chosen = chance.topk(min(k, chance.shape[1]), 1).indices
    return Sequence(vision.values, vision.mask & torch.zeros_like(vision.mask).scatter(1, chosen, True))


def augment(vision: Sequence, strength: float) -> Sequence:
    """Flip, crop, stretch, rotate, change brightness and contrast, grey, erase a box: B×m×3×H×W uint8 → the same.

    Masked frames, which no encoder reads, are not changed.

    Args:
        vision: the frames.
        strength: 0 is off, 1 is typical for faces.
    """
    pixels, mask = vision
    if not strength or not mask.any():
        return vision
    b, _, _, h, w = pixels.shape
    device = pixels.device
    clip = torch.arange(b, device=device)[:, None].expand_as(mask)[mask]  # N: the clip of each real frame
    x = pixels[mask].float()  # N×3×H×W

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(b, device=device).uniform_(low, high)

    theta = _affine_maps(b, strength, uniform)[clip]
    grid = torch.nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
    x = torch.nn.functional.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    contrast = torch.exp(strength * uniform(-0.4, 0.4))[clip, None, None, None]
    brightness = (strength * uniform(-40.0, 40.0))[clip, None, None, None]
    sums = torch.zeros(b, device=device).index_add(0, clip, x.mean((1, 2, 3)))
    mean = (sums / mask.sum(1).clamp(min=1))[clip, None, None, None]
    x = (x - mean) * contrast + mean + brightness
    grey = (torch.rand(b, device=device) < 0.3 * strength)[clip, None, None, None]
    x = torch.where(grey, x.mean(1, keepdim=True).expand_as(x), x)
    x = torch.where(_random_box(b, h, w, strength, device)[clip, None], mean, x)
    changed = pixels.clone()
    changed[mask] = x.clamp(0, 255).round().to(torch.uint8)
    return Sequence(changed, mask)


def _affine_maps(b: int, strength: float, uniform: Callable[[float, float], Tensor]) -> Tensor:
    """The affine map of each clip (flip, crop, stretch, rotation), B×2×3."""
    scale = 1 - strength * uniform(0.0, 0.3)
    aspect = torch.exp(strength * uniform(-0.15, 0.15))
    angle = strength * uniform(-1.0, 1.0) * math.radians(15)
    mirror = torch.where(torch.rand(b, device=scale.device) < 0.5, -1.0, 1.0)
    sx, sy = scale * aspect, scale / aspect
    theta = torch.zeros(b, 2, 3, device=scale.device)
    theta[:, 0, 0], theta[:, 0, 1] = mirror * sx * angle.cos(), -sy * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = mirror * sx * angle.sin(), sy * angle.cos()
    theta[:, 0, 2] = uniform(-1.0, 1.0) * (1 - sx).clamp_min(0)
    theta[:, 1, 2] = uniform(-1.0, 1.0) * (1 - sy).clamp_min(0)
    return theta


def _random_box(b: int, h: int, w: int, strength: float, device: torch.device) -> Tensor:
    """A random box in a share ``strength`` / 3 of the clips, sides up to a third of the frame's: B×H×W, True inside."""
    y, x = torch.arange(h, device=device)[None], torch.arange(w, device=device)[None]
    size = torch.rand(2, b, 1, device=device) / 3 * (torch.rand(b, 1, device=device) < strength / 3)
    corner = torch.rand(2, b, 1, device=device) * (1 - size)
    inside_y = (y >= corner[0] * h) & (y < (corner[0] + size[0]) * h)
    inside_x = (x >= corner[1] * w) & (x < (corner[1] + size[1]) * w)
    return inside_y[:, :, None] & inside_x[:, None]
