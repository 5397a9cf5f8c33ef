"""Compiled encoders answer as those of the RUN, up to their precision; int8 weights are those of rounding by hand."""

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
FAR = {"bf16": 0.05, "int8": 0.05}
"""How far a state may be from torch's, relative to all of them."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    return run_folder(folder, tiny.clip_folder(folder / "clip"))


def gap(one: torch.Tensor, two: torch.Tensor) -> float:
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


def both(run: Path, precision: str, name: str):
    """Of the RUN an encoder as it is, and compiled."""
    model = senticlip.load(run, "cpu").model
    twin = senticlip.load(run, "cpu", precision).model.encoders[name]
    assert isinstance(twin, CompiledEncoder)
    assert twin.dim == model.encoders[name].dim
    return torch.inference_mode()(model.encoders[name]), twin


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("kind", VISION)
def test_frames_of_any_number(tmp_path, kind, precision):
    run = run_folder(tmp_path, VISION[kind](tmp_path / "vision"))
    torch_s, twin = both(run, precision, "vision")
    for shape in ((1, 1), (2, 3), (5, 3)):  # the last is more than goes through at once
        given = frames(*shape)
        states, mask = twin(given)
        assert torch.equal(mask, given.mask)
        assert not states[~mask].any()
        assert gap(states, torch_s(given).values) < FAR[precision]
    assert not twin(Sequence(given.values, torch.zeros_like(given.mask))).values.any()
    assert twin.size == 32


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_texts_of_any_length(tmp_path, kind, precision):
    text = {"encoder": str(tiny.text_folder(tmp_path / kind, kind)), "max_length": 16, "prefix_length": 2}
    run = run_folder(tmp_path, tiny.clip_folder(tmp_path / "clip"), text=text)
    torch_s, twin = both(run, precision, "text")
    for shape in ((1, 1), (1, 16), (3, 5)):
        given = texts(*shape)
        states, mask = twin(given)
        assert torch.equal(mask, given.mask)
        assert 0 < gap(states[mask], torch_s(given).values[mask]) < FAR[precision]
    missing = twin(Sequence(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.bool)))
    assert missing.values.isfinite().all()
    assert not missing.mask.any()


def test_nothing_but_the_encoders_changes(run):
    full, low = (senticlip.load(run, "cpu", precision).model for precision in ("fp32", "int8"))
    one, two = full.network.state_dict(), low.network.state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_int8_weights_by_hand():
    import openvino
    from openvino import opset13 as ops

    random = np.random.default_rng(0)
    weight = random.normal(size=(4, 6)).astype(np.float32)
    weight[:, 2] = 0
    x = ops.parameter([2, 4], np.float32)
    across = ops.matmul(x, ops.constant(weight), False, False)
    along = ops.matmul(across, ops.constant(weight), False, True)
    both = ops.matmul(along, ops.transpose(along, ops.constant([1, 0])), False, False)  # no weight: left alone
    graph = openvino.Model([both], [x])
    assert compiled._to_int8(graph) == 2
    found = []
    for node in graph.get_ordered_ops():
        source = node.input(1).get_source_output().get_node() if node.get_type_name() == "MatMul" else None
        if source is not None and source.get_type_name() == "Multiply":
            small, scale = (source.input(i).get_source_output().get_node() for i in (0, 1))
            small = small.input(0).get_source_output().get_node()
            assert small.get_element_type() == openvino.Type.i8
            found.append((small.get_data().astype(int), scale.get_data()))
    for (small, scale), axis in zip(found, (0, 1), strict=True):  # the axis that the product sums over
        most = np.abs(weight).max(axis, keepdims=True)
        np.testing.assert_allclose(scale, np.maximum(most, 1e-12) / 127, rtol=1e-6)
        assert (np.abs(small).max(axis) == np.where(most.squeeze(axis) > 0, 127, 0)).all()
        assert np.abs(small * scale - weight).max() <= (scale / 2 * 1.001).max()


def test_all_products_of_an_encoder_are_in_int8(run, monkeypatch):
    """Six a layer, four in the tower's last (no keys, no values); there also the patches and the projection."""
    counts, to_int8 = [], compiled._to_int8
    monkeypatch.setattr(compiled, "_to_int8", lambda graph: counts.append(to_int8(graph)) or counts[-1])
    model = senticlip.load(run, "cpu", "int8").model
    layers = tiny.SMALL["num_hidden_layers"]
    assert dict(zip(model.encoders, counts, strict=True)) == {"text": 6 * layers, "vision": 6 * layers}


