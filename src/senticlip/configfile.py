"""YAML files and ``KEY=VALUE`` → plain keys and values; size-limited, as an experiment may be untrusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from senticlip.structures import UsageError

MAX_CHARACTERS, MAX_DEPTH, MAX_DIGITS = 1 << 16, 20, 1000
"""Limits of the input with aliases expanded: characters, nesting levels, digits of an integer."""


class Loader(yaml.SafeLoader):
    """Refuses larger input: nested aliases multiply; deep lists and long numbers would fail when printed."""

    expanded_size = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Count the size of each node with its aliases expanded."""
        start, alias, self.depth = self.expanded_size, self.check_event(yaml.AliasEvent), self.depth + 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} levels")
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        self.expanded_size += getattr(node, "length", MAX_CHARACTERS) if alias else 1 + len(node.value)
        node.length = self.expanded_size - start
        if self.expanded_size > MAX_CHARACTERS:
            raise yaml.YAMLError(f"more than {MAX_CHARACTERS} characters, with its aliases expanded")
        if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(f"a number of more than {MAX_DIGITS} digits")
        return node


def read(source: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file; a file not found is looked up in the package (``experiments/…``).

    Raises:
        UsageError: no such file, or not valid YAML within the limits.
    """
    path = Path(source)
    packaged = Path(__file__).parent / path
    path = packaged if not path.exists() and packaged.is_file() else path
    if not path.is_file():
        raise UsageError(f"{path}: no such config file — the presets are experiments/paper.yaml, small.yaml, tiny.yaml")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as YAML — {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected keys and values")
    return data


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """``["a.b=c"]`` → ``{"a.b": "c"}``, values read as YAML."""
    changes = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise UsageError(f"--set {pair}: expected KEY=VALUE, as in --set train.epochs=5")
        try:
            changes[key.strip()] = yaml.load(value, Loader)
        except (yaml.YAMLError, ValueError):  # such as an invalid date
            raise UsageError(f"--set {pair[:80]}: the value cannot be read as YAML") from None
    return changes
