"""The demo's towers are trained on what is true of a frame, and on nothing that is not said of it."""

import pytest
import torch

from senticlip.pretrain import Captions, Towers, _loss, vocabulary

WORDS = [{"mouth": "嘴角上扬"}, {"mouth": "嘴角下垂", "eyes": "眼睛睁开"}, {"mouth": "嘴角上扬", "eyes": "眼睛闭上"}]


def test_every_character_has_one_number():
    words = vocabulary()
    assert len(set(words)) == len(words)
    assert words[0] == "[PAD]"
    assert {"好", "坏", "，", "a", "7"} <= set(words)
    assert not {"A", "Z"} & set(words)  # the tokenizer makes them small


def test_a_frame_of_which_nothing_is_said_does_not_count(monkeypatch):
    captions, words = Captions(WORDS), vocabulary()
    assert captions.facets == {"eyes": ["眼睛睁开", "眼睛闭上"], "mouth": ["嘴角上扬", "嘴角下垂"]}
    read = [
        "".join(words[i] for i, real in zip(*row, strict=True) if real)
        for row in zip(captions.ids.tolist(), captions.mask.tolist(), strict=True)
    ]
    assert read == [f"[CLS]{caption}[SEP]" for facet in captions.facets.values() for caption in facet]
    assert captions.targets(WORDS, "mouth").tolist() == [0, 1, 0]
    assert captions.targets(WORDS, "eyes").tolist() == [-100, 0, 1]
    # what the frames look like: the second caption of eyes, the first and the second of mouth
    towers = Towers()
    monkeypatch.setattr(towers, "see", lambda frames: torch.eye(4)[[1, 2, 3]])
    monkeypatch.setattr(towers, "read", lambda ids, mask: torch.eye(4))
    _, right = _loss(towers, None, WORDS, captions)
    assert right == {"eyes": 0.5, "mouth": pytest.approx(1 / 3)}
