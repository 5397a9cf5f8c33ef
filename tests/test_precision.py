"""bf16 reaches the encoders alone; what a precision changes is measured and said before it is used."""

import pytest
import torch
from tests.test_export import file, run, video  # noqa: F401

import senticlip
from senticlip.precision import PRECISIONS, compare, disagreement, probe, reduced
from senticlip.structures import Clip, Output, UsageError


def test_bf16_is_for_the_encoders(run):  # noqa: F811
    model = senticlip.load(run, "cpu", "bf16").model
    assert {p.dtype for p in model.encoders["text"].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.encoders["vision"].body.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    assert model.encoders["vision"].std.dtype == torch.float32  # pixels are normalised before they are rounded


def test_the_probe_is_always_the_same(run):  # noqa: F811
    predictor = senticlip.load(run, "cpu")
    one, two = (probe(predictor.model, predictor.config) for _ in range(2))
    assert set(one.modalities) == {"text", "vision"}
    for name, sequence in one.modalities.items():
        assert torch.equal(sequence.values, two.modalities[name].values)
        assert bool(sequence.mask.all())
        assert len(sequence.mask) == 16
    assert one.modalities["vision"].values.dtype == torch.uint8


def test_what_is_said_is_what_was_measured(run):  # noqa: F811
    full, low = senticlip.load(run, "cpu"), senticlip.load(run, "cpu", "bf16")
    batch = probe(full.model, full.config)
    p, q = (x.output(batch).log_probs.exp() for x in (full, low))
    assert full.disagreement == {}
    assert low.disagreement["max_difference"] == pytest.approx(float((p - q).abs().max()), abs=1e-6)
    assert low.disagreement["flips"] == pytest.approx(float((p.argmax(1) != q.argmax(1)).float().mean()))


def test_a_model_does_not_disagree_with_itself(run, video):  # noqa: F811
    predictor = senticlip.load(run, "cpu")
    found = compare(predictor, predictor, [Clip("a", video, "开心"), Clip("b", None, "不好")], batch_size=1)
    assert found == {"n": 2, "flips": 0.0, "max_difference": 0.0, "mean_difference": 0.0}


def test_errors(run):  # noqa: F811
    with pytest.raises(UsageError, match=", ".join(PRECISIONS)):
        reduced(None, run, "fp8")
    with pytest.raises(UsageError, match="no probabilities"):
        disagreement([(Output(score=torch.zeros(2)), Output(score=torch.zeros(2)))])
