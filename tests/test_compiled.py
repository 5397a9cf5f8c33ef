"""Compiled encoders match those of the RUN up to their precision; int8 weights match manual rounding."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.test_explain import run_folder

import senticlip
import tiny
from senticlip import compiled
from senticlip.cam import methods_for
from senticlip.compiled import CompiledEncoder
from senticlip.explain import explanation
from senticlip.sources import fingerprint
from senticlip.structures import Clip, Sequence, UsageError, UserError

VISION = {"clip": tiny.clip_folder, "cnn": lambda f: tiny.timm_folder(f, "test_resnet")}
VISION["vit"] = lambda f: tiny.timm_folder(f, "test_vit")
TOLERANCE = {"bf16": 0.05, "int8": 0.05}
"""The largest allowed relative error of the states, compared with torch's."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    return run_folder(folder, tiny.clip_folder(folder / "clip"))


def relative_error(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


def texts(rows: int, length: int) -> Sequence:
    random = torch.Generator().manual_seed(rows)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[-1, 1:] = False
    return Sequence(torch.randint(5, len(tiny.WORDS), (rows, length), generator=random), mask)


def frames(rows: int, length: int, size: int = 32) -> Sequence:
    random = torch.Generator().manual_seed(rows)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[-1, 1:] = False
    coarse = torch.rand(rows * length, 3, 4, 4, generator=random)
    pixels = 255 * torch.nn.functional.interpolate(coarse, (size, size))
    return Sequence(pixels.to(torch.uint8).unflatten(0, (rows, length)), mask)


def encoder_pair(run: Path, precision: str, name: str):
    """An encoder of the RUN, as it is (in inference mode) and compiled."""
    model = senticlip.load(run, "cpu").model
    compiled_encoder = senticlip.load(run, "cpu", precision).model.encoders[name]
    assert isinstance(compiled_encoder, CompiledEncoder)
    assert compiled_encoder.dim == model.encoders[name].dim
    return torch.inference_mode()(model.encoders[name]), compiled_encoder


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("kind", VISION)
def test_any_number_of_frames(tmp_path, kind, precision):
    run = run_folder(tmp_path, VISION[kind](tmp_path / "vision"))
    reference, compiled_encoder = encoder_pair(run, precision, "vision")
    for shape in ((1, 1), (2, 3), (5, 3)):  # the last is processed in several parts
        sequence = frames(*shape)
        states, mask = compiled_encoder(sequence)
        assert torch.equal(mask, sequence.mask)
        assert not states[~mask].any()
        assert relative_error(states, reference(sequence).values) < TOLERANCE[precision]
    assert not compiled_encoder(Sequence(sequence.values, torch.zeros_like(sequence.mask))).values.any()
    assert compiled_encoder.size == 32


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_any_text_length(tmp_path, kind, precision):
    text = {"encoder": str(tiny.text_folder(tmp_path / kind, kind)), "max_length": 16, "prefix_length": 2}
    run = run_folder(tmp_path, tiny.clip_folder(tmp_path / "clip"), text=text)
    reference, compiled_encoder = encoder_pair(run, precision, "text")
    for shape in ((1, 1), (1, 16), (3, 5)):
        sequence = texts(*shape)
        states, mask = compiled_encoder(sequence)
        assert torch.equal(mask, sequence.mask)
        assert 0 < relative_error(states[mask], reference(sequence).values[mask]) < TOLERANCE[precision]
    missing = compiled_encoder(Sequence(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.bool)))
    assert missing.values.isfinite().all()
    assert not missing.mask.any()


def test_only_encoders_change(run):
    full, low = (senticlip.load(run, "cpu", precision).model for precision in ("fp32", "int8"))
    one, two = full.network.state_dict(), low.network.state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_int8_weights_match_manual_rounding():
    import openvino
    from openvino import opset13 as ops

    random = np.random.default_rng(0)
    weight = random.normal(size=(4, 6)).astype(np.float32)
    weight[:, 2] = 0
    x = ops.parameter([2, 4], np.float32)
    first_product = ops.matmul(x, ops.constant(weight), False, False)
    second_product = ops.matmul(first_product, ops.constant(weight), False, True)
    # the third product has no constant weight, so it is not changed
    output = ops.matmul(second_product, ops.transpose(second_product, ops.constant([1, 0])), False, False)
    graph = openvino.Model([output], [x])
    assert compiled._to_int8(graph) == 2
    quantized = []
    for node in graph.get_ordered_ops():
        source = node.input(1).get_source_output().get_node() if node.get_type_name() == "MatMul" else None
        if source is not None and source.get_type_name() == "Multiply":
            rounded, scale = (source.input(i).get_source_output().get_node() for i in (0, 1))
            rounded = rounded.input(0).get_source_output().get_node()
            assert rounded.get_element_type() == openvino.Type.i8
            quantized.append((rounded.get_data().astype(int), scale.get_data()))
    for (rounded, scale), axis in zip(quantized, (0, 1), strict=True):  # the axis over which the product sums
        maximum = np.abs(weight).max(axis, keepdims=True)
        np.testing.assert_allclose(scale, np.maximum(maximum, 1e-12) / 127, rtol=1e-6)
        assert (np.abs(rounded).max(axis) == np.where(maximum.squeeze(axis) > 0, 127, 0)).all()
        assert np.abs(rounded * scale - weight).max() <= (scale / 2 * 1.001).max()


