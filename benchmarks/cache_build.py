"""Clips → cached features of frozen encoders: naively, clip by clip, against clip_set.

The third line is the vision encoder alone, on decoded frames: a lower bound for building the cache.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from benchmarks import paper, timing
from benchmarks.decode import read_all
from benchmarks.resize import processor, through_pil

from senticlip.encoders.text import load_tokenizer, tokenize
from senticlip.models import create_model
from senticlip.sources import clip_set
from senticlip.structures import Clip, Sequence


def run(quick: bool) -> None:
    """360p clips; a fresh cache in each round."""
    count = 3 if quick else 8
    torch.manual_seed(0)
    model = create_model(paper.config("frozen").override({"prompt": "none"})).eval().requires_grad_(False)
    text, vision = model.encoders["text"], model.encoders["vision"]
    model.tokenizer, peer = load_tokenizer(None), processor()
    counter = itertools.count()
    with timing.folder() as folder, torch.inference_mode():
        paths = [timing.make_video(folder / f"{i}.mp4", 640, 360, 3, seed=i) for i in range(count)]
        clips = [Clip(str(i), path, paper.TEXT + str(i)) for i, path in enumerate(paths)]

        def naive() -> tuple[np.ndarray, np.ndarray]:
            text_states, frame_states = [], []
            for clip, path in zip(clips, paths, strict=True):
                ids, mask = tokenize(model.tokenizer, [clip.text], model.experiment.text.max_length)
                text_states.append(text(Sequence(ids, mask)).values[0])
                frames = through_pil(peer, read_all(path))
                frame_states.append(torch.cat([paper.naive_images(vision, frame[None]) for frame in frames]))
            return torch.stack(text_states).numpy(), torch.stack(frame_states).numpy()

        def ours() -> tuple[np.ndarray, np.ndarray]:
            data = clip_set(clips, model, folder / f"cache-{next(counter)}")
            return tuple(data.stores[name].gather(np.arange(count))[0] for name in ("text", "vision"))

        pixels = torch.zeros(count, 6, 3, 224, 224, dtype=torch.uint8)
        ways = {
            "naive": naive,
            "ours": ours,
            "vision encoder alone": lambda: vision(Sequence(pixels, torch.ones(count, 6, dtype=torch.bool))).values,
        }
        answers, costs = timing.interleave(ways, 1 if quick else 3)
    pairs = list(zip(answers["naive"], answers["ours"], strict=True))
    gap = max(float(np.abs(one - two.astype(np.float32)).max() / np.abs(one).max()) for one, two in pairs)
    assert gap < 0.02, gap
    timing.show(f"cache of {count} clips", costs, {"ours": f"relative difference {gap:.1e} (fp16)"})


if __name__ == "__main__":
    timing.main(run, __doc__)
