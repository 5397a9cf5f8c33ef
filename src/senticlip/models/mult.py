"""MulT: each modality attends to every other over time, in causal cross-modal Transformers.

Tsai et al. 2019, Multimodal Transformer for Unaligned Multimodal Language Sequences (arXiv 1906.00295). SIMS
hyperparameters: MMSA, which omits position embeddings (``options.positions`` adds them). Deviations from MMSA: it has
no padding mask, so its causal band and its “last” step depend on padding; here both follow each row's length.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from senticlip.config import Config
from senticlip.models.peer import Peer, dropout, packed
from senticlip.structures import Batch, Output, Sequence

BLOCK = 64
"""Queries per block: each block scores only the keys it may attend to, and its scores fit into the CPU cache."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float) -> Tensor:
    """Scaled dot-product attention with weight dropout; B×heads×L×d, mask B×1×queries×keys (True: attend)."""
    if not p or q.is_cuda:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    q, contexts = q / math.sqrt(q.shape[-1]), []
    for queries, allowed in zip(q.split(BLOCK, 2), mask.split(BLOCK, 2), strict=True):
        end = int(allowed.flatten(0, 2).any(0).nonzero()[-1]) + 1  # no query of this block attends beyond it
        weights = (queries @ k[:, :, :end].mT).masked_fill(~allowed[..., :end], -torch.inf).softmax(-1)
        contexts.append(dropout(weights, p, True) @ v[:, :, :end])
    return torch.cat(contexts, 2)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward: queries x B×q×d attend to memory B×k×d."""

    def __init__(self, d: int, heads: int, attention_dropout: float, options: dict) -> None:
        super().__init__()
        self.heads, self.p, self.options = heads, attention_dropout, options
        self.project, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc1, self.fc2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        for linear in (self.project, self.out, self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def qkv(self, x: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        """Queries of x, keys and values of memory, B×heads×L×d_head each."""
        d = x.shape[-1]
        weight, bias = self.project.weight, self.project.bias
        q = nn.functional.linear(self.norm1(x), weight[:d], bias[:d])
        k, v = nn.functional.linear(self.norm1(memory), weight[d:], bias[d:]).chunk(2, -1)
        return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """B×q×d → B×q×d."""
        o, training = self.options, self.training
        q, k, v = self.qkv(x, memory)
        context = attend(q, k, v, mask, self.p if training else 0.0)
        x = x + dropout(self.out(context.transpose(1, 2).flatten(2)), o["res_dropout"], training)
        h = dropout(self.fc1(self.norm2(x)).relu(), o["relu_dropout"], training)
        return x + dropout(self.fc2(h), o["res_dropout"], training)


class Encoder(nn.Module):
    """A stack of layers, with the input scaled by √d and a final norm."""

    def __init__(self, d: int, layers: int, attention_dropout: float, options: dict) -> None:
        super().__init__()
        self.options = options
        self.layers: Any = nn.ModuleList(
            [Layer(d, options["heads"], attention_dropout, options) for _ in range(layers)]
        )
        self.norm = nn.LayerNorm(d)

    def embed(self, x: Tensor) -> Tensor:
        """Scale, add sinusoids (with ``options.positions``), apply dropout."""
        x = math.sqrt(x.shape[-1]) * x
        if self.options["positions"]:
            x = x + sinusoids(x.shape[1], x.shape[2]).to(x)
        return dropout(x, self.options["embed_dropout"], self.training)

    def cross(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Every layer attends to the same memory; B×q×d → B×q×d."""
        x, memory = self.embed(x), self.embed(memory)
        for layer in self.layers:
            x = layer(x, memory, mask)
        return self.norm(x)

    def last(self, x: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """The self-attention output at each row's last real step, B×d; the last layer computes only that step."""
        x = self.embed(x)
        for layer in self.layers[:-1]:
            x = layer(x, x, mask)
        rows, last_step = torch.arange(len(x), device=x.device), lengths - 1
        final = self.layers[-1](x[rows, last_step][:, None], x, mask[rows, :, last_step][:, :, None])
        return self.norm(final[:, 0])


def sinusoids(length: int, d: int) -> Tensor:
    """Sinusoidal position embeddings L×d (Vaswani et al. 2017)."""
    half = (d + 1) // 2
    rates = torch.exp(torch.arange(half) * -(math.log(10000) / max(half - 1, 1)))
    angles = torch.arange(1, length + 1)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :d]


