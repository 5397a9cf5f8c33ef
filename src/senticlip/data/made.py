"""The generated data set: short clips of drawn talking faces with Chinese lines, whose correct answers are known.

``make`` writes a CH-SIMS folder (Raw/VIDEO/CLIP.mp4 + label.csv) and ``truth.json``: how each clip was composed, where
mouth and brows are in each frame, and the best accuracies possible from text alone, video alone and both. No person,
background, topic or clause is in more than one split. The face decides: where it shows a sentiment, M is V; otherwise
M is T (Figure 1 of the paper).
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.random import Generator

from senticlip.data.faces import OVERSAMPLE, Expression, Person, Pose, draw
from senticlip.data.lines import Grammar, Line
from senticlip.data.scenes import BACKGROUNDS, COLORS, Scene, backdrop
from senticlip.files import make_folder, staging_folder
from senticlip.structures import LABELS, UsageError, polarity

SPLITS = {"train": 440, "valid": 120, "test": 520}
CLIPS_PER_VIDEO = 5
JOINT = {
    (-1, -1): 0.11, (1, 1): 0.11,  # words and face agree
    (-1, 0): 0.13, (1, 0): 0.13,   # sentiment in the words only
    (0, -1): 0.11, (0, 1): 0.11,   # sentiment in the face only
    (-1, 1): 0.06, (1, -1): 0.06,  # they contradict each other: the face decides
    (0, 0): 0.18,
}  # fmt: skip
"""Shares of (T, V); for M, text alone can reach an accuracy of 0.66, video alone 0.74, both together 1."""
SIZE, RATE, SAMPLE_RATE = 160, 10, 16_000


class Plan(NamedTuple):
    """One clip before it is drawn."""

    video_id: str
    clip_id: str
    split: str
    seed: int
    line: Line
    vision: float
    joint: float
    audio: float
    person: Person
    background: str
    color: str
    backdrop: int

    @property
    def id(self) -> str:
        """The clip's id in a CH-SIMS folder."""
        return f"{self.video_id}/{self.clip_id}"

    @property
    def kind(self) -> str:
        """How words and face relate: agree, words, face, conflict or neutral."""
        text, face = np.sign(self.line.score), np.sign(self.vision)
        if text and face:
            return "agree" if text == face else "conflict"
        return "words" if text else "face" if face else "neutral"


