"""The forward pass on one decoded clip: frame by frame in torch's default fp32, against each precision."""

from __future__ import annotations

import statistics

import torch
from benchmarks import paper, timing

from senticlip.encoders.text import tokenize
from senticlip.structures import Batch, Sequence


def run(quick: bool) -> None:
    """Includes the share of this machine's matrix-product speed, measured now at the same precision."""
    naive = paper.predictor("fp32").model
    ids, mask = tokenize(paper.predictor("fp32").tokenizer, [paper.TEXT], 64)
    pixels = torch.randint(0, 256, (1, 6, 3, 224, 224), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    batch = Batch({"text": Sequence(ids, mask), "vision": Sequence(pixels, torch.ones(1, 6, dtype=torch.bool))}, {})
    work = paper.work(naive, batch)
    ways = {"frame by frame, fp32": lambda: paper.frame_by_frame(naive, batch)}
    for name in paper.precisions(quick):
        ways[f"ours {name}"] = lambda p=name: paper.predictor(p).output(batch)
        paper.predictor(name)  # load it before timing
    answers, costs = timing.interleave(ways, 2 if quick else 9)
    first = answers["frame by frame, fp32"]
    notes = {}
    for name in paper.precisions(quick):
        gap = paper.gap(first, answers[f"ours {name}"])
        assert gap <= paper.LIMIT[name], (name, gap)
        top = paper.ceiling(name)
        share = work / statistics.median(cost.cpu for cost in costs[f"ours {name}"]) / top
        notes[f"ours {name}"] = f"max difference {gap:.1e}, {share:.0%} of {top:.0f} GFLOP/cpu-s"
    timing.show(f"encode ({work:.0f} GFLOP)", costs, notes)


if __name__ == "__main__":
    timing.main(run, __doc__)