def causal(queries: Tensor, keys: Tensor, size: tuple[int, int]) -> Tensor:
    """Lengths B of both sides → mask B×1×q×k: query i attends to the real keys j ≤ i + |L_k − L_q|.

    Padded queries attend to real keys too, so that no row of the mask is empty; their outputs are never read.
    """
    i, j = (torch.arange(n, device=queries.device) for n in size)
    shift = (keys - queries).abs()[:, None, None]
    return ((j <= i[:, None] + shift) & (j < keys[:, None, None]))[:, None]


class MulT(Peer):
    """Convolution to a common width, a cross-modal Transformer per ordered pair, self-attention, the last step."""

    DEFAULTS = {
        "width": 50,
        "heads": 10,
        "layers": 2,
        "memory_layers": 3,
        "text_kernel": 5,
        "audio_kernel": 1,
        "vision_kernel": 1,
        "attention_dropout": 0.2,
        "audio_attention_dropout": 0.1,
        "vision_attention_dropout": 0.0,
        "relu_dropout": 0.0,
        "embed_dropout": 0.1,
        "res_dropout": 0.2,
        "text_dropout": 0.3,
        "output_dropout": 0.1,
        "positions": False,
    }

    def __init__(self, config: Config, dims: dict[str, int]) -> None:
        super().__init__(config, dims)
        o, d = self.options, self.options["width"]
        others = max(len(self.names) - 1, 1)
        drop = {name: o["attention_dropout" if name == "text" else f"{name}_attention_dropout"] for name in self.names}
        self.project = nn.ModuleDict({n: nn.Conv1d(dims[n], d, o[f"{n}_kernel"], bias=False) for n in self.names})
        # as in the authors' code, a pair's attention dropout is that of the modality attended to
        pairs = {f"{a}_asks_{b}": Encoder(d, o["layers"], drop[b], o) for a in self.names for b in self.names if a != b}
        self.pairs: Any = nn.ModuleDict(pairs)
        mem_layers, mem_drop = max(o["layers"], o["memory_layers"]), o["attention_dropout"]
        self.memory: Any = nn.ModuleDict({name: Encoder(others * d, mem_layers, mem_drop, o) for name in self.names})
        combined = len(self.names) * others * d
        self.proj1, self.proj2 = nn.Linear(combined, combined), nn.Linear(combined, combined)
        self.out = nn.Linear(combined, self.outputs)

    def embed(self, name: str, sequence: Sequence) -> tuple[Tensor, Tensor]:
        """B×L×d_in → B×L'×width and lengths B; short rows are zero-padded to the kernel, absent ones are zeros."""
        values, lengths = packed(sequence)
        if name == "text":
            values = dropout(values, self.options["text_dropout"], self.training)
        kernel = self.options[f"{name}_kernel"]
        values = nn.functional.pad(values, (0, 0, 0, max(kernel - values.shape[1], 0)))
        return self.project[name](values.mT).mT, (lengths - kernel + 1).clamp(min=1)

    def forward(self, batch: Batch, attention: bool = False) -> Output:
        """Score B or logits B×C; ``attention`` adds the last layer's map of each pair (``text_asks_vision`` …)."""
        inputs = {name: self.embed(name, x) for name, x in self.inputs(batch).items()}
        maps, last = {}, {}
        for a, (x, length) in inputs.items():
            contexts = []
            for b, (y, keys) in inputs.items():
                if a != b:
                    pair, mask = self.pairs[f"{a}_asks_{b}"], causal(length, keys, (x.shape[1], y.shape[1]))
                    contexts.append(pair.cross(x, y, mask))
                    if attention:
                        maps[f"{a}_asks_{b}"] = attention_map(pair, x, y, mask)
            states = torch.cat(contexts, -1) if contexts else x
            mask = causal(length, length, (x.shape[1], x.shape[1]))
            last[a] = self.memory[a].last(states, length, mask)  # B×(M−1)d
        joint = torch.cat(list(last.values()), -1)
        hidden = dropout(self.proj1(joint).relu(), self.options["output_dropout"], self.training)
        return self.answer(self.out(self.proj2(hidden) + joint), attention=maps, features=last)


def attention_map(pair: Encoder, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
    """The attention weights of a pair's last layer, B×heads×queries×keys."""
    x, memory = pair.embed(x), pair.embed(memory)
    for layer in pair.layers[:-1]:
        x = layer(x, memory, mask)
    q, k, _ = pair.layers[-1].qkv(x, memory)
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf).softmax(-1)
