"""What all HTML pages share: templates, Chinese names of labels and modalities, number formats."""

from __future__ import annotations

from typing import Any

import jinja2

from senticlip.structures import LABELS, bounded

CHINESE = {"negative": "消极", "neutral": "中性", "positive": "积极", "text": "文本", "video": "视频", "audio": "音频"}


def page(template: str, **values: Any) -> str:
    """Render one of the package's templates, with the globals and filters that all of them use."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("senticlip"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"LABELS": LABELS, "CHINESE": CHINESE}
    environment.filters |= {"signed": signed, "bounded": bounded}
    return environment.get_template(template).render(**values)


def signed(number: float, digits: int = 3, plus: str = "+") -> str:
    """A number with a true minus sign, and without a sign if it rounds to zero: +0.125, −0.030, 0.000.

    ``plus``: the sign above zero; "" for a value that is not a change.
    """
    text = f"{abs(number):.{digits}f}"
    return text if not float(text) else ("−" if number < 0 else plus) + text
