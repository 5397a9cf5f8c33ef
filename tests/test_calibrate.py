"""The temperatures that are fitted on valid are those of the least cross-entropy."""

import numpy as np
import torch
from torch import nn

from senticlip import checkpoint
from senticlip.structures import Output


class Model(nn.Module):
    """No temperature fitted yet."""

    def __init__(self):
        super().__init__()
        self.network = nn.Module()
        self.network.temperature = torch.ones(1)
        self.experiment = type("Experiment", (), {"target": "M"})


def test_calibration_lessens_the_cross_entropy(monkeypatch):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=random)
    truth = torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]  # what these logits promise is kept
    output = Output({"text": 4 * logits}, (4 * logits).log_softmax(-1), {"text": torch.ones(4000)})
    monkeypatch.setattr(checkpoint, "outputs", lambda model, data: output)
    model = Model()
    data = type("Data", (), {"labels": {"M": truth.numpy().astype(np.float32) - 1}})
    checkpoint.calibrate(model, data)
    assert abs(model.network.temperature.item() - 4) < 0.3
