"""The cost of `senticlip analyze` on a long film: time, memory, and a kill in the middle.

Makes a film from clips (encoded once, then its packets are repeated) and subtitles, runs `analyze` on it in a separate
process, and for comparison answers some of its lines as clips, one file each.

    python benchmarks/film.py DATA [--run RUN | --text E5 --vision EFFICIENTNET] [--hours 2] [--lines 1500]
        [--height 720] [--precision bf16] [--out DIR]

DATA: a CH-SIMS folder (Raw, label.csv). Without --run, a small-preset model with untrained fusion on the two encoders
is used: its answers are worthless, but its cost is the same. Prints one JSON object; per-core times are CPU seconds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from senticlip import load
from senticlip.structures import Clip

RATE, REEL = 25, 120
"""The film's frames per second, and the seconds of it that are encoded and then repeated."""

GAP = 0.8
"""Length of a line, as a share of the time until the next line begins."""

SAMPLES = 640
"""Sound samples per frame."""

SAMPLE = 24
"""Lines that are also answered as clips."""


class Model(NamedTuple):
    run: Path
    precision: str


def pictures(data: Path, seconds: float, height: int):
    """The frames of the data's clips, one clip after the other."""
    remaining = round(seconds * RATE)
    for path in sorted((data / "Raw").glob("*/*.mp4")):
        with av.open(str(path)) as source:
            for frame in source.decode(video=0):
                if not remaining:
                    return
                yield frame.reformat(height * 16 // 9 // 2 * 2, height, "yuv420p")
                remaining -= 1


def encode(path: Path, frames) -> Path:
    """Frames → an H.264 file with x264's default keyframes (every 250 frames and at cuts), with noise as sound."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "23"})
        stream.pix_fmt = "yuv420p"
        track = out.add_stream("aac", rate=RATE * SAMPLES, layout="mono")
        for number, frame in enumerate(frames):
            if not number:
                stream.width, stream.height = frame.width, frame.height
            frame.pts, frame.time_base, frame.pict_type = number, Fraction(1, RATE), 0
            out.mux(stream.encode(frame))
            noise = random.normal(0, 0.1, (1, SAMPLES)).astype(np.float32)
            sound = av.AudioFrame.from_ndarray(noise, "fltp", "mono")
            sound.sample_rate, sound.pts = RATE * SAMPLES, number * SAMPLES
            out.mux(track.encode(sound))
        for output_stream in (stream, track):
            out.mux(output_stream.encode(None))
    return path


def repeat(reel: Path, path: Path, seconds: float) -> Path:
    """A film that repeats the reel's packets."""
    with av.open(str(path), "w") as out, av.open(str(reel)) as source:
        new = {old.index: out.add_stream_from_template(old) for old in source.streams}
        for repetition in range(round(seconds / REEL)):
            source.seek(0)
            for packet in source.demux():
                # AAC's first packet, before 0, is kept only once: repeated, its time would go back
                if packet.dts is not None and not (repetition and packet.stream.type == "audio" and packet.pts < 0):
                    offset = round(repetition * REEL / packet.time_base)
                    packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                    packet.stream = new[packet.stream.index]
                    out.mux(packet)
    return path


def spread_lines(data: Path, seconds: float, count: int) -> list[tuple[float, float, str]]:
    """Lines spread over the film."""
    with (data / "label.csv").open(encoding="utf-8-sig", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    step = seconds / count
    return [(i * step, (i + GAP) * step, texts[i % len(texts)]) for i in range(count)]


def srt(path: Path, lines: list[tuple[float, float, str]]) -> Path:
    def clock(t: float) -> str:
        ms = round(1000 * t)
        return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02},{ms % 1000:03}"

    path.write_text(
        "\n".join(f"{i}\n{clock(s)} --> {clock(e)}\n{x}\n" for i, (s, e, x) in enumerate(lines, 1)), "utf-8"
    )
    return path


def small_run(folder: Path, text: str, vision: str) -> Path:
    """An untrained RUN of the small preset with these encoders."""
    from senticlip.encoders.text import load_tokenizer
    from senticlip.models import create_model
    from senticlip.tables import load_preset

    config = load_preset("small", [f"text.encoder={text}", f"vision.encoder={vision}", f"label.encoder={text}"])
    create_model(config, {"audio": config.audio.bands}).save_pretrained(folder)
    load_tokenizer(Path(text)).save_pretrained(folder / "tokenizer")
    return folder


def command(model: Model, film: Path, subtitles: Path, out: Path, *more: str) -> list[str]:
    verb = [sys.executable, "-m", "senticlip", "analyze", model.run, film]
    return [*verb, "--precision", model.precision, "--subtitles", subtitles, "--out", out, *more]


def measure(arguments: list[str]) -> dict:
    """Run a command; returns its seconds, CPU seconds, and memory (MiB): at 25, 50, 75 %, at the end, and its peak."""
    started, memory = time.monotonic(), []
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        fields = Path(f"/proc/{process.pid}/statm").read_text().split()
        memory.append(int(fields[1]) * resource.getpagesize() / 2**20)
        time.sleep(0.2)
    assert status == 0, arguments
    process.returncode = 0
    at = {f"rss_mib_at_{share} %": round(memory[len(memory) * share // 100]) for share in (25, 50, 75)}
    return {
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        **at,
        "rss_mib_last": round(memory[-2]),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }


def one_by_one(model: Model, reel: Path, lines: list[tuple[float, float, str]], folder: Path) -> float:
    """CPU seconds per clip of ``predict`` on one file per line (without loading the model)."""
    with av.open(str(reel)) as source:
        stream = iter(source.decode(video=0))
        clips = []
        for i, (start, end, text) in enumerate(lines):
            frames = [next(frame for frame in stream if frame.time >= start)]
            while frames[-1].time < end:
                frames.append(next(stream))
            clips.append(Clip(str(i), encode(folder / f"{i:03}.mp4", frames), text))
    predictor = load(model.run, precision=model.precision)
    list(predictor.predict(clips[:8]))
    started = time.process_time()
    count = sum(1 for _ in predictor.predict(clips, batch_size=16))
    return (time.process_time() - started) / count


def resumes_identically(model: Model, film: Path, subtitles: Path, folder: Path) -> bool:
    """Whether a run that was killed and resumed made the same files as one that was not."""
    subprocess.run(command(model, film, subtitles, folder / "whole"), check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(command(model, film, subtitles, folder / "cut"))
    while len(list((folder / "cut" / ".timeline").glob("[0-9]*.parquet"))) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command(model, film, subtitles, folder / "cut", "--resume"), check=True, stdout=subprocess.DEVNULL)
    names = ("timeline.parquet", "timeline.csv", "timeline.html")
    return all((folder / "cut" / n).read_bytes() == (folder / "whole" / n).read_bytes() for n in names)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--text", help="folder of the small preset's text encoder")
    parser.add_argument("--vision", help="folder of its image encoder")
    parser.add_argument("--hours", type=float, default=2)
    parser.add_argument("--lines", type=int, default=1500)
    parser.add_argument("--height", type=int, default=720, help="of the film's pictures")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--out", type=Path, help="keep the files here")
    options = parser.parse_args()
    if not options.run and not (options.text and options.vision):
        parser.error("give --run, or --text and --vision")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        run = options.run or small_run(folder / "run", options.text, options.vision)
        model = Model(run, options.precision)
        seconds = 3600 * options.hours
        lines = spread_lines(options.data, seconds, options.lines)
        reel = encode(folder / "reel.mp4", pictures(options.data, REEL, options.height))
        short, film = repeat(reel, folder / "short.mp4", 2 * REEL), repeat(reel, folder / "film.mp4", seconds)
        subtitles = srt(folder / "film.srt", lines)
        sample = [line for line in lines if line[1] < REEL - 1][:SAMPLE]
        cpu_seconds_per_clip = one_by_one(model, reel, sample, folder)
        resources = measure(command(model, film, subtitles, folder / "timeline"))
        short_subtitles = srt(folder / "short.srt", [line for line in lines if line[1] < 2 * REEL])
        result = {
            "height": options.height,
            "film_mb": round(film.stat().st_size / 1e6),
            "lines": options.lines,
            **resources,
            "times_real_time": round(seconds / resources["seconds"], 1),
            "times_real_time_per_core": round(seconds / resources["cpu_seconds"], 1),
            "cpu_seconds_per_line": round(resources["cpu_seconds"] / options.lines, 3),
            "cpu_seconds_per_clip_alone": round(cpu_seconds_per_clip, 3),
            "film_over_its_clips": round(resources["cpu_seconds"] / options.lines / cpu_seconds_per_clip, 2),
            "killed_and_resumed_is_the_same": resumes_identically(model, short, short_subtitles, folder),
        }
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