def test_all_products_of_encoders_are_int8(run, monkeypatch):
    """Six per layer; in the vision tower's last layer four (no keys, no values), plus patches and projection."""
    counts, to_int8 = [], compiled._to_int8
    monkeypatch.setattr(compiled, "_to_int8", lambda graph: counts.append(to_int8(graph)) or counts[-1])
    model = senticlip.load(run, "cpu", "int8").model
    layers = tiny.SMALL["num_hidden_layers"]
    assert dict(zip(model.encoders, counts, strict=True)) == {"text": 6 * layers, "vision": 6 * layers}


def test_fp32_where_lower_precision_has_no_benefit(tmp_path, monkeypatch):
    """In int8, networks without matrix products; in bf16, processors without bf16 units."""
    run = run_folder(tmp_path, VISION["cnn"](tmp_path / "vision"))
    sequence, errors, has_bf16 = frames(2, 3), {}, "BF16" in compiled.capabilities()
    for precision in ("bf16", "int8"):
        reference, compiled_encoder = encoder_pair(run, precision, "vision")
        errors[precision] = relative_error(compiled_encoder(sequence).values, reference(sequence).values)
    monkeypatch.setattr(compiled, "capabilities", lambda: ["FP32"])
    compiled_encoder = encoder_pair(run, "bf16", "vision")[1]
    errors["no units"] = relative_error(compiled_encoder(sequence).values, reference(sequence).values)
    assert errors["no units"] == errors["int8"] < 1e-3  # not 0, as the files store weights in fp16
    assert errors["bf16"] > 2 * errors["int8"] or not has_bf16


def test_each_precision_has_its_own_fingerprint(run):
    """So cached features of one precision are not used for another: the fingerprint is in their key."""
    models = [senticlip.load(run, "cpu", precision).model for precision in ("fp32", "bf16", "int8")]
    for name in ("text", "vision"):
        assert len({fingerprint(model.encoders[name], model.config.encoders[name]) for model in models}) == 3


def test_explanation_has_no_heat_maps(run, tmp_path):
    predictor = senticlip.load(run, "cpu", "int8")
    assert methods_for(predictor.model) == []
    result = explanation(predictor, Clip("a", tiny.write_clip(tmp_path / "a.mp4", 120, 1), "天气好"))
    assert result.maps is None
    assert {case.kind for case in result.cases} >= {"everything", "text", "video", "frame", "character"}


def test_compiled_once_per_weights(run, tmp_path, terminal):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("openvino"))
    senticlip.load(copy, "cpu", "bf16")
    assert "compiling the encoders" in terminal.getvalue()
    modified = (copy / "openvino" / "text.bin").stat().st_mtime_ns
    senticlip.load(copy, "cpu", "int8")
    assert (copy / "openvino" / "text.bin").stat().st_mtime_ns == modified
    (copy / "openvino" / "of.txt").write_text(f"{compiled.FORMAT} others")
    senticlip.load(copy, "cpu", "int8")
    assert (copy / "openvino" / "text.bin").stat().st_mtime_ns > modified
    assert not list(copy.glob(".openvino*"))


def test_incomplete_compiled_files(run, tmp_path):
    """A kill leaves unfinished files under another name; a folder without of.txt is compiled again."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("openvino"))
    answer = senticlip.load(copy, "cpu", "bf16")(text="天气好").probabilities
    (copy / "openvino" / "text.bin").write_bytes(b"half")
    with pytest.raises(UserError, match=r"openvino: text cannot be read or compiled \(.+\) — remove this folder"):
        senticlip.load(copy, "cpu", "bf16")
    os.remove(copy / "openvino" / "of.txt")
    assert senticlip.load(copy, "cpu", "bf16")(text="天气好").probabilities == answer


def test_compile_error_is_one_line(run, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("openvino"))

    def fail(encoder, name, config):
        raise RuntimeError("advice") from ValueError("at a place\naten::strange")

    monkeypatch.setattr(compiled, "_trace", fail)
    with pytest.raises(UserError, match=r"^text\.encoder: cannot be compiled \(aten::strange\) — leave "):
        senticlip.load(copy, "cpu", "bf16")
    assert not (copy / "openvino").exists()
    assert not list(copy.glob(".openvino*"))


def test_missing_openvino(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"openvino is not installed: pip install 'senticlip\[onnx\]'"):
        senticlip.load(run, "cpu", "int8")


def test_locked_compiled_encoders_give_one_line_error(run, tmp_path, monkeypatch):
    def busy(*_):
        raise OSError(16, "Device or resource busy")

    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("openvino"))
    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(UserError, match=r"openvino: cannot be replaced \(Device or resource busy\) — remove"):
        senticlip.load(tmp_path / "run", "cpu", "bf16")


@pytest.mark.parametrize(
    "script",
    [
        "from senticlip.compiled import capabilities; assert 'FP32' in capabilities()",
        "from senticlip.export import import_extra; import_extra('onnxruntime')",
    ],
)
def test_imports_send_no_telemetry(tmp_path, script):
    """By default, importing OpenVINO or onnxruntime stores an id of this machine in the home folder and sends it."""
    env = {k: v for k, v in os.environ.items() if k not in ("CI", "ORT_DISABLE_TELEMETRY")} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=env, check=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_compiled_files_must_match_format_and_weights(tmp_path):
    marker = tmp_path / "openvino" / "of.txt"
    marker.parent.mkdir()
    for content, usable in ((f"{compiled.FORMAT} abc", True), (f"{compiled.FORMAT - 1} abc", False), ("abc", False)):
        marker.write_text(content)
        assert compiled.is_compiled(tmp_path, "abc") == usable
        assert not compiled.is_compiled(tmp_path, "c")
