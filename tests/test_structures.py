"""Scores as classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from senticlip.structures import LABELS, polarity

SCORES = [-1.0, -0.2, -0.0, 0.0, 0.2, 1.0]
CLASSES = [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("of", [lambda s: [polarity(x) for x in s], lambda s: polarity(np.float32(s)).tolist(),
                                lambda s: polarity(torch.tensor(s)).tolist()])  # fmt: skip
def test_the_class_is_the_sign(of):
    assert of(SCORES) == CLASSES
    assert of([float("nan")])[0] in range(len(LABELS))
    assert LABELS[of([0.4])[0]] == "positive"
