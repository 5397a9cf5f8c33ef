"""Fusion of the modalities (eq. 9 to 12 and Table 6): cross-attention | concat.

Both map Sequences B×L×d by modality to the same shapes; each row needs a real position in each modality.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from senticlip.config import Config
from senticlip.models.temporal import transformer_layers
from senticlip.structures import Sequence


class CrossAttentionBlock(nn.Module):
    """Cross-attention from one sequence to another, add & norm, feed-forward, add & norm (eq. 9 to 12).

    Shape:
        query B×q×d, context B×k×d → B×q×d and the attention weights B×heads×q×k (None unless asked for)
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        d = config.width
        self.attention = nn.MultiheadAttention(d, config.heads, config.dropout, batch_first=True)
        self.norm = nn.LayerNorm(d)
        self.feed_forward = nn.Sequential(
            nn.Linear(d, 4 * d), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(4 * d, d), nn.Dropout(config.dropout)
        )
        self.norm2 = nn.LayerNorm(d)

    def forward(self, query: Sequence, context: Sequence, attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """``query`` provides the queries, ``context`` the keys and values."""
        s, weights = self.attention(
            query.values,
            context.values,
            context.values,
            key_padding_mask=~context.mask,
            need_weights=attention,
            average_attn_weights=False,
        )  # eq. 9, 10
        s = self.norm(s + query.values)  # eq. 11, 12
        return self.norm2(s + self.feed_forward(s)), weights


class CrossAttentionFusion(nn.Module):
    """Each modality attends to every other; its states and the results are concatenated: Linear([H_a2b …; H_a])."""

    def __init__(self, config: Config, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.blocks = nn.ModuleDict(
            {f"{a}_asks_{b}": CrossAttentionBlock(config) for a in names for b in names if a != b}
        )
        self.join = nn.ModuleDict({name: nn.Linear(len(names) * config.width, config.width) for name in names})

    def forward(
        self, inputs: dict[str, Sequence], attention: bool = False
    ) -> tuple[dict[str, Sequence], dict[str, Tensor]]:
        """Fuse; attention maps are named ``text_asks_vision`` and so on."""
        outputs, maps = {}, {}
        for a in self.names:
            contexts = []
            for b in self.names:
                if a != b:
                    values, weights = self.blocks[f"{a}_asks_{b}"](inputs[a], inputs[b], attention)
                    contexts.append(values)
                    if weights is not None:
                        maps[f"{a}_asks_{b}"] = weights
            outputs[a] = Sequence(self.join[a](torch.cat([*contexts, inputs[a].values], -1)), inputs[a].mask)
        return outputs, maps


class ConcatFusion(nn.Module):
    """One concatenated sequence through a Transformer encoder with as many layers as cross-attention has blocks."""

    def __init__(self, config: Config, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.kinds = nn.Parameter(0.02 * torch.randn(len(names), config.width))
        self.encoder = transformer_layers(config, len(names) * (len(names) - 1))

    def forward(
        self, inputs: dict[str, Sequence], attention: bool = False
    ) -> tuple[dict[str, Sequence], dict[str, Tensor]]:
        """Fuse; there are no cross-attention maps."""
        x = torch.cat([inputs[name].values + kind for name, kind in zip(self.names, self.kinds, strict=True)], 1)
        mask = torch.cat([inputs[name].mask for name in self.names], 1)
        parts = self.encoder(x, src_key_padding_mask=~mask).split([inputs[n].mask.shape[1] for n in self.names], 1)
        return {name: Sequence(part, inputs[name].mask) for name, part in zip(self.names, parts, strict=True)}, {}


FUSION = {"cross-attention": CrossAttentionFusion, "concat": ConcatFusion}
