"""TFN: the outer product of all modalities, each with a 1 prepended.

Zadeh et al. 2017, Tensor Fusion Network for Multimodal Sentiment Analysis (arXiv 1707.07250). SIMS hyperparameters:
MMSA. Deviations from MMSA: time averages and the LSTM skip padding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from senticlip.config import Config
from senticlip.models.peer import Peer, branches, drop_mask, dropout, with_one
from senticlip.structures import Batch, Output


class SlicedProduct(torch.autograd.Function):
    """Σ_i dropout(product · last_i) W_iᵀ; for the backward pass it stores only the dropout masks, not the slices.

    Shape:
        product B×P, last B×S, weight S×out×P → B×out
    """

    @staticmethod
    def forward(ctx: Any, product: Tensor, last: Tensor, weight: Tensor, p: float) -> Tensor:
        """Sum the slices."""
        out, ctx.masks, ctx.scale = product.new_zeros(len(product), weight.shape[1]), [], 1.0
        for i, w in enumerate(weight):
            if p:
                mask, ctx.scale = drop_mask(product.shape, p)
                ctx.masks.append(mask)
            out.addmm_(SlicedProduct.slice(ctx, i, product, last), w.T)
        ctx.save_for_backward(product, last, weight)
        return out

    @staticmethod
    def slice(ctx: Any, i: int, product: Tensor, last: Tensor) -> Tensor:
        """product · last_i with dropout and scaling."""
        z = product * (ctx.scale * last[:, i : i + 1])
        return z.mul_(ctx.masks[i]) if ctx.masks else z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Recompute the slices, one by one."""
        product, last, weight = ctx.saved_tensors
        to_product, to_last, to_weight = torch.zeros_like(product), torch.empty_like(last), torch.empty_like(weight)
        for i, w in enumerate(weight):
            torch.mm(grad.T, SlicedProduct.slice(ctx, i, product, last), out=to_weight[i])
            to_slice = (grad @ w).mul_(ctx.scale)
            to_slice = to_slice.mul_(ctx.masks[i]) if ctx.masks else to_slice
            to_last[:, i] = (to_slice * product).sum(1)
            to_product.addcmul_(to_slice, last[:, i : i + 1])
        return to_product, to_last, to_weight, None


class TensorLinear(nn.Module):
    """Linear(dropout(flatten(x_1 ⊗ … ⊗ x_M))): M tensors B×h_i → B×out.

    The product (1.1 million numbers per row at SIMS sizes) is computed for one element of the last vector at a time, so
    that it stays in the CPU cache. ``weight`` h_M×out×(h_1 ⋯ h_{M−1}).
    """

    def __init__(self, sizes: list[int], out: int, p: float) -> None:
        super().__init__()
        *first, last = [1, *sizes] if len(sizes) == 1 else sizes
        self.p = p
        bound = 1 / math.sqrt(math.prod(sizes))  # as in nn.Linear
        self.weight = nn.Parameter(torch.empty(last, out, math.prod(first)).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out).uniform_(-bound, bound))

    def forward(self, *factors: Tensor) -> Tensor:
        """Outer product, dropout, projection."""
        *first, last = factors if len(factors) > 1 else (factors[0].new_ones(len(factors[0]), 1), *factors)
        product = first[0]
        for factor in first[1:]:
            product = (product[:, :, None] * factor[:, None]).flatten(1)  # B×(h_1 ⋯ h_{M−1})
        p = self.p if self.training else 0.0
        if product.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            return SlicedProduct.apply(product, last, self.weight, p) + self.bias
        out = self.bias.expand(len(product), -1)
        for scale, weight in zip(last.unbind(1), self.weight.unbind(0), strict=True):
            out = torch.addmm(out, dropout(product * scale[:, None], self.p, self.training), weight.T)
        return out  # B×out


class TFN(Peer):
    """An LSTM for text, ``PooledNet`` for audio and vision, then the tensor product."""

    DEFAULTS = {
        "text_hidden": 128,
        "audio_hidden": 32,
        "vision_hidden": 128,
        "text_out": 256,
        "post_fusion": 32,
        "dropout": 0.4,
        "score_range": 3.0,
    }

    def __init__(self, config: Config, dims: dict[str, int]) -> None:
        super().__init__(config, dims)
        o = self.options
        self.nets, widths = branches(self.names, dims, o, o["text_out"])
        self.fusion = TensorLinear([1 + width for width in widths], o["post_fusion"], o["dropout"])
        self.hidden = nn.Linear(o["post_fusion"], o["post_fusion"])
        self.out = nn.Linear(o["post_fusion"], self.outputs)

    def forward(self, batch: Batch, attention: bool = False) -> Output:
        """Features B×L×d by modality → scores B within ± ``options.score_range``, or logits B×C."""
        states = {name: self.nets[name](x) for name, x in self.inputs(batch).items()}  # B×h each
        fused = self.fusion(*[with_one(states[name]) for name in self.names]).relu()  # B×post_fusion
        raw = self.out(self.hidden(fused).relu())
        if self.outputs == 1:
            raw = (2 * raw.sigmoid() - 1) * self.options["score_range"]
        return self.answer(raw)
