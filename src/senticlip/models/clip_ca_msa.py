"""CLIP-CA-MSA: the paper's model, equation by equation (docs/equations.md).

Chen et al. 2024, "基于CLIP和交叉注意力的多模态情感分析模型", doi 10.13705/j.issn.1671-6833.2024.02.003.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from senticlip.config import Config
from senticlip.encoders.labels import LabelEncoder
from senticlip.losses import LOSSES, count_rows, cross_entropy, mean_over
from senticlip.models.fusion import FUSION
from senticlip.models.heads import MAX_SCALE, LinearHead, PooledHead, SimilarityHead
from senticlip.models.temporal import TEMPORAL
from senticlip.structures import LABELS, OWN_LABEL, Batch, Output, Sequence, polarity


class Entrance(nn.Module):
    """Projects features of one modality to the model's width; rows without it get one learned absent token."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, width)
        self.absent = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, features: Sequence, present: Tensor) -> Sequence:
        """B×L×dim → B×L×d; masked values are never read."""
        values, mask = features
        x = self.project(values.to(self.absent.dtype).masked_fill(~mask[..., None], 0.0))
        first = torch.where(present[:, None], x[:, 0], self.absent.to(x.dtype))
        mask = torch.cat([mask[:, :1] | ~present[:, None], mask[:, 1:]], 1)
        return Sequence(torch.cat([first[:, None], x[:, 1:]], 1), mask)


class Whiten(nn.Module):
    """PCA whitening of the audio features: mean 0, covariance close to the identity, B×L×d → B×L×d.

    Neighbouring log-mel bands are highly correlated; voices differ in small residuals, which gradient descent learns
    late. (Cepstra, the cosine transform of a log-mel, are only partly decorrelated.)
    """

    mean: Tensor
    turn: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("turn", torch.eye(dim))

    def forward(self, features: Sequence) -> Sequence:
        """Whiten each position."""
        with torch.autocast(self.mean.device.type, enabled=False):  # bf16 would lose small differences again
            return Sequence((features.values.to(self.mean) - self.mean) @ self.turn, features.mask)

    def learn(self, parts: Iterable[Tensor]) -> None:
        """Fit mean and transform to the training positions, in parts N×d; directions without variance stay small."""
        count, width = 0, len(self.mean)
        total, squares = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
        for part in parts:
            rows = part.double()
            count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.T @ rows
        if count:
            mean = total / count
            variances, directions = torch.linalg.eigh(squares / count - mean[:, None] * mean)
            self.mean.copy_(mean)
            self.turn.copy_(directions / (variances.clamp_min(0) + 1e-3).sqrt())


