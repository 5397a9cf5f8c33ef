"""The one place that sets threads, matmul precision, memory, device and the libraries' chatter."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from typing import Any

from senticlip.structures import UsageError

# Asked for before torch starts: a missing hub must not be a 90-second wait.
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Kernels kept for shapes seen before: texts of all lengths make so many that a film's memory grew (oneDNN keeps 1024).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
# Threads wait for each other by spinning, GCC's for milliseconds, which beside another busy process takes long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_process() -> bool:
    """Whether this process speaks and writes for all that torchrun has started; true where there is only one."""
    return os.environ.get("RANK", "0") == "0"


def setup(threads: int | None = None) -> None:
    """Set torch's threads (default: OMP_NUM_THREADS, else the cores), fast fp32 products and memory; be quiet."""
    import torch
    import transformers

    torch.set_num_threads(threads or _asked() or cores())
    _choose_products()
    _keep_memory()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def _choose_products() -> None:
    """Multiply fp32 matrices at "medium" (oneDNN, up to twice as fast) where that is still fp32, else at "high".

    Processors that multiply bfloat16 fast (AMX) would round the factors to it, which a product by one shows.
    """
    import torch

    torch.set_float32_matmul_precision("medium")
    fine = torch.full((256, 256), 1 + 2**-20)
    if not torch.equal(fine @ torch.eye(256), fine):
        torch.set_float32_matmul_precision("high")


def _keep_memory() -> None:
    """Let glibc keep up to 32 MiB of freed memory, and take blocks below 16 MiB from there.

    It would give a layer's activations back to the kernel and fault the same pages in again for the next layer: 12 % of
    a forward pass of the paper's size. Who has set MALLOC_… is left alone.
    """
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(-3, 16 << 20)  # M_MMAP_THRESHOLD
            mallopt(-1, 32 << 20)  # M_TRIM_THRESHOLD


def _asked() -> int:
    """OMP_NUM_THREADS, which may be empty or a list with a number for each level; 0: not said."""
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
        torch.zeros(1, device=found).tolist()  # a name may be well formed and nothing be behind it
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise UsageError(f"--device {name}: cannot be used here ({reason}) — choose cpu, cuda or cuda:N") from None
    return found


def check_compiler(place: Any) -> None:
    """Whether torch.compile works on a device: it needs a C compiler, which not every machine has.

    Raises:
        UsageError: it does not.
    """
    import torch

    try:
        torch.compile(torch.neg)(torch.zeros(2, device=place))
    except Exception as error:  # the compiler's, the backend's, the driver's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"train.compile: torch.compile fails here ({reason}) — install gcc, or leave it out") from None