def make(
    out: str | Path,
    seed: int = 0,
    sound: bool = False,
    splits: dict[str, int] | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Make the data set in ``out``; one made with the same arguments is kept, one made with others is replaced.

    Args:
        out: the folder to make.
        seed: of all random choices.
        sound: give each clip a voice whose pitch and tempo follow label_A.
        splits: number of clips by split; SPLITS if None.
        workers: number of processes; with 1, this process does the work.
        progress: called with (clips done, total clips).

    Returns:
        The content of ``truth.json``: ``spec``, ``best`` (split → text, video, fused), ``clips`` (id → truth).

    Raises:
        UsageError: ``out`` holds something else, or its folder cannot be made. UserError: the disk is full.
    """
    out, splits = Path(out), splits or SPLITS
    spec = {"seed": seed, "sound": sound, "splits": splits, "version": 2}
    if out.exists() and any(out.iterdir()):
        truth = read_truth(out)
        if truth["spec"] == spec:
            return truth
    plans = plan(splits, seed)
    make_folder(out.parent)
    videos = list({p.video_id: [q for q in plans if q.video_id == p.video_id] for p in plans}.items())
    frames: dict[str, Any] = {}
    with staging_folder(out) as folder:
        building = folder / "made"
        jobs = [(building / "Raw" / name, group, sound) for name, group in videos]
        for done in _render_all(jobs, workers):
            frames |= done
            if progress:
                progress(len(frames), len(plans))
        truth = {
            "spec": spec,
            "best": {split: best([p for p in plans if p.split == split]) for split in splits},
            "clips": {p.id: _clip_truth(p, frames[p.id]) for p in plans},
        }
        _write_labels(building / "label.csv", plans)
        (building / "truth.json").write_text(json.dumps(truth, ensure_ascii=False), encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(building, out)
    return truth


def read_truth(folder: str | Path) -> dict[str, Any]:
    """What ``make`` knows about the clips of a folder.

    Raises:
        UsageError: the folder was not made by ``make``.
    """
    try:
        return json.loads((Path(folder) / "truth.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(
            f"{folder}: no readable truth.json, so this is not a generated data set — choose another folder"
        ) from None


def plan(splits: dict[str, int], seed: int) -> list[Plan]:
    """All clips; each split has the shares of JOINT, to within one clip per cell."""
    total = sum(splits.values())
    grammar = Grammar({name: n / total for name, n in splits.items()}, np.random.default_rng([seed, 1]))
    plans, video_number = [], 0
    for split_number, (split, n) in enumerate(splits.items()):
        rng = np.random.default_rng([seed, 2, split_number])
        cells = [cell for cell, count in _quota(n).items() for _ in range(count)]
        used_texts: set[str] = set()
        for i, cell_index in enumerate(rng.permutation(n)):
            if i % CLIPS_PER_VIDEO == 0:
                video_number += 1
                person, background = Person.random(rng), str(rng.choice(BACKGROUNDS))
                color, backdrop_seed = str(rng.choice(list(COLORS))), int(rng.integers(2**31))
            text, face = cells[cell_index]
            line = _unused_line(grammar, split, text, rng, used_texts)
            vision = face * float(rng.choice([0.4, 0.6, 0.8, 1.0]))
            joint = vision or line.score
            audio = joint if rng.random() < 0.7 else 0.0
            plans.append(
                Plan(
                    f"video_{video_number:04d}", f"{i % CLIPS_PER_VIDEO + 1:04d}", split, int(rng.integers(2**31)),
                    line, vision, joint, audio, person, background, color, backdrop_seed,
                )
            )  # fmt: skip
    return plans


def best(plans: list[Plan]) -> dict[str, float]:
    """The best accuracy possible on these clips from T alone, from V alone, and from both."""
    table = np.zeros((3, 3, 3))  # clips by the classes of T, V and M
    for p in plans:
        table[polarity(p.line.score), polarity(p.vision), polarity(p.joint)] += 1
    correct = {"text": table.sum(1).max(1), "video": table.sum(0).max(1), "fused": table.max(2)}
    return {name: round(float(value.sum() / max(1, len(plans))), 4) for name, value in correct.items()}


def _quota(n: int) -> dict[tuple[int, int], int]:
    """n clips divided by JOINT, by largest remainders."""
    exact = {cell: share * n for cell, share in JOINT.items()}
    counts = {cell: int(value) for cell, value in exact.items()}
    for cell in sorted(exact, key=lambda c: counts[c] - exact[c])[: n - sum(counts.values())]:
        counts[cell] += 1
    return counts


def _unused_line(grammar: Grammar, split: str, sign: int, rng: Generator, used_texts: set[str]) -> Line:
    """A line not used yet, if one is found in 50 tries."""
    for _ in range(50):
        line = grammar.line(split, sign, rng)
        if line.text not in used_texts:
            break
    used_texts.add(line.text)
    return line


def expression(sign: int, rng: Generator) -> Expression:
    """A face that shows a polarity with its mouth, and mostly with brows and eyes, too; the rest varies freely."""
    strong = rng.uniform(0.6, 1.0)
    if sign > 0:
        return Expression(strong, 0, rng.uniform(-0.1, 0.1), rng.uniform(0, 0.6), rng.uniform(0.7, 0.95),
                          strong if rng.random() < 0.8 else 0.0)  # fmt: skip
    if sign < 0:
        angry = rng.random() < 0.5
        tilt = 0.0 if rng.random() < 0.15 else (-strong if angry else strong)
        return Expression(-strong, 0, tilt, rng.uniform(-0.3, 0.2), rng.uniform(0.5, 0.9), 0.0)
    return Expression(
        rng.uniform(-0.1, 0.1), 0, rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.9), rng.uniform(0.6, 1), 0.0
    )


def _render_all(jobs: list[Any], workers: int) -> Any:
    if workers < 2:
        yield from map(_render_video, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_render_video, jobs, chunksize=2)


def _render_video(job: tuple[Path, list[Plan], bool]) -> dict[str, list[dict[str, Any]]]:
    """Draw and write the clips of one video; returns the boxes in each frame, by clip id."""
    folder, plans, sound = job
    folder.mkdir(parents=True, exist_ok=True)
    truth = {}
    for p in plans:
        rng = np.random.default_rng(p.seed)
        frames, boxes, opening = _render_clip(p, rng)
        voice = _voice(p, opening, rng) if sound else None
        _write_video(folder / f"{p.clip_id}.mp4", frames, voice)
        truth[p.id] = boxes
    return truth


def _render_clip(p: Plan, rng: Generator) -> tuple[list[np.ndarray], list[dict[str, Any]], np.ndarray]:
    """All frames of a clip, the boxes in each, and how far the mouth is open in each."""
    n = int(rng.integers(10, 15))
    scene = Scene.random(rng, p.background, p.color)._replace(seed=p.backdrop)
    large_size = (SIZE * OVERSAMPLE, SIZE * OVERSAMPLE)
    background_image = backdrop(scene.background, scene.color, scene.seed, large_size)
    base_expression, pose = expression(int(np.sign(p.vision)), rng), Pose.random(rng)
    t = np.arange(n) / RATE
    tempo = 3.0 * (1 + 0.4 * p.audio) * rng.uniform(0.85, 1.15)
    opening = (
        np.abs(np.sin(np.pi * tempo * t + rng.uniform(0, 3))) ** 1.5 * rng.uniform(0.3, 1.0) * (rng.random() < 0.85)
    )
    sway = 0.02 * np.sin(2 * np.pi * rng.uniform(0.3, 0.8, 3)[:, None] * t + rng.uniform(0, 6, 3)[:, None])
    blink = int(rng.integers(0, 3 * n))
    # the cover appears or disappears halfway through the clip; a cutaway briefly shows another place
    covered = (t < t[n // 2]) == bool(rng.integers(2))
    cutaway_frames = range(0)
    if rng.random() < 0.2:
        first = int(rng.integers(1, n - 3))
        cutaway_frames = range(first, first + int(rng.integers(2, 4)))
    cutaway_scene = Scene.random(rng)
    frames, boxes = [], []
    for i in range(n):
        frame_expression = base_expression._replace(
            open=float(opening[i]), lids=0.05 if i == blink else base_expression.lids
        )
        frame_pose = pose._replace(x=pose.x + sway[0, i], y=pose.y + sway[1, i] / 2, roll=pose.roll + 2 * sway[2, i])
        if i in cutaway_frames:
            drawn = draw(None, cutaway_scene, frame_pose, frame_expression, (SIZE, SIZE), rng)
        else:
            shown = scene if covered[i] else scene._replace(cover=None)
            drawn = draw(p.person, shown, frame_pose, frame_expression, (SIZE, SIZE), rng, background_image)
        frames.append(drawn.pixels)
        boxes.append({name: [round(v, 4) for v in box] for name, box in drawn.boxes.items()})
    return frames, boxes, opening


def _voice(p: Plan, opening: np.ndarray, rng: Generator) -> np.ndarray:
    """A buzzing tone, as loud as the mouth is open, whose pitch follows label_A: 1×samples float32."""
    n = int(len(opening) * SAMPLE_RATE / RATE)
    t = np.arange(n) / SAMPLE_RATE
    pitch = rng.uniform(110, 220) * (1 + 0.35 * p.audio) * (1 + 0.06 * (1 + p.audio) * np.sin(2 * np.pi * 2.5 * t))
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    tone = sum(np.sin(k * phase) / k for k in range(1, 9))
    volume = np.interp(t * RATE, np.arange(len(opening)), opening) * (0.12 + 0.05 * abs(p.audio))
    return (tone * volume + 0.002 * rng.standard_normal(n)).astype(np.float32)[None]


def _write_video(path: Path, frames: list[np.ndarray], voice: np.ndarray | None) -> None:
    """Write H.264 and, if there is a voice, AAC; in one thread, so that the bytes do not depend on machine load."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "crf": "20", "threads": "1"})
        video.width, video.height, video.pix_fmt = SIZE, SIZE, "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono") if voice is not None else None
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            assert voice is not None
            sound = av.AudioFrame.from_ndarray(voice, format="fltp", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
            container.mux(audio.encode(sound))
            container.mux(audio.encode())


def _clip_truth(p: Plan, frames: list[dict[str, Any]]) -> dict[str, Any]:
    composition = {
        "kind": p.kind,
        "line": p.line.kind,
        "phrases": list(p.line.phrases),
        "background": [p.background, p.backdrop],
    }
    return {"split": p.split, **composition, "rate": RATE, "frames": frames}


def _write_labels(path: Path, plans: list[Plan]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video_id", "clip_id", "text", "label", "label_T", "label_A", "label_V", "annotation", "mode"])
        for p in plans:
            scores = [f"{s:g}" for s in (p.joint, p.line.score, p.audio, p.vision)]
            word = LABELS[polarity(p.joint)].capitalize()
            writer.writerow([p.video_id, p.clip_id, p.line.text, *scores, word, p.split])
