"""What all pages have: the templates, the Chinese names of labels and modalities, numbers as they are read."""

from __future__ import annotations

from typing import Any

import jinja2

from senticlip.structures import LABELS, bounded

CHINESE = {"negative": "消极", "neutral": "中性", "positive": "积极", "text": "文本", "video": "视频", "audio": "音频"}


def page(template: str, **values: Any) -> str:
    """A page of the package's templates, with what all of them use."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("senticlip"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"LABELS": LABELS, "CHINESE": CHINESE}
    environment.filters |= {"signed": signed, "bounded": bounded}
    return environment.get_template(template).render(**values)


def signed(number: float, digits: int = 3, plus: str = "+") -> str:
    """A number with a true minus, and no sign where it rounds to zero: +0.125, −0.030, 0.000.

    ``plus``: the sign above zero, "" where a value is told and no change.
    """
    shown = f"{abs(number):.{digits}f}"
    return shown if not float(shown) else ("−" if number < 0 else plus) + shown
