"""A report made of blocks → Markdown or HTML; tables → LaTeX."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

Block = tuple[str, Any]
"""A piece of a report: ("#" | "##" | "p" | "li", text), ("figure", (file, caption)), or ("table", (header, rows, the
cells (row, column) in bold))."""


def as_markdown(blocks: list[Block]) -> str:
    """Blocks → Markdown."""
    lines: list[str] = []
    for kind, content in blocks:
        if kind in ("#", "##"):
            lines += [f"{kind} {content}", ""]
        elif kind == "table":
            header, rows, best = content
            cells = [[f"**{c}**" if (i, j) in best else c for j, c in enumerate(row)] for i, row in enumerate(rows)]
            lines += ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *cells)] + [""]
        elif kind == "figure":
            lines += [f"![{content[1]}]({content[0]})", ""]
        else:
            lines += [f"- {content}" if kind == "li" else content, ""]
    return "\n".join(lines)


STYLE = """body{font:15px/1.5 sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
table{border-collapse:collapse;margin:1em 0;font-size:13px}
td,th{padding:.3em .7em;border-bottom:1px solid #ddd;text-align:right}
td{white-space:nowrap;line-height:1.3}td small{font-weight:400;color:#666}
td:first-child,th:first-child{text-align:left}div.wide{overflow-x:auto}
figure{margin:1em 0}svg{max-width:100%;height:auto}"""


def as_html(blocks: list[Block], folder: Path) -> str:
    """Blocks → one HTML page with the figures inlined."""
    body: list[str] = []
    for kind, content in blocks:
        if kind == "table":
            header, rows, best = content
            lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in header)]
            for i, row in enumerate(rows):
                cells = [f"<b>{html.escape(c)}</b>" if (i, j) in best else html.escape(c) for j, c in enumerate(row)]
                # text in brackets goes on a second line: else the table is too wide for a screen
                cells = [re.sub(r" ([(\[].*[)\]])", r"<br><small>\1</small>", cell) for cell in cells]
                lines.append("".join(f"<td>{cell}</td>" for cell in cells))
            table = "".join(f"<tr>{line}</tr>" for line in lines)
            body.append(f'<div class="wide" tabindex="0"><table>{table}</table></div>')
        elif kind == "figure":
            picture = (folder / content[0]).read_text(encoding="utf-8")
            body.append(f"<figure>{picture}<figcaption>{html.escape(content[1])}</figcaption></figure>")
        else:
            tag = {"#": "h1", "##": "h2", "p": "p", "li": "li"}[kind]
            line = f"<{tag}>{html.escape(content)}</{tag}>"
            body.append(f"<ul>{line}</ul>" if kind == "li" else line)
    text = f"<main>{''.join(body).replace('</ul><ul>', '')}</main>"  # adjacent items form one list
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>CLIP-CA-MSA reproduced</title>'
    )
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{text}</body></html>\n'


def latex_table(caption: str, label: str, header: list[str], rows: list[list[str]], best: set[tuple[int, int]]) -> str:
    """A LaTeX table with booktabs; ``best`` are the cells in bold."""

    def escape(cell: str) -> str:
        cell = re.sub(r"[&%$#_{}]", r"\\\g<0>", cell)
        for sign, command in {"±": r"$\pm$", "−": "$-$", "—": "--", "†": r"$^\dagger$"}.items():
            cell = cell.replace(sign, command)
        return cell

    cells = [
        [f"\\textbf{{{escape(c)}}}" if (i, j) in best else escape(c) for j, c in enumerate(r)]
        for i, r in enumerate(rows)
    ]
    lines = [" & ".join(row) + r" \\" for row in (list(map(escape, header)), *cells)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape(caption)}}}",
            rf"\label{{{label}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )
