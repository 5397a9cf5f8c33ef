"""`senticlip bulk` with many clips: rows per second with one and with two workers, and memory by number of rows.

Repeats the clips of a CH-SIMS folder in a manifest and answers it in separate processes: with one and with two workers
(one thread each, both on Ray, both with a warm model: only the time from the first part to the last counts), then in
one process with few and with many rows.

    python benchmarks/archive.py RUN DATA [--speed-rows 2048] [--rows 1000,20000] [--skip-speed] [--skip-memory]

Prints one JSON object. Two workers need two idle cores: each measurement includes the machine's load before it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

PART = 64
"""Rows per part."""

DRIVER = """
import json, sys, time
from senticlip.bulk import bulk
run, source, out, workers, part, how = sys.argv[1:]
address = None
if how == "ray":  # one worker on Ray, too: the same road for both
    import ray
    ray.init(num_cpus=int(workers), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    address = ray.get_runtime_context().gcs_address
rows = bulk(run, source, out, workers=int(workers), address=address, rows_per_part=int(part))
print(json.dumps([time.monotonic() for _ in rows]))
"""


def manifest(path: Path, data: Path, count: int) -> Path:
    """A manifest of ``count`` rows that repeats the data's clips."""
    with (data / "label.csv").open(encoding="utf-8-sig", newline="") as file:
        clips = list(csv.DictReader(file))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "path", "text"])
        for i, row in enumerate(islice(cycle(clips), count)):
            clip = data.resolve() / "Raw" / row["video_id"] / f"{row['clip_id']}.mp4"
            writer.writerow([f"{i:08}", clip, row["text"]])
    return path


def drive(run: Path, source: Path, out: Path, workers: int, how: str) -> tuple[list[float], dict]:
    """Answer a manifest in a separate process: the time of each row, and the resources used."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    load, memory = os.getloadavg()[0], []
    arguments = [sys.executable, "-c", DRIVER, run, source, out, str(workers), str(PART), how]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(arguments, stdout=output, env=environment)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            memory.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * resource.getpagesize())
            time.sleep(0.2)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert not status, "bulk failed"
        output.seek(0)
        stamps = json.loads(output.read())
    return stamps, {
        "load_before": round(load, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "rss_mib_at_half": round(memory[len(memory) // 2] / 2**20),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--speed-rows", type=int, default=2048)
    parser.add_argument("--rows", default="1000,20000")
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    options = parser.parse_args()
    result: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if not options.skip_speed:
            source = manifest(folder / "speed.csv", options.data, options.speed_rows)
            for workers in (1, 2):
                stamps, resources = drive(options.run, source, folder / f"speed{workers}", workers, "ray")
                # the first part of each worker is its warm-up
                first = workers * PART
                rate = (len(stamps) - first) / (stamps[-1] - stamps[first - 1])
                result[f"{workers}_on_ray"] = {
                    "rows_per_second": round(rate, 2),
                    "load_before": resources["load_before"],
                }
            result["gain"] = round(result["2_on_ray"]["rows_per_second"] / result["1_on_ray"]["rows_per_second"], 2)
        for count in () if options.skip_memory else map(int, options.rows.split(",")):
            source = manifest(folder / f"{count}.csv", options.data, count)
            stamps, resources = drive(options.run, source, folder / f"memory{count}", 1, "process")
            size = sum(path.stat().st_size for path in (folder / f"memory{count}").glob("part-*.parquet"))
            result[f"{count}_rows"] = {
                **resources,
                "cpu_ms_per_row": round(1000 * resources["cpu_seconds"] / count, 1),
                "bytes_per_row": round(size / count),
            }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
