"""The only training path: stages, caches, transformers.Trainer, the best epoch by a validation metric, a checkpoint."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from senticlip import metrics, runtime
from senticlip.checkpoint import (
    CHECKPOINTS,
    TENSORBOARD,
    begin,
    best_checkpoint,
    calibrate,
    is_finished,
    newest_checkpoint,
    origin,
    read_json,
    save_run,
)
from senticlip.config import Config
from senticlip.data.loader import BalancedSampler, ClipSet, collate
from senticlip.data.sims import read_clips
from senticlip.files import alone, disk
from senticlip.models import create_model
from senticlip.models.base import SentimentModel
from senticlip.progress import EpochProgress, announce
from senticlip.sources import clip_set, feature_widths
from senticlip.structures import LABELS, UserError, polarity
from senticlip.trainee import Trainee


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

    Sets threads and matmul precision of the whole process (``runtime.setup``), as the command line does.

    Args:
        config: the experiment.
        data: a CH-SIMS folder, or a CSV of one's own.
        out: the RUN folder.
        seed: instead of the config's.
        resume: continue a killed training of the same config on the same data; a finished one is left as it is.
        device: cpu, cuda, cuda:N; a GPU if there is one by default.
        as_stage: the stage's name in the log, if this is a stage of another training.

    Returns:
        ``{"best_epoch": …, "valid": {…}, "seconds": …, "history": […]}``

    Raises:
        UsageError: no such data, device or encoder. UserError: no clip has the label; the disk is full; ``out`` holds
            another run (with ``resume``); another process trains there.
    """
    started = time.monotonic()
    runtime.setup()
    config = config if seed is None else config.override({"seed": seed})
    out, chosen, mine = Path(out), runtime.device(device), origin(config, data)
    if resume and (result := is_finished(out, mine)):
        return result
    if config.train.compile:
        runtime.check_compiler(chosen)
    first = runtime.first_process()
    with disk(out, "--resume goes on"), alone(out, "training") if first else nullcontext():
        if first:
            begin(out, mine, resume)
        stages = stages_of(config, data)
        set_seed(config.seed)
        model = create_model(config, feature_widths(config, data))  # first: it may fail, and stages take long
        if stages and first:
            announce({**stages, "all together": config})
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
        with arguments.main_process_first():  # the others wait: they may read it as a stage next
            if arguments.process_index == 0:
                save_run(out, model, config, mine, result)
    return result


def stages_of(config: Config, data: str | Path) -> dict[str, Config]:
    """The stages that share a modality with the main training, by name, in the order in which they are trained.

    Where ``data`` lacks a stage's label, it is trained on the main training's. With ``start`` there are none.
    """
    clips = read_clips(data, None, config.protocol, config.seed)
    there = {label for clip in clips for label in clip.labels}
    needed = {}
    for name in () if config.start else config.stages:
        stage = config.stage(name)
        if set(stage.modalities) & set(config.modalities):
            needed[name] = stage if stage.target in there else stage.override({"target": config.target})
    # those that read videos first: an unreadable video is then found early
    return dict(sorted(needed.items(), key=lambda item: "vision" not in item[1].modalities))


def _split(data: str | Path, config: Config, split: str, model: SentimentModel) -> ClipSet:
    clips = [clip for clip in read_clips(data, split, config.protocol, config.seed) if config.target in clip.labels]
    if not clips:
        raise UserError(f"{data}: no clip of {split} has a label {config.target} — give the column or another target")
    return clip_set(clips, model, model.tokenizer, data=data)


def adopt(model: SentimentModel, stage: SentimentModel) -> None:
    """Take over the encoders that a stage has trained."""
    for name, encoder in stage.encoders.items():
        if name in model.encoders:
            model.encoders[name].load_state_dict(encoder.state_dict())


