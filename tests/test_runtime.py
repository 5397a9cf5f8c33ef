"""Threads, precision, memory and environment are set in one place, and a user's own settings are kept."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from senticlip import runtime


@pytest.mark.parametrize(("name", "value"), [
    ("HF_HUB_DOWNLOAD_TIMEOUT", "10"), ("TOKENIZERS_PARALLELISM", "false"), ("ORT_DISABLE_TELEMETRY", "1"),
    ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128"),
])  # fmt: skip
def test_environment_variables_that_are_set_are_kept(name, value):
    code = f"import os; from senticlip import runtime; print(os.environ['{name}'])"
    without = {key: setting for key, setting in os.environ.items() if key != name}

    def value_in(environment):
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout

    assert value_in(without).strip() == value
    assert value_in({**without, name: "7"}).strip() == "7"


def test_malloc_is_configured_unless_the_environment_does(monkeypatch):
    calls = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *option: calls.append(option)))
    monkeypatch.setattr(sys, "platform", "linux")
    for name in list(os.environ):
        if name.startswith("MALLOC_"):
            monkeypatch.delenv(name)
    runtime.setup()
    assert calls == [(-3, 16 * 2**20), (-1, 32 * 2**20)]
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    runtime.setup()
    assert len(calls) == 2


def test_matmul_precision_is_high_where_medium_would_round(monkeypatch):
    before = torch.get_float32_matmul_precision()
    try:
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.matmul(a.bfloat16(), b.bfloat16()).float())
        runtime.setup()
        assert torch.get_float32_matmul_precision() == "high"
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.matmul(a.double(), b.double()).float())
        runtime.setup()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_threads_follow_omp_num_threads_else_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    try:
        runtime.setup()
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        runtime.setup()
        assert torch.get_num_threads() == runtime.cores()
    finally:
        torch.set_num_threads(before)


def test_only_rank_0_is_the_first_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert runtime.first_process()
    for rank, first in (("0", True), ("1", False), ("10", False)):
        monkeypatch.setenv("RANK", rank)
        assert runtime.first_process() is first
