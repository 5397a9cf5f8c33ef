"""Progress bars in one style for all long work; none where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text
from transformers import TrainerCallback

from senticlip.config import Config
from senticlip.structures import SURFACE

Row = TypeVar("Row")

console = Console(stderr=True, markup=False)  # names of files may hold brackets


def bar(**options: Any) -> Progress:
    """A rich progress bar on stderr with the time left."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_interactive, **options)


@contextmanager
def counter(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that calls back with (done, in all)."""
    with bar(transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def watched(rows: Iterable[Row], what: str, total: int) -> Iterator[Row]:
    """Yield the rows, with a bar that counts them."""
    with bar(transient=True) as progress:
        yield from progress.track(rows, total=total, description=what)


def spinner(what: str) -> Status:
    """For work whose progress is not known."""
    return console.status(Text(what))


def announce(trainings: dict[str, Config]) -> None:
    """How many trainings there will be, in their order."""
    told = ", ".join(f"{name} ({config.train.epochs} epochs at most)" for name, config in trainings.items())
    console.print(f"{len(trainings)} trainings: {told}", soft_wrap=True, highlight=False)


class EpochProgress(TrainerCallback):
    """Prints what is trained, steps as a bar, a line with the metrics of each epoch, and why it stopped early.

    A stage is called by ``TrainingArguments.run_name``; a training without one by its modalities.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the heading, show the bar."""
        read = "+".join(SURFACE[name] for name in self.config.modalities)
        what = f"{f'stage {args.run_name}' if args.run_name else read} (label {self.config.target})"
        self.progress = bar(transient=True)
        self.progress.console.print(f"training {what}", highlight=False)
        self.task = self.progress.add_task(what, total=state.max_steps, completed=state.global_step)
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the epoch's line."""
        metrics = kwargs["metrics"]
        told = [k for k in ("nll", "mae", "accuracy", "macro_f1") if f"eval_{k}" in metrics]
        shown = "  ".join(f"{k} {metrics['eval_' + k]:.4f}" for k in told)
        self.progress.console.print(f"epoch {round(state.epoch):>3}  valid: {shown}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the bar; say so if training stopped early."""
        self.progress.stop()
        if state.global_step < state.max_steps:
            patience = self.config.train.patience
            self.progress.console.print(f"stopped early: no better for {patience} epochs", highlight=False)
