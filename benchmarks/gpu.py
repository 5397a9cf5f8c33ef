"""The paper's model on a GPU: a training step, ``senticlip train``'s own loop from cached frames, and inference.

Random weights of the full size (Chinese-CLIP ViT-B/16 reads 6 frames, RoBERTa base the text); all are trained. Shares
are of the FLOP/s of a large bf16 matrix product, measured first. Without a GPU it runs on the CPU, two clips at a time
and one step each, which only shows that it works.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks import paper, timing
from benchmarks.step import arguments_of
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from senticlip import runtime
from senticlip.config import Config
from senticlip.data.cache import cached
from senticlip.data.loader import ArrayRows, ClipSet, collate, to_batch
from senticlip.fit import Fitter, Hooks, parameter_groups
from senticlip.models import create_model
from senticlip.precision import lower_precision
from senticlip.structures import Clip
from senticlip.trainee import Trainee

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def synchronize() -> None:
    """Wait until the GPU has finished."""
    if GPU:
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], times: int, rounds: int = 3) -> float:
    """Median seconds per call over ``rounds`` of ``times`` calls each, after two warm-up calls."""
    timings = []
    for _ in range(2):
        call()
    for _ in range(rounds):
        synchronize()
        started = time.perf_counter()
        for _ in range(times):
            call()
        synchronize()
        timings.append((time.perf_counter() - started) / times)
    return float(np.median(timings))


def ceiling(size: int) -> float:
    """TFLOP/s of a bf16 matrix product."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2e-12 * size**3 / seconds(lambda: a @ b, 10)


def trainee_of(config: Config) -> Trainee:
    """The full model, set up as in ``fit``."""
    torch.manual_seed(0)
    trainee = Trainee(create_model(config).to(DEVICE)).train()
    if config.train.compile:
        trainee.model.compile_encoders()
    return trainee


def random_rows(count: int) -> tuple[ArrayRows, list[Clip]]:
    """Texts of 8 to 62 characters and labels."""
    random = np.random.default_rng(0)
    lengths = random.integers(8, 63, count)
    texts = ArrayRows(random.integers(500, 5000, (count, 62)), np.arange(62) < lengths[:, None])
    return texts, [Clip(f"{i}", labels={"M": float(random.integers(-1, 2))}) for i in range(count)]


def random_set(folder: Path, count: int) -> ClipSet:
    """Random frames in a real cache."""
    texts, clips = random_rows(count)
    random = np.random.default_rng(1)
    rows = (random.integers(0, 256, (6, 3, 224, 224), np.uint8) for _ in clips)
    frames = cached(folder, {"made": "frames"}, [clip.id for clip in clips], lambda indices: rows)
    return ClipSet(clips, {"text": texts, "vision": frames})


def random_batch(count: int) -> dict[str, Tensor]:
    """A batch on the device."""
    texts, clips = random_rows(count)
    frames = np.random.default_rng(1).integers(0, 256, (count, 6, 3, 224, 224), np.uint8)
    data = ClipSet(clips, {"text": texts, "vision": ArrayRows(frames, np.ones((count, 6), bool))})
    return {name: value.to(DEVICE) for name, value in data.__getitems__(list(range(count))).items()}


def work(trainee: Trainee, batch: dict[str, Tensor]) -> float:
    """TFLOP per clip of a training step, without the optimizer's."""
    return paper.counted(lambda: trainee(**batch)["loss"].backward()) / 1e3 / len(batch["rows"])


