"""Occlusion: the model's prediction without the text, the video, the audio, one frame or one character."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from senticlip import cam
from senticlip.encoders.text import tokenize
from senticlip.structures import LABELS, SURFACE, Batch, Output, Prediction, Sequence, bounded, text_or_none


class Case(NamedTuple):
    """The prediction without one part.

    ``kind`` of the part: everything (nothing is left out), text, video, audio, frame or character. ``place``: index of
    the frame or character. ``shown``: what the page calls it.
    """

    kind: str
    place: int
    shown: str
    prediction: Prediction


class Character(NamedTuple):
    """A token that the model reads: its index among the tokens, and its characters text[start:end]."""

    token: int
    start: int
    end: int


def characters(tokenizer: Any, text: str | None, max_length: int) -> list[Character]:
    """The tokens that stand for characters of the text, in order; of several with the same span, the first.

    SentencePiece's word-start mark "▁" stands for no character, although its span is that of the first. A span inside
    another (of a token for part of a character) is left out.
    """
    if not text:
        return []
    encoded = tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    spans: list[Character] = []
    for token, (start, end) in enumerate(encoded["offset_mapping"]):
        if tokens[token] == "▁" or not text[start:end].strip():
            continue
        if spans and spans[-1].start <= start and end <= spans[-1].end:
            continue
        if spans and start <= spans[-1].start and spans[-1].end <= end:
            spans.pop()
        spans.append(Character(token, start, end))
    return spans


def unread_text(predictor: Any, text: str | None) -> str:
    """The end of a text, if truncated because it has too many tokens for the model; else empty."""
    text = text_or_none(text)
    if text is None or predictor.tokenizer is None:
        return ""
    limit = predictor.config.text.max_length
    if len(predictor.tokenizer(text)["input_ids"]) <= limit:
        return ""  # checked first, since the last characters of a text may belong to no token
    read = characters(predictor.tokenizer, text, limit)
    return text[max((character.end for character in read), default=len(text)) :].strip()


def support(prediction: Prediction, label: str) -> float:
    """The probability of ``label``; for a regression model's score s in [−1, 1], as for heat maps, −s, −|s|, s for
    negative, neutral, positive."""
    if prediction.score is None:
        return prediction.probabilities[label]
    score = bounded(prediction.score)
    return {"negative": -score, "neutral": -abs(score), "positive": score}[label]


def prediction_distance(before: Prediction, after: Prediction) -> float:
    """The distance of two predictions, 0 … 1: total variation distance, or half the difference of scores."""
    if before.score is not None and after.score is not None:
        return abs(bounded(before.score) - bounded(after.score)) / 2
    return sum(abs(before.probabilities[name] - after.probabilities[name]) for name in LABELS) / 2


def masked(features: Batch, cases: list[tuple[str, int]]) -> Batch:
    """One clip's features, a row for each case (modality, position) with that position masked; −1 masks all."""
    rows = cam.repeat(features, len(cases))
    for name, sequence in rows.modalities.items():
        mask = sequence.mask.clone()
        for row, (modality, position) in enumerate(cases):
            if modality == name:
                mask[row, slice(None) if position < 0 else position] = False
        rows.modalities[name] = Sequence(sequence.values, mask)
    return rows


@torch.no_grad()
def occlude(predictor: Any, batch: Batch, text: str | None) -> list[Case]:
    """All cases of one clip, "everything" first, without those that would leave nothing of it.

    A frame is masked (the others keep their temporal positions); a character is cut out of the text; without its only
    character, the clip has no text. Frames are encoded once, since the encoder reads each separately.

    Args:
        predictor: of a RUN.
        batch: this clip only, as returned by ``predictor.batch``, or its features (not encoded again).
        text: the clip's text.
    """
    model = predictor.model
    features = model.encode(batch)
    present = _present(features)
    frames: list[int] = []
    if "vision" in present and "vision" in model.encoders:
        frames = features.modalities["vision"].mask[0].nonzero()[:, 0].tolist()
    parts = [("everything", 0, "", ("", -1))]
    if len(present) > 1:
        parts += [(SURFACE[name], 0, "", (name, -1)) for name in present]
    if len(present) > 1 or len(frames) > 1:
        parts += [("frame", i, str(i + 1), ("vision", position)) for i, position in enumerate(frames)]
    predictions = predictor.predictions(model.fuse(masked(features, [target for *_, target in parts])))
    cases = [
        Case(kind, index, shown, prediction)
        for (kind, index, shown, _), prediction in zip(parts, predictions, strict=True)
    ]
    return cases + _without_characters(predictor, features, text)


def _without_characters(predictor: Any, features: Batch, text: str | None) -> list[Case]:
    model = predictor.model
    if not text or "text" not in model.encoders:
        return []
    length = predictor.config.text.max_length
    only_text = _present(features) == ["text"]
    cuts = {
        index: (text[span.start : span.end], rest)
        for index, span in enumerate(characters(predictor.tokenizer, text, length))
        if (rest := text_or_none(text[: span.start] + text[span.end :])) is not None or not only_text
    }
    if not cuts:
        return []
    texts = [rest for _, rest in cuts.values()]
    ids, mask = tokenize(predictor.tokenizer, texts, length)
    encoded = model.encode(Batch({"text": Sequence(ids.to(model.device), mask.to(model.device))}, {}))
    rows = cam.repeat(features, len(cuts))
    modalities = {name: encoded.modalities["text"] if name == "text" else s for name, s in rows.modalities.items()}
    predictions = predictor.predictions(model.fuse(Batch(modalities, {})))
    return [
        Case("character", index, shown, prediction)
        for (index, (shown, _)), prediction in zip(cuts.items(), predictions, strict=True)
    ]


@torch.no_grad()
def alone(predictor: Any, features: Batch) -> dict[str, Prediction]:
    """The prediction given each modality of one clip alone, by surface name; empty if the clip has only one."""
    present = _present(features)
    outputs = predictor.model.alone(features) if len(present) > 1 else {}
    return {SURFACE[name]: predictor.predictions(outputs[name])[0] for name in present if name in outputs}


def _present(features: Batch) -> list[str]:
    """The modalities that a batch of one clip has."""
    return [name for name, sequence in features.modalities.items() if sequence.mask.any()]


def cross_attention(output: Output, features: Batch) -> dict[str, torch.Tensor]:
    """Cross-attention weights of one clip, averaged over heads: ``text_asks_vision`` → queries×keys, unmasked only.

    If the vision sequence begins with a state of the whole clip, that is the first row or column. Rows sum to 1.
    """
    maps_by_pair = {}
    for name, maps in output.attention.items():
        masks = []
        for modality, length in zip(name.split("_asks_"), maps.shape[-2:], strict=True):
            if modality not in features.modalities:  # it comes from a feature file
                break
            mask = features.modalities[modality].mask[0]
            extra = length - len(mask)
            if extra not in (0, 1):
                break
            masks.append(torch.cat([mask.new_ones(extra), mask]))
        if len(masks) == 2:
            maps_by_pair[name] = maps[0].float().mean(0)[masks[0]][:, masks[1]].cpu()
    return maps_by_pair
