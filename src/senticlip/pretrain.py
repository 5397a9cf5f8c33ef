"""``senticlip demo --pretrain``: contrastive pretraining of the demo's two towers, as in CLIP (Radford 2021).

Frames and captions come from the generator of drawn faces. No text, label or person of the demo's data sets is used,
and no caption names a sentiment. Each frame is compared with all captions of one facet (嘴角上扬 | 嘴角平直 |
嘴角下垂), so that its negatives differ only in what has to be seen. The vision tower is a small convolutional network:
a ViT of the same cost needs many more frames to recognise a mouth at any place and size (measured: after 10,000 frames
and three minutes it had learned no facet).
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn

from senticlip.data.captions import describe
from senticlip.data.faces import Expression, Person, Pose, draw
from senticlip.data.scenes import Scene
from senticlip.files import write_atomically, write_text

FOLDER = Path(__file__).parent / "towers"
ARCHITECTURE = "test_resnet"
MODEL_ARGS: dict[str, Any] = {"output_stride": 8}
MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
SIZE, WIDTH, JOINT, BATCH = 96, 128, 64, 64
WEIGHTS = {"mouth": 2.0, "brows": 3.0, "eyes": 1.5, "lips": 1.0}
"""The weight of each facet in the loss; 0.2 for all others."""


def vocabulary() -> list[str]:
    """Special tokens, ASCII, punctuation and the 3,755 common characters of GB 2312, level 1."""
    ascii_ = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    marks = list("，。！？、；：“”‘’（）《》…—·")
    common = [bytes([row, cell]).decode("gb2312", "ignore") for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF)]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ascii_, *marks, *[c for c in common if c]]


def sample(rng: Generator) -> tuple[np.ndarray, dict[str, str]]:
    """A drawn frame SIZE×SIZE×3 and its captions by facet; one in 25 shows no face."""
    person = Person.random(rng) if rng.random() > 0.04 else None
    scene, pose, expression = Scene.random(rng), Pose.random(rng), Expression.random(rng)
    return draw(person, scene, pose, expression, (SIZE, SIZE), rng).pixels, describe(person, scene, pose, expression)


class Towers(nn.Module):
    """A timm network and a BERT, each with a bias-free projection into the joint space."""

    def __init__(self) -> None:
        super().__init__()
        import timm
        from transformers import BertConfig, BertModel

        vision: Any = timm.create_model(ARCHITECTURE, num_classes=0, **MODEL_ARGS)
        self.vision = vision
        config = BertConfig(
            vocab_size=len(vocabulary()), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=2 * WIDTH, max_position_embeddings=96, initializer_range=0.06,
        )  # fmt: skip
        self.text = BertModel(config, add_pooling_layer=False)
        self.vision_projection = nn.Linear(vision.num_features, JOINT, bias=False)
        self.text_projection = nn.Linear(WIDTH, JOINT, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def see(self, frames: np.ndarray) -> Tensor:
        """Frames N×H×W×3 uint8 → unit vectors N×JOINT."""
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
        pixels = (pixels - MEAN[0]) / STD[0]
        return nn.functional.normalize(self.vision_projection(self.vision(pixels)), dim=-1)

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids and mask K×n → unit vectors K×JOINT."""
        states = self.text(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(self.text_projection(mean), dim=-1)


class Captions:
    """All captions in the given samples, by facet, and their token ids."""

    def __init__(self, frame_captions: list[dict[str, str]]) -> None:
        names = sorted({name for captions_by_facet in frame_captions for name in captions_by_facet})
        self.facets = {
            name: sorted({captions_by_facet[name] for captions_by_facet in frame_captions if name in captions_by_facet})
            for name in names
        }
        numbers = {token: number for number, token in enumerate(vocabulary())}
        captions = [caption for name in names for caption in self.facets[name]]
        width = max(map(len, captions)) + 2
        self.ids = torch.zeros(len(captions), width, dtype=torch.long)
        for row, caption in enumerate(captions):
            tokens = ["[CLS]", *caption, "[SEP]"]
            self.ids[row, : len(tokens)] = torch.tensor([numbers[token] for token in tokens])
        self.mask = (self.ids != 0).long()

    def targets(self, frame_captions: list[dict[str, str]], name: str) -> Tensor:
        """The index of each frame's caption for a facet; −100 if it has none."""
        index_of = {caption: number for number, caption in enumerate(self.facets[name])}
        return torch.tensor(
            [index_of.get(captions_by_facet.get(name, ""), -100) for captions_by_facet in frame_captions]
        )


def _loss(
    towers: Towers, frames: np.ndarray, frame_captions: list[dict[str, str]], captions: Captions
) -> tuple[Tensor, dict]:
    """Cross-entropy over the captions of each facet, and the share of frames whose caption ranks first, by facet."""
    logits = towers.logit_scale.exp() * towers.see(frames) @ towers.read(captions.ids, captions.mask).T
    total, accuracy = logits.new_zeros(()), {}
    sizes = [len(options) for options in captions.facets.values()]
    for name, facet_logits in zip(captions.facets, logits.split(sizes, 1), strict=True):
        target = captions.targets(frame_captions, name)
        has_caption = target >= 0
        if has_caption.any():
            total = total + WEIGHTS.get(name, 0.2) * nn.functional.cross_entropy(
                facet_logits[has_caption], target[has_caption]
            )
            accuracy[name] = (facet_logits[has_caption].argmax(1) == target[has_caption]).float().mean().item()
    return total, accuracy


def pretrain(out: Path = FOLDER, minutes: float = 12.0, seed: int = 0, show: Callable[[str], None] = print) -> dict:
    """Train both towers for ``minutes`` of CPU time and write them to ``out``/vision and ``out``/text.

    Returns:
        By facet, the share of new frames whose caption ranks first; ``frames`` and ``seconds``.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, 20_000_003])
    captions = Captions([sample_words(rng) for _ in range(6000)])
    towers = Towers()
    optimizer = torch.optim.AdamW(towers.parameters(), lr=3e-3, weight_decay=0.02, betas=(0.9, 0.98))
    mean: dict[str, float] = {}
    start, step = time.process_time(), 0
    while (progress := (time.process_time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 60) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        batch = [sample(rng) for _ in range(BATCH)]
        loss, accuracy = _loss(towers, np.stack([b[0] for b in batch]), [b[1] for b in batch], captions)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(towers.parameters(), 2.0)
        optimizer.step()
        mean = {name: 0.96 * mean.get(name, value) + 0.04 * value for name, value in accuracy.items()}
        step += 1
        if step % 50 == 0:
            show(f"{step * BATCH} frames, {progress:.0%}: " + ", ".join(f"{n} {v:.2f}" for n, v in mean.items()))
        if step % 200 == 0:
            write(towers, out)
    write(towers, out)
    towers.eval()
    validation = [sample(rng) for _ in range(1000)]
    with torch.no_grad():
        _, accuracy = _loss(towers, np.stack([b[0] for b in validation]), [b[1] for b in validation], captions)
    return {**accuracy, "frames": step * BATCH, "seconds": time.process_time() - start}


def sample_words(rng: Generator) -> dict[str, str]:
    """Captions by facet, without drawing the frame."""
    return describe(Person.random(rng), Scene.random(rng), Pose.random(rng), Expression.random(rng))


def write(towers: Towers, out: Path) -> None:
    """Write a timm folder and a BERT folder, weights in fp16; each file is written under a temporary name first."""
    from safetensors.torch import save_file

    vision = {
        "architecture": ARCHITECTURE, "num_classes": 0, "num_features": towers.vision.num_features,
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {"input_size": [3, SIZE, SIZE], "mean": MEAN, "std": STD, "num_classes": 0,
                           "interpolation": "bicubic", "crop_pct": 1.0, "pool_size": [12, 12]},
    }  # fmt: skip
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 96}
    files = {
        "vision/config.json": json.dumps(vision, indent=1),
        "text/config.json": towers.text.config.to_json_string(),
        "text/tokenizer_config.json": json.dumps(tokenizer, indent=1),
        "text/vocab.txt": "\n".join(vocabulary()) + "\n",
    }
    for part in ("vision", "text"):
        (out / part).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_text(out / name, content)
    for name, module in (("vision", towers.vision), ("text", towers.text)):
        state = module.state_dict().items()
        weights = {key: (value.half() if value.is_floating_point() else value).contiguous() for key, value in state}
        save = functools.partial(save_file, weights, metadata={"format": "pt"})
        write_atomically(out / name / "model.safetensors", save)
