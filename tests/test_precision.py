"""bf16 reaches the encoders alone; what a precision changes is measured and said before it is used."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.test_explain import run_folder
from tests.test_export import make_run, make_video

import senticlip
import tiny
from senticlip import quantize
from senticlip.models.base import SentimentModel
from senticlip.precision import _to_bf16, compare, disagreement, lowered, probe
from senticlip.structures import PRECISIONS, Clip, Output, UsageError, UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("precision"))


@pytest.fixture(scope="module")
def video(run) -> Path:
    return make_video(run.parent / "clip.mp4")


def test_bf16_of_a_gpu_is_for_the_encoders(run):
    model = _to_bf16(senticlip.load(run, "cpu").model)
    assert {p.dtype for p in model.encoders["text"].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.encoders["vision"].body.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    assert model.encoders["vision"].std.dtype == torch.float32  # pixels are normalised before they are rounded


@pytest.mark.parametrize("lower", [lowered, lambda model, *rest: (_to_bf16(model), {})], ids=["cpu", "as on a gpu"])
def test_bf16_of_a_network_that_does_not_round_what_it_reads(tmp_path, video, lower):
    """Chinese-CLIP does, timm's do not."""
    run = run_folder(tmp_path, tiny.timm_folder(tmp_path / "cnn", "test_resnet"))
    full, low = (senticlip.load(run, "cpu") for _ in range(2))
    low.model, _ = lower(low.model, run, "bf16")
    full, low = (predictor(video, "好") for predictor in (full, low))
    assert low.probabilities == pytest.approx(full.probabilities, abs=0.1)
    assert low.probabilities != full.probabilities


def test_the_probe_is_always_the_same(run):
    predictor = senticlip.load(run, "cpu")
    one, two = (probe(predictor.model, predictor.config) for _ in range(2))
    assert set(one.modalities) == {"text", "vision"}
    for name, sequence in one.modalities.items():
        assert torch.equal(sequence.values, two.modalities[name].values)
        assert bool(sequence.mask.all())
        assert len(sequence.mask) == 4
    assert one.modalities["vision"].values.dtype == torch.uint8


def test_the_probe_makes_no_sound_that_would_come_from_a_feature_file(run):
    predictor = senticlip.load(run, "cpu")
    clips = predictor.config.override({"modalities": ["text", "vision", "audio"], "audio.bands": 5})
    assert probe(predictor.model, clips).modalities["audio"].values.shape == (4, 30, 5)
    file = clips.override({"vision.encoder": "features"})  # of whatever width
    assert "audio" not in probe(predictor.model, file).modalities


def test_what_is_said_is_what_was_measured(run):
    full, low = senticlip.load(run, "cpu"), senticlip.load(run, "cpu", "bf16")
    batch = probe(full.model, full.config)
    p, q = (x.output(batch).log_probs.exp() for x in (full, low))
    assert full.disagreement == {}
    assert low.disagreement["max_difference"] == pytest.approx(float((p - q).abs().max()), abs=1e-6)
    assert low.disagreement["flips"] == pytest.approx(float((p.argmax(1) != q.argmax(1)).float().mean()))


def test_a_model_does_not_disagree_with_itself(run, video):
    predictor = senticlip.load(run, "cpu")
    found = compare(predictor, predictor, [Clip("a", video, "开心"), Clip("b", None, "不好")], batch_size=1)
    assert found == {"n": 2, "flips": 0.0, "max_difference": 0.0, "mean_difference": 0.0}


def test_it_is_measured_once_for_these_weights(run, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("precision.json", "openvino"))
    asked = []
    forward = SentimentModel.forward
    monkeypatch.setattr(
        SentimentModel, "forward", lambda self, *args, **more: asked.append(1) or forward(self, *args, **more)
    )
    first = senticlip.load(copy, "cpu", "bf16").disagreement
    assert len(asked) == 2
    assert senticlip.load(copy, "cpu", "bf16").disagreement == first
    assert len(asked) == 2
    other_weights(copy)
    assert senticlip.load(copy, "cpu", "bf16").disagreement != first
    assert len(asked) == 4
    (copy / "precision.json").write_text("{")
    assert senticlip.load(copy, "cpu", "bf16").disagreement["n"] == 4


