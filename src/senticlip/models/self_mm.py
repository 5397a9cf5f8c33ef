"""Self-MM: the fusion learns from the joint label, each modality from labels that the model generates itself.

Yu et al. 2021, Learning Modality-Specific Representations with Self-Supervised Multi-Task Learning for Multimodal
Sentiment Analysis (arXiv 2102.04830). SIMS hyperparameters and update: MMSA. Regression by nature. Deviations from
MMSA: a row's label starts when the row is first seen, not in a pass before the training (the same from epoch 2 on);
where no label is on one side of zero, that centre stays at zero instead of NaN.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor, nn

from senticlip.config import Config
from senticlip.losses import mean_of
from senticlip.models.peer import Peer, RecurrentNet, groups, masked_mean, packed, present
from senticlip.structures import Batch, Output, Sequence, UsageError

JOINT = "fused"


class Branch(nn.Module):
    """dropout → Linear, ReLU (the feature whose distances make labels) → Linear, ReLU → Linear: a score."""

    def __init__(self, dim: int, hidden: int, p: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(p)
        self.layer1, self.layer2, self.layer3 = nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """B×d → feature B×h, score B×1."""
        feature = self.layer1(self.drop(x)).relu()
        return feature, self.layer3(self.layer2(feature).relu())


class SelfMM(Peer):
    """The network, and buffers that hold the generated labels and features of each training row.

    ``labels`` heads×N (NaN: not seen yet), ``seen_<head>`` N×h features, ``centres_<head>`` 2×h (negative, positive)
    are in the checkpoint, but not needed to predict. N is the size that :meth:`prepare` was told. The trainer gives
    each row's index in the training set as ``batch.rows`` and calls :meth:`epoch_started`.
    """

    labels: Tensor
    TASKS = ("regression",)  # it makes labels on a scale
    DEFAULTS = {
        "text_pool": "first",
        "audio_hidden": 16,
        "vision_hidden": 64,
        "audio_out": 16,
        "vision_out": 32,
        "fused_post": 128,
        "text_post": 64,
        "audio_post": 16,
        "vision_post": 32,
        "fused_dropout": 0.0,
        "text_dropout": 0.1,
        "audio_dropout": 0.1,
        "vision_dropout": 0.0,
        "audio_lr": 5e-3,
        "vision_lr": 5e-3,
        "sequence_decay": 0.01,
        "limit": 1.0,
    }

    def __init__(self, config: Config, dims: dict[str, int]) -> None:
        super().__init__(config, dims)
        o = self.options
        sequences = [name for name in self.names if name != "text"]
        self.nets = nn.ModuleDict({n: RecurrentNet(dims[n], o[f"{n}_hidden"], o[f"{n}_out"]) for n in sequences})
        sizes = {name: dims[name] if name == "text" else o[f"{name}_out"] for name in self.names}
        self.heads = [JOINT, *self.names]
        widths = {JOINT: sum(sizes.values()), **sizes}
        self.branches: Any = nn.ModuleDict(
            {n: Branch(widths[n], o[f"{n}_post"], o[f"{n}_dropout"]) for n in self.heads}
        )
        self.epoch = 1
        self._resize_buffers(0)

    def prepare(self, training: Sized) -> None:
        """Reset the buffers to the size of the training set."""
        self._resize_buffers(len(training))

    def _resize_buffers(self, size: int) -> None:
        place = self.branches[JOINT].layer1.weight
        self.register_buffer("labels", place.new_full((len(self.heads), size), torch.nan))
        for name in self.heads:
            width = self.options[f"{name}_post"]
            self.register_buffer(f"seen_{name}", place.new_zeros(size, width))
            self.register_buffer(f"centres_{name}", place.new_zeros(2, width))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Resize the buffers to those of the checkpoint first."""
        if (labels := state_dict.get(prefix + "labels")) is not None:
            self._resize_buffers(labels.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def epoch_started(self, epoch: int) -> None:
        """Which epoch of the training this is, 1 for the first: from the second on, labels move."""
        self.epoch = epoch

    def forward(self, batch: Batch, attention: bool = False) -> Output:
        """The joint score; in ``features`` each head's feature, and its score as ``<head>_score`` B×1."""
        states = {}
        for name, sequence in self.inputs(batch).items():
            states[name] = self.nets[name](sequence) if name != "text" else pool(sequence, self.options["text_pool"])
        features = {}
        for name, branch in self.branches.items():
            x = torch.cat([states[n] for n in self.names], -1) if name == JOINT else states[name]
            features[name], features[f"{name}_score"] = branch(x)
        return self.answer(features[f"{JOINT}_score"], features=features)

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Training: L1 of all heads to their own labels, unimodal ones weighted tanh|y_s − y_m|, then the update."""
        if not self.training:
            return super().loss(output, batch)
        if batch.rows is None:
            raise UsageError("self_mm: a training batch needs the index of its rows, to keep a label for each")
        truth, index = batch.labels[self.target].to(self.labels), batch.rows
        known = ~truth.isnan()
        if int(index.max()) >= self.labels.shape[1]:
            raise UsageError(f"self_mm: prepared for {self.labels.shape[1]} rows, but row {int(index.max())} came")
        own = self.labels[:, index]
        own = torch.where(own.isnan(), truth, own)  # heads×B: the joint label until there is a better one
        own, joint = own.nan_to_num(), truth.nan_to_num()  # 0 · NaN would be the gradient of a row without a label
        came = {name: sequence.mask.any(1) for name, sequence in batch.modalities.items()}
        there = torch.stack([came.get(name, torch.full_like(known, name == JOINT)) for name in self.heads])  # heads×B
        total, logs = output.features[f"{JOINT}_score"].new_zeros(()), {}
        for name, labels, rows in zip(self.heads, own, known & there, strict=True):
            weight = torch.ones_like(labels) if name == JOINT else (labels - joint).abs().tanh()
            loss = mean_of(weight * (output.features[f"{name}_score"][:, 0] - labels).abs(), rows)
            total, logs[f"loss_{name}"] = total + loss, loss.detach()
        features = torch.cat([output.features[name].detach().to(self.labels) for name in self.heads], -1)
        self.remember(index, truth, features, there)
        return total, logs

    @torch.no_grad()
    def remember(self, index: Tensor, truth: Tensor, features: Tensor, there: Tensor) -> None:
        """Update these rows' labels and stored features (B×Σh), then the centres, over all processes.

        ``there`` (heads×B): which rows have the modality; without it a row has no label, and counts in no centre.
        """
        index, truth, features, came = (gathered(values) for values in (index, truth, features, there.T.contiguous()))
        known = ~truth.isnan()
        index, truth, features, came = index[known], truth[known], features[known], came[known]
        by_head = dict(
            zip(self.heads, features.split([self.options[f"{n}_post"] for n in self.heads], -1), strict=True)
        )
        own = self.labels[:, index]
        own = torch.where(own.isnan(), truth, own)
        if self.epoch > 1:
            tilt = {n: lean(by_head[n], *getattr(self, f"centres_{n}")) for n in self.heads}
            moved = [
                new_label(own[i], truth, tilt[n], tilt[JOINT], self.epoch, self.options["limit"])
                for i, n in enumerate(self.heads)
                if n != JOINT
            ]
            own = torch.stack([truth, *moved])
        self.labels[:, index] = torch.where(came.T, own, torch.nan)
        for name, labels in zip(self.heads, self.labels, strict=True):
            seen = getattr(self, f"seen_{name}")
            seen[index] = by_head[name]
            sides = torch.stack([labels < 0, labels > 0]).to(seen)  # 2×N; NaN is on neither side
            getattr(self, f"centres_{name}").copy_(sides @ seen / sides.sum(1, keepdim=True).clamp(min=1))

    def param_groups(self, config: Config) -> list[dict[str, Any]]:
        """Audio and vision LSTMs learn at their own rate."""
        o, train = self.options, config.train
        special = [(net.parameters(), o[f"{name}_lr"], o["sequence_decay"]) for name, net in self.nets.items()]
        return groups(self, special, train.lr, train.weight_decay)


def lean(feature: Tensor, negative: Tensor, positive: Tensor) -> Tensor:
    """δ = (‖F − C_neg‖ − ‖F − C_pos‖) / (‖F − C_pos‖ + 1e-8), B."""
    to_positive = (feature - positive).norm(dim=-1)
    return ((feature - negative).norm(dim=-1) - to_positive) / (to_positive + 1e-8)


def new_label(own: Tensor, joint: Tensor, tilt: Tensor, tilt_joint: Tensor, epoch: int, limit: float) -> Tensor:
    """The momentum update of a modality's labels (eq. 8 to 11 of the paper), B."""
    alpha = tilt / (tilt_joint + 1e-8)
    target = (0.5 * alpha * joint + 0.5 * (joint + tilt - tilt_joint)).clamp(-limit, limit)
    return (epoch - 1) / (epoch + 1) * own + 2 / (epoch + 1) * target


def pool(sequence: Sequence, how: str) -> Tensor:
    """B×L×d → B×d: the first real position ([CLS]) or the mean; zeros where absent."""
    if how == "mean":
        return masked_mean(sequence)
    return packed(sequence)[0][:, 0] * present(sequence)


def gathered(values: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; ``values`` itself where there is one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    size = torch.tensor(len(values), device=values.device)
    sizes = [torch.zeros_like(size) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(sizes, size)
    longest = int(max(sizes))
    padded = torch.cat([values, values.new_zeros(longest - len(values), *values.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)])
