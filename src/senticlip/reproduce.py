"""The paper's Tables 1 to 8: experiments × seeds → one report beside the paper's numbers, resumable row by row."""

from __future__ import annotations

import csv
import json
import shutil
import time
from pathlib import Path
from traceback import format_exception_only
from typing import Any

from senticlip import results
from senticlip.checkpoint import encoder_keys, read_json, rows_digest, share_stage
from senticlip.config import Config
from senticlip.data.sims import read_clips
from senticlip.data.table import SPLITS
from senticlip.files import alone, disk, make_folder, write_text
from senticlip.progress import bar, console
from senticlip.structures import LABELS, Clip, UserError
from senticlip.tables import Table, digest, load_preset, load_tables

WEIGHTS = "model.safetensors"


def reproduce(
    data: str | Path,
    out: str | Path,
    preset: str = "paper",
    tables: list[str] | None = None,
    seeds: int = 5,
    protocol: str = "official",
    keep: bool = False,
    overrides: list[str] | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Run what is missing, then write ``report.md``, ``report.html``, ``results.json`` and ``tables.tex``.

    After a kill, the same call continues: finished rows are read, an unfinished one resumes at its last epoch. Rows of
    the same config are run once; the stages of a preset are trained once per seed for all rows.

    Args:
        data: a CH-SIMS folder, or a CSV of one's own.
        out: where runs, their metrics and predictions, and the report go.
        preset: tiny, small or paper: the size of the encoders (or a YAML file).
        tables: which of "1" … "8"; all by default.
        seeds: how many, from 0.
        protocol: official, tenth or video.
        keep: keep all weights, too.
        overrides: ``KEY=VALUE`` changes of the preset.
        device: cpu, cuda, cuda:N.

    Returns:
        ``{"tables": {number: {row: {metric: {"mean", "std"}}}}, "report": path}``

    Raises:
        UserError: ``out`` holds runs on other data or of other weights; another reproduce writes there; no row could
            be run; the disk is full.
    """
    out = Path(out)
    config = load_preset(preset, [*(overrides or []), f"protocol={protocol}"])
    splits = [read_clips(data, None, protocol, seed) for seed in range(seeds)]
    for split in SPLITS:  # an empty split is an error before anything is trained
        read_clips(data, split, protocol)
    labels = {name for clip in splits[0] for name in clip.labels}
    chosen = load_tables(config, tables, labels, random=preset in ("tiny", "small"))
    with alone(out, "reproduce"):
        _claim(out / "runs", data, splits[0], config)
        runner = Runner(data, out / "runs", keep, device)
        runner.run_all(chosen, seeds)
        errors = [result["error"] for result in runner.results.values() if "error" in result]
        if len(errors) == len(runner.results):
            raise UserError(f"no row could be run: {errors[0]}")
        found = results.collect(chosen, runner.results, seeds)
        report = results.write(out, chosen, found, splits, preset, protocol, str(data))
    return {"tables": results.numbers(found), "report": str(report)}


def _claim(runs: Path, data: str | Path, clips: list[Clip], config: Config) -> None:
    """Refuse another data set, protocol or encoders than those of the finished rows, which are not run again."""
    there = read_json(runs / "data.json")
    encoders = there.get("encoders", {}) | encoder_keys(config)
    mine = {"data": str(data), "rows": rows_digest(data, clips), "encoders": encoders}
    if there and there["rows"] != mine["rows"]:
        raise UserError(
            f"{runs.parent}: holds runs on other data, labels or protocol ({there['data']}) — choose another --out"
        )
    for name, keys in there.get("encoders", {}).items():
        if keys != encoders[name]:
            raise UserError(f"{runs.parent}: holds runs of other weights of {name} — choose another --out")
    with disk(runs):
        make_folder(runs)
    write_text(runs / "data.json", json.dumps(mine, ensure_ascii=False))


class Runner:
    """Trains and evaluates each experiment once; ``results`` holds what came out, or why nothing did.

    Without ``keep``, weights are deleted when they are no longer needed: a row's after its evaluation, a stage's after
    the last row of the seed.
    """

    def __init__(self, data: str | Path, root: Path, keep: bool, device: str | None) -> None:
        self.data, self.root, self.keep, self.device = data, root, keep, device
        self.shared: set[str] = set()
        self.results: dict[tuple[str, int], dict[str, Any]] = {}

    def run_all(self, tables: list[Table], seeds: int) -> None:
        """Run all rows, seed by seed, so that a first full set of rows comes early."""
        experiments: dict[str, tuple[str, Config]] = {}
        for table in tables:
            for row in table.rows:
                for config in row.configs.values():
                    experiments.setdefault(digest(config), (f"Table {table.number}, {row.name}", config))
        from senticlip.train import stages_of

        self.shared = {digest(s) for _, c in experiments.values() for s in stages_of(c, self.data).values()}
        with bar() as progress:
            task = progress.add_task("rows × seeds", total=len(experiments) * seeds)
            for seed in range(seeds):
                for name, config in experiments.values():
                    progress.update(task, description=f"{name}, seed {seed}")
                    self._one(name, config, seed)
                    progress.advance(task)
                if not self.keep:
                    for weights in (self.root / f"seed{seed}").glob(f"*/{WEIGHTS}"):
                        weights.unlink()

    def _one(self, name: str, config: Config, seed: int) -> None:
        started = time.monotonic()
        try:
            result = self.result(config, seed)
            told = f"accuracy {result['accuracy']:.4f}, macro-F1 {result['macro_f1']:.4f}"
        except Exception as error:  # a row's failure is that row's, even one that is our bug: the other rows go on
            reason = str(error) if isinstance(error, UserError) else "".join(format_exception_only(error))
            result = {"error": " ".join(reason.split())}
            told = f"not run: {result['error']}"
        self.results[digest(config), seed] = result
        console.print(f"{name}, seed {seed}: {told} ({time.monotonic() - started:.0f} s)", soft_wrap=True)

    def folder(self, config: Config, seed: int) -> Path:
        """The RUN folder of an experiment."""
        return self.root / f"seed{seed}" / f"{config.model}-{'+'.join(config.modalities)}-{digest(config)}"

    def result(self, config: Config, seed: int) -> dict[str, Any]:
        """Test metrics and predictions of an experiment, read if they are there."""
        folder = self.folder(config, seed)
        done = folder / "result.json"
        if not done.is_file():
            from senticlip.evaluate import evaluate

            self.train(config, seed)
            found = evaluate(folder, self.data, "test", self.device)
            write_text(done, json.dumps(found, ensure_ascii=False))
            if not self.keep and digest(config) not in self.shared:
                (folder / WEIGHTS).unlink()
        return json.loads(done.read_text(encoding="utf-8")) | {"predictions": predictions(folder)}

    def train(self, config: Config, seed: int, as_stage: str | None = None) -> Path:
        """A complete run folder with its weights; each stage is such a folder of its own, shared by all rows."""
        from senticlip.train import stages_of, train

        folder = self.folder(config, seed)
        if (folder / "metrics.json").is_file():
            if (folder / WEIGHTS).is_file():
                return folder
            shutil.rmtree(folder)  # finished, but its weights were deleted and are needed again
        for name, stage in stages_of(config, self.data).items():
            share_stage(folder, name, self.train(stage, seed, name))
        train(config, self.data, folder, seed=seed, resume=True, device=self.device, as_stage=as_stage)
        return folder


def predictions(folder: Path) -> dict[str, list[Any]]:
    """Clip ids, and the true and predicted class indices of a run's test set."""
    with (folder / "predictions-test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: [LABELS.index(row[name]) for row in rows] for name in ("truth", "predicted")}
    return {"id": [row["id"] for row in rows], **columns}
