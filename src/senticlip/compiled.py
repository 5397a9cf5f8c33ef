"""The encoders of a RUN, compiled by OpenVINO for this machine's processor, in bf16 or int8."""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from senticlip.encoders.vision import real_frames
from senticlip.export import import_extra, traced
from senticlip.files import staging_folder
from senticlip.progress import spinner
from senticlip.structures import Sequence, UserError

GROUP = 384
"""The number of inputs of an int8 product that share a scale; below 256 it is slower (docs/experiments.md)."""

FORMAT = 2
"""The version of the OpenVINO files; increase it when the graphs change."""


class CompiledEncoder(nn.Module):
    """A compiled copy of an encoder: same input, same output up to precision, no gradients, no hidden states.

    Shape:
        as for the encoder: text ids B×n, or frames B×m×3×S×S uint8, with their mask → Sequence B×…×d
    """

    kind = "compiled"  # no heat maps are possible

    def __init__(self, encoder: Any, graph: Any, about: str) -> None:
        super().__init__()
        self.dim, self.size, self.body = encoder.dim, getattr(encoder, "size", None), None
        self.request, self.lock = graph.create_infer_request(), Lock()
        # in the state dict, so that another compiled copy gets other cached features
        self.register_buffer("about", torch.frombuffer(bytearray(about.encode()), dtype=torch.uint8))

    def _run(self, *inputs: Tensor) -> Tensor:
        with self.lock:  # a request serves one thread at a time
            return torch.from_numpy(np.array(self.request.infer([part.numpy() for part in inputs])[0]))

    def forward(self, sequence: Sequence) -> Sequence:
        """Encode; masked frames are zero."""
        values, mask = sequence
        if self.size is None:
            return Sequence(self._run(values, mask), mask)
        return real_frames(sequence, self._run, torch.zeros(0, self.dim), apart=True)


class _TensorEncoder(nn.Module):
    """An encoder as a function of tensors."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *inputs: Tensor) -> Tensor:
        """Frames N×3×S×S uint8, or ids and mask B×n → states."""
        if len(inputs) == 1:
            return self.encoder.images(self.encoder.normalize(*inputs))
        return self.encoder(Sequence(*inputs)).values


def compile_encoders(model: Any, folder: Path, weights: str, precision: str) -> Any:
    """Replace a model's encoders by their compiled copies.

    Args:
        model: on the CPU.
        folder: the folder given to ``write_compiled``.
        weights: a fingerprint of the model's weights.
        precision: bf16, or int8 (weights and inputs of matrix products; the rest in bf16). fp32 replaces bf16 on a
            processor without it, and in int8 for networks without such products.

    Raises:
        UserError: an encoder cannot be compiled.
    """
    source = folder / "openvino"
    options = {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP if precision == "int8" else 0,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    for name, encoder in model.encoders.items():
        try:
            graph = _core().read_model(source / f"{name}.xml")
            use_bf16 = precision == "bf16" or _to_int8(graph)
            specific: dict[str, Any] = {
                "INFERENCE_PRECISION_HINT": "bf16" if use_bf16 and "BF16" in capabilities() else "f32"
            }
            if name == "text":  # a kernel would be cached for each text length: hundreds of MiB
                specific["CPU_RUNTIME_CACHE_CAPACITY"] = 0
            compiled = _core().compile_model(graph, "CPU", options | specific)
        except RuntimeError as error:
            message = f"{source}: {name} cannot be read or compiled ({_last_line(error)})"
            raise UserError(f"{message} — remove this folder, or leave out --precision") from error
        model.encoders[name] = CompiledEncoder(encoder, compiled, f"{weights} {precision} {runtime_id()}")
    return model


def is_compiled(folder: Path, weights: str) -> bool:
    """Whether ``folder/openvino`` holds the OpenVINO models of these weights."""
    marker = folder / "openvino" / "of.txt"
    return marker.is_file() and marker.read_text() == f"{FORMAT} {weights}"


def write_compiled(model: Any, folder: Path, weights: str) -> None:
    """Write a model's encoders as OpenVINO models to ``folder/openvino``, weights in fp16.

    Raises:
        UsageError: ONNX is not installed. UserError: an encoder cannot be compiled.
    """
    import_extra("onnxscript")
    openvino, target = _openvino(), folder / "openvino"
    with staging_folder(target) as temporary, spinner("compiling the encoders"):
        complete = temporary / "whole"
        complete.mkdir()
        for name, encoder in model.encoders.items():
            try:
                _trace(encoder, name, model.experiment).save(str(temporary / "graph.onnx"))
                openvino.save_model(_core().read_model(temporary / "graph.onnx"), complete / f"{name}.xml")
            except Exception as error:
                reason = _last_line(error.__cause__ or error)  # the exporter's own message is for debugging it
                raise UserError(f"{name}.encoder: cannot be compiled ({reason}) — leave out --precision") from error
        (complete / "of.txt").write_text(f"{FORMAT} {weights}")
        shutil.rmtree(target, ignore_errors=True)
        try:
            os.replace(complete, target)
        except OSError as error:
            message = f"{target}: cannot be replaced ({error.strerror})"
            raise UserError(f"{message} — remove this folder, or leave out --precision") from error


def _last_line(error: BaseException) -> str:
    """The last non-empty line: OpenVINO's messages begin with locations in its source code."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1][:120]


