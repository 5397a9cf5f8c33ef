"""Clips → model input: token ids, cached frames, cached features of frozen encoders."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from senticlip.config import FROM_FILE, Config
from senticlip.data import cache
from senticlip.data.audio import audio_store
from senticlip.data.loader import ArrayRows, ClipSet, Rows, padded, to_batch
from senticlip.data.mmsa import feature_file, read_features
from senticlip.data.openface import WIDTH, openface_store
from senticlip.encoders.text import tokenize
from senticlip.progress import console
from senticlip.structures import SURFACE, Clip, UsageError, UserError

if TYPE_CHECKING:
    from senticlip.models.base import SentimentModel


def cache_root() -> Path:
    """The cache folder: $SENTICLIP_CACHE, else ~/.cache/senticlip."""
    return Path(os.environ.get("SENTICLIP_CACHE") or Path.home() / ".cache" / "senticlip")


BATCH = 32
"""The batch size of frozen encoders."""


def ready_made(config: Config) -> list[str]:
    """The modalities without an encoder: always audio; text and vision if their ``encoder`` is one of FROM_FILE."""
    encoders = {"text": config.text.encoder, "vision": config.vision.encoder, "audio": FROM_FILE[0]}
    return [name for name in config.modalities if encoders[name] in FROM_FILE]


def reads_log_mel(config: Config) -> bool:
    """Whether the model reads the clips' log-mel: audio comes from a feature file only if text or vision does."""
    others = [getattr(config, name).encoder for name in config.modalities if name != "audio"]
    return "audio" in config.modalities and FROM_FILE[0] not in others


def clip_modalities(model: Any) -> list[str]:
    """The modalities that a model (also an exported one) reads from clips, not from feature files."""
    return [*model.encoders, *(["audio"] if reads_log_mel(model.experiment) else [])]


def feature_rows(
    config: Config, clips: list[Clip], data: str | Path, root: Path | None = None
) -> dict[str, tuple[Rows, int]]:
    """Rows and feature width of each modality without an encoder, for clips of the data set ``data``.

    Audio comes from the feature file if text or vision does, else it is the log-mel of the clips. OpenFace features
    come from ``DATA/OpenFace/`` if that folder exists, else from the feature file.

    Raises:
        UserError: no feature file, or it has none of the clips. UsageError: a clip has over ``vision.frames`` frames.
    """
    root, names = root or cache_root(), ready_made(config)
    result: dict[str, tuple[Rows, int]] = {}
    lengths: Any = []  # of vision; a feature file gives those of all its clips, before a model is built
    folder = Path(data) / "OpenFace"
    if reads_log_mel(config):
        result["audio"] = (audio_store(clips, config.audio.bands, root, config.audio.average), config.audio.bands)
    if config.vision.encoder == "openface" and "vision" in names and folder.is_dir():
        openface = openface_store(clips, folder, root)
        result["vision"], lengths = (openface, WIDTH), openface.lengths
    from_file = tuple(name for name in names if name not in result)
    if from_file:
        features = read_features(feature_file(data), root, from_file)
        for name in from_file:
            result[name] = (features.choose(name, clips), features.widths[name])
        lengths = features.rows["vision"].lengths if "vision" in from_file else lengths
    if config.model == "clip_ca_msa" and (longest := max(lengths, default=0)) > config.vision.frames:
        raise UsageError(
            f"vision.frames: {config.vision.frames}, but {data} has clips of {longest} frames "
            f"— --set vision.frames={longest}"
        )
    return result


def feature_widths(config: Config, data: str | Path) -> dict[str, int]:
    """Feature width of each modality without an encoder."""
    return {name: width for name, (_, width) in feature_rows(config, [], data).items()}


