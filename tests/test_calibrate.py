"""The temperatures fitted on the validation split minimise its cross-entropy."""

import numpy as np
import torch
from torch import nn

from senticlip import checkpoint
from senticlip.structures import Output


class Model(nn.Module):
    """A model whose temperature is not fitted yet."""

    def __init__(self):
        super().__init__()
        self.network = nn.Module()
        self.network.temperature = torch.ones(1)
        self.experiment = type("Experiment", (), {"target": "M"})


def test_calibrate_finds_the_temperature_of_scaled_logits(monkeypatch):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=random)
    truth = torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]  # so these logits are calibrated
    output = Output({"text": 4 * logits}, (4 * logits).log_softmax(-1), {"text": torch.ones(4000)})
    monkeypatch.setattr(checkpoint, "outputs", lambda model, data: output)
    model = Model()
    data = type("Data", (), {"labels": {"M": truth.numpy().astype(np.float32) - 1}})
    checkpoint.calibrate(model, data)
    assert abs(model.network.temperature.item() - 4) < 0.3


def test_calibrate_ignores_rows_without_modality_or_label(monkeypatch):
    """Their logits are very confident but random, so including them would change the temperature."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(6000, 3, generator=random)
    truth = torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0].float() - 1
    logits[4000:] = 50 * torch.randn(2000, 3, generator=random)
    present = torch.ones(6000)
    present[4000:5000], truth[5000:] = 0, torch.nan
    heads = {"text": logits, "video": logits}
    output = Output(heads, logits.log_softmax(-1), {"text": present, "video": torch.zeros(6000)})
    monkeypatch.setattr(checkpoint, "outputs", lambda model, data: output)
    model = Model()
    model.network.temperature = torch.tensor([7.0, 7.0])
    checkpoint.calibrate(model, type("Data", (), {"labels": {"M": truth.numpy()}}))
    assert abs(model.network.temperature[0].item() - 1) < 0.1
    assert model.network.temperature[1] == 7  # no validation clip has this modality
