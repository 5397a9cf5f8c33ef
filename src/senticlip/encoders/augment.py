"""Training-time changes of the frames of a clip, the same for all its frames, on the device, in whole batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from senticlip.structures import Sequence


def sample_frames(vision: Sequence, k: int) -> Sequence:
    """k random real frames of each clip in their order (fewer where there are fewer)."""
    chance = torch.rand(vision.mask.shape, device=vision.mask.device).masked_fill(~vision.mask, -1.0)
    chosen = chance.topk(min(k, chance.shape[1]), 1).indices.sort(1).values  # B×k
    mask = vision.mask.gather(1, chosen)
    order = (~mask).int().argsort(dim=1, stable=True)  # padding to the end
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    return Sequence(vision.values[rows, chosen.gather(1, order)], mask.gather(1, order))


def augment(pixels: Tensor, strength: float) -> Tensor:
    """Mirror, crop and stretch, turn, relight, lose colour, erase a box: B×m×3×H×W uint8 → the same.

    Args:
        pixels: the frames.
        strength: 0 changes nothing, 1 is usual for faces.
    """
    if not strength:
        return pixels
    b, m, _, h, w = pixels.shape
    x = pixels.float()
    device = x.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(b, device=device).uniform_(low, high)

    scale = 1 - strength * uniform(0.0, 0.3)
    aspect = torch.exp(strength * uniform(-0.15, 0.15))
    angle = strength * uniform(-1.0, 1.0) * math.radians(15)
    mirror = torch.where(torch.rand(b, device=device) < 0.5, -1.0, 1.0)
    sx, sy = scale * aspect, scale / aspect
    theta = torch.zeros(b, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 0, 1] = mirror * sx * angle.cos(), -sy * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = mirror * sx * angle.sin(), sy * angle.cos()
    theta[:, 0, 2] = uniform(-1.0, 1.0) * (1 - sx).clamp_min(0)
    theta[:, 1, 2] = uniform(-1.0, 1.0) * (1 - sy).clamp_min(0)
    grid = torch.nn.functional.affine_grid(theta.repeat_interleave(m, 0), [b * m, 3, h, w], align_corners=False)
    x = torch.nn.functional.grid_sample(
        x.flatten(0, 1), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    ).view(b, m, 3, h, w)
    contrast = torch.exp(strength * uniform(-0.4, 0.4)).view(b, 1, 1, 1, 1)
    bright = (strength * uniform(-40.0, 40.0)).view(b, 1, 1, 1, 1)
    middle = x.mean((1, 2, 3, 4), keepdim=True)
    x = (x - middle) * contrast + middle + bright
    grey = (torch.rand(b, device=device) < 0.3 * strength).view(b, 1, 1, 1, 1)
    x = torch.where(grey, x.mean(2, keepdim=True).expand_as(x), x)
    x = torch.where(_box(b, h, w, strength, device)[:, None, None], middle, x)
    return x.clamp(0, 255).round().to(torch.uint8)


def _box(b: int, h: int, w: int, strength: float, device: torch.device) -> Tensor:
    """One box in a third of the rows, up to a third of each side long: B×H×W, True inside."""
    y, x = torch.arange(h, device=device)[None], torch.arange(w, device=device)[None]
    size = torch.rand(2, b, 1, device=device) / 3 * (torch.rand(b, 1, device=device) < strength / 3)
    corner = torch.rand(2, b, 1, device=device) * (1 - size)
    inside_y = (y >= corner[0] * h) & (y < (corner[0] + size[0]) * h)
    inside_x = (x >= corner[1] * w) & (x < (corner[1] + size[1]) * w)
    return inside_y[:, :, None] & inside_x[:, None]
