"""The one place that sets threads, matmul precision, memory, device and the libraries' log levels."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from typing import Any

from senticlip.structures import UsageError, first_line

# Set before torch is imported. Without a network, the hub would be waited for 90 seconds.
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime would tell Microsoft of each use
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where HOME cannot be written, and goes on
# oneDNN caches 1024 kernels, one for each shape: with texts of all lengths, memory grew during a film.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
# OpenMP threads wait by spinning, GCC's for milliseconds, which is slow beside another busy process.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_process() -> bool:
    """Whether this process prints and writes for all that torchrun has started (rank 0); true without torchrun."""
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

    Processors with fast bfloat16 (AMX) would round the factors to it, which a product with the identity shows. On a GPU
    both settings allow TF32.
    """
    import torch

    torch.set_float32_matmul_precision("medium")
    fine = torch.full((256, 256), 1 + 2**-20)
    if not torch.equal(fine @ torch.eye(256), fine):
        torch.set_float32_matmul_precision("high")


def _keep_memory() -> None:
    """Let glibc keep up to 32 MiB of freed memory, and take blocks below 16 MiB from there.

    By default it returns a layer's activations to the kernel and page-faults them in again for the next layer: 12 % of
    a forward pass of the paper's size. If a MALLOC_… variable is set, nothing is changed.
    """
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(-3, 16 << 20)  # M_MMAP_THRESHOLD
            mallopt(-1, 32 << 20)  # M_TRIM_THRESHOLD


def _requested_threads() -> int:
    """OMP_NUM_THREADS (its first number, of a list for nested levels); 0 if it is not set."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def device(name: str | None = None) -> Any:
    """The torch device: the one asked for, else a GPU if there is one.

    Raises:
        UsageError: there is no such device here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.zeros(1, device=found).tolist()  # a valid name does not mean that there is such a device
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).partition(". ")[0]
        raise UsageError(f"--device {name}: cannot be used here ({reason}) — choose cpu, cuda or cuda:N") from None
    return found


def check_compiler(place: Any) -> None:
    """Try torch.compile on a device: it needs a C compiler, which not every machine has.

    Raises:
        UsageError: it does not work.
    """
    import torch

    try:
        torch.compile(torch.neg)(torch.zeros(2, device=place))
    except Exception as error:  # the compiler's, the backend's, the driver's
        reason = first_line(error)
        raise UsageError(f"train.compile: torch.compile fails here ({reason}) — install gcc, or leave it out") from None
