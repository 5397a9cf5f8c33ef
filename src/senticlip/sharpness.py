"""Sharpness-aware minimisation (Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving
Generalization"): the gradient is taken where the loss is worst nearby."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

T = TypeVar("T")


def sharpness_aware(module: nn.Module, radius: float, backward: Callable[[], T]) -> T:
    """Add to each ``grad`` the gradient at w + radius · g / ‖g‖, g the gradient at w; the weights stay as they are.

    Args:
        module: what learns; gradients that earlier batches left (accumulation) are kept.
        radius: ρ of the paper, 0.05 there.
        backward: runs one batch forward and backward; it is called twice, with the same random numbers.

    Returns:
        What the first call gave, the one at w.
    """
    learning = [p for p in module.parameters() if p.requires_grad]
    before = _exchange(learning, [None] * len(learning))
    with torch.random.fork_rng():
        result = backward()
    slopes = zip(learning, _exchange(learning, before), strict=True)
    here = [(p, p.detach().clone(), slope) for p, slope in slopes if slope is not None]
    norm = torch.stack([slope.norm() for _, _, slope in here]).norm()
    with torch.no_grad():
        for p, _, slope in here:
            p.add_(slope * (radius / norm.clamp_min(1e-12)))
    with _resting_statistics(module):
        backward()
    with torch.no_grad():
        for p, value, _ in here:
            p.copy_(value)
    return result


def _exchange(parameters: list[nn.Parameter], grads: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Give them these gradients, and return those that they had."""
    taken = [p.grad for p in parameters]
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad
    return taken


@contextmanager
def _resting_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms learn the statistics of the weights as they are, not of those nearby."""
    norms = [(part, part.momentum) for part in module.modules() if isinstance(part, _BatchNorm)]
    try:
        for part, _ in norms:
            part.momentum = 0.0
        yield
    finally:
        for part, momentum in norms:
            part.momentum = momentum
