"""The report of ``reproduce``: our mean ± std beside the paper's number, the differences, what speaks for a claim."""

from __future__ import annotations

import html
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from senticlip import metrics
from senticlip.config import Config
from senticlip.data.table import SPLITS
from senticlip.files import disk, write_text
from senticlip.structures import LABELS, SURFACE, TARGETS, Clip, polarity
from senticlip.tables import Table, digest, notes

NAMES = {"accuracy": "Acc", "macro_f1": "macro F1", "weighted_f1": "weighted F1", "precision": "P", "recall": "R"}
WORDS = {"M": "the joint label M", "T": "the text's own label T", "V": "the video's own label V"}
DAGGER = "†"
Block = tuple[str, Any]
"""A piece of the report: ("#" | "##" | "p" | "li" | "table" | "figure", content)."""


def collect(tables: list[Table], results: dict[tuple[str, int], dict[str, Any]], seeds: int) -> dict[str, Any]:
    """Results by (digest of the config, seed) → for each table and target: rows of means, and their comparisons.

    Each row gives ``runs`` (seed → metrics), ``scores`` (metric → mean and std), ``versus`` (the paired bootstrap of
    reference − row over the pooled seeds, clips drawn whole), ``errors`` (seed → why it did not run) and ``random``
    (an encoder is frozen with random weights).
    """
    found: dict[str, Any] = {}
    for table in tables:
        by_target: dict[str, dict[str, Any]] = {}
        for row in table.rows:
            for target, config in row.configs.items():
                runs = {
                    seed: results[digest(config), seed] for seed in range(seeds) if (digest(config), seed) in results
                }
                good = {seed: run for seed, run in runs.items() if "error" not in run}
                by_target.setdefault(target, {})[row.name] = {
                    "paper": row.paper,
                    "random": _random(config),
                    "runs": good,
                    "errors": {seed: run["error"] for seed, run in runs.items() if "error" in run},
                    "scores": spread(list(good.values())),
                }
        for rows in by_target.values():
            reference = rows.get(table.reference, {"runs": {}})
            for name, entry in rows.items():
                entry["versus"] = None if name == table.reference else versus(reference["runs"], entry["runs"])
        found[table.number] = by_target
    return found


