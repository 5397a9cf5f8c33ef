"""An epoch of the fusion head on cached features: transformers.Trainer as run by ``senticlip train``, against a bare
PyTorch loop with the same model, and against running the frozen encoders each time.

The encoders' epoch is extrapolated: their forward pass is timed on one clip and multiplied by the number of clips.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import paper, timing
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainingArguments, get_scheduler

from senticlip.data.cache import cached
from senticlip.data.loader import ClipSet, collate, to_batch
from senticlip.fit import Fitter, Hooks, parameter_groups
from senticlip.models import create_model
from senticlip.structures import Batch, Clip, Sequence
from senticlip.train import _training_arguments
from senticlip.trainee import Trainee


def random_set(folder: Path, count: int, widths: dict[str, int]) -> ClipSet:
    """Random features in a real cache: 30 characters, 6 frames."""
    random = np.random.default_rng(0)
    keys = [f"{i}" for i in range(count)]
    stores = {}
    for name, length in (("text", 30), ("vision", 6)):
        shape = (length, widths[name])
        rows = (random.standard_normal(shape, np.float32).astype(np.float16) for _ in keys)
        stores[name] = cached(folder, {"made": name}, keys, lambda indices, rows=rows: rows)
    return ClipSet([Clip(key, labels={"M": float(random.integers(-1, 2))}) for key in keys], stores)


def make_model(seed: int = 0) -> Any:
    """The network without its frozen encoders, and the encoders."""
    torch.manual_seed(seed)
    model = create_model(paper.config("frozen").override({"prompt": "none", "dropout": 0.0}))
    encoders = {name: model.encoders.pop(name).eval() for name in list(model.encoders)}
    return model, encoders


def arguments_of(trainee: Trainee, folder: Path, device: str = "cpu", epochs: int = 1) -> TrainingArguments:
    """The arguments of ``senticlip train``, for some epochs without evaluation and checkpoints."""
    return dataclasses.replace(
        _training_arguments(trainee.experiment, folder, torch.device(device)),
        num_train_epochs=epochs,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
    )


def bare_loop(trainee: Trainee, data: ClipSet, folder: Path) -> float:
    """A hand-written loop with the same batches, optimizer and schedule; returns the mean loss."""
    arguments, size = arguments_of(trainee, folder), trainee.experiment.train.batch_size
    steps, losses = len(data) // size, []
    optimizer = torch.optim.AdamW(parameter_groups(trainee), fused=True)
    schedule = get_scheduler(arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(steps), steps)
    trainee.train()
    for step in range(steps):
        batch = to_batch(data.__getitems__(list(range(step * size, (step + 1) * size))))
        loss = trainee.model.loss(trainee.model(batch), batch)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), arguments.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        trainee.step_finished()
        losses.append(float(loss.detach()))
    return float(np.mean(losses))


class InOrder(Fitter):
    """Takes batches in the order of the rows, as the bare loop does."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def by_trainer(trainee: Trainee, data: ClipSet, folder: Path) -> float:
    """The same with the Trainer."""
    arguments = arguments_of(trainee, folder)
    trainer = InOrder(trainee, arguments, data_collator=collate, train_dataset=data, callbacks=[Hooks(trainee)])
    trainer.pop_callback(PrinterCallback)
    return float(trainer.train().training_loss)


@torch.inference_mode()
def encode_one(encoders: dict[str, Any]) -> None:
    """Both encoders on one clip."""
    pixels = torch.zeros(1, 6, 3, 224, 224, dtype=torch.uint8)
    ids = torch.full((1, 30), 500)
    encoders["vision"](Sequence(pixels, torch.ones(1, 6, dtype=torch.bool)))
    encoders["text"](Sequence(ids, torch.ones_like(ids, dtype=torch.bool)))


def run(quick: bool) -> None:
    """1368 clips, as in CH-SIMS; fewer if quick."""
    count = 128 if quick else 1368
    model, encoders = make_model()
    model_copy = make_model()[0]
    with timing.folder() as folder:
        data = random_set(folder / "cache", count, model.network.dims)
        probe = Batch(to_batch(data.__getitems__([0, 1])).modalities, {})
        with torch.no_grad():
            assert torch.equal(model.eval()(probe).log_probs, model_copy.eval()(probe).log_probs)
        trainees = Trainee(model), Trainee(model_copy)
        ways = {
            "bare PyTorch loop": lambda: bare_loop(trainees[0], data, folder / "out"),
            "ours, Trainer": lambda: by_trainer(trainees[1], data, folder / "out"),
            "encoders, one clip": lambda: encode_one(encoders),
        }
        answers, costs = timing.interleave(ways, 1 if quick else 3)
    # both learn the same; each round continues from the last
    gap = abs(answers["bare PyTorch loop"] - answers["ours, Trainer"])
    assert gap < 1e-4, answers
    encoder_costs = costs.pop("encoders, one clip")
    timing.show(f"epoch of {count} clips", costs, {"ours, Trainer": f"difference of the loss {gap:.0e}"})
    head_seconds, encoder_seconds = timing.median(costs["ours, Trainer"]).cpu, timing.median(encoder_costs).cpu
    print(
        f"cached epoch: {head_seconds:.1f} cpu-s; with the encoders each time "
        f"{head_seconds + count * encoder_seconds:.0f} cpu-s ({encoder_seconds:.2f} a clip, counted for {count}): "
        f"{(head_seconds + count * encoder_seconds) / head_seconds:.0f}x"
    )


if __name__ == "__main__":
    timing.main(run, __doc__)
