"""Reduced precision is limited to the encoders; its effect is measured and stored before it is used."""

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
from senticlip.precision import _to_bf16, compare, disagreement, lower_precision, probe
from senticlip.structures import PRECISIONS, Clip, Output, UsageError, UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("precision"))


@pytest.fixture(scope="module")
def video(run) -> Path:
    return make_video(run.parent / "clip.mp4")


def test_gpu_bf16_applies_only_to_encoders(run):
    model = _to_bf16(senticlip.load(run, "cpu").model)
    assert {p.dtype for p in model.encoders["text"].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.encoders["vision"].body.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    assert model.encoders["vision"].std.dtype == torch.float32  # pixels are normalised in fp32


@pytest.mark.parametrize(
    "lower_precision", [lower_precision, lambda model, *rest: (_to_bf16(model), {})], ids=["cpu", "as on a gpu"]
)
def test_bf16_of_timm_network_is_close(tmp_path, video, lower_precision):
    """Chinese-CLIP casts its input to its own precision, timm networks do not."""
    run = run_folder(tmp_path, tiny.timm_folder(tmp_path / "cnn", "test_resnet"))
    full, low = (senticlip.load(run, "cpu") for _ in range(2))
    low.model, _ = lower_precision(low.model, run, "bf16")
    full, low = (predictor(video, "好") for predictor in (full, low))
    assert low.probabilities == pytest.approx(full.probabilities, abs=0.1)
    assert low.probabilities != full.probabilities


def test_probe_is_deterministic(run):
    predictor = senticlip.load(run, "cpu")
    one, two = (probe(predictor.model, predictor.config) for _ in range(2))
    assert set(one.modalities) == {"text", "vision"}
    for name, sequence in one.modalities.items():
        assert torch.equal(sequence.values, two.modalities[name].values)
        assert bool(sequence.mask.all())
        assert len(sequence.mask) == 4
    assert one.modalities["vision"].values.dtype == torch.uint8


def test_probe_omits_audio_of_feature_files(run):
    predictor = senticlip.load(run, "cpu")
    from_clips = predictor.config.override({"modalities": ["text", "vision", "audio"], "audio.bands": 5})
    assert probe(predictor.model, from_clips).modalities["audio"].values.shape == (4, 30, 5)
    from_file = from_clips.override({"vision.encoder": "features"})  # of unknown width
    assert "audio" not in probe(predictor.model, from_file).modalities


def test_disagreement_matches_outputs_on_probe(run):
    full, low = senticlip.load(run, "cpu"), senticlip.load(run, "cpu", "bf16")
    batch = probe(full.model, full.config)
    p, q = (predictor.output(batch).log_probs.exp() for predictor in (full, low))
    assert full.disagreement == {}
    assert low.disagreement["max_difference"] == pytest.approx(float((p - q).abs().max()), abs=1e-6)
    assert low.disagreement["flips"] == pytest.approx(float((p.argmax(1) != q.argmax(1)).float().mean()))


def test_a_model_does_not_disagree_with_itself(run, video):
    predictor = senticlip.load(run, "cpu")
    result = compare(predictor, predictor, [Clip("a", video, "开心"), Clip("b", None, "不好")], batch_size=1)
    assert result == {"n": 2, "flips": 0.0, "max_difference": 0.0, "mean_difference": 0.0}


def test_disagreement_is_measured_once_per_weights(run, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("precision.json", "openvino"))
    calls = []
    forward = SentimentModel.forward
    monkeypatch.setattr(
        SentimentModel, "forward", lambda self, *args, **kwargs: calls.append(1) or forward(self, *args, **kwargs)
    )
    first = senticlip.load(copy, "cpu", "bf16").disagreement
    assert len(calls) == 2
    assert senticlip.load(copy, "cpu", "bf16").disagreement == first
    assert len(calls) == 2
    change_weights(copy)
    assert senticlip.load(copy, "cpu", "bf16").disagreement != first
    assert len(calls) == 4
    (copy / "precision.json").write_text("{")
    assert senticlip.load(copy, "cpu", "bf16").disagreement["n"] == 4


def change_weights(run: Path) -> None:
    """Change the weights as further training would, but keep the file's modification time."""
    path = run / "model.safetensors"
    before, weights = path.stat(), load_file(path)
    name = "network.entrances.text.project.weight"
    save_file({**weights, name: -weights[name]}, path, {"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_int8_follows_changed_weights(run, tmp_path, video):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("precision.json", "openvino"))
    before = senticlip.load(copy, "cpu", "int8")(video, "开心").probabilities
    assert senticlip.load(copy, "cpu", "int8")(video, "开心").probabilities == before
    change_weights(copy)
    after = senticlip.load(copy, "cpu", "int8")(video, "开心").probabilities
    assert after == pytest.approx(senticlip.load(copy, "cpu")(video, "开心").probabilities, abs=0.03)
    assert after != before


def test_changed_config_recompiles_encoders(run, tmp_path):
    """The weights do not show, for example, the activation function."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("precision.json", "openvino"))
    first = senticlip.load(copy, "cpu", "bf16")
    config = json.loads((copy / "config.json").read_text())
    config["encoders"]["text"]["spec"]["hidden_act"] = "relu"
    (copy / "config.json").write_text(json.dumps(config))
    assert senticlip.load(copy, "cpu", "bf16")(text="开心").probabilities == pytest.approx(
        senticlip.load(copy, "cpu")(text="开心").probabilities, abs=0.03
    )
    assert senticlip.load(copy, "cpu", "bf16").disagreement != first.disagreement


def test_read_only_run_is_compiled_into_cache(run, tmp_path, video, monkeypatch):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("openvino"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    answer = senticlip.load(tmp_path / "run", precision="int8")(video, "好")
    assert not (tmp_path / "run" / "openvino").exists()
    (path,) = (tmp_path / "cache").rglob("vision.xml")
    modified = path.stat().st_mtime_ns
    assert senticlip.load(tmp_path / "run", precision="int8")(video, "好") == answer
    assert path.stat().st_mtime_ns == modified


def test_disagreement_is_measured_per_processor(run, tmp_path, monkeypatch):
    """The RUN may have been copied from another machine."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("precision.json", "openvino"))
    senticlip.load(copy, "cpu", "int8")
    monkeypatch.setattr("senticlip.precision.runtime_id", lambda: "another")
    senticlip.load(copy, "cpu", "int8")
    measured = json.loads((copy / "precision.json").read_text())
    assert len([name for name in measured if name.startswith("int8")]) == 2


def test_disagreement_of_scores_by_hand():
    one = Output(score=torch.tensor([-0.5, 0.0, 0.6, 1.0]))
    two = Output(score=torch.tensor([-0.7, 0.2, 0.6, 1.0]))
    result = disagreement([(one, two)])
    assert result == pytest.approx({"n": 4, "flips": 0.25, "max_difference": 0.2, "mean_difference": 0.1}, abs=1e-6)


def test_disagreement_accumulates_over_batches():
    """The largest difference is in the middle batch."""
    random = torch.Generator().manual_seed(0)
    p, q = (torch.randn(6, 3, generator=random).softmax(1) for _ in range(2))
    q[[0, 1, 5]] = p[[0, 1, 5]]
    q[2] = p[2].roll(1)
    batches = [(Output(log_probs=p[i : i + 2].log()), Output(log_probs=q[i : i + 2].log())) for i in (0, 2, 4)]
    flips = int((p.argmax(1) != q.argmax(1)).sum())
    assert flips > 1
    gap = (p - q).abs()
    expected = {"n": 6, "flips": flips / 6, "max_difference": float(gap.max()), "mean_difference": float(gap.mean())}
    assert disagreement(batches) == pytest.approx(expected, abs=1e-6)
    assert disagreement([]) == {"n": 0, "flips": 0, "max_difference": 0, "mean_difference": 0}


def test_disagreement_is_measured_despite_full_disk(run, tmp_path, monkeypatch):
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
        ("AMD64", None, "QUInt8"),  # Windows has no such file
        ("aarch64", "asimd", "QInt8"),
        ("arm64", None, "QInt8"),
    ],
)
def test_int8_weight_type_avoids_overflow(tmp_path, monkeypatch, machine, flags, expected):
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"flags\t: {flags}\n")
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(quantize, "Path", lambda name: tmp_path / Path(name).name)
    assert quantize.weight_type() == expected


def test_nan_outputs_are_reported_before_compiling(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("precision.json", "openvino"))
    path = tmp_path / "run" / "model.safetensors"
    weights = load_file(path)
    next(weight for name, weight in weights.items() if name.startswith("encoders.vision"))[:] = torch.nan
    save_file(weights, path, {"format": "pt"})
    for precision in ("bf16", "int8"):
        with pytest.raises(UserError, match="run: its answers are NaN, so its weights are broken"):
            senticlip.load(tmp_path / "run", "cpu", precision)


def test_unknown_precision_is_rejected(run):
    with pytest.raises(UsageError, match=", ".join(PRECISIONS)):
        senticlip.load(run, "cpu", "fp8")


def test_model_without_encoders_rejects_precision(tmp_path):
    with pytest.raises(UsageError, match=r"--precision bf16.*no encoder"):
        lower_precision(SimpleNamespace(encoders={}), tmp_path, "bf16")
