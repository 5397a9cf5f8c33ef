"""Losses compared with numbers calculated by hand."""

from __future__ import annotations

import math

import pytest
import torch

from senticlip.losses import Uncertainty, WeightedSum, cross_entropy

LOGITS = torch.tensor([[0.0, math.log(2), math.log(3)]])
"""Probabilities 1/6, 2/6, 3/6."""

BOTH = {"text": torch.tensor(True), "vision": torch.tensor(True)}


def test_focal_loss_by_hand():
    # target 2: p = 1/2, so −(1 − 1/2)² ln 1/2 = 0.25 · 0.693147
    assert float(cross_entropy(LOGITS, torch.tensor([2]), gamma=2.0)) == pytest.approx(0.1732868, abs=1e-6)
    # target 0: p = 1/6, so (5/6)² · ln 6 = 0.694444 · 1.791759
    assert float(cross_entropy(LOGITS, torch.tensor([0]), gamma=2.0)) == pytest.approx(1.2442773, abs=1e-6)
    assert float(cross_entropy(LOGITS, torch.tensor([0]))) == pytest.approx(math.log(6), abs=1e-6)


def test_gradient_includes_the_focal_factor():
    """d/dz of −(1−p)² log p, by finite differences."""
    logits, target = torch.randn(4, 3, dtype=torch.double), torch.tensor([0, 1, 2, 2])
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, target, 2.0), logits.requires_grad_())


def test_class_weights():
    loss = cross_entropy(LOGITS, torch.tensor([0]), weight=torch.tensor([3.0, 1.0, 1.0]))
    assert float(loss) == pytest.approx(3 * math.log(6), abs=1e-5)


def test_confident_row_has_finite_gradient():
    logits = torch.tensor([[0.0, 0.0, 200.0]], requires_grad=True)
    cross_entropy(logits, torch.tensor([2]), gamma=2.0).sum().backward()
    assert logits.grad.isfinite().all()


def test_uncertainty_loss_and_gradient_by_hand():
    combine = Uncertainty(["text", "vision"])
    with torch.no_grad():
        combine.s["text"].fill_(math.log(2))
    total = combine({"text": torch.tensor(0.5), "vision": torch.tensor(1.0)}, BOTH)
    # ½ · 0.5 + ln 2 / 2 = 0.596574, and 1 · 1 + 0
    assert total.item() == pytest.approx(1.5965736, abs=1e-6)
    total.backward()
    # −exp(−s) L + ½
    assert float(combine.s["text"].grad) == pytest.approx(0.25, abs=1e-6)
    assert float(combine.s["vision"].grad) == pytest.approx(-0.5, abs=1e-6)
    assert combine.weights().tolist() == pytest.approx([0.5, 1.0])


def test_uncertainty_converges_to_its_minimum():
    """At s = ln 2L."""
    combine = Uncertainty(["text"])
    optimizer = torch.optim.SGD(combine.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        combine({"text": torch.tensor(0.3)}, BOTH).backward()
        optimizer.step()
    assert combine.s["text"].item() == pytest.approx(math.log(0.6), abs=1e-4)


def test_clamped_s_still_has_a_gradient():
    combine = Uncertainty(["text"])
    with torch.no_grad():
        combine.s["text"].fill_(9.0)
    combine.clamp()
    assert combine.s["text"].item() == 5.0
    combine({"text": torch.tensor(1.0)}, BOTH).backward()
    assert float(combine.s["text"].grad) != 0


def test_weighted_sum():
    combine = WeightedSum(["text", "vision"])
    assert float(combine({"text": torch.tensor(0.5), "vision": torch.tensor(1.0)}, BOTH)) == 1.5


def test_unobserved_modality_does_not_change_s():
    combine = Uncertainty(["text", "vision"])
    losses = {"text": torch.tensor(0.0), "vision": torch.tensor(1.0)}
    combine(losses, {"text": torch.tensor(False), "vision": torch.tensor(True)}).backward()
    assert float(combine.s["text"].grad) == 0.0
    assert float(combine.s["vision"].grad) == pytest.approx(-1.0 + 0.5)
