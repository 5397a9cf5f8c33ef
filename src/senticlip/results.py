"""The report of ``reproduce``: our mean ± std next to the paper's numbers, differences, evidence for its claims."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from senticlip import metrics
from senticlip.config import Config
from senticlip.data.table import SPLITS
from senticlip.files import write_text
from senticlip.layout import Block, as_html, as_markdown, latex_table
from senticlip.pages import signed
from senticlip.structures import LABELS, SURFACE, TARGETS, Clip, polarity
from senticlip.tables import RunSettings, Table, digest, notes

NAMES = {"accuracy": "Acc", "macro_f1": "macro F1", "weighted_f1": "weighted F1", "precision": "P", "recall": "R"}
SCORES = {"mae": "MAE", "corr": "Corr"}
"""Metrics of regression models; not in per cent."""
TARGET_NAMES = {"M": "the joint label M"} | {
    label: f"the {of}'s own label {label}" for label, of in {"T": "text", "A": "sound", "V": "video"}.items()
}
DAGGER = "†"
COLORS = ("#c8553d", "#9aa3ad", "#2a8c82")
"""Colours of negative, neutral and positive on every page (templates/explain.css)."""


def collect(tables: list[Table], results: dict[tuple[str, int], dict[str, Any]], seeds: int) -> dict[str, Any]:
    """Results by (config digest, seed) → table number → target → row name → a summary of the row.

    A row has ``paper`` (its numbers there), ``runs`` (seed → metrics), ``seeds`` (the number of runs), ``scores``
    (metric → mean and std), ``versus`` (paired bootstrap of reference − row over all seeds, resampling clips),
    ``errors`` (seed → why it did not run) and ``random`` (an encoder is frozen with random weights).
    """
    collected: dict[str, Any] = {}
    for table in tables:
        by_target: dict[str, dict[str, Any]] = {}
        for row in table.rows:
            for target, config in row.configs.items():
                runs = {
                    seed: results[digest(config), seed] for seed in range(seeds) if (digest(config), seed) in results
                }
                finished = {seed: run for seed, run in runs.items() if "error" not in run}
                by_target.setdefault(target, {})[row.name] = {
                    "paper": row.paper,
                    "random": _has_random_weights(config),
                    "runs": finished,
                    "seeds": len(finished),
                    "errors": {seed: run["error"] for seed, run in runs.items() if "error" in run},
                    "scores": spread(list(finished.values())),
                }
        for rows in by_target.values():
            reference = rows[table.reference]["runs"]
            for name, entry in rows.items():
                entry["versus"] = None if name == table.reference else versus(reference, entry["runs"])
        collected[table.number] = by_target
    return collected


def spread(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation over seeds of each metric that is a number in all runs (one seed: std 0)."""
    names = [name for name in (runs[0] if runs else {}) if all(isinstance(run.get(name), int | float) for run in runs)]
    scores = {}
    for name in names:
        values = [run[name] for run in runs]
        scores[name] = {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(runs) > 1 else 0.0}
    return scores


def _has_random_weights(config: Config) -> bool:
    """Whether an encoder is frozen at its random initial weights."""
    parts = [getattr(config, name) for name in config.modalities if name != "audio"]
    return any(part.train == "frozen" and not part.pretrained for part in parts)


def versus(first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]]) -> dict[str, dict[str, Any]] | None:
    """The paired bootstrap of first − second over the seeds that both ran on the same clips; None if there are none.

    It resamples clips, not seeds; ``accuracy["seeds"]`` lists the difference for each seed.
    """
    pairs = [(first[seed]["predictions"], second[seed]["predictions"]) for seed in first if seed in second]
    pairs = [(a, b) for a, b in pairs if a["id"] == b["id"]]
    if not pairs:
        return None
    runs = [np.full(len(a["id"]), i) for i, (a, _) in enumerate(pairs)]
    columns = [(a["id"], a["truth"], a["predicted"], b["predicted"]) for a, b in pairs]
    ids, truth, ours, theirs = (np.concatenate(list(map(np.asarray, column))) for column in zip(*columns, strict=True))
    result: dict[str, Any] = dict(metrics.paired_bootstrap(truth, ours, theirs, ids, np.concatenate(runs)))
    gaps = [
        np.mean(np.equal(a["truth"], a["predicted"])) - np.mean(np.equal(b["truth"], b["predicted"])) for a, b in pairs
    ]
    result["accuracy"]["seeds"] = [float(gap) for gap in gaps]
    return result