def _trace(encoder: Any, name: str, config: Any) -> Any:
    """The ONNX program of an encoder, for any number of rows and any text length."""
    rows = torch.export.Dim("rows")
    if name == "vision":
        inputs: tuple[Tensor, ...] = (torch.zeros(2, 3, encoder.size, encoder.size, dtype=torch.uint8),)
        shapes: list[Any] = [{0: rows}]
    else:
        length = torch.export.Dim("length", min=1, max=max(3, config.text.max_length))
        inputs = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
        shapes = [{0: rows, 1: length}] * 2
    return traced(_TensorEncoder(encoder).eval(), inputs, shapes)


def _to_int8(graph: Any) -> int:
    """Store the weights of a graph's matrix products in int8, with one scale per output; return their number.

    At run time, OpenVINO then also quantises each product's input to int8.
    """
    from openvino import opset13 as ops

    count = 0
    for node in graph.get_ops():
        weight = _constant_weight(node) if node.get_type_name() == "MatMul" else None
        if weight is None:
            continue
        axis = 1 if node.get_attributes()["transpose_b"] else 0
        scale = np.maximum(np.abs(weight).max(axis, keepdims=True), 1e-12) / 127
        rounded = ops.convert(ops.constant(np.round(weight / scale).astype(np.int8)), "f32")
        node.input(1).replace_source_output(ops.multiply(rounded, ops.constant(scale.astype(np.float32))).output(0))
        count += 1
    return count


def _constant_weight(product: Any) -> np.ndarray | None:
    """The second factor of a product, if it is a constant matrix (in the file: fp16, then a conversion)."""
    node = product.input(1).get_source_output().get_node()
    if node.get_type_name() == "Convert":
        node = node.input(0).get_source_output().get_node()
    if node.get_type_name() != "Constant" or len(node.shape) != 2:
        return None
    return node.get_data().astype(np.float32)


def _openvino() -> Any:
    """The package, without its telemetry package, which would report each import to Google Analytics."""
    modules: Any = sys.modules
    modules.setdefault("openvino_telemetry", None)
    return import_extra("openvino")


@cache
def _core() -> Any:
    return _openvino().Core()


@cache
def capabilities() -> list[str]:
    """The data types that this processor supports, as named by OpenVINO: FP32, INT8, BF16 …"""
    return list(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def runtime_id() -> str:
    """What the answers of a compiled encoder depend on besides its weights."""
    return f"OpenVINO {_openvino().__version__}, {' '.join(capabilities())}"
