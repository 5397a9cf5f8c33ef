"""Occlusion: the model's prediction without the text, the video, the audio, one frame or one character."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from senticlip import cam
from senticlip.encoders.text import tokenize
from senticlip.structures import LABELS, SURFACE, Batch, Output, Prediction, Sequence, bounded, spoken


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
    found: list[Character] = []
    for token, (start, end) in enumerate(encoded["offset_mapping"]):
        if tokens[token] == "▁" or not text[start:end].strip():
            continue
        if found and found[-1].start <= start and end <= found[-1].end:
            continue
        if found and start <= found[-1].start and found[-1].end <= end:
            found.pop()
        found.append(Character(token, start, end))
    return found


def unread(predictor: Any, text: str | None) -> str:
    """The end of a text, if truncated because it has too many tokens for the model; else empty."""
    text = spoken(text)
    if text is None or predictor.tokenizer is None:
        return ""
    most = predictor.config.text.max_length
    if len(predictor.tokenizer(text)["input_ids"]) <= most:
        return ""  # checked first, since the last characters of a text may belong to no token
    read = characters(predictor.tokenizer, text, most)
    return text[max((one.end for one in read), default=len(text)) :].strip()


def value(prediction: Prediction, label: str) -> float:
    """The probability of ``label``; for a regression model's score s in [−1, 1], as for heat maps, −s, −|s|, s for
    negative, neutral, positive."""
    if prediction.score is None:
        return prediction.probabilities[label]
    score = bounded(prediction.score)
    return {"negative": -score, "neutral": -abs(score), "positive": score}[label]


def change(before: Prediction, after: Prediction) -> float:
    """The distance of two predictions, 0 … 1: total variation distance, or half the difference of scores."""
    if before.score is not None and after.score is not None:
        return abs(bounded(before.score) - bounded(after.score)) / 2
    return sum(abs(before.probabilities[name] - after.probabilities[name]) for name in LABELS) / 2


def masked(features: Batch, cases: list[tuple[str, int]]) -> Batch:
    """One clip's features, a row for each case (modality, place) with that position masked, or all of them for −1."""
    rows = cam.repeat(features, len(cases))
    for name, sequence in rows.modalities.items():
        mask = sequence.mask.clone()
        for row, (gone, place) in enumerate(cases):
            if gone == name:
                mask[row, slice(None) if place < 0 else place] = False
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
    there = _present(features)
    frames: list[int] = []
    if "vision" in there and "vision" in model.encoders:
        frames = features.modalities["vision"].mask[0].nonzero()[:, 0].tolist()
    asked = [("everything", 0, "", ("", -1))]
    if len(there) > 1:
        asked += [(SURFACE[name], 0, "", (name, -1)) for name in there]
    if len(there) > 1 or len(frames) > 1:
        asked += [("frame", i, str(i + 1), ("vision", place)) for i, place in enumerate(frames)]
    answers = predictor.predictions(model.fuse(masked(features, [gone for *_, gone in asked])))
    cases = [Case(kind, place, shown, found) for (kind, place, shown, _), found in zip(asked, answers, strict=True)]
    return cases + _without_characters(predictor, features, text)


def _without_characters(predictor: Any, features: Batch, text: str | None) -> list[Case]:
    model = predictor.model
    if not text or "text" not in model.encoders:
        return []
    length = predictor.config.text.max_length
    lone = _present(features) == ["text"]
    cuts = {
        place: (text[span.start : span.end], rest)
        for place, span in enumerate(characters(predictor.tokenizer, text, length))
        if (rest := spoken(text[: span.start] + text[span.end :])) is not None or not lone
    }
    if not cuts:
        return []
    shorter = [rest for _, rest in cuts.values()]
    ids, mask = tokenize(predictor.tokenizer, shorter, length)
    said = model.encode(Batch({"text": Sequence(ids.to(model.device), mask.to(model.device))}, {}))
    rows = cam.repeat(features, len(cuts))
    modalities = {name: said.modalities["text"] if name == "text" else s for name, s in rows.modalities.items()}
    answers = predictor.predictions(model.fuse(Batch(modalities, {})))
    return [
        Case("character", place, shown, found) for (place, (shown, _)), found in zip(cuts.items(), answers, strict=True)
    ]


@torch.no_grad()
def alone(predictor: Any, features: Batch) -> dict[str, Prediction]:
    """The prediction given each modality of one clip alone, by surface name; empty if the clip has only one."""
    there = _present(features)
    answers = predictor.model.alone(features) if len(there) > 1 else {}
    return {SURFACE[name]: predictor.predictions(answers[name])[0] for name in there if name in answers}


def _present(features: Batch) -> list[str]:
    """The modalities that a batch of one clip has."""
    return [name for name, sequence in features.modalities.items() if sequence.mask.any()]


def cross_attention(output: Output, features: Batch) -> dict[str, torch.Tensor]:
    """Cross-attention weights of one clip, averaged over heads: ``text_asks_vision`` → queries×keys, unmasked only.

    If the vision sequence begins with a state of the whole clip, that is the first row or column. Rows sum to 1.
    """
    found = {}
    for name, maps in output.attention.items():
        sides = []
        for modality, length in zip(name.split("_asks_"), maps.shape[-2:], strict=True):
            if modality not in features.modalities:  # it comes from a feature file
                break
            mask = features.modalities[modality].mask[0]
            lead = length - len(mask)
            if lead not in (0, 1):
                break
            sides.append(torch.cat([mask.new_ones(lead), mask]))
        if len(sides) == 2:
            found[name] = maps[0].float().mean(0)[sides[0]][:, sides[1]].cpu()
    return found
