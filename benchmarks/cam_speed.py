"""How long the heat maps of one clip take: with reused activations, and the naive way.

    python benchmarks/cam_speed.py

The paper's sizes with random weights: Chinese-CLIP ViT-B/16 reads 6 frames, RoBERTa base the text. The naive way (run
the whole model for each zeroed channel) is timed on some channels and extrapolated to all; on these, both must agree.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from senticlip import cam, runtime
from senticlip.config import from_dict
from senticlip.cut import Split
from senticlip.models import create_model
from senticlip.structures import Batch, Sequence


@torch.no_grad()
def naive(model: Any, batch: Batch, index: int, channels: list[int]) -> tuple[torch.Tensor, float]:
    """Weights of some channels of the first frame by a run of the whole model each, and the CPU seconds per channel."""
    layer: Any = Split(model.encoders["vision"]).norm
    y = model(batch).log_probs.double().exp()[0, index]
    weights, began = [], time.process_time()
    for channel in channels:

        def ablate(module: Any, inputs: Any, output: torch.Tensor, channel: int = channel) -> torch.Tensor:
            output = output.clone()
            output[0, :, channel] = 0
            return output

        handle = layer.register_forward_hook(ablate)
        weights.append((y - model(batch).log_probs.double().exp()[0, index]) / y)
        handle.remove()
    return torch.stack(weights), (time.process_time() - began) / len(channels)


@torch.no_grad()
def fast(model: Any, batch: Batch, index: int, channels: list[int]) -> torch.Tensor:
    """The same weights with reused activations."""
    split = Split(model.encoders["vision"])
    activations, residual = split.before(cam.seen_frames(model, batch)[0][:1])
    features = model.encode(batch)
    output = model.fuse(features)
    states = split.ablated(activations, residual, torch.tensor(channels))
    rows = cam.repeat(features, len(channels))
    values = rows.modalities["vision"].values.clone()
    values[:, 0] = states
    rows.modalities["vision"] = Sequence(values, rows.modalities["vision"].mask)
    ablated = cam.log_odds(model.network, model.fuse(rows))[:, index]
    return cam.drop(output, cam.log_odds(model.network, output)[0, index], ablated)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--characters", type=int, default=30)
    parser.add_argument("--channels", type=int, default=4, help="of the naive way")
    options = parser.parse_args()
    runtime.setup()
    torch.manual_seed(0)
    config = from_dict(
        {
            "text": {"pretrained": False},
            "vision": {"pretrained": False, "frames": options.frames},
            "label": {"pretrained": False},
        }
    )
    model = create_model(config).eval()
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, options.frames, 3, 224, 224), generator=random, dtype=torch.uint8)
    words = torch.randint(1000, 8000, (1, options.characters), generator=random)
    batch = Batch(
        {
            "text": Sequence(words, torch.ones_like(words, dtype=torch.bool)),
            "vision": Sequence(pixels, torch.ones(1, options.frames, dtype=torch.bool)),
        },
        {},
    )
    began, busy = time.perf_counter(), time.process_time()
    cam.ablation_cam(model, batch, 0)
    took, busy = time.perf_counter() - began, time.process_time() - busy
    count = 768 * options.frames
    channels = list(range(0, 768, 768 // options.channels))[: options.channels]
    weights, each = naive(model, batch, 0, channels)
    gap = float((weights - fast(model, batch, 0, channels)).abs().max())
    print(
        f"{torch.get_num_threads()} threads, {options.frames} frames, {options.characters} characters, {count} channels"
    )
    print(f"reused activations: {took:.1f} s, {busy:.1f} CPU s")
    print(
        f"naive: {each:.2f} CPU s a channel, {each * count:.0f} CPU s for all: {each * count / busy:.0f} times as much"
    )
    print(f"weights of {len(channels)} channels differ by at most {gap:.1e}")


if __name__ == "__main__":
    main()
