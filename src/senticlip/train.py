"""The single training path: stages, caches, the Trainer's arguments, one fit, a checkpoint."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from senticlip import runtime
from senticlip.checkpoint import CHECKPOINTS, calibrate, claim_folder, is_finished, origin, read_metrics, save_run
from senticlip.config import FROM_FILE, Config
from senticlip.data.loader import ClipSet
from senticlip.data.sims import read_clips
from senticlip.files import folder_lock, report_full_disk
from senticlip.fit import fit
from senticlip.metrics import score_class
from senticlip.models import create_model
from senticlip.models.base import SentimentModel
from senticlip.progress import console
from senticlip.sources import clip_set, feature_widths
from senticlip.structures import LABELS, OWN_LABEL, Clip, UsageError, UserError, polarity


def train(
    config: Config,
    data: str | Path,
    out: str | Path,
    seed: int | None = None,
    resume: bool = False,
    device: str | None = None,
    as_stage: str | None = None,
) -> dict[str, Any]:
    """Train one experiment, its stages first; ``out`` becomes a complete checkpoint folder.

    Like the command line, this sets threads and matmul precision for the whole process (``runtime.setup``).

    Args:
        config: the experiment.
        data: a CH-SIMS folder, or your own CSV.
        out: the RUN folder.
        seed: overrides the config's.
        resume: continue an interrupted training of the same config on the same data; a finished one is kept.
        device: cpu, cuda or cuda:N; by default a GPU if there is one.
        as_stage: the stage's name in the log, if this is a stage of another training.

    Returns:
        ``{"best_epoch": …, "valid": {…}, "seconds": …, "history": […]}``

    Raises:
        UsageError: no such data, device or encoder; ``start`` was trained on clips of this valid or test split.
        UserError: no clip has the label; the disk is full; ``out`` holds another run (with ``resume``); another process
            is training there.
    """
    started = time.monotonic()
    runtime.setup()
    config = config if seed is None else config.override({"seed": seed})
    out, torch_device, this_origin = Path(out), runtime.device(device), origin(config, data)
    if resume and (result := is_finished(out, this_origin)):
        return result
    _check_start(config, data)
    if config.train.compile:
        runtime.check_compiler(torch_device)
    is_first = runtime.first_process()
    with report_full_disk(out, "continue with --resume"), folder_lock(out, "training") if is_first else nullcontext():
        if is_first:
            claim_folder(out, this_origin, resume)
        stages = stages_of(config, data)
        set_seed(config.seed)
        model = create_model(config, feature_widths(config, data))  # before the stages, which take long: it may fail
        _check_sizes(model, stages)
        for each in (config, *stages.values()):
            _batch_per_process(each)  # fails now rather than when its turn comes
        if is_first and not as_stage:
            _report_labels(config, data, stages, model)
        if stages and is_first:
            runs = [f"{n} (epochs: up to {c.train.epochs})" for n, c in {**stages, "all together": config}.items()]
            console.print(f"{len(runs)} training runs: {', '.join(runs)}", soft_wrap=True, highlight=False)
        for name, stage in stages.items():
            train(stage, data, out / "stages" / name, resume=resume, device=device, as_stage=name)
        arguments = _training_arguments(config, out / CHECKPOINTS, torch_device, as_stage)
        training_device: Any = arguments.device
        model.to(training_device)
        for name in stages:
            copy_encoders(model, SentimentModel.from_pretrained(out / "stages" / name))
        with arguments.main_process_first():
            sets = {split: _load_split(data, config, split, model) for split in ("train", "valid")}
        result = fit(model, sets["train"], sets["valid"], arguments, resume)
        calibrate(model, sets["valid"])
        result["seconds"] = round(time.monotonic() - started, 1)
        with arguments.main_process_first():  # the others wait, as they may load this stage next
            if arguments.process_index == 0:
                save_run(out, model, config, this_origin, result)
    return result


def stages_of(config: Config, data: str | Path) -> dict[str, Config]:
    """The stages whose encoders the main training takes over, by name, in training order.

    A stage whose label ``data`` lacks is trained on the main training's label. With ``start`` there are no stages.
    """
    available, needed = _available_labels(read_clips(data, None, config.protocol, config.seed)), {}
    for name in () if config.start else config.stages:
        stage = config.stage(name)
        shared = {*stage.modalities} & {*config.modalities} - {"audio"}  # audio has no encoder
        if any(getattr(stage, modality).encoder not in FROM_FILE for modality in shared):
            needed[name] = stage if stage.target in available else stage.override({"target": config.target})
    # stages that read video come first, so that an unreadable video is found early
    return dict(sorted(needed.items(), key=lambda item: "vision" not in item[1].modalities))


def _check_start(config: Config, data: str | Path) -> None:
    """Refuse a ``start`` RUN that was trained on clips of valid or test: each seed may draw its own split.

    Raises:
        UsageError: it was.
    """
    record = read_metrics(Path(config.start)) if config.start else {}
    if "data" not in record or Path(record["data"]).resolve() != Path(data).resolve():
        return
    start_config = Config().to_dict() | record["experiment"]
    trained_ids = {clip.id for clip in read_clips(data, "train", start_config["protocol"], start_config["seed"])}
    held_out = [clip for clip in read_clips(data, None, config.protocol, config.seed) if clip.split != "train"]
    if overlap := sum(clip.id in trained_ids for clip in held_out):
        message = f"start: {config.start} was trained on {overlap} of the {len(held_out)} clips in valid and test"
        raise UsageError(f"{message} — use --set protocol={start_config['protocol']} --set seed={start_config['seed']}")


def _check_sizes(model: SentimentModel, stages: dict[str, Config]) -> None:
    """Refuse stages with another frame size if the vision encoder has position embeddings, which depend on it.

    Raises:
        UsageError: a stage has another frame size.
    """
    size = model.experiment.vision.size
    positions = any("pos_embed" in name for name, _ in model.encoders.named_parameters())
    for name, stage in stages.items():
        if positions and "vision" in {*stage.modalities} & {*model.experiment.modalities} and stage.vision.size != size:
            raise UsageError(
                f"stages.{name}: vision.size is {stage.vision.size}, but {size} in the main training — make them the "
                "same, as this network has position embeddings"
            )


def _available_labels(clips: list[Clip]) -> set[str]:
    """The labels that at least one clip has."""
    return {label for clip in clips for label in clip.labels}


def _report_labels(config: Config, data: str | Path, stages: dict[str, Config], model: SentimentModel) -> None:
    """Report settings that need unimodal labels the data lacks, and labels that even an exact score would miss."""
    clips = read_clips(data, None, config.protocol, config.seed)
    missing = sorted({OWN_LABEL[name] for name in config.modalities} - _available_labels(clips))
    notes = [
        f"stage {name} is trained on label {stage.target}"
        for name, stage in stages.items()
        if stage != config.stage(name)
    ]
    has_audio = "audio" in config.modalities
    ineffective = {
        "train.recombine": config.train.recombine and missing,
        "train.mislead": config.train.mislead and has_audio and {"T", "V"} & {*missing},
        "audio.own": config.audio.own and has_audio and "A" in missing,
    }
    notes += [f"{key} has no effect without it" for key, is_ineffective in ineffective.items() if is_ineffective]
    if notes:
        console.print(f"{data}: no label {', '.join(missing)}: {'; '.join(notes)}", soft_wrap=True, highlight=False)
    scores = [clip.labels[config.target] for clip in clips if config.target in clip.labels]
    mismatched = sum(score_class(score) != polarity(score) for score in scores)
    if mismatched and getattr(model.network, "outputs", len(LABELS)) == 1:
        message = f"{mismatched} labels {config.target} between -0.1 and 0.1 are not neutral"
        console.print(f"{data}: {message}, but such scores are predicted as neutral", soft_wrap=True, highlight=False)


def _load_split(data: str | Path, config: Config, split: str, model: SentimentModel) -> ClipSet:
    clips = [clip for clip in read_clips(data, split, config.protocol, config.seed) if config.target in clip.labels]
    if not clips:
        raise UserError(f"{data}: no clip in {split} has label {config.target} — add it or choose another target")
    return clip_set(clips, model, data=data)


def copy_encoders(model: SentimentModel, stage: SentimentModel) -> None:
    """Copy the weights of the encoders that a stage has trained."""
    for name, encoder in stage.encoders.items():
        if name in model.encoders:
            model.encoders[name].load_state_dict(encoder.state_dict())


def _batch_per_process(config: Config) -> tuple[int, int]:
    """The batch size per process, and the number of processes."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if config.train.batch_size % world_size:
        raise UserError(f"train.batch_size {config.train.batch_size} is not divisible by {world_size} processes")
    return config.train.batch_size // world_size, world_size


