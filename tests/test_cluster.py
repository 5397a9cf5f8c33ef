"""How bulk uses Ray, shown by workers that only report where they run."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from senticlip import runtime
from senticlip.cluster import on_ray
from senticlip.structures import UserError

ray = pytest.importorskip("ray")
PARTS = 8


def reporting_worker(out: Path, workers: int) -> type:
    """A worker that reports its process, threads and GPUs for each part, once all ``workers`` have started.

    A local class, so that Ray pickles its code instead of importing this file.
    """

    class Worker:
        def __init__(self, job: dict, threads: int | None) -> None:
            self.job, self.threads, self.deadline = job, threads, time.monotonic() + 30
            (out / f"worker-{os.getpid()}").touch()

        def __call__(self, batch: dict) -> dict:
            while len(list(out.glob("worker-*"))) < workers and time.monotonic() < self.deadline:
                time.sleep(0.05)
            with (out / f"part-{batch['id'][0]}").open("a") as file:
                file.write(f"{os.getpid()} {self.threads} {len(ray.get_gpu_ids())}\n")
            if self.job.get("dies"):
                os._exit(1)
            return batch

    return Worker


def reports(out: Path) -> list[list[str]]:
    """Process, threads and GPUs for each time a part was worked on."""
    return [line.split() for path in sorted(out.glob("part-*")) for line in path.read_text().splitlines()]


def run(out: Path, device: str = "cpu", workers: int | None = None, expected: int = 1) -> set[tuple[str, str]]:
    """All parts on Ray by ``expected`` workers; the workers' threads and GPUs."""
    out.mkdir()
    done = on_ray(reporting_worker(out, expected), {"device": device}, list(range(PARTS)), None, workers)
    assert sorted(done) == list(range(PARTS))
    assert len(list(out.glob("worker-*"))) == expected
    return {(threads, gpus) for _, threads, gpus in reports(out)}


def test_ray_that_is_already_running(tmp_path):
    """One worker per GPU with all its threads, or one per core with one thread; Ray is left running."""
    ray.init(
        address="local", num_cpus=3, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    try:
        assert run(tmp_path / "gpu", device="auto") == {("None", "1")}
        assert run(tmp_path / "cpu", expected=3) == {("1", "0")}
        assert run(tmp_path / "two", workers=2, expected=2) == {("1", "0")}
        assert ray.is_initialized()
        assert ray.cluster_resources()["CPU"] == 3
    finally:
        ray.shutdown()


def test_ray_started_for_the_job(tmp_path, monkeypatch):
    """It may have more workers than cores, sends no usage reports and ends with the job."""
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    workers = runtime.cores() + 1
    assert run(tmp_path / "out", workers=workers, expected=workers) == {("1", "0")}
    assert not ray.is_initialized()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_part_that_kills_every_worker_is_not_retried_forever(tmp_path, monkeypatch):
    monkeypatch.setattr("senticlip.cluster.RETRIES", 2)
    with pytest.raises(UserError, match=r"^a worker failed: [^\n]*$"):
        list(on_ray(reporting_worker(tmp_path, 1), {"device": "cpu", "dies": True}, [0], None, 1))
    assert len(reports(tmp_path)) == 3


@pytest.mark.parametrize("port", [99999, 10**20])
def test_impossible_port(tmp_path, port):
    with pytest.raises(UserError, match=rf"--address 127\.0\.0\.1:{port}: no Ray cluster answers"):
        list(on_ray(reporting_worker(tmp_path, 1), {"device": "cpu"}, [0], f"127.0.0.1:{port}", 1))