class ClipCaMsa(nn.Module):
    """The network after the encoders.

    Args:
        config: the experiment; temporal, fusion, head and loss select the rows of Tables 5 to 8.
        dims: feature width by modality.
        label: spec and shape of the label encoder (similarity head only).

    Shape:
        features B×n×d_t (text), B×m×d_v (vision), B×L×d_a (audio) → Output with logits B×C per modality

    With a single modality there is no fusion: the head reads the (temporal) states.
    """

    temperature: Tensor
    class_weights: Tensor

    def __init__(self, config: Config, dims: dict[str, int], label: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.config, self.names, self.dims = config, list(config.modalities), dims
        self.whiten: Any = Whiten(dims["audio"]) if "audio" in self.names else None
        self.entrances = nn.ModuleDict({name: Entrance(dims[name], config.width) for name in self.names})
        self.temporal: Any = TEMPORAL[config.temporal](config) if "vision" in self.names else None
        self.fusion = FUSION[config.fusion](config, self.names) if len(self.names) > 1 else None
        self.labels = LabelEncoder(label["spec"], tuple(label["shape"]), config.label.train) if label else None
        self.heads: Any = nn.ModuleDict({name: self._head(name) for name in self.names})
        self.combine: Any = LOSSES[config.loss](self.names)
        has_own_loss = self.fusion is not None and "audio" in self.names and config.audio.own
        self.hearing = PooledHead(config) if has_own_loss else None  # logits from the audio alone, for its own label
        self.register_buffer("temperature", torch.ones(len(self.names)))
        self.register_buffer("class_weights", torch.ones(len(LABELS)))

    def _head(self, name: str) -> nn.Module:
        if name != "vision":
            return PooledHead(self.config)
        return SimilarityHead(self.config, self.labels.dim) if self.labels is not None else LinearHead(self.config)

    def forward(self, batch: Batch, attention: bool = False) -> Output:
        """Features B×L×d by modality → logits and weights per modality, and fused log-probabilities B×C."""
        rows, device = next((s.mask.shape[0], s.mask.device) for s in batch.modalities.values())
        states, present = {}, {}
        for name in self.names:
            features = batch.modalities.get(name) or _empty_sequence(rows, self.dims[name], device)
            present[name] = features.mask.any(1)  # B
            if name == "audio":
                features = self.whiten(features)
            states[name] = self.entrances[name](features, present[name])  # B×L×d
        if self.temporal is not None:
            states["vision"] = self.temporal(states["vision"])  # eq. 8, B×(1+m)×d
        own_logits = {"audio_own": self.hearing(states["audio"]).float()} if self.hearing is not None else {}
        maps: dict[str, Tensor] = {}
        if self.fusion is not None:
            states, maps = self.fusion(states, attention)  # eq. 9-12
        logits = {name: self._logits(name, states[name]).float() for name in self.names}
        weights = self.weights(present)
        log_probs = self.decide(logits, weights)
        first = {name: s.values[:, 0] for name, s in states.items()}
        return Output(logits, log_probs, weights, None, maps, first | own_logits)

    def _logits(self, name: str, states: Sequence) -> Tensor:
        if name == "vision" and self.labels is not None:
            return self.heads[name](states, self.labels())  # eq. 13
        return self.heads[name](states)

    def weights(self, present: dict[str, Tensor]) -> dict[str, Tensor]:
        """w_i = exp(−s_i) / Σ over the present modalities, B each; zeros in a row without any modality."""
        stacked = torch.stack([present[name] for name in self.names], 1)  # B×heads
        w = self.combine.weights().to(stacked.device) * stacked
        w = w / w.sum(1, keepdim=True).clamp_min(1e-12)
        return dict(zip(self.names, w.unbind(1), strict=True))

    def decide(self, logits: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
        """The prediction rule: log softmax(Σ w_i · logits_i / τ_i), B×C."""
        votes = [weights[n][:, None] * logits[n] / tau for n, tau in zip(self.names, self.temperature, strict=True)]
        return torch.stack(votes).sum(0).log_softmax(-1)

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Focal loss for text, cross-entropy for the others, each over rows that have the modality and a label."""
        scores = batch.labels[self.config.target]
        labelled = ~scores.isnan()
        target = polarity(scores)
        losses, observed = {}, {}
        for name, logits in output.logits.items():
            gamma = self.config.focal_gamma if name == "text" else 0.0
            row_losses = cross_entropy(logits, target, gamma, self.config.train.label_smoothing, self.class_weights)
            used = labelled & (output.weights[name] > 0)
            observed[name] = count_rows(used) > 0
            losses[name] = mean_over(row_losses, used)
        total = self.combine(losses, observed)
        if self.hearing is not None:
            losses["own"] = self._own_loss(output, batch)
            total = total + self.config.audio.own * losses["own"]
        return total, {f"loss_{name}": loss.detach() for name, loss in losses.items()}

    def _own_loss(self, output: Output, batch: Batch) -> Tensor:
        """Cross-entropy of the logits of the audio alone against its own label A, as in Yu et al. 2020 (CH-SIMS)."""
        scores = batch.labels[OWN_LABEL["audio"]]
        used = ~scores.isnan() & (output.weights["audio"] > 0)
        logits, target = output.features["audio_own"], polarity(scores)
        return mean_over(cross_entropy(logits, target, smoothing=self.config.train.label_smoothing), used)

    @torch.no_grad()
    def prepare(self, training: Any) -> None:
        """Fit the audio whitening to the training set (a ClipSet); with ``start``, the RUN's own is kept."""
        if self.whiten is not None and self.config.start is None:
            store = training.stores["audio"]
            parts = map(store.gather, np.array_split(np.arange(len(store)), 1 + len(store) // 64))
            self.whiten.learn(torch.from_numpy(values[mask]) for values, mask in parts)

    @torch.no_grad()
    def step_finished(self) -> None:
        """Clamp s and logit_scale in place: clamped in the forward pass, they would lose their gradient."""
        self.combine.clamp()
        if self.labels is not None:
            self.heads["vision"].logit_scale.clamp_(max=MAX_SCALE)


def _empty_sequence(rows: int, dim: int, device: torch.device) -> Sequence:
    return Sequence(torch.zeros(rows, 1, dim, device=device), torch.zeros(rows, 1, dtype=torch.bool, device=device))
