"""MMAF: self-attention per modality, cross-attention per pair, a gate over all parts; T, A, V as extra tasks.

Wu & Ma 2023, Multi-task & multi-modal sentiment analysis model based on aware fusion (doi
10.11925/infotech.2096-3467.2022.1017); only its abstract is accessible. “MMAF” is the single-task form; “MMAF+T+A+V”
(``options.tasks``) adds the unimodal tasks, weighted by homoscedastic uncertainty. Our interpretation: pairwise
cross-modal attention, and a gate over modalities and interactions; any features replace BERT, wav2vec and OpenFace.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from senticlip.config import Config
from senticlip.losses import LOSSES, count_rows, mean_over
from senticlip.models.peer import Peer, groups, masked_mean
from senticlip.structures import LABELS, OWN_LABEL, Batch, Output, Sequence


class Perception(nn.Module):
    """Two modalities attend to each other; the two results are merged into one vector.

    Shape:
        a B×d with B×L_a×d, b B×d with B×L_b×d → B×d and two maps B×heads×1×L
    """

    def __init__(self, d: int, heads: int, p: float) -> None:
        super().__init__()
        self.attention = nn.ModuleList([nn.MultiheadAttention(d, heads, p, batch_first=True) for _ in range(2)])
        self.join = nn.Sequential(nn.Linear(2 * d, d), nn.ReLU(), nn.LayerNorm(d))

    def forward(self, a: tuple[Tensor, Sequence], b: tuple[Tensor, Sequence]) -> tuple[Tensor, list[Tensor]]:
        """Each pooled vector is the query; the other modality's sequence provides keys and values."""
        contexts, maps = [], []
        for attention, (query, _), (_, context) in zip(self.attention, (a, b), (b, a), strict=True):
            padding = ~context.mask
            values, weights = attention(
                query[:, None], context.values, context.values, key_padding_mask=padding, average_attn_weights=False
            )
            contexts.append(values[:, 0])
            maps.append(weights)
        return self.join(torch.cat(contexts, -1)), maps


class MMAF(Peer):
    """Classification only; ``weights`` is the gate, with an interaction's share split between its two modalities."""

    TASKS = ("classification",)
    DEFAULTS = {"task": "classification", "tasks": ["M"], "width": 128, "heads": 4, "layers": 1, "dropout": 0.2}

    def __init__(self, config: Config, dims: dict[str, int]) -> None:
        super().__init__(config, dims)
        o, d = self.options, self.options["width"]
        self.project = nn.ModuleDict({n: nn.Sequential(nn.Linear(dims[n], d), nn.LayerNorm(d)) for n in self.names})
        layers = {}
        for name in self.names:
            layer = nn.TransformerEncoderLayer(d, o["heads"], 2 * d, o["dropout"], batch_first=True, norm_first=True)
            layers[name] = nn.TransformerEncoder(layer, o["layers"], nn.LayerNorm(d), enable_nested_tensor=False)
        self.self_attention = nn.ModuleDict(layers)
        self.pairs = list(combinations(self.names, 2))
        self.perception = nn.ModuleDict(
            {"_".join(pair): Perception(d, o["heads"], o["dropout"]) for pair in self.pairs}
        )
        parts = len(self.names) + len(self.pairs)
        self.gate = nn.Linear(parts * d, parts) if parts > 1 else None
        self.drop = nn.Dropout(o["dropout"])
        self.tasks = ["fused", *(name for name in self.names if OWN_LABEL[name] in o["tasks"])]
        self.heads = nn.ModuleDict({name: nn.Linear(d, len(LABELS)) for name in self.tasks})
        self.weigh: Any = LOSSES[config.loss](self.tasks) if len(self.tasks) > 1 else None

    def forward(self, batch: Batch, attention: bool = False) -> Output:
        """Logits B×C of the joint task, and of each modality whose task is trained."""
        inputs = self.inputs(batch)
        present = {name: sequence.mask.any(1) for name, sequence in inputs.items()}  # B each
        encoded = {name: self.encode(name, sequence) for name, sequence in inputs.items()}
        pooled = {name: masked_mean(sequence) for name, sequence in encoded.items()}  # B×d each
        parts, part_present = list(pooled.values()), list(present.values())
        maps: dict[str, Tensor] = {}
        for a, b in self.pairs:
            both, (ab, ba) = self.perception[f"{a}_{b}"]((pooled[a], encoded[a]), (pooled[b], encoded[b]))
            parts.append(both)
            part_present.append(present[a] & present[b])
            maps |= {f"{a}_asks_{b}": ab, f"{b}_asks_{a}": ba} if attention else {}
        keep = torch.stack(part_present, -1)  # B×P
        states = torch.where(keep[..., None], torch.stack(parts, 1), 0)  # B×P×d: absent parts are zero
        gate = self.gates(states, keep)
        fused = (gate[..., None] * states).sum(1)
        logits = {name: self.heads[name](self.drop(pooled.get(name, fused))).float() for name in self.tasks}
        return Output(logits, logits["fused"].log_softmax(-1), self.shares(gate), attention=maps)

    def encode(self, name: str, sequence: Sequence) -> Sequence:
        """Project and apply self-attention; an absent modality becomes one zero vector at a position marked as real."""
        absent = ~sequence.mask.any(1, keepdim=True)
        mask = torch.cat([sequence.mask[:, :1] | absent, sequence.mask[:, 1:]], 1)
        values = self.project[name](torch.where(sequence.mask[..., None], sequence.values, 0))
        return Sequence(self.self_attention[name](values, src_key_padding_mask=~mask), mask)

    def gates(self, states: Tensor, keep: Tensor) -> Tensor:
        """B×P×d → B×P, which sum to 1 over the present parts (over all parts if a row has none)."""
        if self.gate is None:
            return states.new_ones(states.shape[:2])
        keep = keep | ~keep.any(1, keepdim=True)
        return self.gate(states.flatten(1)).masked_fill(~keep, -torch.inf).softmax(-1)

    def shares(self, gate: Tensor) -> dict[str, Tensor]:
        """The share of each modality in the gate, B each."""
        shares = dict(zip(self.names, gate.unbind(1), strict=False))
        for i, (a, b) in enumerate(self.pairs, len(self.names)):
            shares[a], shares[b] = shares[a] + gate[:, i] / 2, shares[b] + gate[:, i] / 2
        return shares

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of each task over the rows that have its label and its modality."""
        losses, observed, inputs = {}, {}, self.inputs(batch)
        for name in self.tasks:
            labels = batch.labels[self.target if name == "fused" else OWN_LABEL[name]]
            used = ~labels.isnan()
            if name != "fused":
                used = used & inputs[name].mask.any(1)
            observed[name] = count_rows(used) > 0
            losses[name] = mean_over(self.cross_entropy(output.logits[name], labels), used)
        logs = {f"loss_{name}": value.detach() for name, value in losses.items()}
        return (losses["fused"] if self.weigh is None else self.weigh(losses, observed)), logs

    def step_finished(self) -> None:
        """Clamp the log variances."""
        if self.weigh is not None:
            self.weigh.clamp()

    def param_groups(self, config: Config) -> list[dict[str, Any]]:
        """The log variances have their own learning rate and no weight decay."""
        special = [(self.weigh.parameters(), config.train.scalar_lr, 0.0)] if self.weigh is not None else []
        return groups(self, special, config.train.lr, config.train.weight_decay)
