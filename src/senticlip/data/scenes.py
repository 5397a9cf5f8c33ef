"""The scene of a drawn face: background, light, camera, and what hides a part of the face."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "红": (190, 60, 55), "橙": (225, 140, 60), "黄": (225, 200, 90), "绿": (80, 150, 95), "青": (80, 170, 175),
    "蓝": (70, 105, 180), "紫": (130, 85, 165), "灰": (130, 130, 135), "白": (232, 230, 224), "棕": (130, 92, 62),
}  # fmt: skip
BACKGROUNDS = ("墙", "条纹", "格子", "书架", "窗", "光斑", "风景", "百叶")
COVERS = ("口罩", "话筒", "手", "杯子", "贴纸")
"""What may hide a part of the face: the first four hide the mouth, the last one brow and its eye."""


class Scene(NamedTuple):
    """What stays the same in every frame of one clip: background, light, camera, and what hides a part of the face."""

    background: str
    color: str
    seed: int
    light: float
    side: float
    cast: tuple[float, float, float]
    grain: float
    cover: str | None

    @classmethod
    def random(cls, rng: Generator, background: str | None = None, color: str | None = None) -> Scene:
        """A random scene; its background and colour may be given."""
        return cls(
            background or str(rng.choice(BACKGROUNDS)), color or str(rng.choice(list(COLORS))),
            int(rng.integers(2**31)), rng.uniform(0.65, 1.15), rng.uniform(-0.45, 0.45),
            tuple(rng.uniform(0.9, 1.1, 3).tolist()), rng.uniform(0, 5),
            str(rng.choice(COVERS)) if rng.random() < 0.2 else None,
        )  # fmt: skip


def shade(color: Color, factor: float) -> Color:
    """A lighter (factor above 1) or darker tone."""
    red, green, blue = (int(min(255, max(0, c * factor))) for c in color)
    return red, green, blue


def backdrop(background: str, color: str, seed: int, size: tuple[int, int]) -> Image.Image:
    """A background of ``size`` (width, height) pixels; the same arguments give the same picture."""
    rng = np.random.default_rng(seed)
    width, height = size
    red, green, blue = (int(np.clip(c + rng.integers(-25, 25), 0, 255)) for c in COLORS[color])
    base = (red, green, blue)
    image = Image.new("RGB", size, base)
    draw = ImageDraw.Draw(image)
    tone = lambda low=0.6, high=1.35: shade(base, rng.uniform(low, high))  # noqa: E731
    step = int(height * rng.uniform(0.08, 0.2))
    if background == "条纹":
        for x in range(-height, width, 2 * step):
            draw.polygon(
                [(x, height), (x + step, height), (x + step + height // 3, 0), (x + height // 3, 0)],
                fill=tone(0.8, 1.2),
            )
    elif background == "格子":
        for x in range(0, width, step):
            for y in range(0, height, step):
                draw.rectangle([x + 1, y + 1, x + step - 2, y + step - 2], fill=tone(0.85, 1.15))
    elif background == "书架":
        for y in range(0, height, 2 * step):
            x = 0
            while x < width:
                book_width, book_height = int(rng.integers(step // 4 + 2, step)), int(rng.integers(step, 2 * step))
                draw.rectangle([x, y + 2 * step - book_height, x + book_width, y + 2 * step - 3], fill=tone(0.5, 1.5))
                x += book_width + 1
    elif background == "窗":
        draw.rectangle([0, 0, width, height], fill=(196, 216, 232))
        for x in range(0, width, 4 * step):
            draw.rectangle([x, 0, x + step // 2, height], fill=base)
        draw.rectangle([0, height // 2, width, height // 2 + step // 2], fill=base)
    elif background == "光斑":
        for _ in range(24):
            x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
            r = int(rng.integers(step // 3, step + 2))
            draw.ellipse([x - r, y - r, x + r, y + r], fill=tone(0.8, 1.6))
    elif background == "风景":
        draw.rectangle([0, 0, width, height], fill=(160, 195, 225))
        for level in (0.45, 0.6, 0.75):
            ridge = [(x, height * (level + rng.uniform(-0.08, 0.08))) for x in range(0, width + step, step)]
            draw.polygon([*ridge, (width, height), (0, height)], fill=tone(0.6, 1.2))
    elif background == "百叶":
        for y in range(0, height, step):
            draw.rectangle([0, y, width, y + step // 2], fill=tone(0.75, 1.25))
    return image
