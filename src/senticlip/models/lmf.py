"""LMF: TFN's tensor product with a low-rank weight tensor, neither of which is materialised.

Liu et al. 2018, Efficient Low-rank Multimodal Fusion with Modality-Specific Factors (arXiv 1806.00064). SIMS
hyperparameters: MMSA. Deviations from MMSA: time averages and the LSTM skip padding; its optimizer omits
``fusion_weights`` and ``fusion_bias`` (``parameters()[:3]`` and ``[5:]``), which stay at their random initial values;
ours trains them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from senticlip.config import Config
from senticlip.models.peer import Peer, branches, groups, with_one
from senticlip.structures import Batch, Output


class LowRankFusion(nn.Module):
    """Σ_r w_r Π_m (x_m F_m^r) + b: M tensors B×h_i → B×out.

    Equal to Linear(flatten(x_1 ⊗ … ⊗ x_M)) with the weight Σ_r w_r F_1^r ⊗ … ⊗ F_M^r.
    """

    def __init__(self, sizes: list[int], out: int, rank: int) -> None:
        super().__init__()
        self.factors = nn.ParameterList([nn.init.xavier_normal_(torch.empty(rank, size, out)) for size in sizes])
        self.weights = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, rank)))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Project each tensor, multiply over modalities, sum over ranks."""
        product = torch.stack([x @ factor for x, factor in zip(inputs, self.factors, strict=True)]).prod(0)  # r×B×out
        return torch.einsum("r,rbo->bo", self.weights[0], product) + self.bias


class LMF(Peer):
    """An LSTM for text, ``PooledNet`` for audio and vision, then low-rank fusion."""

    DEFAULTS = {
        "text_hidden": 64,
        "audio_hidden": 16,
        "vision_hidden": 64,
        "rank": 4,
        "dropout": 0.2,
        "factor_lr": 5e-4,
    }

    def __init__(self, config: Config, dims: dict[str, int]) -> None:
        super().__init__(config, dims)
        o = self.options
        self.nets, widths = branches(self.names, dims, o, o["text_hidden"] // 2)
        self.fusion = LowRankFusion([1 + width for width in widths], self.outputs, o["rank"])

    def forward(self, batch: Batch, attention: bool = False) -> Output:
        """Features B×L×d by modality → score B or logits B×C."""
        states = {name: self.nets[name](x) for name, x in self.inputs(batch).items()}  # B×h each
        return self.answer(self.fusion(*[with_one(states[name]) for name in self.names]))

    def param_groups(self, config: Config) -> list[dict[str, Any]]:
        """The factors have their own learning rate."""
        decay = config.train.weight_decay
        return groups(self, [(self.fusion.factors, self.options["factor_lr"], decay)], config.train.lr, decay)
