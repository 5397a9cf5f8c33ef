"""Clips or cached Sequences → batches, gathered a whole batch at a time from memory-mapped stores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from senticlip.structures import MODALITIES, TARGETS, Batch, Clip, Sequence


class Rows(Protocol):
    """N sequences of different lengths: the interface shared by a cache's Store and ArrayRows."""

    lengths: np.ndarray

    def __len__(self) -> int:
        """N."""
        ...

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values k×Lmax×… and mask k×Lmax of some rows."""
        ...


class ArrayRows:
    """Rows in memory: padded values N×L×… and mask N×L."""

    def __init__(self, values: np.ndarray, mask: np.ndarray) -> None:
        self.values, self.mask = values, mask
        self.lengths = mask.sum(1)

    @cached_property
    def keys(self) -> list[str]:
        """A hash of each row's content; the empty string for an empty row."""
        return [
            hashlib.blake2b(row[:n].tobytes(), digest_size=16).hexdigest() if n else ""
            for row, n in zip(self.values, self.lengths, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.values)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and mask of some rows, trimmed to the longest of them."""
        mask = self.mask[indices]
        longest = max(1, int(mask.sum(1).max()))
        return self.values[indices, :longest], mask[:, :longest]


def padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows L_i×… → values k×Lmax×…, zero where masked, and mask k×Lmax; Lmax is at least 1."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(max(1, lengths.max())) < lengths[:, None]
    values = np.zeros((*mask.shape, *rows[0].shape[1:]), rows[0].dtype)
    values[mask] = np.concatenate(rows)
    return values, mask


class ClipSet(Dataset[dict[str, Tensor]]):
    """One split: a store per modality and the labels.

    ``__getitems__`` (called by torch's fetcher with a batch of indices) returns plain tensors by name, since
    transformers.Trainer mangles NamedTuples: ``text``, ``text_mask``, …, ``label_M``, …, ``rows``.
    """

    def __init__(self, clips: list[Clip], stores: Mapping[str, Rows]) -> None:
        self.clips, self.stores = clips, stores
        self.labels = {
            name: np.array([clip.labels.get(name, np.nan) for clip in clips], dtype=np.float32) for name in TARGETS
        }

    def __len__(self) -> int:
        return len(self.clips)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A batch as tensors by name; a modality that no row has is left out, unless the rows have none at all."""
        chosen = np.asarray(indices)
        batch = {f"label_{name}": torch.from_numpy(scores[chosen]) for name, scores in self.labels.items()}
        batch["rows"] = torch.from_numpy(chosen)
        gathered = {name: store.gather(chosen) for name, store in self.stores.items()}
        present = {name for name, (_, mask) in gathered.items() if mask.any()}
        present = present or {name for name, store in self.stores.items() if store.lengths.any()}  # of known width
        for name, (values, mask) in gathered.items():
            if name in present:
                batch[name], batch[f"{name}_mask"] = torch.from_numpy(values), torch.from_numpy(mask)
        return batch


class BalancedSampler(Sampler[int]):
    """Rows drawn with replacement, all classes with the same probability.

    The draw depends on the seed and the epoch only, so a resumed training run draws what the uninterrupted run would
    have drawn, and all processes of a run draw the same.

    Args:
        classes: N class indices.
        seed: the training run's seed.
    """

    def __init__(self, classes: np.ndarray, seed: int) -> None:
        weights = 1 / np.bincount(classes)[classes]
        self.chances, self.seed, self.epoch = weights / weights.sum(), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch, from 0; the Trainer calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        n = len(self.chances)
        return iter(np.random.default_rng((self.seed, self.epoch)).choice(n, n, p=self.chances).tolist())

    def __len__(self) -> int:
        return len(self.chances)


def collate(batch: Any) -> Any:
    """Return the batch as it is: ClipSet returns whole batches."""
    return batch


def to_batch(inputs: Mapping[str, Any]) -> Batch:
    """ClipSet's tensors by name → a Batch; half-precision features become float32."""
    modalities = {}
    for name in MODALITIES:
        if name in inputs:
            values = inputs[name]
            values = values.float() if values.dtype == torch.float16 else values
            modalities[name] = Sequence(values, inputs[f"{name}_mask"])
    labels = {name: inputs[f"label_{name}"] for name in TARGETS if f"label_{name}" in inputs}
    return Batch(modalities, labels, inputs.get("rows"))
