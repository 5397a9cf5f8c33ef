"""The RUN folder: model, tokenizer, resolved experiment, metrics, model card; and the temperatures fitted on valid."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from senticlip.config import FROM_FILE, Config, from_dict
from senticlip.data.cache import file_keys
from senticlip.data.loader import ClipSet, to_batch
from senticlip.data.mmsa import feature_file
from senticlip.data.sims import read_clips
from senticlip.files import alone, write_text
from senticlip.progress import console
from senticlip.sources import cache_root
from senticlip.structures import Clip, Output, UsageError, UserError, polarity

if TYPE_CHECKING:
    from senticlip.models.base import SentimentModel

TEMPERATURES = torch.logspace(-1.5, 2, 701)
CHECKPOINTS = "checkpoints"
"""The folder in a RUN from which a killed training can be resumed; removed when the training is finished."""
TENSORBOARD = "tensorboard"
"""The folder of a RUN's training curves."""
WRITTEN = (CHECKPOINTS, TENSORBOARD, "config.json", "model.safetensors", "README.md")
"""What a training deletes or overwrites in its folder."""


@torch.inference_mode()
def outputs(model: SentimentModel, data: ClipSet, batch_size: int = 64) -> Output:
    """The model's output for a whole split, rows in the split's order, on the CPU."""
    model.eval()
    parts = []
    for begin in range(0, len(data), batch_size):
        inputs = data.__getitems__(list(range(begin, min(begin + batch_size, len(data)))))
        output = model(to_batch({name: value.to(model.device) for name, value in inputs.items()}))
        parts.append(output)

    def joined(field: str) -> dict[str, torch.Tensor]:
        return {name: torch.cat([getattr(p, field)[name].cpu() for p in parts]) for name in getattr(parts[0], field)}

    log_probs, score = parts[0].log_probs, parts[0].score
    return Output(
        joined("logits"),
        None if log_probs is None else torch.cat([p.log_probs.cpu() for p in parts]),
        joined("weights"),
        None if score is None else torch.cat([p.score.cpu() for p in parts]),
    )


def calibrate(model: SentimentModel, valid: ClipSet) -> None:
    """Set each head's temperature τ to the one with the least cross-entropy on valid (Guo et al. 2017).

    Models without a ``temperature`` stay as they are.
    """
    if not hasattr(model.network, "temperature"):
        return
    output = outputs(model, valid)
    scores = torch.from_numpy(valid.labels[model.experiment.target])
    for i, (name, logits) in enumerate(output.logits.items()):
        rows = ~scores.isnan() & (output.weights[name] > 0)
        if rows.any():
            spread = (logits[rows][None] / TEMPERATURES[:, None, None]).log_softmax(-1)  # temperatures×n×C
            target = polarity(scores[rows])[None, :, None].expand(len(TEMPERATURES), -1, 1)
            model.network.temperature[i] = TEMPERATURES[spread.gather(2, target).mean((1, 2)).argmax()]


def rows_digest(data: str | Path, clips: list[Clip]) -> str:
    """A hash of a data set's path and of its clips: ids, video paths, texts, labels, splits (no video contents)."""
    root = Path(data).resolve()
    rows = [(clip.video and os.path.relpath(clip.video, root), clip._replace(video=None)) for clip in clips]
    return _hash([str(root), rows])


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def origin(config: Config, data: str | Path) -> dict[str, Any]:
    """What identifies a training: experiment, weights of its encoders, ready-made features, the data's path and rows.

    As JSON.
    """
    rows = rows_digest(data, read_clips(data, None, config.protocol, config.seed))
    keys = {"encoders": encoder_keys(config), "features": feature_keys(config, data)}
    return {"experiment": config.to_dict(), **keys, "data": str(data), "rows": rows}


_READ = (".safetensors", ".bin", ".json", ".txt", ".model")
"""Suffixes of an encoder's files: weights, configs, vocabularies."""


def encoder_keys(config: Config) -> dict[str, list[str]]:
    """Hashes of weights, config and words in the folders of encoders and ``start``, by folder; a hub id has none."""
    folders = {config.text.encoder, config.vision.encoder, config.label.encoder, config.start}
    files = {f: [p for p in Path(f).glob("*.*") if p.suffix in _READ] for f in sorted(filter(None, folders))}
    keys = file_keys((path for found in files.values() for path in found), cache_root())
    return {name: [keys[path] for path in sorted(found)] for name, found in files.items() if found}


def feature_keys(config: Config, data: str | Path) -> dict[str, str]:
    """A hash of the data set's feature file and one of OpenFace's CSVs, by path, where the experiment reads them."""
    root, files = Path(data).resolve(), dict[Path, list[Path]]()
    encoders = {getattr(config, name).encoder for name in config.modalities if name != "audio"} & {*FROM_FILE}
    if "openface" in encoders and (faces := root / "OpenFace").is_dir():
        files[faces] = sorted(faces.rglob("*.csv"))
        encoders.remove("openface")
    if encoders:
        with suppress(UserError):  # a file that is missing is told where it is read
            file = feature_file(root)
            files[file] = [file]
    keys = file_keys((path for found in files.values() for path in found), cache_root())
    return {str(p): _hash([(os.path.relpath(path, p), keys[path]) for path in found]) for p, found in files.items()}


def _difference(record: dict[str, Any], mine: dict[str, Any]) -> str:
    """In what a run's origin differs from ``mine``, in words for a message; empty if in nothing."""
    try:
        same = from_dict(record["experiment"]) == from_dict(mine["experiment"])
    except (KeyError, UsageError):
        same = False
    if not same:
        return "a different config"
    if record.get("encoders", mine["encoders"]) != mine["encoders"]:  # older runs do not record them
        return "different encoders (the weights in a folder have changed)"
    if record.get("rows") != mine["rows"]:
        return f"different data ({record['data']}, or its labels have changed)"
    same = record.get("features", mine["features"]) == mine["features"]
    return "" if same else "different features (the feature file or OpenFace's CSVs have changed)"


