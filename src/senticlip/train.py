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
from senticlip.checkpoint import CHECKPOINTS, begin, calibrate, is_finished, origin, read_metrics, save_run
from senticlip.config import FROM_FILE, Config
from senticlip.data.loader import ClipSet
from senticlip.data.sims import read_clips
from senticlip.files import alone, disk
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
    out, chosen, mine = Path(out), runtime.device(device), origin(config, data)
    if resume and (result := is_finished(out, mine)):
        return result
    _check_start(config, data)
    if config.train.compile:
        runtime.check_compiler(chosen)
    first = runtime.first_process()
    with disk(out, "continue with --resume"), alone(out, "training") if first else nullcontext():
        if first:
            begin(out, mine, resume)
        stages = stages_of(config, data)
        set_seed(config.seed)
        model = create_model(config, feature_widths(config, data))  # before the stages, which take long: it may fail
        _check_sizes(model, stages)
        for each in (config, *stages.values()):
            _per_process(each)  # fails now rather than when its turn comes
        if first and not as_stage:
            _tell_labels(config, data, stages, model)
        if stages and first:
            told = [f"{n} (up to {c.train.epochs} epochs)" for n, c in {**stages, "all together": config}.items()]
            console.print(f"{len(told)} training runs: {', '.join(told)}", soft_wrap=True, highlight=False)
        for name, stage in stages.items():
            train(stage, data, out / "stages" / name, resume=resume, device=device, as_stage=name)
        arguments = _arguments(config, out / CHECKPOINTS, chosen, as_stage)
        place: Any = arguments.device
        model.to(place)
        for name in stages:
            adopt(model, SentimentModel.from_pretrained(out / "stages" / name))
        with arguments.main_process_first():
            sets = {split: _split(data, config, split, model) for split in ("train", "valid")}
        result = fit(model, sets["train"], sets["valid"], arguments, resume)
        calibrate(model, sets["valid"])
        result["seconds"] = round(time.monotonic() - started, 1)
        with arguments.main_process_first():  # the others wait, as they may load this stage next
            if arguments.process_index == 0:
                save_run(out, model, config, mine, result)
    return result


def stages_of(config: Config, data: str | Path) -> dict[str, Config]:
    """The stages whose encoders the main training takes over, by name, in training order.

    A stage whose label ``data`` lacks is trained on the main training's label. With ``start`` there are no stages.
    """
    there, needed = _labels(read_clips(data, None, config.protocol, config.seed)), {}
    for name in () if config.start else config.stages:
        stage = config.stage(name)
        shared = {*stage.modalities} & {*config.modalities} - {"audio"}  # audio has no encoder
        if any(getattr(stage, modality).encoder not in FROM_FILE for modality in shared):
            needed[name] = stage if stage.target in there else stage.override({"target": config.target})
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
    before = Config().to_dict() | record["experiment"]
    learned = {clip.id for clip in read_clips(data, "train", before["protocol"], before["seed"])}
    judges = [clip for clip in read_clips(data, None, config.protocol, config.seed) if clip.split != "train"]
    if known := sum(clip.id in learned for clip in judges):
        told = f"start: {config.start} was trained on {known} of the {len(judges)} clips in valid and test"
        raise UsageError(f"{told} — use --set protocol={before['protocol']} --set seed={before['seed']}")


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


def _labels(clips: list[Clip]) -> set[str]:
    """The labels that at least one clip has."""
    return {label for clip in clips for label in clip.labels}


def _tell_labels(config: Config, data: str | Path, stages: dict[str, Config], model: SentimentModel) -> None:
    """Report settings that need unimodal labels the data lacks, and labels that even an exact score would miss."""
    clips = read_clips(data, None, config.protocol, config.seed)
    missing = sorted({OWN_LABEL[name] for name in config.modalities} - _labels(clips))
    told = [
        f"stage {name} is trained on label {stage.target}"
        for name, stage in stages.items()
        if stage != config.stage(name)
    ]
    hears = "audio" in config.modalities
    needs = {
        "train.recombine": config.train.recombine and missing,
        "train.mislead": config.train.mislead and hears and {"T", "V"} & {*missing},
        "audio.own": config.audio.own and hears and "A" in missing,
    }
    told += [f"{key} has no effect without it" for key, lacks in needs.items() if lacks]
    if told:
        console.print(f"{data}: no label {', '.join(missing)}: {'; '.join(told)}", soft_wrap=True, highlight=False)
    scores = [clip.labels[config.target] for clip in clips if config.target in clip.labels]
    small = sum(score_class(score) != polarity(score) for score in scores)
    if small and getattr(model.network, "outputs", len(LABELS)) == 1:
        near = f"{small} labels {config.target} between -0.1 and 0.1 are not neutral"
        console.print(f"{data}: {near}, but such scores are predicted as neutral", soft_wrap=True, highlight=False)


def _split(data: str | Path, config: Config, split: str, model: SentimentModel) -> ClipSet:
    clips = [clip for clip in read_clips(data, split, config.protocol, config.seed) if config.target in clip.labels]
    if not clips:
        raise UserError(f"{data}: no clip in {split} has label {config.target} — add it or choose another target")
    return clip_set(clips, model, data=data)


def adopt(model: SentimentModel, stage: SentimentModel) -> None:
    """Copy the weights of the encoders that a stage has trained."""
    for name, encoder in stage.encoders.items():
        if name in model.encoders:
            model.encoders[name].load_state_dict(encoder.state_dict())


def _per_process(config: Config) -> tuple[int, int]:
    """The batch size per process, and the number of processes."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.train.batch_size % world:
        raise UserError(f"train.batch_size {config.train.batch_size} is not divisible by {world} processes")
    return config.train.batch_size // world, world


def _arguments(config: Config, folder: Path, device: torch.device, as_stage: str | None = None) -> TrainingArguments:
    t, (share, world) = config.train, _per_process(config)
    arguments = TrainingArguments(
        output_dir=str(folder.resolve()),  # the path is saved, and the working directory may differ when resuming
        run_name=as_stage,
        num_train_epochs=t.epochs,
        per_device_train_batch_size=share,
        per_device_eval_batch_size=max(share, 32),
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
        ddp_backend="gloo" if device.type == "cpu" and world > 1 else None,
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
    if device.type == "cuda" and world == 1:
        _stay_on(arguments, torch.device("cuda", device.index or 0))
    return arguments


def _stay_on(arguments: TrainingArguments, device: torch.device) -> None:
    """Use only this GPU: TrainingArguments would take the first one and use DataParallel over all."""
    _ = arguments.device  # computed once; the result is stored in three places
    torch.cuda.set_device(device)
    arguments.__dict__["_setup_devices"], arguments._n_gpu = device, 1
    arguments.distributed_state.device = device