def training_step(trainee: Trainee, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """A training step, as done by the Trainer."""
    bf16, clip = trainee.experiment.train.precision == "bf16", trainee.experiment.train.clip_norm
    optimizer = torch.optim.AdamW(parameter_groups(trainee), fused=True)

    def step() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            loss = trainee(**batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        trainee.step_finished()
        return loss.detach()

    return step


def say(name: str, clips: int, seconds_taken: float, tflop: float, peak: float, note: str = "") -> None:
    """Print a line of the table."""
    memory = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0
    share = f"{clips * tflop / seconds_taken / peak:5.0%}"
    print(
        f"{name:52} {clips / seconds_taken:9.1f} clips/s  {share} of the product  {memory:5.1f} GiB  {note}", flush=True
    )


def reset_gpu() -> None:
    """Clear compiled code and unused memory, so that they do not affect the next measurement."""
    torch._dynamo.reset()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


BF16 = {"train.precision": "bf16"}
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32 (torch's default), eager": ("highest", {}),
    "fp32 (TF32), eager": ("medium", {}),
    "bf16, eager": ("medium", BF16),
    "bf16, compiled": ("medium", {**BF16, "train.compile": True}),
}


def time_steps(peak: float, tflop: float) -> None:
    """Time a training step whose batch is already on the device."""
    count = 32 if GPU else 2
    for name, (matmul_precision, changes) in STEPS.items():
        torch.set_float32_matmul_precision(matmul_precision)
        reset_gpu()
        started = time.perf_counter()
        batch, trainee = random_batch(count), trainee_of(paper.config().override(changes))
        step = training_step(trainee, batch)
        loss = float(step())
        first = time.perf_counter() - started
        seconds_taken = seconds(step, 10 if GPU else 1)
        say(
            f"step: {name}, {count} clips",
            count,
            seconds_taken,
            tflop,
            peak,
            f"loss {loss:.2f}, ready in {first:.0f} s",
        )
        del trainee, step, batch


class Clock(TrainerCallback):
    """Seconds per step, from the end of step ``skip`` to the end of the last one, and seconds until the first ended."""

    def __init__(self, skip: int) -> None:
        self.skip, self.started, self.first, self.seconds_per_step = skip, time.perf_counter(), 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the end of the first step and of step ``skip``."""
        if state.global_step == 1:
            synchronize()
            self.first = time.perf_counter() - self.started
        if state.global_step == self.skip:
            synchronize()
            self.started = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the end of the last step."""
        synchronize()
        self.seconds_per_step = (time.perf_counter() - self.started) / (state.global_step - self.skip)


def time_training_loop(peak: float, tflop: float, data: ClipSet, folder: Path, size: int) -> None:
    """Time the Trainer's loop on cached frames, without the first epoch, in which it compiles."""
    size = size if GPU else 2
    reset_gpu()
    trainee = trainee_of(paper.config().override({**BF16, "train.compile": True, "train.batch_size": size}))
    arguments, clock = arguments_of(trainee, folder, DEVICE.type, epochs=2), Clock(len(data) // size)
    trainer = Fitter(trainee, arguments, data_collator=collate, train_dataset=data, callbacks=[Hooks(trainee), clock])
    trainer.pop_callback(PrinterCallback)
    trainer.train()
    name, note = f"senticlip train, cached frames, {size} clips", f"first step after {clock.first:.0f} s"
    say(name, size, clock.seconds_per_step, tflop, peak, note)


def inference(peak: float) -> None:
    """Time the model frame by frame in torch's default fp32, and as used by the Predictor."""
    model = create_model(paper.config()).to(DEVICE).eval()
    batches = {n: to_batch(random_batch(n)) for n in ((1, 8, 64, 256) if GPU else (1,))}
    single = batches[1]
    with torch.inference_mode():
        tflop = paper.work(model, single) / 1e3
        naive = paper.frame_by_frame(model, single)
        seconds_taken = seconds(lambda: paper.frame_by_frame(model, single), 5)
        say("inference: frame by frame, fp32, 1 clip", 1, seconds_taken, tflop, peak)
        for name in ("fp32", "bf16"):
            if name == "bf16":
                with timing.folder() as folder:
                    model = lower_precision(model, folder, name)[0]
            gap = paper.gap(naive, model(single))
            assert gap < paper.LIMIT["bf16"], gap
            for n, batch in batches.items():
                reset_gpu()
                seconds_taken = seconds(functools.partial(model, batch), 5 if GPU else 1)
                say(f"inference: {name}, {n} clips", n, seconds_taken, tflop, peak, f"largest difference {gap:.0e}")


def run(quick: bool) -> None:
    """Everything; if quick, only ``senticlip train``."""
    print(torch.cuda.get_device_name() if GPU else "no GPU here", f"{runtime.cores()} cores", flush=True)
    peak = max(ceiling(8192 if GPU else 512) for _ in range(3))
    tflop = work(trainee_of(paper.config()), random_batch(2))
    print(f"bf16 product: {peak:.1f} TFLOP/s; {1e3 * tflop:.0f} GFLOP a clip and training step", flush=True)
    with timing.folder() as folder:
        data = random_set(folder / "cache", 4096 if GPU else 4)
        for size in (128, 64, 32):
            time_training_loop(peak, tflop, data, folder / "out", size)
    if not quick:
        time_steps(peak, tflop)
        inference(peak)


if __name__ == "__main__":
    timing.main(run, __doc__)