def numbers(collected: dict[str, Any]) -> dict[str, Any]:
    """The ``--json`` object: table → row → metric → mean and std; scores on a second label are under ``on_M``."""
    tables: dict[str, Any] = {}
    for number, by_target in collected.items():
        rows: dict[str, Any] = {}
        for i, (target, entries) in enumerate(by_target.items()):
            for name, entry in entries.items():
                scores = entry["scores"] or {"error": next(iter(entry["errors"].values()), None)}
                if i == 0:
                    rows[name] = dict(scores)
                else:
                    rows[name][f"on_{target}"] = scores
        tables[number] = rows
    return tables


def majority(clips: list[Clip], target: str = "M") -> dict[str, Any]:
    """The test scores of always predicting the training set's most frequent class."""
    classes = {
        split: np.array([polarity(c.labels[target]) for c in clips if c.split == split and target in c.labels], int)
        for split in ("train", "test")
    }
    majority_class = int(np.bincount(classes["train"], minlength=len(LABELS)).argmax())
    scores = metrics.classification(classes["test"], np.full(len(classes["test"]), majority_class))
    return {"label": LABELS[majority_class], **{name: scores[name] for name in ("accuracy", "macro_f1", "n")}}


def write(
    out: Path, tables: list[Table], collected: dict[str, Any], splits: list[list[Clip]], settings: RunSettings
) -> Path:
    """Write ``results.json``, ``report.md``, ``labels.svg``, ``tables.tex`` and ``report.html``; return its path.

    ``splits``: all clips, as split for each seed.
    """
    without_runs = {
        number: {
            target: {name: {k: v for k, v in entry.items() if k != "runs"} for name, entry in rows.items()}
            for target, rows in by_target.items()
        }
        for number, by_target in collected.items()
    }
    record = {**settings.to_dict(), "seeds": len(splits), "tables": without_runs}
    write_text(out / "results.json", json.dumps(record, ensure_ascii=False, indent=1))
    write_text(out / "labels.svg", label_figure(splits[0]))
    write_text(out / "tables.tex", in_latex(tables, collected, len(splits), settings))
    blocks = report_blocks(tables, collected, splits, settings)
    write_text(out / "report.md", as_markdown(blocks))
    write_text(out / "report.html", as_html(blocks, out))
    return out / "report.html"


def report_blocks(
    tables: list[Table], collected: dict[str, Any], splits: list[list[Clip]], settings: RunSettings
) -> list[Block]:
    """The report as blocks, in reading order."""
    sizes, target = Counter(clip.split for clip in splits[0]), settings.config.target
    splits_differ = len({tuple(clip.split for clip in clips) for clips in splits}) > 1
    seed_note = " (for seed 0; each seed draws its own split)" if splits_differ else ""
    baselines = [majority(clips, target) for clips in (splits if splits_differ else splits[:1])]
    baseline, scores = baselines[0], spread(baselines)
    answer = (
        f"“{baseline['label']}”"
        if len({each["label"] for each in baselines}) == 1
        else "the most frequent training class"
    )
    scored_against = f", scored against {TARGET_NAMES[target]}" if target != "M" else ""
    blocks: list[Block] = [
        ("#", "The tables of CLIP-CA-MSA, reproduced"),
        (
            "p",
            f"{settings.summary(len(splits))}; "
            + ", ".join(f"{split} {n} clips" for split, n in sizes.items())
            + f"{seed_note}. Numbers are in per cent on test: mean ± standard deviation over seeds, the epoch chosen "
            "on valid; in brackets, the paper's number and ours minus the paper's. The paper's numbers are for "
            "CH-SIMS.",
        ),
        (
            "p",
            f"Majority baseline: always answering {answer} scores {_format_score(scores['accuracy'], splits_differ)} "
            f"accuracy and {_format_score(scores['macro_f1'], splits_differ)} macro F1 on test "
            f"({baseline['n']} clips){scored_against}.",
        ),
        ("figure", ("labels.svg", f"Classes by split and label{seed_note} (the paper's Fig. 4)")),
        ("p", "Labels: M is a clip's joint label; T, A and V are the labels of its text, sound and video alone."),
        (
            "p",
            "Bold: best in the column, random weights aside. Δ: the table's reference minus the row, in points, with "
            "the 95 % interval over clips. For, Against, Open: the accuracy interval lies above zero, below zero, or "
            "includes it. In brackets after a name: the difference for each seed, since the interval does not cover "
            "other seeds.",
        ),
    ]
    for table in tables:
        blocks += _table_blocks(table, collected[table.number], len(splits), settings.kept_value_notes(table))
    blocks += [("##", "Notes on the paper's numbers"), *[("li", note) for note in notes()]]
    return [*blocks, ("p", "The same tables in LaTeX: tables.tex, next to this report.")]


