"""Clips → cached features of frozen encoders: one after the other the naive way, against clip_set.

The third line is the encoders alone, on frames that are there: what the cache's building cannot go below.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from benchmarks import paper, timing
from benchmarks.decode import read_all
from benchmarks.resize import processor, through_pil

from senticlip.encoders.text import load_tokenizer
from senticlip.models import create_model
from senticlip.sources import clip_set
from senticlip.structures import Clip, Sequence


def run(quick: bool) -> None:
    """360p clips; a fresh cache in every round."""
    count = 3 if quick else 8
    torch.manual_seed(0)
    model = create_model(paper.config("frozen").override({"prompt": "none"})).eval().requires_grad_(False)
    vision, tokenizer, peer = model.encoders["vision"], load_tokenizer(None), processor()
    number = itertools.count()
    with timing.folder() as folder, torch.inference_mode():
        paths = [timing.make_video(folder / f"{i}.mp4", 640, 360, 3, seed=i) for i in range(count)]
        clips = [Clip(str(i), path, paper.TEXT + str(i)) for i, path in enumerate(paths)]

        def naive() -> np.ndarray:
            frames = [through_pil(peer, read_all(path)) for path in paths]
            return torch.stack([torch.cat([vision.images(f[None]) for f in clip]) for clip in frames]).numpy()

        def ours() -> np.ndarray:
            found = clip_set(clips, model, tokenizer, folder / f"cache-{next(number)}")
            return found.stores["vision"].gather(np.arange(count))[0]

        pixels = torch.zeros(count, 6, 3, 224, 224, dtype=torch.uint8)
        ways = {
            "naive, vision only": naive,
            "ours, text too": ours,
            "vision encoder alone": lambda: vision(Sequence(pixels, torch.ones(count, 6, dtype=torch.bool))).values,
        }
        answers, costs = timing.interleave(ways, 1 if quick else 3)
    one, two = answers["naive, vision only"], answers["ours, text too"].astype(np.float32)
    gap = float(np.abs(one - two).max() / np.abs(one).max())
    assert gap < 0.02, gap
    timing.show(f"cache of {count} clips", costs, {"ours, text too": f"relative difference {gap:.1e} (fp16)"})


if __name__ == "__main__":
    timing.main(run, __doc__)
