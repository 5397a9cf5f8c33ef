"""Sharpness-aware minimisation (Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving
Generalization"): the gradient is taken where the loss is worst nearby."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")


def sharpness_aware(parameters: Iterable[nn.Parameter], radius: float, backward: Callable[[], T]) -> T:
    """Add to each ``grad`` the gradient at w + radius · g / ‖g‖, g the gradient at w; the weights stay as they are.

    Args:
        parameters: what learns; a gradient that earlier batches left (accumulation) is kept.
        radius: ρ of the paper, 0.05 there.
        backward: runs one batch forward and backward; it is called twice, and draws its own dropout each time.

    Returns:
        What the first call gave, the one at w.
    """
    learning = [p for p in parameters if p.requires_grad]
    before = _take(learning)
    result = backward()
    slopes = zip(learning, _take(learning), strict=True)
    here = [(p, p.detach().clone(), slope) for p, slope in slopes if slope is not None]
    norm = torch.stack([slope.norm() for _, _, slope in here]).norm()
    with torch.no_grad():
        for p, _, slope in here:
            p.add_(slope * (radius / norm.clamp_min(1e-12)))
    backward()
    with torch.no_grad():
        for p, value, _ in here:
            p.copy_(value)
        for p, grad in zip(learning, before, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad.add_(grad)
    return result


def _take(parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
    """Their gradients, which they no longer have."""
    taken = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return taken
