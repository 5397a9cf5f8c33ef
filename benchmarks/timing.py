"""What the benchmarks share: interleaved timing, medians, the machine's GEMM ceiling and generated videos."""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch

from senticlip import runtime


class Cost(NamedTuple):
    """Seconds of a call, or their median: wall-clock time, and CPU time of all threads."""

    wall: float
    cpu: float


def once(way: Callable[[], Any]) -> tuple[Any, Cost]:
    """One call's answer and cost."""
    wall, cpu = time.perf_counter(), time.process_time()
    answer = way()
    return answer, Cost(time.perf_counter() - wall, time.process_time() - cpu)


def interleave(ways: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, Any], dict[str, list[Cost]]]:
    """Call the ways in turn, ``rounds`` times, so that other load on the machine affects all of them alike.

    Returns:
        the last answer and all costs of each way, by name.
    """
    answers: dict[str, Any] = {}
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            answers[name], cost = once(way)
            costs[name].append(cost)
    return answers, costs


def median(costs: list[Cost]) -> Cost:
    """The median of each column."""
    return Cost(*map(statistics.median, zip(*costs, strict=True)))


def show(title: str, costs: dict[str, list[Cost]], notes: dict[str, str] | None = None) -> None:
    """Print a line for each way; a ratio is the median over rounds of the first way's cost to this one's."""
    first = next(iter(costs.values()))
    for name, way_costs in costs.items():
        cost = median(way_costs)
        pairs = list(zip(first, way_costs, strict=True))
        ratio = median([Cost(a.wall / b.wall, a.cpu / b.cpu) for a, b in pairs])
        note = (notes or {}).get(name, "")
        print(
            f"{title:22} {name:26} cpu {1e3 * cost.cpu:9.1f} ms {ratio.cpu:7.2f}x   "
            f"wall {1e3 * cost.wall:9.1f} ms {ratio.wall:7.2f}x  {note}",
            flush=True,
        )


def main(run: Callable[..., None], about: str | None, files: bool = False) -> None:
    """The command line of a benchmark; ``files``: whether it also takes files."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller inputs")
    if files:
        parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    runtime.setup()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    run(options.quick, *([options.files] if files else []))


def ceiling(dtype: torch.dtype, size: int = 1536, rounds: int = 5) -> float:
    """GFLOP per CPU second of torch's matrix product: the best of several rounds."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return max(2e-9 * size**3 / once(lambda: torch.mm(a, b))[1].cpu for _ in range(rounds))


def int8_ceiling(size: int = 1536, rounds: int = 5) -> float:
    """The same for onnxruntime's product of uint8 and constant int8."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weight = numpy_helper.from_array(random.integers(-127, 127, (size, size), np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [size, size])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [size, size])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": random.integers(0, 255, (size, size), np.uint8)}
    session.run(None, feed)
    return max(2e-9 * size**3 / once(lambda: session.run(None, feed))[1].cpu for _ in range(rounds))


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder."""
    path = Path(tempfile.mkdtemp(prefix="senticlip-bench-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def make_video(
    path: Path,
    width: int,
    height: int,
    seconds: float,
    seed: int = 0,
    rate: int = 25,
    noise: float = 4,
    gop: float = 10,
) -> Path:
    """A panning textured picture with a patch that moves independently, and sensor noise; x264's defaults (B-frames).

    ``noise`` is the noise's standard deviation (of 255): the more noise, the more of the work is reading bits. ``gop``
    is the longest time between keyframes, in seconds.
    """
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.random((1, 3, 24, 40), np.float32))
    fine = torch.from_numpy(random.random((1, 3, height // 4, width // 2), np.float32))
    big = (height + 128, width + 512)
    scene = sum(
        part * torch.nn.functional.interpolate(layer, big, mode="bicubic")[0]
        for part, layer in ((190.0, coarse), (50.0, fine))
    )
    base = np.asarray(scene).transpose(1, 2, 0)
    grain = [random.normal(0, noise, (height, width, 1)).astype(np.float32) for _ in range(4)]
    patch = base[: height // 4, : width // 6, ::-1]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = round(gop * rate)
        for i in range(round(seconds * rate)):
            x, y = 256 + round(250 * np.sin(i / 60)), 64 + round(60 * np.cos(i / 45))
            image = base[y : y + height, x : x + width] + grain[i % 4]
            left, top = round((width - patch.shape[1]) * (i % 90) / 90), round(height * (0.4 + 0.3 * np.sin(i / 12)))
            image[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), "rgb24")))
        out.mux(stream.encode(None))
    return path


def describe(path: Path) -> str:
    """What ratios depend on: the bitrate, and the share of B-frames (about two in three need no decoding)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stamps = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
        seconds = (container.duration or 0) / av.time_base
    behind = np.array(stamps) < np.maximum.accumulate(stamps)  # shown before a frame that is decoded earlier
    return f"{path.stat().st_size * 8e-6 / seconds:.1f} Mbit/s, {behind.mean():.0%} B-frames"


def repeat_video(source: Path, path: Path, times: int) -> Path:
    """Repeat the packets of a video: a long video without encoding one."""
    with av.open(str(path), "w") as out:
        with av.open(str(source)) as container:
            target = out.add_stream_from_template(container.streams.video[0])
        for number in range(times):
            with av.open(str(source)) as container:
                stream: Any = container.streams.video[0]
                for packet in container.demux(stream):
                    if packet.dts is not None and packet.pts is not None:
                        packet.pts += number * stream.duration
                        packet.dts += number * stream.duration
                        packet.stream = target
                        out.mux(packet)
    return path
