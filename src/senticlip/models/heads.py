"""Sequences → logits (eq. 13 and Table 7): pooled linear for text and audio, similarity | linear for video."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from senticlip.config import Config
from senticlip.structures import LABELS, Sequence

MAX_SCALE = math.log(100.0)


class PooledHead(nn.Module):
    """Linear(attention-pool(H)): B×L×d → B×C."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        # no bias: the softmax cancels it, so its gradient would be zero
        self.query = nn.Linear(config.width, 1, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.classify = nn.Linear(config.width, len(LABELS))

    def forward(self, states: Sequence) -> Tensor:
        """Pool the real positions and classify: B×L×d → B×C."""
        weights = self.query(states.values)[..., 0].masked_fill(~states.mask, -torch.inf).softmax(1)  # B×L
        return self.classify(self.dropout((weights[..., None] * states.values).sum(1)))


class SimilarityHead(nn.Module):
    """exp(logit_scale) · norm(h_v) · norm(H_P)ᵀ with h_v at position 0 (eq. 13).

    Label vectors whose width differs from the model's pass through a bias-free projection.
    """

    def __init__(self, config: Config, label_dim: int) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.project = nn.Linear(label_dim, config.width, bias=False) if label_dim != config.width else None

    def forward(self, states: Sequence, labels: Tensor) -> Tensor:
        """B×L×d and C×d_label → B×C."""
        labels = labels if self.project is None else self.project(labels)
        with torch.autocast(labels.device.type, enabled=False):  # in bf16, two scaled logits may round to one value
            video = nn.functional.normalize(states.values[:, 0].float(), dim=-1)
            return self.logit_scale.exp() * video @ nn.functional.normalize(labels.float(), dim=-1).T


class LinearHead(nn.Module):
    """Linear(h_v), the alternative in Table 7."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.classify = nn.Linear(config.width, len(LABELS))

    def forward(self, states: Sequence) -> Tensor:
        """B×L×d → B×C."""
        return self.classify(self.dropout(states.values[:, 0]))