def _table_blocks(table: Table, by_target: dict[str, Any], seeds: int, value_notes: Sequence[str] = ()) -> list[Block]:
    reads = {"+".join(SURFACE[m] for m in config.modalities) for row in table.rows for config in row.configs.values()}
    blocks: list[Block] = [
        ("##", f"Table {table.number}. {table.title}"),
        ("p", f"The paper: {table.claim} Here the rows read {' or '.join(sorted(reads))}. Δ: {table.reference} − row."),
    ]
    blocks += [("p", sentence) for sentence in value_notes]
    for target, rows in by_target.items():
        if {*by_target} != {"M"}:
            blocks.append(("p", f"Scored against {TARGET_NAMES[target]}:"))
        columns = columns_of(rows)
        header = ["", *columns.values(), "Δ Acc", "Δ macro F1"]
        lines = [_row_cells(name, entry, columns) for name, entry in rows.items()]
        blocks.append(("table", (header, lines, best(rows))))
        if any(entry["random"] for entry in rows.values()):
            random_configs = [
                config for row in table.rows for config in row.configs.values() if rows[row.name]["random"]
            ]
            prompt_note = (
                ", with a fixed prompt" if any(config.prompt == "discrete" for config in random_configs) else ""
            )
            blocks.append(
                ("p", f"{DAGGER} random weights, not pretrained{prompt_note}: tests the code, not the paper.")
            )
        for name, entry in rows.items():
            if errors := entry["errors"]:
                for_seeds = f" for {len(errors)} of {seeds} seeds" if len(errors) < seeds else ""
                blocks.append(("li", f"{name}: not run{for_seeds} — {next(iter(errors.values()))}"))
        blocks += [("p", sentence) for sentence in verdict(table.reference, rows)]
    return blocks


def columns_of(rows: dict[str, Any]) -> dict[str, str]:
    """The metrics of a table and their names; regression metrics only if a row has them."""
    return NAMES | {k: name for k, name in SCORES.items() if any(k in entry["scores"] for entry in rows.values())}


def best(rows: dict[str, Any]) -> set[tuple[int, int]]:
    """The cells (row, column; column 0 has the names) with the best value of each metric that several rows have.

    Rows with random weights are never the best: they only test the code.
    """
    cells = set()
    for column, metric in enumerate(columns_of(rows), 1):
        scores_by_row = {
            i: e["scores"] for i, e in enumerate(rows.values()) if metric in e["scores"] and not e["random"]
        }
        means = {i: scores[metric]["mean"] for i, scores in scores_by_row.items()}
        rounded = {i: round(mean, 4) for i, mean in means.items()}  # values that look equal are ties
        best_value = (min if metric == "mae" else max)(rounded.values(), default=0.0)
        cells |= {(i, column) for i, mean in rounded.items() if mean == best_value and len(rounded) > 1}
    return cells


def _format_score(score: dict[str, float], several: bool, metric: str = "") -> str:
    """A metric in per cent (MAE and Corr unscaled), with its standard deviation if there are several runs."""
    factor, digits = (1, 4) if metric in SCORES else (100, 2)
    mean, deviation = (signed(factor * score[name], digits, plus="") for name in ("mean", "std"))
    return f"{mean} ± {deviation}" if several else mean


def in_latex(tables: list[Table], collected: dict[str, Any], seeds: int, settings: RunSettings) -> str:
    """The tables in LaTeX: mean ± std, the best of each column in bold."""
    parts = [
        r"% \usepackage{booktabs}; Chinese names need XeLaTeX and \usepackage{ctex}. In per cent except MAE and Corr.",
        f"% {' '.join(settings.summary(seeds).split())}.",
    ]
    seeds_text = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    for table in tables:
        parts += [f"% {sentence}" for sentence in settings.kept_value_notes(table)]
        for target, rows in collected[table.number].items():
            columns = columns_of(rows)
            cells = [
                _row_cells(name, entry | {"paper": {}}, columns)[: 1 + len(columns)] for name, entry in rows.items()
            ]
            dagger_note = f"; {DAGGER} random weights" if any(entry["random"] for entry in rows.values()) else ""
            unit = "per cent except MAE and Corr" if SCORES.keys() & columns.keys() else "per cent"
            caption = f"{table.title}, scored against {TARGET_NAMES[target]}; {unit}, {seeds_text}{dagger_note}"
            label = f"tab:{table.number}-{target}"
            parts.append(latex_table(caption, label, ["", *columns.values()], cells, best(rows)))
    return "\n\n".join(parts) + "\n"


