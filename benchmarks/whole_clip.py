"""From a 720p file and a text to probabilities: OpenCV, PIL and one frame at a time, against the Predictor."""

from __future__ import annotations

from pathlib import Path

from benchmarks import paper, timing
from benchmarks.decode import read_all
from benchmarks.resize import processor, through_pil
from torch import Tensor

from senticlip.encoders.text import tokenize
from senticlip.structures import Batch, Clip, Output, Sequence


def naive(path: Path, peer: object) -> Output:
    """Read all frames, resize by PIL, encode one frame at a time."""
    return forward(through_pil(peer, read_all(path)))


def forward(pixels: Tensor) -> Output:
    """The naive peer's answer to normalised frames m×3×S×S."""
    predictor = paper.predictor("fp32")
    text = Sequence(*tokenize(predictor.tokenizer, [paper.TEXT], 64))
    return paper.frame_by_frame(predictor.model, Batch({"text": text}, {}), pixels)


def run(quick: bool) -> None:
    """A clip of 4 seconds."""
    peer, fp32_predictor = processor(), paper.predictor("fp32")
    with timing.folder() as folder:
        clip = Clip("clip", timing.make_video(folder / "clip.mp4", 1280, 720, 4), paper.TEXT)
        ways = {"naive": lambda: naive(folder / "clip.mp4", peer)}
        for name in paper.precisions(quick):
            predictor = paper.predictor(name)
            ways[f"ours {name}"] = lambda p=predictor: p.output(p.batch([clip]))
        answers, costs = timing.interleave(ways, 2 if quick else 9)
        batch = fp32_predictor.batch([clip])
    # frames through PIL differ from ours by up to 1/255, so models are compared on the same pixels
    expected = forward(fp32_predictor.model.encoders["vision"].normalize(batch.modalities["vision"].values[0]))
    work, notes = paper.work(fp32_predictor.model, batch), {}
    for name in paper.precisions(quick):
        gap = paper.gap(expected, answers[f"ours {name}"])
        assert gap <= paper.LIMIT[name], (name, gap)
        share = work / timing.median(costs[f"ours {name}"]).cpu / paper.ceiling(name)
        pil_gap = paper.gap(answers["naive"], answers[f"ours {name}"])
        notes[f"ours {name}"] = f"max difference {gap:.1e} (with PIL {pil_gap:.1e}), {share:.0%} of the ceiling"
    timing.show("whole clip 720p", costs, notes)


if __name__ == "__main__":
    timing.main(run, __doc__)