def spread(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation over seeds of every metric that is a number (std 0 for one seed)."""
    names = [name for name, value in (runs[0] if runs else {}).items() if isinstance(value, int | float)]
    scores = {}
    for name in names:
        values = [run[name] for run in runs]
        scores[name] = {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(runs) > 1 else 0.0}
    return scores


def _random(config: Config) -> bool:
    """Whether an encoder is frozen with the random weights that it was made with."""
    parts = [getattr(config, name) for name in config.modalities if name != "audio"]
    return any(part.train == "frozen" and not part.pretrained for part in parts)


def versus(first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]]) -> dict[str, dict[str, Any]] | None:
    """The paired bootstrap of first − second over the seeds that both have run on the same clips; None without any.

    It draws clips, not seeds: ``accuracy["seeds"]`` has the difference of each.
    """
    pairs = [(first[seed]["predictions"], second[seed]["predictions"]) for seed in first if seed in second]
    pairs = [(a, b) for a, b in pairs if a["id"] == b["id"]]
    if not pairs:
        return None
    runs = [np.full(len(a["id"]), i) for i, (a, _) in enumerate(pairs)]
    columns = [(a["id"], a["truth"], a["predicted"], b["predicted"]) for a, b in pairs]
    ids, truth, ours, theirs = (np.concatenate(list(map(np.asarray, column))) for column in zip(*columns, strict=True))
    found: dict[str, Any] = dict(metrics.paired_bootstrap(truth, ours, theirs, ids, np.concatenate(runs)))
    gaps = [
        np.mean(np.equal(a["truth"], a["predicted"])) - np.mean(np.equal(b["truth"], b["predicted"])) for a, b in pairs
    ]
    found["accuracy"]["seeds"] = [float(gap) for gap in gaps]
    return found


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    """The ``--json`` object: table → row → metric → mean and std; a row's other label under ``on_M``."""
    tables: dict[str, Any] = {}
    for number, by_target in found.items():
        rows: dict[str, Any] = {}
        for i, (target, entries) in enumerate(by_target.items()):
            for name, entry in entries.items():
                told = entry["scores"] or {"error": next(iter(entry["errors"].values()), None)}
                if i == 0:
                    rows[name] = dict(told)
                else:
                    rows[name][f"on_{target}"] = told
        tables[number] = rows
    return tables


def majority(clips: list[Clip], target: str = "M") -> dict[str, Any]:
    """What always answering the training set's most frequent class scores on test."""
    classes = {
        split: np.array([polarity(c.labels[target]) for c in clips if c.split == split and target in c.labels], int)
        for split in ("train", "test")
    }
    most = int(np.bincount(classes["train"], minlength=len(LABELS)).argmax())
    found = metrics.classification(classes["test"], np.full(len(classes["test"]), most))
    return {"label": LABELS[most], **{name: found[name] for name in ("accuracy", "macro_f1", "n")}}


def write(
    out: Path,
    tables: list[Table],
    found: dict[str, Any],
    splits: list[list[Clip]],
    preset: str,
    protocol: str,
    data: str,
) -> Path:
    """Write ``results.json``, ``report.md``, ``labels.svg`` and ``report.html``; returns the page's path.

    ``splits``: the data set as each seed divides it.
    """
    with disk(out):
        out.mkdir(parents=True, exist_ok=True)
    kept = {
        number: {
            target: {name: {k: v for k, v in entry.items() if k != "runs"} for name, entry in rows.items()}
            for target, rows in by_target.items()
        }
        for number, by_target in found.items()
    }
    record = {"preset": preset, "protocol": protocol, "seeds": len(splits), "data": data, "tables": kept}
    write_text(out / "results.json", json.dumps(record, ensure_ascii=False, indent=1))
    write_text(out / "labels.svg", label_figure(splits[0]))
    blocks = story(tables, found, splits, preset, protocol, data)
    write_text(out / "report.md", as_markdown(blocks))
    write_text(out / "report.html", as_html(blocks, out))
    return out / "report.html"


def story(
    tables: list[Table],
    found: dict[str, Any],
    splits: list[list[Clip]],
    preset: str,
    protocol: str,
    data: str,
) -> list[Block]:
    """The report as blocks, in reading order."""
    seeds, sizes = len(splits), Counter(clip.split for clip in splits[0])
    drawn = len({tuple(clip.split for clip in clips) for clips in splits}) > 1
    first = " (those of seed 0; each seed draws its own)" if drawn else ""
    bases = [majority(clips) for clips in (splits if drawn else splits[:1])]
    base, scores = bases[0], spread(bases)
    blocks: list[Block] = [
        ("#", "The tables of CLIP-CA-MSA, run again"),
        (
            "p",
            f"Data “{Path(data).name}”, preset {preset}, protocol {protocol}, {seeds} seed(s); "
            + ", ".join(f"{split} {n} clips" for split, n in sizes.items())
            + f"{first}. Numbers are per cent: mean ± standard deviation over seeds on test, the epoch chosen on "
            "valid; the paper's number and ours minus the paper's behind it. The paper's numbers are from CH-SIMS.",
        ),
        (
            "p",
            f"Majority baseline: always answering “{base['label']}” scores {_shown(scores['accuracy'], drawn)} "
            f"accuracy and {_shown(scores['macro_f1'], drawn)} macro F1 on test ({base['n']} clips).",
        ),
        ("figure", ("labels.svg", f"Classes by split and label{first} (the paper's Fig. 4)")),
    ]
    for table in tables:
        blocks += _table_blocks(table, found[table.number], seeds)
    blocks += [("##", "Notes on the paper's numbers"), *[("li", note) for note in notes()]]
    return blocks


def _table_blocks(table: Table, by_target: dict[str, Any], seeds: int) -> list[Block]:
    reads = {"+".join(SURFACE[m] for m in config.modalities) for row in table.rows for config in row.configs.values()}
    blocks: list[Block] = [
        ("##", f"Table {table.number}. {table.title}"),
        ("p", f"The paper: {table.claim} Here the rows read {' or '.join(sorted(reads))}."),
    ]
    for target, rows in by_target.items():
        if len(by_target) > 1:
            blocks.append(("p", f"Judged by {WORDS.get(target, target)}:"))
        header = ["", *NAMES.values(), f"{table.reference} − row, Acc", "macro F1"]
        blocks.append(("table", (header, [_line(name, entry) for name, entry in rows.items()])))
        if any(entry["random"] for entry in rows.values()):
            blocks.append(("p", f"{DAGGER} random weights, not pretrained: tests the path, not the paper."))
        for name, entry in rows.items():
            if errors := entry["errors"]:
                where = f" for {len(errors)} of {seeds} seeds" if len(errors) < seeds else ""
                blocks.append(("li", f"{name}: not run{where} — {next(iter(errors.values()))}"))
        blocks += [("p", sentence) for sentence in verdict(table.reference, rows)]
    return blocks


def _shown(score: dict[str, float], several: bool) -> str:
    """A metric in per cent, with its deviation where there are several."""
    return f"{100 * score['mean']:.2f}" + (f" ± {100 * score['std']:.2f}" if several else "")


def _line(name: str, entry: dict[str, Any]) -> list[str]:
    cells = [f"{name} {DAGGER}" if entry["random"] else name]
    for metric in NAMES:
        if metric not in entry["scores"]:
            cells.append("—")
            continue
        score, paper = entry["scores"][metric], entry["paper"].get(metric)
        told = f" ({paper:.2f}, {100 * score['mean'] - paper:+.2f})" if paper is not None else ""
        cells.append(_shown(score, len(entry["runs"]) > 1) + told)
    for metric in ("accuracy", "macro_f1"):
        gap = entry["versus"][metric] if entry["versus"] else None
        cells.append("" if gap is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*_points(gap)))
    return cells


