"""Shared parts of the peers: options with published defaults, masked pooling, output and loss.

A peer reads a Batch of float features and returns an Output. Unlike in MMSA's code (github.com/thuiar/MMSA), padding
has no effect. A missing modality is read as zeros, whatever values are under its mask; the biases of later layers learn
what absence means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from senticlip.config import Config, typed
from senticlip.losses import cross_entropy, mean_over
from senticlip.structures import LABELS, MODALITIES, TARGETS, Batch, Output, Sequence, UsageError, polarity


class Peer(nn.Module):
    """Base class of the peers: ``options`` (override ``DEFAULTS``), order of modalities, output and loss.

    Args:
        config: ``modalities``, ``target``, ``options``; ``options.task`` is regression (a score; classes by Acc-3
            bins) or classification (logits).
        dims: feature width by modality.

    Raises:
        UsageError: an unknown option or invalid value, or class weights (``balance: weights``) for regression.
    """

    class_weights: Tensor
    TASKS: tuple[str, ...] = ("regression", "classification")
    DEFAULTS: dict[str, Any] = {"task": "regression"}

    def __init__(self, config: Config, dims: dict[str, int]) -> None:
        super().__init__()
        defaults = {**Peer.DEFAULTS, **self.DEFAULTS}
        unknown = sorted(map(str, set(config.options) - set(defaults)))
        if unknown:
            raise UsageError(f"options.{unknown[0]}: {config.model} has no such option, only {', '.join(defaults)}")
        given = {name: typed(type(defaults[name]), value, f"options.{name}") for name, value in config.options.items()}
        self.options = {**defaults, **given}
        _check(self.options, self.TASKS)
        if config.train.balance == "weights" and self.options["task"] == "regression":
            raise UsageError(f"train.balance: weights — {config.model} learns a score, not classes: choose none")
        self.names = [name for name in MODALITIES if name in config.modalities]
        self.dims = {name: dims[name] for name in self.names}
        self.target = config.target
        self.smoothing = config.train.label_smoothing
        self.outputs = len(LABELS) if self.options["task"] == "classification" else 1
        self.register_buffer("class_weights", torch.ones(len(LABELS)))

    def inputs(self, batch: Batch) -> dict[str, Sequence]:
        """Features by modality, in this peer's order and dtype; a modality not in the batch is absent in all rows."""
        dtype, reference = next(self.parameters()).dtype, next(iter(batch.modalities.values())).mask
        absent, sequences = reference.new_zeros(len(reference), 1), {}
        for name, dim in self.dims.items():
            values, mask = batch.modalities.get(name) or (absent.new_zeros(len(reference), 1, dim), absent)
            sequences[name] = Sequence(values.to(dtype), mask)
        return sequences

    def answer(self, raw: Tensor, **more: Any) -> Output:
        """Logits B×C or scores B×1 as an Output; in fp32, since rounding could make two logits equal."""
        raw = raw.float()
        if self.outputs == 1:
            return Output(score=raw[:, 0], **more)
        return Output(logits={"fused": raw}, log_probs=raw.log_softmax(-1), **more)

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """L1 of the score or cross-entropy of the logits, over rows with a known label."""
        labels = batch.labels[self.target]
        labelled = ~labels.isnan()
        if output.score is None:
            row_losses = self.cross_entropy(output.logits["fused"], labels)
        else:
            row_losses = (output.score - labels).abs()
        return mean_over(row_losses, labelled), {}

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each row, B; the class is the sign of the label. Mask rows without a label (NaN)."""
        return cross_entropy(logits, polarity(labels), smoothing=self.smoothing, weight=self.class_weights)


def _check(options: dict[str, Any], tasks: tuple[str, ...]) -> None:
    """Reject option values out of range."""
    choices = {"task": tasks, "tasks": TARGETS, "text_pool": ("first", "mean")}
    for name, value in options.items():
        if name in choices:
            if invalid := [v for v in (value if isinstance(value, list) else [value]) if v not in choices[name]]:
                raise UsageError(f"options.{name}: {invalid[0]!r} — choose from {', '.join(choices[name])}")
        elif name.endswith("dropout") and not 0 <= value < 1:
            raise UsageError(f"options.{name}: {value} — must be at least 0 and below 1")
        else:  # counts are at least 1, other numbers at least 0
            minimum = 1 if type(value) is int else 0
            if not minimum <= value < math.inf:
                raise UsageError(f"options.{name}: {value} — must be at least {minimum}")
    if options.get("width", 0) % options.get("heads", 1):
        raise UsageError(f"options.width: {options['width']} is not divisible by heads: {options['heads']}")


def masked_mean(sequence: Sequence) -> Tensor:
    """B×L×d → B×d, the mean over real positions; zeros if there are none. (MMSA includes padding.)"""
    real = sequence.mask[..., None]
    return torch.where(real, sequence.values, 0).sum(1) / real.sum(1).clamp(min=1)


def present(sequence: Sequence) -> Tensor:
    """B×1: 1 where the row has this modality, else 0."""
    return sequence.mask.any(1, keepdim=True).to(sequence.values.dtype)


def packed(sequence: Sequence) -> tuple[Tensor, Tensor]:
    """Real positions moved to the front, followed by zeros: values B×L'×d and lengths B (0 where absent).

    L' is the longest row's length, at least 1, which removes unnecessary padding.
    """
    values, mask = torch.where(sequence.mask[..., None], sequence.values, 0), sequence.mask
    lengths = mask.sum(1)
    if (mask[:, 1:] > mask[:, :-1]).any():  # there are gaps
        order = (~mask).int().argsort(dim=1, stable=True)
        values = values.gather(1, order[..., None].expand_as(values))
    return values[:, : max(int(lengths.max()), 1)], lengths


class LastState(nn.Module):
    """The state of an LSTM after the last real step: B×L×d → B×h; zeros where the modality is absent."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dim, hidden, batch_first=True)

    def forward(self, sequence: Sequence) -> Tensor:
        """Compute only real steps; an absent row is one step of zeros, whose state is discarded."""
        values, lengths = packed(sequence)
        steps = lengths.clamp(min=1).cpu()
        with torch.autocast(values.device.type, enabled=False):  # some CPUs do not support bf16 LSTMs
            values = values.to(next(self.lstm.parameters()).dtype)
            _, (last, _) = self.lstm(nn.utils.rnn.pack_padded_sequence(values, steps, True, enforce_sorted=False))
        return last[0] * present(sequence)


