"""Is training memory independent of the number of clips? An epoch of the fusion head on cached features, at two sizes.

Each size runs in a separate process, by transformers.Trainer as in ``senticlip train``. Only anonymous memory counts:
the kernel can drop pages of the memory-mapped cache at any time.

    python -m benchmarks.train_memory [--clips 2000,16000]

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

STATUS = Path("/proc/self/status")


def memory() -> int:
    """This process's anonymous memory in MiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) // 1024


def child(count: int) -> dict[str, int]:
    """Train once; returns memory in MiB before it, and its maximum, sampled every 50 ms."""
    from benchmarks import step

    from senticlip import runtime
    from senticlip.trainee import Trainee

    runtime.setup()
    with tempfile.TemporaryDirectory() as scratch:
        model, encoders = step.make_model()
        encoders.clear()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else growth could hide in what the encoders freed
        data = step.random_set(Path(scratch) / "cache", count, model.network.dims)
        size = sum(path.stat().st_size for path in Path(scratch).rglob("*.npy")) >> 20
        samples, finished = [memory()], threading.Event()

        def watch() -> None:
            while not finished.wait(0.05):
                samples.append(memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            step.by_trainer(Trainee(model), data, Path(scratch) / "out")
        finally:
            finished.set()
            watcher.join()
    return {"cache_mib": size, "anonymous_mib_before": samples[0], "anonymous_mib_at_most": max(samples)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", default="2000,16000")
    parser.add_argument("--child", type=int)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child)))
        return
    results = {}
    for count in map(int, options.clips.split(",")):
        command = [sys.executable, "-m", "benchmarks.train_memory", "--child", str(count)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        results[f"{count} clips"] = json.loads(answer.stdout.splitlines()[-1])
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