def _training_arguments(
    config: Config, folder: Path, device: torch.device, as_stage: str | None = None
) -> TrainingArguments:
    t, (per_process, world_size) = config.train, _batch_per_process(config)
    arguments = TrainingArguments(
        output_dir=str(folder.resolve()),  # the path is saved, and the working directory may differ when resuming
        run_name=as_stage,
        num_train_epochs=t.epochs,
        per_device_train_batch_size=per_process,
        per_device_eval_batch_size=max(per_process, 32),
        gradient_accumulation_steps=t.accumulation,
        learning_rate=t.lr,
        weight_decay=t.weight_decay,
        warmup_steps=t.warmup,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(t.schedule, t.schedule),
        max_grad_norm=t.clip_norm,
        bf16=t.precision == "bf16",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # early stopping keeps its count
        metric_for_best_model=t.metric,
        greater_is_better=t.metric != "nll",
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" and world_size > 1 else None,
        dataloader_drop_last=True,
        dataloader_pin_memory=device.type == "cuda",
        accelerator_config={"non_blocking": device.type == "cuda"},
        remove_unused_columns=False,
        label_names=[f"label_{config.target}"],
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        logging_nan_inf_filter=False,  # the filter would synchronise with the GPU at each step and hide NaN
    )
    if device.type == "cuda" and world_size == 1:
        _use_only(arguments, torch.device("cuda", device.index or 0))
    return arguments


def _use_only(arguments: TrainingArguments, device: torch.device) -> None:
    """Use only this GPU: TrainingArguments would take the first one and use DataParallel over all."""
    _ = arguments.device  # computed once; the result is stored in three places
    torch.cuda.set_device(device)
    arguments.__dict__["_setup_devices"], arguments._n_gpu = device, 1
    arguments.distributed_state.device = device