class Fitter(Trainer):
    """transformers.Trainer with a learning rate for each part."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the parts' groups."""
        if self.optimizer is None:
            fused = self.args.device.type in ("cuda", "cpu")
            self.optimizer = torch.optim.AdamW(parameter_groups(self.model), fused=fused)
        return self.optimizer

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """A loader of every row of valid: Trainer applies ``dataloader_drop_last`` to it, too."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        loader = super().get_eval_dataloader(*args, **kwargs)
        self.args.dataloader_drop_last = drop
        return loader

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        trainee: Any = self.model
        config: Config = trainee.experiment
        if config.train.balance != "sampler":
            return super()._get_train_sampler(*args, **kwargs)
        return BalancedSampler(_classes_of(self.train_dataset, config), config.seed)


def parameter_groups(trainee: Any) -> list[dict[str, Any]]:
    """Optimizer groups by learning rate and weight decay; norms, biases, s, logit_scale and the prefix do not decay.

    A peer brings the groups of its published code.
    """
    config: Config = trainee.experiment
    if hasattr(trainee.model.network, "param_groups"):
        return trainee.model.network.param_groups(config) + _groups(trainee, config, encoders_only=True)
    return _groups(trainee, config, encoders_only=False)


def _groups(trainee: Any, config: Config, encoders_only: bool) -> list[dict[str, Any]]:
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in trainee.model.named_parameters():
        if not parameter.requires_grad or (encoders_only and not name.startswith("encoders.")):
            continue
        rate = _rate(name, config)
        decay = 0.0 if parameter.ndim < 2 or name.endswith(".prefix") else config.train.weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]


def _rate(name: str, config: Config) -> float:
    """The learning rate of a parameter: its encoder's, the audio projection's, ``train.scalar_lr`` or ``train.lr``."""
    if name.startswith("encoders.") and not name.endswith(".prefix"):
        return getattr(config, name.split(".")[1]).lr
    if name.startswith("network.labels."):
        return config.label.lr
    if name.startswith("network.entrances.audio."):
        return config.audio.lr
    return config.train.scalar_lr if ".combine." in name else config.train.lr


class Hooks(TrainerCallback):
    """Tells the network the number of each epoch and the end of each step."""

    def __init__(self, trainee: Trainee) -> None:
        self.trainee, self.network = trainee, trainee.model.network

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Self-MM updates its labels by the epoch's number, from 1."""
        if hasattr(self.network, "epoch_started"):
            self.network.epoch_started(round(state.epoch or 0) + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clamp in place."""
        self.trainee.step_finished()


def fit(
    model: SentimentModel, training: ClipSet, valid: ClipSet, arguments: TrainingArguments, resume: bool
) -> dict[str, Any]:
    """Train until the validation metric stops rising; the model ends with its best epoch's weights."""
    config = model.experiment
    frozen = {name: model.encoders.pop(name) for name in list(model.encoders) if model.frozen(name)}
    if hasattr(model.network, "prepare"):
        model.network.prepare(training)
    if config.train.balance == "weights" and hasattr(model.network, "class_weights"):
        counts = np.bincount(_classes_of(training, config), minlength=len(LABELS))
        model.network.class_weights.copy_(torch.tensor(counts.sum() / len(LABELS) / counts.clip(1)))

    # an incomplete last batch is left out, unless it is the only one
    arguments.dataloader_drop_last = len(training) >= config.train.batch_size
    if getattr(model.network, "outputs", len(LABELS)) == 1 and config.train.metric == "nll":
        arguments.metric_for_best_model = "mae"  # a regression model has no likelihood
    trainee = Trainee(model)
    if config.train.compile:
        model.compile_encoders()

    def compute_metrics(prediction: Any) -> dict[str, float]:
        values, *more = prediction.predictions if trainee.logged else [prediction.predictions]
        log = {name: float(rows.mean()) for name, rows in zip(trainee.logged, more, strict=True)}
        return score(values, prediction.label_ids) | log

    callbacks: list[TrainerCallback] = [Hooks(trainee), EarlyStoppingCallback(config.train.patience)]
    if arguments.process_index == 0:
        board = SummaryWriter(str(Path(arguments.output_dir or "").parent / TENSORBOARD))
        callbacks += [EpochProgress(config), TensorBoardCallback(board)]
    trainer = Fitter(
        trainee,
        arguments,
        data_collator=collate,
        train_dataset=training,
        eval_dataset=valid,
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )
    trainer.pop_callback(PrinterCallback)
    folder = Path(arguments.output_dir or "")
    checkpoint = newest_checkpoint(folder) if resume else None
    best = best_checkpoint(checkpoint) if checkpoint else None
    if checkpoint is None or not _stopped(checkpoint, config.train.patience):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    else:  # it was killed after its last epoch
        trainer.state = trainer.state.load_from_json(str(checkpoint / "trainer_state.json"))
        trainer.state.best_model_checkpoint = str(best)  # its path is stale if the folder was moved
        trainer._load_best_model()
    if trainee.average is not None:
        model.load_state_dict(trainee.average.state_dict())
    model.encoders.update(frozen)
    model.eval()
    return _summary(trainer.state, arguments)


def score(values: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Validation metrics of log-probabilities n×C, or scores n, against label scores n: with nll, or with mae."""
    if np.isnan(values).any():
        raise UserError("the training diverged: its answers on valid are NaN — lower train.lr, or set train.clip_norm")
    target = polarity(truth)
    predicted = values.argmax(-1) if values.ndim == 2 else metrics.score_class(values)
    found = metrics.classification(target, predicted)
    rows = np.abs(values - truth) if values.ndim == 1 else -np.take_along_axis(values, target[:, None], 1)
    error = {"mae" if values.ndim == 1 else "nll": float(rows.mean())}
    return {name: found[name] for name in ("accuracy", "macro_f1", "weighted_f1")} | error


def _classes_of(data: Any, config: Config) -> np.ndarray:
    return polarity(data.labels[config.target])


def _stopped(checkpoint: Path, patience: int) -> bool:
    """Whether the training had ended, by its last epoch or by early stopping, when this checkpoint was written."""
    state = read_json(checkpoint / "trainer_state.json")
    if state["global_step"] >= state["max_steps"]:
        return True
    callback = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    return callback.get("attributes", {}).get("early_stopping_patience_counter", 0) >= patience


def _summary(state: Any, arguments: TrainingArguments) -> dict[str, Any]:
    metric = f"eval_{arguments.metric_for_best_model}"
    rows = [row for row in state.log_history if metric in row]
    best = (max if arguments.greater_is_better else min)(rows, key=lambda row: row[metric])
    valid = {name[5:]: round(value, 6) for name, value in best.items() if name.startswith("eval_")}
    keep = ("accuracy", "macro_f1", "weighted_f1", "nll", "mae")
    history = [{k.removeprefix("eval_"): v for k, v in row.items()} for row in state.log_history if "epoch" in row]
    return {"best_epoch": round(best["epoch"]), "valid": {k: valid[k] for k in keep if k in valid}, "history": history}


def _arguments(config: Config, folder: Path, device: torch.device, as_stage: str | None = None) -> TrainingArguments:
    t, world = config.train, int(os.environ.get("WORLD_SIZE", "1"))
    if t.batch_size % world:
        raise UserError(f"train.batch_size {t.batch_size} cannot be divided among {world} processes")
    arguments = TrainingArguments(
        output_dir=str(folder.resolve()),  # its path is saved, and a resumed run may have another working directory
        run_name=as_stage,
        num_train_epochs=t.epochs,
        per_device_train_batch_size=t.batch_size // world,
        per_device_eval_batch_size=max(t.batch_size // world, 32),
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
        restore_callback_states_from_checkpoint=True,  # early stopping goes on counting
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
        logging_nan_inf_filter=False,  # it would synchronise with the GPU at each step, and hide NaN
    )
    if device.type == "cuda" and world == 1:
        _stay_on(arguments, torch.device("cuda", device.index or 0))
    return arguments


def _stay_on(arguments: TrainingArguments, device: torch.device) -> None:
    """Use this one GPU: TrainingArguments would take the first, and DataParallel over all."""
    _ = arguments.device  # computed once, and stored in three places
    torch.cuda.set_device(device)
    arguments.__dict__["_setup_devices"], arguments._n_gpu = device, 1
    arguments.distributed_state.device = device