def clip_set(
    clips: list[Clip], model: SentimentModel, root: Path | None = None, data: str | Path | None = None
) -> ClipSet:
    """One split as model input; the features of frozen encoders come from the cache.

    Args:
        clips: the clips of the split.
        model: on its device; its frozen encoders are run here on clips that are not cached yet.
        root: the cache folder.
        data: the data set, for modalities without an encoder.

    Raises:
        UserError: no clip has any input for the model.
    """
    root = root or cache_root()
    config = model.experiment
    stores: dict[str, Rows] = {}
    if data is not None:
        stores = {name: rows for name, (rows, _) in feature_rows(config, clips, data, root).items()}
    if "text" in model.encoders:
        ids, mask = tokenize(model.tokenizer, [clip.text for clip in clips], config.text.max_length)
        token_rows = ArrayRows(ids.numpy(), mask.numpy())

        def ids_of(indices: list[int]) -> Iterable[np.ndarray]:
            return (token_rows.values[index, token_rows.mask[index]] for index in indices)

        stores["text"] = (
            encoder_features(token_rows.keys, ids_of, model, "text", root) if model.frozen("text") else token_rows
        )
    if "vision" in model.encoders:
        encoder: Any = model.encoders["vision"]
        m, size, cutaways = config.vision.frames, encoder.size, config.vision.cutaways

        def frames(indices: list[int]) -> Iterator[np.ndarray]:
            return cache.decoded([clips[index] for index in indices], m, size, ahead=BATCH, cutaways=cutaways)

        if model.frozen("vision"):  # frames are decoded while others are encoded, without being stored
            stores["vision"] = encoder_features(cache.clip_keys(clips, root), frames, model, "vision", root)
        else:
            stores["vision"] = cache.frame_store(clips, m, size, root, cutaways=cutaways)
    if missing := [SURFACE[name] for name, store in stores.items() if not store.lengths.any()]:
        message = f"{data or 'these clips'}: no {' and no '.join(missing)} in any of {len(clips)} clips"
        if len(missing) == len(stores):
            raise UserError(f"{message}, and this model or stage reads nothing else — train with other modalities")
        console.print(f"{message}; the model uses the remaining modalities", soft_wrap=True)
    return ClipSet(clips, stores)


def fingerprint(module: torch.nn.Module, built: Any) -> str:
    """A hash of a module's state dict (any weight, prompt or buffer) and of the config that it was built from.

    The config is hashed because weights do not show the number of heads, the activation or the pooling.
    """
    digest = hashlib.blake2b(json.dumps(built, sort_keys=True).encode(), digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def encoder_features(
    keys: list[str], rows: Callable[[list[int]], Iterable[np.ndarray]], model: SentimentModel, name: str, root: Path
) -> Rows:
    """The features (fp16, L×d) of each row by a frozen encoder, from the cache or computed now.

    Args:
        keys: a content key for each row; empty for an empty row.
        rows: yields the encoder's input, L×…, for each of the given indices into ``keys``.
        model: the model that has the encoder.
        name: the modality.
        root: the cache folder.
    """
    encoder: Any = model.encoders[name].eval()
    device = model.device

    @torch.inference_mode()
    def features(chunk: list[np.ndarray]) -> Iterator[np.ndarray]:
        values, mask = padded(chunk)
        inputs = {name: torch.from_numpy(values).to(device), f"{name}_mask": torch.from_numpy(mask).to(device)}
        states = encoder(to_batch(inputs).modalities[name])
        limit = torch.finfo(torch.half).max  # larger values would become infinite
        values = states.values.clamp(-limit, limit).half().cpu().numpy()
        for row, present in zip(values, states.mask.cpu().numpy(), strict=True):
            yield row[present]

    def compute(indices: list[int]) -> Iterator[np.ndarray]:
        remaining = iter(rows(indices))
        while chunk := list(islice(remaining, BATCH)):
            yield from features(chunk)

    # a text's key covers its token ids; a clip's key covers its video; the spec adds which frames are read
    vision = model.experiment.vision
    frame_spec = cache.frame_spec(vision.frames, encoder.size, vision.cutaways) if name == "vision" else {}
    spec = {
        "encoder": fingerprint(encoder, model.config.encoders[name]),
        "modality": name,
        "of": frame_spec,
        "version": 1,
    }
    return cache.cached(root, spec, keys, compute, f"encoding {SURFACE[name]}")
