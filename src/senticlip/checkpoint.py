"""The RUN folder (model, tokenizer, resolved experiment, metrics, model card) and temperatures fitted on valid."""

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
from senticlip.files import folder_lock, write_text
from senticlip.progress import console
from senticlip.sources import cache_root
from senticlip.structures import Clip, Output, UsageError, UserError, polarity

if TYPE_CHECKING:
    from senticlip.models.base import SentimentModel

TEMPERATURES = torch.logspace(-1.5, 2, 701)
CHECKPOINTS = "checkpoints"
"""The folder in a RUN from which an interrupted training resumes; removed when training finishes."""
TENSORBOARD = "tensorboard"
"""The folder in a RUN with the training curves."""
OVERWRITTEN = (CHECKPOINTS, TENSORBOARD, "config.json", "model.safetensors", "README.md")
"""Files and folders in a RUN that a training deletes or overwrites."""


@torch.inference_mode()
def outputs(model: SentimentModel, data: ClipSet, batch_size: int = 64) -> Output:
    """The model's output for a whole split, in row order, on the CPU."""
    model.eval()
    parts = []
    for start in range(0, len(data), batch_size):
        inputs = data.__getitems__(list(range(start, min(start + batch_size, len(data)))))
        output = model(to_batch({name: value.to(model.device) for name, value in inputs.items()}))
        parts.append(output)

    def concatenated(field: str) -> dict[str, torch.Tensor]:
        return {name: torch.cat([getattr(p, field)[name].cpu() for p in parts]) for name in getattr(parts[0], field)}

    log_probs, score = parts[0].log_probs, parts[0].score
    return Output(
        concatenated("logits"),
        None if log_probs is None else torch.cat([p.log_probs.cpu() for p in parts]),
        concatenated("weights"),
        None if score is None else torch.cat([p.score.cpu() for p in parts]),
    )


def calibrate(model: SentimentModel, valid: ClipSet) -> None:
    """Set each head's temperature τ to minimise the cross-entropy on valid (Guo et al. 2017).

    Models without a ``temperature`` are not changed.
    """
    if not hasattr(model.network, "temperature"):
        return
    output = outputs(model, valid)
    scores = torch.from_numpy(valid.labels[model.experiment.target])
    for i, (name, logits) in enumerate(output.logits.items()):
        rows = ~scores.isnan() & (output.weights[name] > 0)
        if rows.any():
            log_probs = (logits[rows][None] / TEMPERATURES[:, None, None]).log_softmax(-1)  # temperatures×n×C
            target = polarity(scores[rows])[None, :, None].expand(len(TEMPERATURES), -1, 1)
            model.network.temperature[i] = TEMPERATURES[log_probs.gather(2, target).mean((1, 2)).argmax()]


def rows_digest(data: str | Path, clips: list[Clip]) -> str:
    """A hash of a data set's path and its clips: ids, video paths, texts, labels, splits (not the video contents)."""
    root = Path(data).resolve()
    rows = [(clip.video and os.path.relpath(clip.video, root), clip._replace(video=None)) for clip in clips]
    return _hash([str(root), rows])


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def origin(config: Config, data: str | Path) -> dict[str, Any]:
    """What identifies a training, as JSON: experiment, encoder weights, feature files, the data's path and rows."""
    rows = rows_digest(data, read_clips(data, None, config.protocol, config.seed))
    keys = {"encoders": encoder_keys(config), "features": feature_keys(config, data)}
    return {"experiment": config.to_dict(), **keys, "data": str(data), "rows": rows}


_ENCODER_SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model")
"""Suffixes of an encoder's files: weights, configs, vocabularies."""


def encoder_keys(config: Config) -> dict[str, list[str]]:
    """Hashes of weights, configs and vocabularies of encoder folders and ``start``, by folder; hub ids have none."""
    folders = {config.text.encoder, config.vision.encoder, config.label.encoder, config.start}
    files = {
        folder: [p for p in Path(folder).glob("*.*") if p.suffix in _ENCODER_SUFFIXES]
        for folder in sorted(filter(None, folders))
    }
    keys = file_keys((path for paths in files.values() for path in paths), cache_root())
    return {name: [keys[path] for path in sorted(paths)] for name, paths in files.items() if paths}


def feature_keys(config: Config, data: str | Path) -> dict[str, str]:
    """Hashes of the data set's feature file and OpenFace CSVs, by path, if the experiment reads them."""
    root, files = Path(data).resolve(), dict[Path, list[Path]]()
    encoders = {getattr(config, name).encoder for name in config.modalities if name != "audio"} & {*FROM_FILE}
    if "openface" in encoders and (openface := root / "OpenFace").is_dir():
        files[openface] = sorted(openface.rglob("*.csv"))
        encoders.remove("openface")
    if encoders:
        with suppress(UserError):  # a missing file is reported where it is read
            file = feature_file(root)
            files[file] = [file]
    keys = file_keys((path for paths in files.values() for path in paths), cache_root())
    return {
        str(source): _hash([(os.path.relpath(path, source), keys[path]) for path in paths])
        for source, paths in files.items()
    }


def _difference(record: dict[str, Any], current: dict[str, Any]) -> str:
    """How a recorded origin differs from the ``current`` one, in words for a message; empty if it does not."""
    try:
        same = from_dict(record["experiment"]) == from_dict(current["experiment"])
    except (KeyError, UsageError):
        same = False
    if not same:
        return "a different config"
    if record.get("encoders", current["encoders"]) != current["encoders"]:  # not recorded by older runs
        return "different encoders (the files in a folder have changed)"
    if record.get("rows") != current["rows"]:
        return f"different data ({record['data']}, or its labels have changed)"
    same = record.get("features", current["features"]) == current["features"]
    return "" if same else "different features (the feature file or OpenFace's CSVs have changed)"