class PooledNet(nn.Module):
    """The audio and vision branch of TFN and LMF: mean over time, batch norm, three ReLU layers; B×L×d → B×h."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList([nn.Linear(dim if i == 0 else hidden, hidden) for i in range(3)])

    def forward(self, sequence: Sequence) -> Tensor:
        """B×L×d → B×h; a batch of one row is normalised by running statistics, as its own would give 0/0."""
        x = masked_mean(sequence)
        norm = self.norm
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        x = self.drop(norm(x) if len(x) > 1 else nn.functional.batch_norm(x, *statistics, eps=norm.eps))
        for layer in self.layers:
            x = layer(x).relu()
        return x * present(sequence)


class RecurrentNet(nn.Module):
    """The text branch of TFN and LMF, and audio and vision in Self-MM: Linear(last LSTM state); B×L×d → B×out."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.last = LastState(dim, hidden)
        self.out = nn.Linear(hidden, out)

    def forward(self, sequence: Sequence) -> Tensor:
        """B×L×d → B×out, zeros where the modality is absent."""
        return self.out(self.last(sequence)) * present(sequence)


def branches(
    names: list[str], dims: dict[str, int], options: dict[str, Any], text_out: int
) -> tuple[nn.ModuleDict, list[int]]:
    """The branches of TFN and LMF by modality, and their output widths."""
    nets: dict[str, nn.Module] = {}
    for name in names:
        dim, hidden = dims[name], options[f"{name}_hidden"]
        is_text = name == "text"
        nets[name] = RecurrentNet(dim, hidden, text_out) if is_text else PooledNet(dim, hidden, options["dropout"])
    return nn.ModuleDict(nets), [text_out if name == "text" else options[f"{name}_hidden"] for name in names]


def with_one(x: Tensor) -> Tensor:
    """Prepend a 1, B×h → B×(1+h): products of such vectors also contain all lower-order products."""
    return nn.functional.pad(x, (1, 0), value=1.0)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout that, on a CPU, draws a random byte per element instead of a float; p is then rounded to 1/256.

    With floats, TFN and MulT would spend most of their training time on random numbers.
    """
    if not (training and p):
        return x
    if x.is_cuda:
        return nn.functional.dropout(x, p)
    mask, scale = drop_mask(x.shape, p)
    return x * mask.to(x.dtype).mul_(scale)


def drop_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """Which elements to keep (bool, on the CPU), and their scale factor, about 1 / (1 − p)."""
    drop = min(round(p * 256), 255)
    words = torch.empty(-(-shape.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    return (words.view(torch.uint8)[: shape.numel()] >= drop).view(shape), 256 / (256 - drop)


def groups(
    network: nn.Module, special: Iterable[tuple[Iterable[nn.Parameter], float, float]], lr: float, decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups: (parameters, lr, weight decay) for each in ``special``; ``lr`` and ``decay`` for all others."""
    result, taken = [], set()
    for parameters, rate, weight_decay in special:
        chosen = list(parameters)
        taken |= {id(p) for p in chosen}
        result.append({"params": chosen, "lr": rate, "weight_decay": weight_decay})
    rest = [p for p in network.parameters() if id(p) not in taken]
    return [*result, {"params": rest, "lr": lr, "weight_decay": decay}]
