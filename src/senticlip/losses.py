"""Focal loss, and the two ways to combine losses (eq. 14 to 17 and Table 8): uncertainty | sum."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def cross_entropy(
    logits: Tensor, target: Tensor, gamma: float = 0.0, smoothing: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """Focal loss −(1−p)^γ log p of each row, B; γ = 0 is cross-entropy (Lin et al. 2017, eq. 4).

    Args:
        logits: B×C.
        target: B class indices.
        gamma: focusing parameter γ; p is the probability of the target class.
        smoothing: label smoothing of the cross-entropy factor.
        weight: C class weights; the result is not normalised by their sum.
    """
    losses = nn.functional.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    if gamma:
        p = logits.softmax(-1).gather(1, target[:, None])[:, 0]
        # rounding can make 1 − p negative, and at 0 its power has no finite gradient
        losses = (1 - p).clamp_min(1e-8) ** gamma * losses
    return losses if weight is None else losses * weight.to(losses.dtype)[target]


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of ``values`` B where ``mask`` is True; 0, still differentiable, if it is False everywhere.

    With several processes, the average of their results is the mean over all their rows.
    """
    return torch.where(mask, values, 0).sum() / count_rows(mask).clamp(min=1e-6)


def count_rows(mask: Tensor) -> Tensor:
    """The number of True rows; with several processes the mean over them, since their gradients are averaged too."""
    count = mask.sum().float()
    if torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count /= torch.distributed.get_world_size()
    return count


class Uncertainty(nn.Module):
    """Σ exp(−s_i) L_i + s_i / 2, s_i = log σ_i² (eq. 17; Kendall, Gal & Cipolla 2018, classification form).

    The minimum over s_i is at s_i = ln 2 L_i. ``clamp`` is called after each optimizer step: clamping in the forward
    pass would zero the gradient of s beyond the limit.
    """

    LIMIT = 5.0

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.s = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in names})

    def forward(self, losses: dict[str, Tensor], observed: dict[str, Tensor]) -> Tensor:
        """Scalar losses by name, and whether the batch has any row for each → scalar.

        Without any row, the term s / 2 is left out: alone, it would lower s and so raise a rare task's weight.
        """
        parts = [torch.exp(-self.s[name]) * loss + self.s[name] / 2 * observed[name] for name, loss in losses.items()]
        return torch.stack(parts).sum()

    def weights(self) -> Tensor:
        """exp(−s) of each loss, in the order of ``names``, not normalised."""
        return torch.exp(-torch.stack(list(self.s.values())))

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamp s to ± LIMIT."""
        for s in self.s.values():
            s.clamp_(-self.LIMIT, self.LIMIT)


class WeightedSum(nn.Module):
    """The sum of the losses (eq. 14 with μ = 1)."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, losses: dict[str, Tensor], observed: dict[str, Tensor]) -> Tensor:
        """Scalar losses by name → scalar."""
        return torch.stack(list(losses.values())).sum()

    def weights(self) -> Tensor:
        """Equal weights."""
        return torch.ones(len(self.names))

    def clamp(self) -> None:
        """Do nothing: there are no parameters."""


LOSSES = {"uncertainty": Uncertainty, "sum": WeightedSum}
