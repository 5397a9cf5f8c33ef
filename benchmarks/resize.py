"""Six 720p frames to 224×224, normalised: PIL through Chinese-CLIP's processor, against torch on uint8."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from benchmarks import timing
from torch import Tensor

from senticlip.data.video import read_frames, resize
from senticlip.encoders.hub import OPENAI_MEAN, OPENAI_STD


def processor() -> Any:
    """Chinese-CLIP's PIL processor; the frames are squashed, not cropped."""
    from transformers import ChineseCLIPImageProcessorPil

    size = {"height": 224, "width": 224}
    return ChineseCLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=OPENAI_MEAN, image_std=OPENAI_STD)


def through_pil(way: Any, frames: np.ndarray) -> Tensor:
    """k×3×H×W uint8 → k×3×224×224 normalised, one frame at a time."""
    return torch.cat([way(frame.transpose(1, 2, 0), return_tensors="pt")["pixel_values"] for frame in frames])


def run(quick: bool) -> None:
    """Also checks that both results agree within 1/255."""
    std = torch.tensor(OPENAI_STD)[:, None, None]
    mean = torch.tensor(OPENAI_MEAN)[:, None, None]
    with timing.folder() as folder:
        frames = read_frames(timing.make_video(folder / "clip.mp4", 1280, 720, 1), 6).pixels
    peer = processor()
    ways = {
        "PIL, HF processor": lambda: through_pil(peer, frames),
        "ours": lambda: (resize(frames, 224) / 255 - mean) / std,
    }
    answers, costs = timing.interleave(ways, 3 if quick else 15)
    one, two = answers.values()
    gap = float(((one - two).abs() * std).max() * 255)
    assert gap < 1.01, gap
    timing.show("resize 6 frames", costs, {"ours": f"max difference {gap:.2f}/255"})


if __name__ == "__main__":
    timing.main(run, __doc__)
