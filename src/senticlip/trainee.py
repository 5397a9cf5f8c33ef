"""The module that the Trainer trains: model, moving average (EMA), batch augmentation, logged values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from senticlip.data.loader import to_batch
from senticlip.encoders.augment import augment, sample_frames
from senticlip.models.base import SentimentModel
from senticlip.structures import OWN_LABEL, Batch, Sequence


class Trainee(nn.Module):
    """The model and, with ``train.ema``, its exponential moving average, which is evaluated in its place.

    Args:
        model: without its frozen encoders, whose output is cached and which checkpoints need not contain.
    """

    accepts_loss_kwargs = False
    steps: Tensor

    def __init__(self, model: SentimentModel) -> None:
        super().__init__()
        self.experiment, self.model = model.experiment, model
        self.average = copy.deepcopy(model).requires_grad_(False).eval() if model.experiment.train.ema else None
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def step_finished(self) -> None:
        """Let the network clamp its parameters, then update the average, whose decay grows up to ``train.ema``."""
        if hasattr(self.model.network, "step_finished"):
            self.model.network.step_finished()
        if self.average is None:
            return
        self.steps += 1
        steps = int(self.steps)  # synchronises with a GPU
        decay = min(self.experiment.train.ema, (1 + steps) / (10 + steps))
        state, buffers = self.model.state_dict(), dict(self.model.named_buffers())
        for (name, mean), value in zip(self.average.state_dict().items(), state.values(), strict=True):
            if not mean.is_floating_point():
                mean.copy_(value)
            elif name in buffers:  # NaN: not known yet (Self-MM's labels)
                mean.copy_(torch.where(mean.isnan(), value, mean.lerp(value, 1 - decay)))
            else:  # parameters: one pass over memory
                mean.lerp_(value, 1 - decay)

    def forward(self, **inputs: Tensor) -> dict[str, Any]:
        """``loss``, ``prediction`` (log-probabilities B×C, or scores B) and, in evaluation, ``log`` (name → B)."""
        batch = to_batch(inputs)
        model = self.model if self.training or self.average is None else self.average
        batch = model.encode(self.augment_batch(batch) if self.training else batch)
        chance = self.experiment.train.mislead
        if self.training and chance and "audio" in batch.modalities:
            batch = batch._replace(modalities=mislead(batch.modalities, batch.labels, chance))
        output = model.fuse(batch)
        loss, parts = model.loss(output, batch)
        prediction = output.score if output.score is not None else output.log_probs
        assert prediction is not None
        if self.training:
            return {"loss": loss, "prediction": prediction}
        # one value per row, so that the mean is right even if the last batch is smaller
        log = {f"weight_{name}": weight for name, weight in output.weights.items()}
        log |= {name: part.expand(len(prediction)) for name, part in parts.items()}
        return {"loss": loss, "prediction": prediction, "log": log}

    def augment_batch(self, batch: Batch) -> Batch:
        """Augment a training batch: sample and augment frames, recombine modalities, drop modalities at random."""
        parts = dict(batch.modalities)
        vision, config = parts.get("vision"), self.experiment
        if vision is not None and vision.values.dtype == torch.uint8:
            if config.vision.train_frames:
                vision = sample_frames(vision, config.vision.train_frames)
            parts["vision"] = augment(vision, config.vision.augment)
        if config.train.recombine and len(parts) > 1:
            parts = recombine(parts, batch.labels, config.train.recombine)
        if config.train.modality_dropout and len(parts) > 1:
            rows = len(next(iter(parts.values())).mask)
            dropped = torch.rand(rows) < config.train.modality_dropout
            choice = torch.randint(len(parts), (rows,))
            several = torch.stack([sequence.mask.any(1) for sequence in parts.values()]).sum(0) > 1
            for i, (name, sequence) in enumerate(parts.items()):
                hidden = (dropped & (choice == i)).to(several.device) & several  # no row loses its only modality
                parts[name] = Sequence(sequence.values, sequence.mask & ~hidden[:, None])
        return Batch(parts, batch.labels, batch.rows)


def recombine(parts: dict[str, Sequence], labels: dict[str, Tensor], chance: float) -> dict[str, Sequence]:
    """Exchange modalities, with probability ``chance``, between rows whose own labels have the same sign.

    The sign of each row's unimodal labels stays the same, and so does the joint label.

    Args:
        parts: the modalities of a batch, B rows each.
        labels: M, T, A, V, B each; a modality stays where it is if its own label is missing or unknown in a row, or
            if the row lacks the modality.
        chance: the share of rows in which a modality is exchanged.
    """
    mixed = {}
    for name, sequence in parts.items():
        if (own := labels.get(OWN_LABEL[name])) is None:
            mixed[name] = sequence
            continue
        own = own.cpu()
        stays = own.isnan() | ~sequence.mask.any(1).cpu() | (torch.rand(len(own)) >= chance)
        group = torch.where(stays, 2.0 * torch.arange(1, len(own) + 1), own.sign())  # -1, 0, 1, or its own group
        rows = torch.empty(len(own), dtype=torch.long)
        rows[torch.argsort(group + torch.rand(len(own)) / 2)] = torch.argsort(group + torch.rand(len(own)) / 2)
        mixed[name] = Sequence(*(values[rows.to(values.device)] for values in sequence))
    return mixed


def mislead(parts: dict[str, Sequence], labels: dict[str, Tensor], chance: float) -> dict[str, Sequence]:
    """In rows with audio, mix text or vision features with those of a row whose own label has another sign.

    Fine-tuned encoders are more confident on their training clips than on new ones. A fusion network that sees only
    the former learns to ignore the audio, which has no such encoder. Audio and joint labels are not changed.

    Args:
        parts: the features of a batch by modality, B×L×d; the other row is stretched to the length of this one.
        labels: M, T, A, V, B each; a modality is not mixed if its own label is missing or unknown in a row.
        chance: the probability that a row's modality is mixed; the other row's weight is drawn from [0, 1].
    """
    misled, has_audio = dict(parts), parts["audio"].mask.any(1).cpu()
    for name, sequence in parts.items():
        if name == "audio" or (own := labels.get(OWN_LABEL[name])) is None:
            continue
        own = own.cpu()
        candidates = own.sign()[:, None] != own.sign()[None, :]  # B×B
        usable = sequence.mask.any(1).cpu() & ~own.isnan()
        candidates &= usable[:, None] & usable[None, :]
        chosen = (torch.rand(len(own)) < chance) & has_audio & candidates.any(1)
        rows = torch.arange(len(own))
        if chosen.any():
            rows[chosen] = torch.multinomial(candidates[chosen].float(), 1)[:, 0]
        share = (torch.rand(len(own)) * chosen).to(sequence.values)[:, None, None]
        mixed = sequence.values.lerp(_stretched(sequence, rows.to(sequence.mask.device)), share)
        misled[name] = Sequence(mixed, sequence.mask)
    return misled


def _stretched(sequence: Sequence, rows: Tensor) -> Tensor:
    """The values of ``rows`` B (indices), stretched to each row's number of real positions, B×L×d."""
    lengths = sequence.mask.sum(1, keepdim=True)  # B×1
    real_first = sequence.mask.int().argsort(dim=1, descending=True, stable=True)[rows]  # its real positions first
    rank = (sequence.mask.cumsum(1) - 1).clamp_min(0)  # the rank of each real position in its row
    positions = real_first.gather(1, rank * lengths[rows] // lengths.clamp_min(1))
    return sequence.values[rows[:, None], positions]
