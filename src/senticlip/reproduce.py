"""The paper's Tables 1 to 8: experiments × seeds → a report next to the paper's numbers, resumable row by row."""

from __future__ import annotations

import csv
import json
import shutil
import time
from pathlib import Path
from traceback import format_exception_only
from typing import Any

from senticlip import results
from senticlip.checkpoint import CHECKPOINTS, encoder_keys, feature_keys, read_json, rows_digest, share_stage
from senticlip.config import Config
from senticlip.configfile import parse_overrides
from senticlip.data.sims import read_clips
from senticlip.data.table import SPLITS
from senticlip.files import folder_lock, make_folder, report_full_disk, write_text
from senticlip.progress import bar, console
from senticlip.structures import LABELS, Clip, UsageError, UserError
from senticlip.tables import RunSettings, Table, digest, load_preset, load_tables

WEIGHTS = "model.safetensors"
RESULT = "result.json"
"""The file in a run's folder with its test metrics and predictions (``evaluate`` does not write it)."""
NOT_KEPT = "not-kept"
"""Marks a run whose weights are to be deleted; a later call finds it after a kill."""


def reproduce(
    data: str | Path,
    out: str | Path,
    preset: str = "paper",
    tables: list[str] | None = None,
    seeds: int = 5,
    protocol: str | None = None,
    keep: bool = False,
    overrides: list[str] | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Run the missing experiments, then write ``report.md``, ``report.html``, ``results.json`` and ``tables.tex``.

    After a kill, the same call continues: finished rows are read, an unfinished one resumes from its last epoch. Rows
    with the same config are run once; the stages of a preset are trained once per seed for all rows.

    Args:
        data: a CH-SIMS folder, or your own CSV.
        out: the folder for runs, their metrics and predictions, and the report.
        preset: tiny, small or paper (the size of the encoders), or a YAML file.
        tables: which of "1" … "8"; all by default.
        seeds: the number of seeds, from 0.
        protocol: official, tenth or video; the preset's by default.
        keep: also keep all weights.
        overrides: ``KEY=VALUE`` changes of the preset.
        device: cpu, cuda, cuda:N.

    Returns:
        ``{"tables": {number: {row: {metric: {"mean", "std"}}}}, "report": path}``

    Raises:
        UsageError: ``overrides`` sets the seed, or a protocol that conflicts with ``protocol``. UserError: a split is
            empty or lacks the label; ``out`` has runs with different data or encoders; another reproduce is writing
            there; no row could be run; the disk is full.
    """
    out, changes = Path(out), overrides or []
    config = load_preset(preset, [*changes, *([f"protocol={protocol}"] if protocol else [])])
    if "seed" in (requested := parse_overrides(changes)):
        raise UsageError("--set seed: seeds run from 0 to --seeds minus 1 — leave it out")
    if requested.get("protocol", config.protocol) != config.protocol:
        raise UsageError(
            f"--set protocol={requested['protocol']}: conflicts with --protocol {protocol} — leave one out"
        )
    splits = [read_clips(data, None, config.protocol, seed) for seed in range(seeds)]
    for split in SPLITS:  # fail on an empty split before any training
        if not any(config.target in clip.labels for clip in read_clips(data, split, config.protocol)):
            raise UserError(f"{data}: no clip in {split} has label {config.target}")
    labels = {name for clip in splits[0] for name in clip.labels}
    chosen_tables = load_tables(config, tables, labels, random=preset in ("tiny", "small"))
    with folder_lock(out, "reproduce"):
        _check_same_inputs(out / "runs", data, splits[0], chosen_tables)
        runner = Runner(data, out / "runs", keep, device)
        runner.run_all(chosen_tables, seeds)
        errors = [result["error"] for result in runner.results.values() if "error" in result]
        if len(errors) == len(runner.results):
            raise UserError(f"no row could be run: {errors[0]}")
        collected = results.collect(chosen_tables, runner.results, seeds)
        _report_dropped_tables(out, list(collected))
        report = results.write(out, chosen_tables, collected, splits, RunSettings(config, preset, changes, str(data)))
    return {"tables": results.numbers(collected), "report": str(report)}


def _report_dropped_tables(out: Path, current: list[str]) -> None:
    """Say which tables the report loses, as it contains only those of the latest call."""
    before = read_json(out / "results.json").get("tables", {})
    if dropped := [number for number in before if number not in current]:
        all_numbers = ",".join(sorted({*before, *current}))
        message = f"the report now has Tables {', '.join(current)} and no longer {', '.join(dropped)}"
        console.print(
            f"{out}: {message} — --tables {all_numbers} includes all, and reuses finished rows", soft_wrap=True
        )


def _check_same_inputs(runs: Path, data: str | Path, clips: list[Clip], tables: list[Table]) -> None:
    """Refuse data, encoders or features that differ from those of the finished rows, which are not run again; record
    these in ``data.json``."""
    saved = read_json(runs / "data.json")
    encoders = dict(saved.get("encoders", {}))
    for config in (config for table in tables for row in table.rows for config in row.configs.values()):
        encoders |= encoder_keys(config) | feature_keys(config, data)
    current = {"data": str(data), "rows": rows_digest(data, clips), "encoders": encoders}
    if saved and saved["rows"] != current["rows"]:
        raise UserError(
            f"{runs.parent}: has runs with different data, labels or protocol ({saved['data']}) — choose another --out"
        )
    for name, keys in saved.get("encoders", {}).items():
        if keys != encoders[name]:
            raise UserError(f"{runs.parent}: has runs made when {name} had different contents — choose another --out")
    with report_full_disk(runs):
        make_folder(runs)
    write_text(runs / "data.json", json.dumps(current, ensure_ascii=False))


class Runner:
    """Trains and evaluates each experiment once; ``results`` holds its result or its error.

    Without ``keep``, trained weights are deleted when no longer needed: a row's after its evaluation, a stage's after
    the last row of the seed. Weights that an earlier call kept stay.
    """

    def __init__(self, data: str | Path, root: Path, keep: bool, device: str | None) -> None:
        self.data, self.root, self.keep, self.device = data, root, keep, device
        self.shared: set[str] = set()
        self.results: dict[tuple[str, int], dict[str, Any]] = {}

    def run_all(self, tables: list[Table], seeds: int) -> None:
        """Run all rows seed by seed, so that a first complete set of rows is done early."""
        experiments: dict[str, tuple[str, Config]] = {}
        for table in tables:
            for row in table.rows:
                for target, config in row.configs.items():
                    name = f"Table {table.number}, {row.name}" + (f" ({target})" if len(row.configs) > 1 else "")
                    experiments.setdefault(digest(config), (name, config))
        from senticlip.train import stages_of

        self.shared = {digest(s) for _, c in experiments.values() for s in stages_of(c, self.data).values()}
        with bar() as progress:
            task = progress.add_task("rows × seeds", total=len(experiments) * seeds)
            for seed in range(seeds):
                for name, config in experiments.values():
                    progress.update(task, description=f"{name}, seed {seed}")
                    self._run_one(name, config, seed)
                    progress.advance(task)
                if not self.keep:
                    for mark in (self.root / f"seed{seed}").glob(f"*/{NOT_KEPT}"):
                        (mark.parent / WEIGHTS).unlink(missing_ok=True)
        if self.keep:
            self._report_deleted_weights(list(experiments.values()), seeds)

    def _report_deleted_weights(self, experiments: list[tuple[str, Config]], seeds: int) -> None:
        """Say how many finished rows no longer have weights to keep."""
        rows = [(config, seed) for seed in range(seeds) for _, config in experiments]
        folders = [self.folder(*row) for row in rows if "error" not in self.results[digest(row[0]), row[1]]]
        if deleted := sum(not (folder / WEIGHTS).is_file() for folder in folders):
            message = f"{deleted} of {len(folders)} finished rows no longer have weights: they were run without --keep"
            console.print(f"{self.root.parent}: {message} — choose another --out to keep them", soft_wrap=True)

    def _run_one(self, name: str, config: Config, seed: int) -> None:
        started = time.monotonic()
        try:
            result = self.result(config, seed)
            summary = f"accuracy {result['accuracy']:.4f}, macro-F1 {result['macro_f1']:.4f}"
        except Exception as error:  # even a bug of ours fails only this row: the others go on
            reason = str(error) if isinstance(error, UserError) else "".join(format_exception_only(error))
            result = {"error": " ".join(reason.split())}
            summary = f"not run: {result['error']}"
        self.results[digest(config), seed] = result
        console.print(f"{name}, seed {seed}: {summary} ({time.monotonic() - started:.0f} s)", soft_wrap=True)

    def folder(self, config: Config, seed: int) -> Path:
        """The RUN folder of an experiment."""
        return self.root / f"seed{seed}" / f"{config.model}-{'+'.join(config.modalities)}-{digest(config)}"

    def result(self, config: Config, seed: int) -> dict[str, Any]:
        """Test metrics and predictions of an experiment; read from disk if it has been run."""
        folder = self.folder(config, seed)
        result = read_json(folder / RESULT)
        if not isinstance(result.get("predictions"), dict):
            from senticlip.evaluate import evaluate

            self.train(config, seed)
            result = evaluate(folder, self.data, "test", self.device) | {"predictions": predictions(folder)}
            write_text(folder / RESULT, json.dumps(result, ensure_ascii=False))
            if (folder / NOT_KEPT).is_file() and digest(config) not in self.shared:
                (folder / WEIGHTS).unlink()
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # a kill may have left them
        return result

    def train(self, config: Config, seed: int, as_stage: str | None = None) -> Path:
        """A complete run folder with its weights; each stage has its own run folder, shared by all rows."""
        from senticlip.train import stages_of, train

        folder = self.folder(config, seed)
        if self.keep:
            (folder / NOT_KEPT).unlink(missing_ok=True)  # from a killed call without keep
        if (folder / "metrics.json").is_file():
            if (folder / WEIGHTS).is_file():
                return folder
            shutil.rmtree(folder)  # finished, but its deleted weights are needed again
        for name, stage in stages_of(config, self.data).items():
            share_stage(folder, name, self.train(stage, seed, name))
        if not self.keep:
            make_folder(folder)
            (folder / NOT_KEPT).touch()
        train(config, self.data, folder, seed=seed, resume=True, device=self.device, as_stage=as_stage)
        return folder


def predictions(folder: Path) -> dict[str, list[Any]]:
    """Clip ids, and the true and predicted class indices of a run's test set."""
    with (folder / "predictions-test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: [LABELS.index(row[name]) for row in rows] for name in ("truth", "predicted")}
    return {"id": [row["id"] for row in rows], **columns}
