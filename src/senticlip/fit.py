"""Train one model with transformers.Trainer: optimizer, data loaders, best epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from senticlip import metrics
from senticlip.checkpoint import TENSORBOARD, best_checkpoint, newest_checkpoint, read_json
from senticlip.config import Config
from senticlip.data.loader import BalancedSampler, ClipSet, collate
from senticlip.models.base import SentimentModel
from senticlip.progress import bar
from senticlip.structures import LABELS, SURFACE, UserError, polarity
from senticlip.trainee import Trainee

SELECTION_METRIC, TIE_WEIGHT = "choice", 1e-6
"""The metric that chooses a regression model's epoch: ``train.metric``, minus the MAE times TIE_WEIGHT to break ties.

Early on, all its scores fall into one class; with the metric alone, early stopping would end the training there.
"""


class Fitter(Trainer):
    """transformers.Trainer with a learning rate for each part, balanced sampling, and every row of valid."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over ``parameter_groups``."""
        if self.optimizer is None:
            fused = self.args.device.type in ("cuda", "cpu")
            self.optimizer = torch.optim.AdamW(parameter_groups(self.model), fused=fused)
        return self.optimizer

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """A loader of every row of valid: Trainer would apply ``dataloader_drop_last`` here too."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        loader = super().get_eval_dataloader(*args, **kwargs)
        self.args.dataloader_drop_last = drop_last
        return loader

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        trainee: Any = self.model
        config: Config = trainee.experiment
        if config.train.balance != "sampler":
            return super()._get_train_sampler(*args, **kwargs)
        return BalancedSampler(_classes_of(self.train_dataset, config), config.seed)


def parameter_groups(trainee: Any) -> list[dict[str, Any]]:
    """Optimizer groups by learning rate and weight decay; no decay for norms, biases, s, logit_scale and the prefix.

    A peer defines its own groups, as in its published code.
    """
    config, network = trainee.experiment, trainee.model.network
    network_groups = network.param_groups(config) if hasattr(network, "param_groups") else []
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in trainee.model.named_parameters():
        if parameter.requires_grad and not (network_groups and name.startswith("network.")):
            decay = 0.0 if parameter.ndim < 2 or name.endswith(".prefix") else config.train.weight_decay
            groups.setdefault((_learning_rate(name, config), decay), []).append(parameter)
    return network_groups + [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]


def _learning_rate(name: str, config: Config) -> float:
    """The learning rate of a parameter: its encoder's, the audio projection's, ``train.scalar_lr`` or ``train.lr``."""
    if name.startswith("encoders.") and not name.endswith(".prefix"):
        return getattr(config, name.split(".")[1]).lr
    if name.startswith("network.labels."):
        return config.label.lr
    if name.startswith("network.entrances.audio."):
        return config.audio.lr
    return config.train.scalar_lr if ".combine." in name else config.train.lr


class Hooks(TrainerCallback):
    """Tell the network when an epoch begins and when a step ends."""

    def __init__(self, trainee: Trainee) -> None:
        self.trainee, self.network = trainee, trainee.model.network

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the network which epoch begins, from 1 (Self-MM moves its labels from the second on)."""
        if hasattr(self.network, "epoch_started"):
            self.network.epoch_started(round(state.epoch or 0) + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clamp parameters, then update the moving average."""
        self.trainee.step_finished()


class EpochProgress(TrainerCallback):
    """Prints a heading, a progress bar over steps, the metrics of each epoch, and why training stopped early.

    The heading names a stage by ``TrainingArguments.run_name``, any other training by its modalities.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.progress = config, bar(transient=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the heading, show the bar."""
        modalities = "+".join(SURFACE[name] for name in self.config.modalities)
        title = f"{f'stage {args.run_name}' if args.run_name else modalities} (label {self.config.target})"
        self.progress.console.print(f"training {title}", highlight=False)
        self.task = self.progress.add_task(title, total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        self.progress.update(self.task, completed=state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the metrics of the epoch."""
        logged = kwargs["metrics"]
        names = [k for k in ("nll", "mae", "accuracy", "macro_f1") if f"eval_{k}" in logged]
        values = "  ".join(f"{k} {logged['eval_' + k]:.4f}" for k in names)
        self.progress.console.print(f"epoch {round(state.epoch):>3}  valid: {values}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the bar; say so if training stopped early."""
        self.progress.stop()
        if state.global_step < state.max_steps:
            patience = self.config.train.patience
            self.progress.console.print(f"stopped early: no improvement for {patience} epochs", highlight=False)


def fit(
    model: SentimentModel, training: ClipSet, valid: ClipSet, arguments: TrainingArguments, resume: bool
) -> dict[str, Any]:
    """Train until the validation metric stops improving; the model ends with the weights of its best epoch."""
    config = model.experiment
    frozen = {name: model.encoders.pop(name) for name in list(model.encoders) if model.frozen(name)}
    if hasattr(model.network, "prepare"):
        model.network.prepare(training)
    if config.train.balance == "weights":
        counts = np.bincount(_classes_of(training, config), minlength=len(LABELS))
        model.network.class_weights.copy_(torch.tensor(counts.sum() / len(LABELS) / counts.clip(1)))

    # an incomplete last batch is dropped, unless it is the only one
    arguments.dataloader_drop_last = len(training) >= config.train.batch_size
    steps = config.train.epochs * max(1, len(training) // (config.train.batch_size * config.train.accumulation))
    if config.train.warmup * steps < 1:  # would be rounded up to one step at rate 0: too much of a short training
        arguments.warmup_steps = 0
    metric = config.train.metric
    if getattr(model.network, "outputs", len(LABELS)) == 1:  # a regression model has no likelihood
        arguments.metric_for_best_model = "mae" if metric == "nll" else SELECTION_METRIC
    trainee = Trainee(model)
    if config.train.compile:
        model.compile_encoders()

    def compute_metrics(prediction: Any) -> dict[str, float]:
        values, log = prediction.predictions
        scores = score(values, prediction.label_ids)
        if arguments.metric_for_best_model == SELECTION_METRIC:
            scores[SELECTION_METRIC] = scores[metric] - TIE_WEIGHT * scores["mae"]
        return scores | {name: float(rows.mean()) for name, rows in log.items()}

    folder = Path(arguments.output_dir or "")
    epoch_progress = EpochProgress(config)
    callbacks: list[TrainerCallback] = [Hooks(trainee), EarlyStoppingCallback(config.train.patience)]
    writer = None
    if arguments.process_index == 0:
        writer = SummaryWriter(str(folder.parent / TENSORBOARD))
        callbacks += [epoch_progress, TensorBoardCallback(writer)]
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
    checkpoint = newest_checkpoint(folder) if resume else None
    best = best_checkpoint(checkpoint) if checkpoint else None
    try:
        if checkpoint is None or not _is_over(checkpoint, config.train.patience):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        else:  # killed after its last epoch
            trainer.state = trainer.state.load_from_json(str(checkpoint / "trainer_state.json"))
            trainer.state.best_model_checkpoint = str(best)  # the saved path is stale if the folder was moved
            trainer._load_best_model()
    finally:  # a running bar hides the terminal's cursor; an open writer may write to a deleted folder
        epoch_progress.progress.stop()
        if writer is not None:
            writer.close()
    if trainee.average is not None:
        model.load_state_dict(trainee.average.state_dict())
    model.encoders.update(frozen)
    model.eval()
    return _summary(trainer.state)


def score(values: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Validation metrics of log-probabilities n×C (with nll) or scores n (with mae) against label scores n."""
    if np.isnan(values).any():
        raise UserError("training diverged: the predictions on valid are NaN — lower train.lr or set train.clip_norm")
    target = polarity(truth)
    predicted = values.argmax(-1) if values.ndim == 2 else metrics.score_class(values)
    scores = metrics.classification(target, predicted)
    errors = np.abs(values - truth) if values.ndim == 1 else -np.take_along_axis(values, target[:, None], 1)
    error = {"mae" if values.ndim == 1 else "nll": float(errors.mean())}
    return {name: scores[name] for name in ("accuracy", "macro_f1", "weighted_f1")} | error


def _classes_of(data: Any, config: Config) -> np.ndarray:
    return polarity(data.labels[config.target])


def _is_over(checkpoint: Path, patience: int) -> bool:
    """Whether training was over, by its last epoch or by early stopping, when this checkpoint was written."""
    state = read_json(checkpoint / "trainer_state.json")
    if state["global_step"] >= state["max_steps"]:
        return True
    callback = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    return callback.get("attributes", {}).get("early_stopping_patience_counter", 0) >= patience


def _summary(state: Any) -> dict[str, Any]:
    rows = (row for row in state.log_history if "eval_accuracy" in row)
    best = next(row for row in rows if row["step"] == state.best_global_step)
    names = ("accuracy", "macro_f1", "weighted_f1", "nll", "mae")
    valid = {name: round(best[f"eval_{name}"], 6) for name in names if f"eval_{name}" in best}
    history = [
        {k.removeprefix("eval_"): v for k, v in row.items() if k != f"eval_{SELECTION_METRIC}"}
        for row in state.log_history
        if "epoch" in row
    ]
    return {"best_epoch": round(best["epoch"]), "valid": valid, "history": history}
