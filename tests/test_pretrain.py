"""Pretraining of the demo's towers: the vocabulary, the captions and the loss."""

import pytest
import torch

from senticlip.pretrain import Captions, Towers, _loss, vocabulary

WORDS = [{"mouth": "嘴角上扬"}, {"mouth": "嘴角下垂", "eyes": "眼睛睁开"}, {"mouth": "嘴角上扬", "eyes": "眼睛闭上"}]


def test_vocabulary_has_no_duplicates():
    tokens = vocabulary()
    assert len(set(tokens)) == len(tokens)
    assert tokens[0] == "[PAD]"
    assert {"好", "坏", "，", "a", "7"} <= set(tokens)
    assert not {"A", "Z"} & set(tokens)  # the tokenizer lowercases


def test_loss_ignores_frames_without_a_caption(monkeypatch):
    captions, tokens = Captions(WORDS), vocabulary()
    assert captions.facets == {"eyes": ["眼睛睁开", "眼睛闭上"], "mouth": ["嘴角上扬", "嘴角下垂"]}
    decoded = [
        "".join(tokens[i] for i, real in zip(*row, strict=True) if real)
        for row in zip(captions.ids.tolist(), captions.mask.tolist(), strict=True)
    ]
    assert decoded == [f"[CLS]{caption}[SEP]" for facet in captions.facets.values() for caption in facet]
    assert captions.targets(WORDS, "mouth").tolist() == [0, 1, 0]
    assert captions.targets(WORDS, "eyes").tolist() == [-100, 0, 1]
    # the frames match: the second caption of eyes, the first and the second of mouth
    towers = Towers()
    monkeypatch.setattr(towers, "see", lambda frames: torch.eye(4)[[1, 2, 3]])
    monkeypatch.setattr(towers, "read", lambda ids, mask: torch.eye(4))
    _, right = _loss(towers, None, WORDS, captions)
    assert right == {"eyes": 0.5, "mouth": pytest.approx(1 / 3)}
