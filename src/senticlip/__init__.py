"""senticlip: the sentiment of a video clip and its transcript, by CLIP-CA-MSA."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["LABELS", "analyze", "bulk", "explain", "load"]


def __getattr__(name: str) -> Any:
    """Import lazily, so that ``import senticlip`` and the command line start fast."""
    if name == "load":
        from senticlip.predictor import load

        return load
    if name == "LABELS":
        from senticlip.structures import LABELS

        return LABELS
    if name in ("analyze", "bulk", "explain"):
        import importlib

        return importlib.import_module(f"senticlip.{name}")
    raise AttributeError(f"module 'senticlip' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Include the lazily imported names, so that notebooks complete them."""
    return sorted({*globals(), *__all__})