def share_stage(run: Path, name: str, stage: Path) -> None:
    """Link the finished ``stage`` of another run into ``run``, so that ``train`` with ``resume`` need not repeat it."""
    link = run / "stages" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():  # missing, or a dangling link
        link.unlink(missing_ok=True)
        target = os.path.relpath(stage.resolve(), link.parent.resolve())  # relative, so that both can be moved together
        link.symlink_to(target, target_is_directory=True)


def is_finished(out: Path, this_origin: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a finished run of this origin; None if there is none, or it is incomplete or being trained again.

    Raises:
        UserError: ``out`` holds a run of another origin, finished or not.
    """
    folder = out / CHECKPOINTS
    finished, unfinished = read_metrics(out), read_json(folder / "origin.json")
    # a finished run has no origin.json: this one is being trained again
    if unfinished and not _difference(unfinished, this_origin):
        return None
    if finished and not _difference(finished, this_origin):
        if not (_has_weights(out) and (out / "config.json").is_file()):
            return None
        if folder.exists() and not unfinished:  # left by a kill; with origin.json it would be another training's
            with suppress(UserError), folder_lock(out, "training"):
                shutil.rmtree(folder, ignore_errors=True)
        return {name: finished[name] for name in ("best_epoch", "valid", "seconds", "history")}
    if other := unfinished if any(folder.glob("checkpoint-*")) else finished:
        raise UserError(
            f"{out}: holds a run with {_difference(other, this_origin)} — choose another --out, or leave out --resume"
        )
    return None


def claim_folder(out: Path, this_origin: dict[str, Any], resume: bool) -> None:
    """Record in ``out`` what is trained there, and delete the checkpoints of other trainings.

    Raises:
        UserError: ``out`` holds other files where a RUN's would go, or is the RUN that training starts from.
    """
    if (start := this_origin["experiment"]["start"]) and Path(start).resolve() == out.resolve():
        raise UserError(f"{out}: this is the RUN that training starts from — choose another --out")
    folder = out / CHECKPOINTS
    unfinished, finished = read_json(folder / "origin.json"), read_metrics(out)
    if not unfinished and not finished and (foreign := [name for name in OVERWRITTEN if _is_occupied(out / name)]):
        raise UserError(f"{out}: holds {foreign[0]} from something else — choose another --out")
    if not resume or not unfinished or _difference(unfinished, this_origin):
        _report_discarded(out, unfinished, this_origin)
        if finished and not unfinished:
            console.print(f"{out}: holds a finished run, which this one will replace", soft_wrap=True)
        for old in (*folder.glob("checkpoint-*"), out / TENSORBOARD):  # origin.json stays: it marks the folder as a run
            shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "origin.json", json.dumps(this_origin))


def _is_occupied(path: Path) -> bool:
    """Whether a path exists and is not a folder left by a full disk or a kill (empty except for partial files)."""
    return os.path.lexists(path) and not (path.is_dir() and all(entry.match(".*.partial") for entry in path.iterdir()))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; those with a missing or truncated file are skipped."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        state, patterns = read_json(path / "trainer_state.json"), ("optimizer.pt", "scheduler.pt", "rng_state*")
        pickles = [[zipfile.is_zipfile(file) for file in path.glob(name)] for name in patterns]
        if "best_global_step" in state and _has_weights(path) and all(valid and all(valid) for valid in pickles):
            complete.append((state["global_step"], path))
    return max(complete)[1] if complete else None


def best_checkpoint(newest: Path) -> Path:
    """The checkpoint of the best epoch so far. (Without it, Trainer would silently keep the last epoch's weights.)

    Raises:
        UserError: its weights are missing or incomplete.
    """
    best = newest.parent / f"checkpoint-{read_json(newest / 'trainer_state.json')['best_global_step']}"
    if not _has_weights(best):
        raise UserError(f"{best}: the best epoch's weights are missing — train again without --resume")
    return best


def _has_weights(folder: Path) -> bool:
    """Whether a folder has complete weights. (Without them, Trainer silently continues.)"""
    try:
        with safe_open(folder / "model.safetensors", "np"):
            return True
    except (OSError, SafetensorError):
        return False


def _report_discarded(out: Path, unfinished: dict[str, Any], this_origin: dict[str, Any]) -> None:
    """Tell the user if a training that could be resumed is being deleted."""
    newest = newest_checkpoint(out / CHECKPOINTS)
    if newest is not None:
        step, difference = newest.name.rpartition("-")[2], _difference(unfinished, this_origin)
        reason = f"; it had {difference}" if difference else " — train --resume would have continued it"
        console.print(f"{out}: starting over; the training up to step {step} is discarded{reason}", soft_wrap=True)


def save_run(
    out: Path, model: SentimentModel, config: Config, this_origin: dict[str, Any], result: dict[str, Any]
) -> None:
    """Write the RUN to a temporary folder, then move each file; ``metrics.json`` comes last and marks it finished."""
    from senticlip.card import model_card

    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    write_text(partial / "experiment.yaml", config.to_yaml())
    write_text(partial / "README.md", model_card(config, this_origin["data"], result))
    for old in (out / "metrics.json", *out.glob("predictions-*.csv")):  # from an older run
        old.unlink(missing_ok=True)
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            target = out / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    shutil.rmtree(partial)
    write_text(out / "metrics.json", json.dumps({**result, **this_origin}, ensure_ascii=False, indent=1))
    (out / CHECKPOINTS / "origin.json").unlink(missing_ok=True)  # first: without it, the checkpoints are not resumed
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def read_metrics(run: Path) -> dict[str, Any]:
    """The contents of a run's ``metrics.json``; empty if there is none."""
    return read_json(run / "metrics.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file or it holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