def other_weights(run: Path) -> None:
    """Train on, as it were, and leave the file as old as it was."""
    path = run / "model.safetensors"
    before, weights = path.stat(), load_file(path)
    name = "network.entrances.text.project.weight"
    save_file({**weights, name: -weights[name]}, path, {"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_int8_is_of_these_weights(run, tmp_path, video):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("precision.json", "openvino"))
    before = senticlip.load(copy, "cpu", "int8")(video, "开心").probabilities
    assert senticlip.load(copy, "cpu", "int8")(video, "开心").probabilities == before
    other_weights(copy)
    after = senticlip.load(copy, "cpu", "int8")(video, "开心").probabilities
    assert after == pytest.approx(senticlip.load(copy, "cpu")(video, "开心").probabilities, abs=0.03)
    assert after != before


def test_encoders_are_compiled_again_for_another_config(run, tmp_path):
    """The activation, for example, does not show in the weights."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("precision.json", "openvino"))
    first = senticlip.load(copy, "cpu", "bf16")
    described = json.loads((copy / "config.json").read_text())
    described["encoders"]["text"]["spec"]["hidden_act"] = "relu"
    (copy / "config.json").write_text(json.dumps(described))
    assert senticlip.load(copy, "cpu", "bf16")(text="开心").probabilities == pytest.approx(
        senticlip.load(copy, "cpu")(text="开心").probabilities, abs=0.03
    )
    assert senticlip.load(copy, "cpu", "bf16").disagreement != first.disagreement


def test_a_run_that_cannot_be_written_is_compiled_into_the_cache(run, tmp_path, video, monkeypatch):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("openvino"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    answer = senticlip.load(tmp_path / "run", precision="int8")(video, "好")
    assert not (tmp_path / "run" / "openvino").exists()
    (made,) = (tmp_path / "cache").rglob("vision.xml")
    before = made.stat().st_mtime_ns
    assert senticlip.load(tmp_path / "run", precision="int8")(video, "好") == answer
    assert made.stat().st_mtime_ns == before


def test_a_precision_is_measured_on_this_processor(run, tmp_path, monkeypatch):
    """A RUN may come from another one."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("precision.json", "openvino"))
    senticlip.load(copy, "cpu", "int8")
    monkeypatch.setattr("senticlip.precision.recipe", lambda: "another")
    senticlip.load(copy, "cpu", "int8")
    measured = json.loads((copy / "precision.json").read_text())
    assert len([name for name in measured if name.startswith("int8")]) == 2


def test_scores_are_compared_by_hand():
    one = Output(score=torch.tensor([-0.5, 0.0, 0.6, 1.0]))
    two = Output(score=torch.tensor([-0.7, 0.2, 0.6, 1.0]))
    found = disagreement([(one, two)])
    assert found == pytest.approx({"n": 4, "flips": 0.25, "max_difference": 0.2, "mean_difference": 0.1}, abs=1e-6)


def test_pairs_add_up_to_the_whole():
    """The farthest row comes in the middle."""
    random = torch.Generator().manual_seed(0)
    p, q = (torch.randn(6, 3, generator=random).softmax(1) for _ in range(2))
    q[[0, 1, 5]] = p[[0, 1, 5]]
    q[2] = p[2].roll(1)
    parts = [(Output(log_probs=p[i : i + 2].log()), Output(log_probs=q[i : i + 2].log())) for i in (0, 2, 4)]
    flips = int((p.argmax(1) != q.argmax(1)).sum())
    assert flips > 1
    gap = (p - q).abs()
    expected = {"n": 6, "flips": flips / 6, "max_difference": float(gap.max()), "mean_difference": float(gap.mean())}
    assert disagreement(parts) == pytest.approx(expected, abs=1e-6)
    assert disagreement([]) == {"n": 0, "flips": 0, "max_difference": 0, "mean_difference": 0}


def test_what_cannot_be_written_down_is_measured_all_the_same(run, tmp_path, monkeypatch):
    def full(path, text):
        raise UserError(f"{path}: the disk is full")

    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("precision.json", "openvino"))
    monkeypatch.setattr("senticlip.precision.write_text", full)
    assert senticlip.load(tmp_path / "run", "cpu", "bf16").disagreement["n"] == 4


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "avx2 avx512_vnni", "QInt8"),
        ("AMD64", "avx2 avx_vnni", "QInt8"),
        ("x86_64", "sse4_2 avx2", "QUInt8"),
        ("AMD64", None, "QUInt8"),  # Windows, which has no such file
        ("aarch64", "asimd", "QInt8"),
        ("arm64", None, "QInt8"),
    ],
)
def test_weights_of_int8_are_those_that_do_not_overflow(tmp_path, monkeypatch, machine, flags, expected):
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"flags\t: {flags}\n")
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(quantize, "Path", lambda name: tmp_path / Path(name).name)
    assert quantize.weight_type() == expected


def test_what_is_no_number_is_not_hidden_by_what_is_compiled(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("precision.json", "openvino"))
    path = tmp_path / "run" / "model.safetensors"
    weights = load_file(path)
    next(weight for name, weight in weights.items() if name.startswith("encoders.vision"))[:] = torch.nan
    save_file(weights, path, {"format": "pt"})
    for precision in ("bf16", "int8"):
        with pytest.raises(UserError, match="run: its answers are NaN, so its weights are broken"):
            senticlip.load(tmp_path / "run", "cpu", precision)


def test_errors(run):
    with pytest.raises(UsageError, match=", ".join(PRECISIONS)):
        senticlip.load(run, "cpu", "fp8")


def test_a_model_of_features_has_nothing_to_compute_in_less(tmp_path):
    with pytest.raises(UsageError, match=r"--precision bf16.*no encoder"):
        lowered(SimpleNamespace(encoders={}), tmp_path, "bf16")
