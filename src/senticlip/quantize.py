"""int8 quantisation of an ONNX file: which matrix products, and which weight type on this processor."""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import Any


def quantize(path: Path) -> Path:
    """Write ``int8.onnx`` next to a file: dynamic quantisation of its matrix products, weights in 8 bits.

    Convolutions, which would get slower, and the ``fp32_products`` stay in fp32.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_name("int8.onnx")
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        quantize_dynamic(
            str(path),
            str(target),
            weight_type=QuantType[weight_type()],
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=fp32_products(onnx.load(str(path), load_external_data=False).graph),
        )
    finally:
        root.setLevel(level)
    return target


def fp32_products(graph: Any) -> list[str]:
    """The names of the products that stay in fp32: cheap, but with the most effect on the output (docs/experiments.md).

    These are the network after the encoders, and the second product of each feed-forward layer of the text encoder:
    its input has large outliers, but only one 8-bit scale. Stacked matrices (in the class token's last layer) stay in
    fp32 too: onnxruntime would write them in a form that it cannot read.
    """
    shapes = {weight.name: tuple(weight.dims) for weight in graph.initializer}

    def is_spared(node: Any) -> bool:
        scopes = next((p.value for p in node.metadata_props if p.key.endswith("name_scopes")), "")
        shape = shapes.get(node.input[1], ())
        narrows = len(shape) == 2 and shape[0] > shape[1]
        return len(shape) > 2 or "'model.encoders." not in scopes or ("'model.encoders.text'" in scopes and narrows)

    names = [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and is_spared(node)]
    return [*names, *(f"{name}_MatMul" for name in names)]  # onnxruntime first turns a Gemm into a MatMul


def weight_type() -> str:
    """The type of int8 weights on this processor: QInt8, or QUInt8 on x86 without VNNI.

    Without VNNI, x86 accumulates uint8 × int8 products in 16 bits, which overflow; uint8 × uint8 products do not
    (onnxruntime, "Quantize ONNX models"). 7-bit weights would not overflow either and be a fifth faster, but would
    change more predictions (docs/experiments.md).
    """
    info = Path("/proc/cpuinfo")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return "QUInt8" if x86 and not (info.is_file() and "vnni" in info.read_text()) else "QInt8"