def test_fp32_where_less_gains_nothing(tmp_path, monkeypatch):
    """In int8 networks without a product, and in bf16 on processors without units for it."""
    run = run_folder(tmp_path, VISION["cnn"](tmp_path / "vision"))
    given, far, units = frames(2, 3), {}, "BF16" in compiled.capabilities()
    for precision in ("bf16", "int8"):
        torch_s, twin = both(run, precision, "vision")
        far[precision] = gap(twin(given).values, torch_s(given).values)
    monkeypatch.setattr(compiled, "capabilities", lambda: ["FP32"])
    twin = both(run, "bf16", "vision")[1]
    far["no units"] = gap(twin(given).values, torch_s(given).values)
    assert far["no units"] == far["int8"] < 1e-3  # the files' weights are in fp16
    assert far["bf16"] > 2 * far["int8"] or not units


def test_another_twin_has_other_features_in_the_cache(run):
    """Their key is the encoder's fingerprint."""
    models = [senticlip.load(run, "cpu", precision).model for precision in ("fp32", "bf16", "int8")]
    for name in ("text", "vision"):
        assert len({fingerprint(model.encoders[name], model.config.encoders[name]) for model in models}) == 3


def test_explained_without_heat_maps(run, tmp_path):
    predictor = senticlip.load(run, "cpu", "int8")
    assert methods_for(predictor.model) == []
    found = explanation(predictor, Clip("a", tiny.write_clip(tmp_path / "a.mp4", 120, 1), "天气好"))
    assert found.maps is None
    assert {case.kind for case in found.cases} >= {"everything", "text", "video", "frame", "character"}


def test_made_once_for_these_weights(run, tmp_path, terminal):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("openvino"))
    senticlip.load(copy, "cpu", "bf16")
    assert "compiling the encoders" in terminal.getvalue()
    made = (copy / "openvino" / "text.bin").stat().st_mtime_ns
    senticlip.load(copy, "cpu", "int8")
    assert (copy / "openvino" / "text.bin").stat().st_mtime_ns == made
    (copy / "openvino" / "of.txt").write_text(f"{compiled.FORMAT} others")
    senticlip.load(copy, "cpu", "int8")
    assert (copy / "openvino" / "text.bin").stat().st_mtime_ns > made
    assert not list(copy.glob(".openvino*"))


def test_a_twin_of_a_killed_process_is_made_again(run, tmp_path):
    """What was half made lies under another name; a folder without its mark is none."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("openvino"))
    answer = senticlip.load(copy, "cpu", "bf16")(text="天气好").probabilities
    (copy / "openvino" / "text.bin").write_bytes(b"half")
    with pytest.raises(UserError, match=r"openvino: text cannot be read or compiled \(.+\) — remove this folder"):
        senticlip.load(copy, "cpu", "bf16")
    os.remove(copy / "openvino" / "of.txt")
    assert senticlip.load(copy, "cpu", "bf16")(text="天气好").probabilities == answer


def test_what_cannot_be_compiled_is_told_in_a_line(run, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("openvino"))

    def fails(encoder, name, config):
        raise RuntimeError("advice") from ValueError("at a place\naten::strange")

    monkeypatch.setattr(compiled, "_trace", fails)
    with pytest.raises(UserError, match=r"^text\.encoder: cannot be compiled \(aten::strange\) — leave "):
        senticlip.load(copy, "cpu", "bf16")
    assert not (copy / "openvino").exists()
    assert not list(copy.glob(".openvino*"))


def test_without_openvino(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"openvino is not installed: pip install 'senticlip\[onnx\]'"):
        senticlip.load(run, "cpu", "int8")


def test_twins_that_another_holds_are_one_line(run, tmp_path, monkeypatch):
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
        "from senticlip.export import need; need('onnxruntime')",
    ],
)
def test_nothing_is_told_to_the_makers_of_libraries(tmp_path, script):
    """The imports of OpenVINO and onnxruntime keep an id of this machine at home, and send it."""
    place = {k: v for k, v in os.environ.items() if k not in ("CI", "ORT_DISABLE_TELEMETRY")} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=place, check=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_twins_of_another_format_or_of_other_weights_are_none(tmp_path):
    mark = tmp_path / "openvino" / "of.txt"
    mark.parent.mkdir()
    for written, there in ((f"{compiled.FORMAT} abc", True), (f"{compiled.FORMAT - 1} abc", False), ("abc", False)):
        mark.write_text(written)
        assert compiled.made(tmp_path, "abc") == there
        assert not compiled.made(tmp_path, "c")
