"""Scores → classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from senticlip.structures import LABELS, polarity

SCORES = [-1.0, -0.2, -0.0, 0.0, 0.2, 1.0]
CLASSES = [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("classify", [lambda s: [polarity(x) for x in s], lambda s: polarity(np.float32(s)).tolist(),
                                      lambda s: polarity(torch.tensor(s)).tolist()])  # fmt: skip
def test_polarity_is_the_sign(classify):
    assert classify(SCORES) == CLASSES
    assert classify([float("nan")])[0] in range(len(LABELS))
    assert LABELS[classify([0.4])[0]] == "positive"
