"""From a 720p file and a text to probabilities: OpenCV, PIL and frame by frame, against the Predictor."""

from __future__ import annotations

from pathlib import Path

import torch
from benchmarks import paper, timing
from benchmarks.decode import read_all
from benchmarks.resize import processor, through_pil

from senticlip.encoders.text import tokenize
from senticlip.structures import Batch, Clip, Output, Sequence


def naive(path: Path, peer: object) -> Output:
    """Read all, PIL, one frame after the other."""
    predictor = paper.predictor("fp32")
    pixels = through_pil(peer, read_all(path))
    text = Sequence(*tokenize(predictor.tokenizer, [paper.TEXT], 64))
    with torch.no_grad():
        return paper.frame_by_frame(predictor.model, Batch({"text": text}, {}), pixels)


def run(quick: bool) -> None:
    """A clip of 4 seconds."""
    peer = processor()
    with timing.folder() as folder:
        path = timing.make_video(folder / "clip.mp4", 1280, 720, 4)
        clip = Clip("clip", path, paper.TEXT)
        ways = {"naive": lambda: naive(path, peer)}
        for name in paper.precisions(quick):
            predictor = paper.predictor(name)
            ways[f"ours {name}"] = lambda p=predictor: p.output(p.batch([clip]))
        answers, costs = timing.interleave(ways, 3 if quick else 9)
    notes = {}
    for name in paper.precisions(quick):
        gap = paper.gap(answers["naive"], answers[f"ours {name}"])
        # the two ways to resize differ by up to 1/255, so fp32 is not held to 1e-4 here
        assert gap <= max(5e-3, paper.LIMIT[name]), (name, gap)
        notes[f"ours {name}"] = f"max difference {gap:.1e}"
    timing.show("whole clip 720p", costs, notes)


if __name__ == "__main__":
    timing.main(run, __doc__)