def _row_cells(name: str, entry: dict[str, Any], columns: dict[str, str]) -> list[str]:
    total = len(entry["runs"]) + len(entry["errors"])
    count_note = f" ({len(entry['runs'])} of {total} seeds)" if entry["runs"] and entry["errors"] else ""
    cells = [f"{name}{f' {DAGGER}' if entry['random'] else ''}{count_note}"]
    for metric in columns:
        if metric not in entry["scores"]:
            cells.append("—")
            continue
        score, paper = entry["scores"][metric], entry["paper"].get(metric)
        in_brackets = f" ({paper:.2f}, {signed(100 * score['mean'] - paper, 2)})" if paper is not None else ""
        cells.append(_format_score(score, len(entry["runs"]) > 1, metric) + in_brackets)
    for metric in ("accuracy", "macro_f1"):
        gap = entry["versus"][metric] if entry["versus"] else None
        points = [] if gap is None else [signed(100 * gap[key], 2) for key in ("difference", "low", "high")]
        cells.append("{} [{}, {}]".format(*points) if points else "")
    return cells


def verdict(reference: str, rows: dict[str, Any]) -> list[str]:
    """Sentences on what the intervals say about these runs; rows with random weights are left out.

    Row names are followed by the difference for each seed, since the intervals resample clips, not seeds.
    """
    if rows[reference]["random"]:
        return []
    above: list[str] = []
    below: list[str] = []
    open_: list[str] = []
    for name, entry in rows.items():
        if not entry["random"] and (gap := (entry["versus"] or {}).get("accuracy")):
            side = above if gap["low"] > 0 else below if gap["high"] < 0 else open_
            side.append(f"{name} ({', '.join(signed(100 * seed, 2) for seed in gap['seeds'])})")
    excludes = "in these runs (by seed; the 95 % interval over clips excludes zero)"
    sentences = []
    if above:
        sentences.append(f"For: {reference} is above {', '.join(above)} {excludes}.")
    if below:
        sentences.append(f"Against: {reference} is below {', '.join(below)} {excludes}.")
    if open_:
        sentences.append(f"Open: between {reference} and {', '.join(open_)} the interval includes zero.")
    return sentences


def label_figure(clips: list[Clip]) -> str:
    """An SVG of the number of negative, neutral and positive clips, by label and split."""
    counts: dict[tuple[str, str], Counter[int]] = {}
    for clip in clips:
        for target in TARGETS:
            if target in clip.labels:
                counts.setdefault((target, clip.split or "all"), Counter())[polarity(clip.labels[target])] += 1
    largest = max((n for counter in counts.values() for n in counter.values()), default=1)
    parts = []
    order = [(target, split) for target in TARGETS for split in (*SPLITS, "all") if (target, split) in counts]
    for row, (target, split) in enumerate(order):
        y, counter = 34 + row * 44, counts[target, split]
        parts.append(f'<text x="0" y="{y + 22}">{target} {split}</text>')
        for i, color in enumerate(COLORS):
            n, top = counter[i], y + 12 * i
            parts.append(f'<rect x="70" y="{top}" width="{420 * n / largest:.1f}" height="10" fill="{color}"/>')
            parts.append(f'<text x="{75 + 420 * n / largest:.1f}" y="{top + 9}">{n}</text>')
    legend = "".join(
        f'<rect x="{70 + 90 * i}" y="6" width="10" height="10" fill="{color}"/>'
        f'<text x="{85 + 90 * i}" y="15">{label}</text>'
        for i, (color, label) in enumerate(zip(COLORS, LABELS, strict=True))
    )
    size = f'viewBox="0 0 560 {40 + 44 * len(counts)}" width="560"'
    style = 'font-family="sans-serif" font-size="11"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{legend}{"".join(parts)}</svg>\n'
