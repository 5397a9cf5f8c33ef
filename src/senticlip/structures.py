"""The five data types from file to prediction.

``Clip`` (paths and text) → ``Sequence`` (input or output of an encoder) → ``Batch`` → ``Output`` → ``Prediction``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

LABELS = ("negative", "neutral", "positive")
"""The classes, in the order of every C axis."""

TARGETS = ("M", "T", "A", "V")
"""The labels of a clip: joint, text alone, audio alone, vision alone."""

OWN_LABEL = {"text": "T", "audio": "A", "vision": "V"}
"""The unimodal label of each modality."""

MODALITIES = ("text", "vision", "audio")
"""The modalities, in the order in which models read them."""

PRECISIONS = ("fp32", "bf16", "int8")
"""The precisions in which a model can run."""

SURFACE = {"text": "text", "vision": "video", "audio": "audio"}
"""The name of each modality in everything the user sees."""


class UserError(Exception):
    """An error that the user can fix; its one-line message says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with ``code``: 1 for bad data, 2 for wrong usage.
    """

    code = 1


class UsageError(UserError):
    """Wrong usage: an unknown option, key, split, folder or device."""

    code = 2


def first_line(error: Exception) -> str:
    """The first line of a library's error message; its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def bounded(score: float) -> float:
    """A regression model's (unbounded) score as users see it: clipped to [−1, 1], as in MMSA's metrics."""
    return min(1.0, max(-1.0, score))


def polarity(score: Any) -> Any:
    """The class index (0 negative, 1 neutral, 2 positive) of a CH-SIMS score: its sign.

    ``score``: a number, array or tensor of any shape; the result has the same shape. NaN also gives an index: mask it.
    """
    return (score >= 0) + 1 * (score > 0)


def valid_utf8(text: str) -> str:
    """A text as valid UTF-8: lone surrogates (from file names and some encodings) become question marks."""
    return text.encode("utf-8", "replace").decode()


def text_or_none(text: str | None) -> str | None:
    """A text as valid UTF-8, or None if it is blank."""
    text = valid_utf8(text or "")
    return text if text.strip() else None


class Clip(NamedTuple):
    """One clip as listed in the data set: paths and text, nothing decoded.

    ``labels`` maps M, T, A, V to scores in [-1, 1]; missing labels are left out. ``video`` and ``text`` are
    None where that modality is missing. ``row`` is the line in the label file, for messages; ``start`` and ``end``
    (seconds) select a segment of a longer video.
    """

    id: str
    video: Path | None = None
    text: str | None = None
    labels: dict[str, float] = {}
    split: str | None = None
    row: int | None = None
    start: float | None = None
    end: float | None = None


class Sequence(NamedTuple):
    """One modality of a batch.

    ``values`` B×L×…: token ids B×L, pixels B×m×3×H×W (uint8), or features B×L×d. ``mask`` B×L bool: True where
    ``values`` is real. A row whose mask is all False lacks this modality.
    """

    values: Tensor
    mask: Tensor


class Batch(NamedTuple):
    """Modalities (text, vision, audio) and labels (M, T, A, V: B float scores, NaN where unknown) by name.

    ``rows`` B: the index of each clip in its split (Self-MM stores its generated labels under it).
    """

    modalities: dict[str, Sequence]
    labels: dict[str, Tensor]
    rows: Tensor | None = None


class Output(NamedTuple):
    """What every model returns.

    Classification: ``logits``: head → B×C (heads are modalities, or ``fused``); ``log_probs`` B×C, fused and
    normalised. ``weights``: modality → B, its share in the answer; they sum to 1 (clip_ca_msa: to 0 in a row that
    has no modality). Regression: ``score`` B, in label units. ``attention``, on request: name → B×heads×queries×keys.
    ``features``: name → B×d, needed by the losses of some models. ``alone``, on request, classification only: modality
    → B×C log-probabilities given that modality only (a head's logits depend on the others through fusion).
    """

    logits: dict[str, Tensor] = {}
    log_probs: Tensor | None = None
    weights: dict[str, Tensor] = {}
    score: Tensor | None = None
    attention: dict[str, Tensor] = {}
    features: dict[str, Tensor] = {}
    alone: dict[str, Tensor] = {}

    def are_numbers(self) -> Tensor:
        """Which rows have no NaN, B bool (argmax would map a row of NaN to the first class)."""
        values = self.score if self.score is not None else self.log_probs
        assert values is not None
        return ~values.isnan().reshape(len(values), -1).any(1)


class Prediction(NamedTuple):
    """The answer for one clip, as ``senticlip predict --json`` prints it (surface names: text, video, audio).

    ``probabilities``: by label; ``modalities``: modality → probabilities given that modality only; ``weights``: of
    each modality's head, summing to 1. A regression model sets ``label`` and ``score`` only.
    """

    label: str
    probabilities: dict[str, float]
    modalities: dict[str, dict[str, float]]
    weights: dict[str, float]
    score: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that are not None, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}