def _points(gap: dict[str, float]) -> tuple[float, float, float]:
    return 100 * gap["difference"], 100 * gap["low"], 100 * gap["high"]


def verdict(reference: str, rows: dict[str, Any]) -> list[str]:
    """What the intervals say of these runs, and no more; random weights speak neither for nor against anything.

    Behind each row's name the difference of each seed: the intervals draw clips, so they know nothing of other seeds.
    """
    if rows[reference]["random"]:
        return []
    above: list[str] = []
    below: list[str] = []
    open_: list[str] = []
    for name, entry in rows.items():
        if not entry["random"] and (gap := (entry["versus"] or {}).get("accuracy")):
            side = above if gap["low"] > 0 else below if gap["high"] < 0 else open_
            side.append(f"{name} ({', '.join(f'{100 * seed:+.2f}' for seed in gap['seeds'])})")
    excludes = "in these runs (by seed; the 95 % interval over clips excludes zero)"
    told = []
    if above:
        told.append(f"For: {reference} is above {', '.join(above)} {excludes}.")
    if below:
        told.append(f"Against: {reference} is below {', '.join(below)} {excludes}.")
    if open_:
        told.append(f"Open: between {reference} and {', '.join(open_)} the interval includes zero.")
    return told


def label_figure(clips: list[Clip]) -> str:
    """An SVG of how many clips of each split are negative, neutral and positive, by each label."""
    counts: dict[tuple[str, str], Counter[int]] = {}
    for clip in clips:
        for target in TARGETS:
            if target in clip.labels:
                counts.setdefault((target, clip.split or "all"), Counter())[polarity(clip.labels[target])] += 1
    most = max((n for counter in counts.values() for n in counter.values()), default=1)
    colors, parts = ("#b2493b", "#9a9a94", "#3b7d5e"), []
    order = [(target, split) for target in TARGETS for split in (*SPLITS, "all") if (target, split) in counts]
    for row, (target, split) in enumerate(order):
        y, counter = 34 + row * 44, counts[target, split]
        parts.append(f'<text x="0" y="{y + 22}">{target} {split}</text>')
        for i, color in enumerate(colors):
            n, top = counter[i], y + 12 * i
            parts.append(f'<rect x="70" y="{top}" width="{420 * n / most:.1f}" height="10" fill="{color}"/>')
            parts.append(f'<text x="{75 + 420 * n / most:.1f}" y="{top + 9}">{n}</text>')
    keys = "".join(
        f'<rect x="{70 + 90 * i}" y="6" width="10" height="10" fill="{color}"/>'
        f'<text x="{85 + 90 * i}" y="15">{label}</text>'
        for i, (color, label) in enumerate(zip(colors, LABELS, strict=True))
    )
    size = f'viewBox="0 0 560 {40 + 44 * len(counts)}" width="560"'
    style = 'font-family="sans-serif" font-size="11"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{keys}{"".join(parts)}</svg>\n'


def as_markdown(blocks: list[Block]) -> str:
    """Blocks → Markdown."""
    lines: list[str] = []
    for kind, content in blocks:
        if kind in ("#", "##"):
            lines += [f"{kind} {content}", ""]
        elif kind == "table":
            header, rows = content
            lines += ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)] + [""]
        elif kind == "figure":
            lines += [f"![{content[1]}]({content[0]})", ""]
        else:
            lines += [f"- {content}" if kind == "li" else content, ""]
    return "\n".join(lines)


STYLE = """body{font:15px/1.5 sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
table{border-collapse:collapse;margin:1em 0;font-size:13px}
td,th{padding:.3em .7em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left;white-space:nowrap}div.wide{overflow-x:auto}
figure{margin:1em 0}svg{max-width:100%;height:auto}"""


def as_html(blocks: list[Block], folder: Path) -> str:
    """Blocks → one page; figures are put into it."""
    body: list[str] = []
    for kind, content in blocks:
        if kind == "table":
            header, rows = content
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
            table = f"<tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines)
            body.append(f'<div class="wide"><table>{table}</table></div>')
        elif kind == "figure":
            picture = (folder / content[0]).read_text(encoding="utf-8")
            body.append(f"<figure>{picture}<figcaption>{html.escape(content[1])}</figcaption></figure>")
        else:
            tag = {"#": "h1", "##": "h2", "p": "p", "li": "li"}[kind]
            line = f"<{tag}>{html.escape(content)}</{tag}>"
            body.append(f"<ul>{line}</ul>" if kind == "li" else line)
    text = "".join(body).replace("</ul><ul>", "")  # items side by side are one list
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>CLIP-CA-MSA, run again</title>'
    )
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{text}</body></html>\n'
