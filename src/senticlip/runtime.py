"""The only place that sets threads, matmul precision, memory, device and the libraries' log levels."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from typing import Any

from senticlip.structures import UsageError, first_line

# Set before torch is imported. Without a network, waiting for the hub would take 90 seconds.
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime would report each use to Microsoft
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it only warns if HOME is not writable
# By default, oneDNN caches 1024 kernels, one per shape: memory grew during a film, as each text length adds kernels.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
# OpenMP threads spin while they wait (GCC's for milliseconds), which is slow next to another busy process.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_process() -> bool:
    """Whether this is the process that prints and writes (rank 0); true without torchrun."""
    return os.environ.get("RANK", "0") == "0"


def setup() -> None:
    """Set torch's threads (default: OMP_NUM_THREADS, else the cores), fp32 matmul precision, malloc and log levels."""
    import torch
    import transformers

    torch.set_num_threads(_requested_threads() or cores())
    _set_matmul_precision()
    _keep_memory()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _set_matmul_precision() -> None:
    """Set fp32 matmuls to "medium" (oneDNN, up to twice as fast) where that still computes in fp32, else to "high".

    Processors with fast bfloat16 (AMX) would round the factors to it, which a product with the identity reveals. On a
    GPU, both settings allow TF32.
    """
    import torch

    torch.set_float32_matmul_precision("medium")
    value = torch.full((256, 256), 1 + 2**-20)
    if not torch.equal(value @ torch.eye(256), value):
        torch.set_float32_matmul_precision("high")


def _keep_memory() -> None:
    """Let glibc keep up to 32 MiB of freed memory and reuse it for blocks below 16 MiB.

    By default, it returns a layer's activations to the kernel and page-faults them in again for the next layer: 12 % of
    a forward pass at the paper's size. If a MALLOC_… variable is set, nothing is changed.
    """
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(-3, 16 << 20)  # M_MMAP_THRESHOLD
            mallopt(-1, 32 << 20)  # M_TRIM_THRESHOLD


def _requested_threads() -> int:
    """OMP_NUM_THREADS (the first number of a list for nested levels); 0 if it is not set."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def device(name: str | None = None) -> Any:
    """The torch device: the one named, else a GPU if there is one.

    Raises:
        UsageError: this device is not available.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.zeros(1, device=chosen).tolist()  # a valid name does not mean that the device exists
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).partition(". ")[0]
        raise UsageError(f"--device {name}: cannot be used here ({reason}) — choose cpu, cuda or cuda:N") from None
    return chosen


def check_compiler(torch_device: Any) -> None:
    """Try torch.compile on a device: it needs a C compiler, which not every machine has.

    Raises:
        UsageError: it does not work.
    """
    import torch

    try:
        torch.compile(torch.neg)(torch.zeros(2, device=torch_device))
    except Exception as error:  # from the compiler, the backend or the driver
        reason = first_line(error)
        raise UsageError(f"train.compile: torch.compile fails here ({reason}) — install gcc, or leave it out") from None