def share_stage(run: Path, name: str, stage: Path) -> None:
    """Link the finished ``stage`` of another run into ``run``, so that ``train`` with ``resume`` finds it finished."""
    link = run / "stages" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():  # or it points to nothing
        link.unlink(missing_ok=True)
        target = os.path.relpath(stage.resolve(), link.parent.resolve())  # both may be moved together
        link.symlink_to(target, target_is_directory=True)


def is_finished(out: Path, mine: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a finished run of this origin; None if there is none, it is incomplete, or is being trained again.

    Raises:
        UserError: there is a run of another origin, finished or not.
    """
    folder = out / CHECKPOINTS
    finished, begun = read_metrics(out), read_json(folder / "origin.json")
    if begun and not _difference(begun, mine):  # a finished run has no origin.json: this one is trained again
        return None
    if finished and not _difference(finished, mine):
        if not (_has_weights(out) and (out / "config.json").is_file()):
            return None
        if folder.exists() and not begun:  # a kill left it; with origin.json it is another training's
            with suppress(UserError), alone(out, "training"):
                shutil.rmtree(folder, ignore_errors=True)
        return {name: finished[name] for name in ("best_epoch", "valid", "seconds", "history")}
    if other := begun if any(folder.glob("checkpoint-*")) else finished:
        raise UserError(
            f"{out}: holds a run with {_difference(other, mine)} — choose another --out, or leave out --resume"
        )
    return None


def begin(out: Path, mine: dict[str, Any], resume: bool) -> None:
    """Record in ``out`` what is trained there, and delete the checkpoints of another training.

    Raises:
        UserError: files that are no run's are where a run's would be; ``out`` is the RUN that the training starts from.
    """
    if (start := mine["experiment"]["start"]) and Path(start).resolve() == out.resolve():
        raise UserError(f"{out}: this is the RUN that training starts from — choose another --out")
    folder = out / CHECKPOINTS
    begun, finished = read_json(folder / "origin.json"), read_metrics(out)
    if not begun and not finished and (foreign := [name for name in WRITTEN if _holds(out / name)]):
        raise UserError(f"{out}: holds {foreign[0]} from something else — choose another --out")
    if not resume or not begun or _difference(begun, mine):
        _tell_loss(out, begun, mine)
        if finished and not begun:
            console.print(f"{out}: holds a finished run, which this one will replace", soft_wrap=True)
        for old in (*folder.glob("checkpoint-*"), out / TENSORBOARD):  # origin.json stays: it marks a run
            shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "origin.json", json.dumps(mine))


def _holds(path: Path) -> bool:
    """Whether a path exists and is no folder that a full disk or a kill has left: empty, but for files half written."""
    return os.path.lexists(path) and not (path.is_dir() and all(each.match(".*.partial") for each in path.iterdir()))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: one with a missing or truncated file was not fully written or copied."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        state, rest = read_json(path / "trainer_state.json"), ("optimizer.pt", "scheduler.pt", "rng_state*")
        pickles = [[zipfile.is_zipfile(file) for file in path.glob(name)] for name in rest]
        if "best_global_step" in state and _has_weights(path) and all(found and all(found) for found in pickles):
            complete.append((state["global_step"], path))
    return max(complete)[1] if complete else None


def best_checkpoint(newest: Path) -> Path:
    """The checkpoint of the best epoch so far. (Without it, Trainer would silently end with the last epoch's weights.)

    Raises:
        UserError: its weights are missing, or not whole.
    """
    best = newest.parent / f"checkpoint-{read_json(newest / 'trainer_state.json')['best_global_step']}"
    if not _has_weights(best):
        raise UserError(f"{best}: the best epoch's weights are missing — train again without --resume")
    return best


def _has_weights(folder: Path) -> bool:
    """Whether a folder has complete weights. (Trainer silently goes on without them.)"""
    try:
        with safe_open(folder / "model.safetensors", "np"):
            return True
    except (OSError, SafetensorError):
        return False


def _tell_loss(out: Path, begun: dict[str, Any], mine: dict[str, Any]) -> None:
    """Tell the user if a training that could have been resumed is deleted."""
    newest = newest_checkpoint(out / CHECKPOINTS)
    if newest is not None:
        step, other = newest.name.rpartition("-")[2], _difference(begun, mine)
        then = f"; it had {other}" if other else " — train --resume would have continued it"
        console.print(f"{out}: starting over; the training up to step {step} is discarded{then}", soft_wrap=True)


def save_run(out: Path, model: SentimentModel, config: Config, mine: dict[str, Any], result: dict[str, Any]) -> None:
    """Write the RUN into a temporary folder, then move each file; ``metrics.json`` comes last: the run is finished."""
    from senticlip.card import model_card

    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    write_text(partial / "experiment.yaml", config.to_yaml())
    write_text(partial / "README.md", model_card(config, mine["data"], result))
    for old in (out / "metrics.json", *out.glob("predictions-*.csv")):  # an older run's
        old.unlink(missing_ok=True)
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            target = out / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    shutil.rmtree(partial)
    write_text(out / "metrics.json", json.dumps({**result, **mine}, ensure_ascii=False, indent=1))
    (out / CHECKPOINTS / "origin.json").unlink(missing_ok=True)  # first: without it, the checkpoints are not resumed
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def read_metrics(run: Path) -> dict[str, Any]:
    """The ``metrics.json`` of a run; empty if there is none."""
    return read_json(run / "metrics.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file, or no object in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
