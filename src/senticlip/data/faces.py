"""Drawn faces: a person, an expression and a pose in front of a scene → pixels, and the boxes of mouth and brows.

Face coordinates are in units of the face's half height: (0, 0) is its centre, x goes right, y down, the chin is at
y = 1. A pose turns the face (on a cylinder), tilts, scales and places it. For antialiasing, PIL draws everything at
twice the size, which is then halved.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from senticlip.data.scenes import COLORS, Color, Scene, backdrop, shade

Points = NDArray[np.float64]
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 as shares of the frame's width and height."""

HAIR = {
    "黑发": (32, 28, 28),
    "棕发": (92, 60, 40),
    "黄发": (196, 158, 84),
    "白发": (205, 205, 205),
    "红发": (150, 62, 40),
}
STYLES = ("短发", "长发", "光头", "卷发", "刘海")
OVERSAMPLE = 2


class Person(NamedTuple):
    """What stays the same in every clip of one person."""

    skin: Color
    hair: str
    style: str
    width: float
    eyes: float
    gap: float
    brow: float
    lips: float
    nose: float
    glasses: bool
    beard: bool
    clothes: str

    @classmethod
    def random(cls, rng: Generator) -> Person:
        """A random person."""
        light, warm = rng.uniform(0.45, 1.0), rng.uniform(-1, 1)
        skin = (int(238 * light), int((196 + 8 * warm) * light**1.08), int((168 - 14 * warm) * light**1.2))
        return cls(
            skin, str(rng.choice(list(HAIR))), str(rng.choice(STYLES)), rng.uniform(0.66, 0.86),
            rng.uniform(0.13, 0.19), rng.uniform(0.28, 0.36), rng.uniform(0.065, 0.1), rng.uniform(0.25, 0.35),
            rng.uniform(0.1, 0.18), bool(rng.random() < 0.25), bool(rng.random() < 0.15), str(rng.choice(list(COLORS))),
        )  # fmt: skip


class Pose(NamedTuple):
    """Where the face is (shares of the frame), its half height (share of the frame's height), and its angles (rad)."""

    x: float
    y: float
    size: float
    roll: float = 0.0
    yaw: float = 0.0
    pitch: float = 0.0

    @classmethod
    def random(cls, rng: Generator) -> Pose:
        """Anywhere in the frame at any size, with eyes, brows and mouth inside."""
        size = 0.22 * (0.52 / 0.22) ** rng.random()
        room_x, room_y = max(0.02, 0.5 - 0.62 * size), max(0.02, 0.5 - 0.78 * size)
        return cls(
            0.5 + rng.uniform(-room_x, room_x), 0.5 + rng.uniform(-room_y, room_y), size,
            float(np.clip(rng.normal(0, 0.15), -0.4, 0.4)), rng.uniform(-0.45, 0.45), rng.uniform(-0.3, 0.3),
        )  # fmt: skip


class Expression(NamedTuple):
    """What moves: ``mouth`` −1 corners down … 1 up, ``open`` 0 … 1, ``tilt`` −1 inner ends of the brows down … 1 up,
    ``lift`` of the brows −1 … 1, ``lids`` 0 shut … 1 wide, ``bend`` 0 … 1 lower lids pushed up (eyes like crescents).
    """

    mouth: float = 0.0
    open: float = 0.0
    tilt: float = 0.0
    lift: float = 0.0
    lids: float = 0.8
    bend: float = 0.0

    @classmethod
    def random(cls, rng: Generator) -> Expression:
        """All parts are drawn independently, so that none predicts another."""
        return cls(
            mouth=rng.choice([-1, 0, 1]) * rng.uniform(0.5, 1) + rng.uniform(-0.1, 0.1),
            open=rng.choice([0.0, rng.uniform(0.2, 1.0)]),
            tilt=rng.choice([-1, 0, 0, 1]) * rng.uniform(0.55, 1) + rng.uniform(-0.12, 0.12),
            lift=rng.uniform(-0.4, 1.0),
            lids=rng.choice([0.05, rng.uniform(0.35, 1), rng.uniform(0.65, 1)], p=[0.1, 0.4, 0.5]),
            bend=rng.choice([0.0, rng.uniform(0.5, 1)], p=[0.65, 0.35]),
        )


class Drawn(NamedTuple):
    """A drawn frame: pixels H×W×3 uint8, and the boxes of its visible parts (mouth, brow_left, brow_right, face)."""

    pixels: NDArray[np.uint8]
    boxes: dict[str, Box]


class _Pen:
    """Draws shapes given in face coordinates onto an image."""

    def __init__(self, image: Image.Image, pose: Pose, width: float) -> None:
        self.draw, self.pose, self.width = ImageDraw.Draw(image), pose, width
        self.shape, self.unit = image.size, pose.size * image.size[1]

    def to_pixels(self, points: Points, surface: bool = True) -> Points:
        """Face coordinates → pixels; ``surface`` points turn with the head, its outline does not."""
        x, y = np.asarray(points, float).T
        if surface:
            x = self.width * np.sin(np.arcsin(np.clip(x / self.width, -0.98, 0.98)) + self.pose.yaw)
            y = y + 0.35 * np.sin(self.pose.pitch)
        cos, sin = np.cos(self.pose.roll), np.sin(self.pose.roll)
        origin = np.array([self.pose.x * self.shape[0], self.pose.y * self.shape[1]])
        return origin + self.unit * np.stack([x * cos - y * sin, x * sin + y * cos], axis=1)

    def fill(self, points: Points, color: Color, surface: bool = True) -> None:
        """A filled polygon."""
        self.draw.polygon([tuple(p) for p in self.to_pixels(points, surface).tolist()], fill=color)

    def stroke(self, points: Points, thickness: float, color: Color, surface: bool = True) -> Points:
        """A line; its thickness is in face units. Returns the placed points."""
        placed = self.to_pixels(points, surface)
        line_width = max(1, round(thickness * self.unit))
        self.draw.line([tuple(p) for p in placed.tolist()], fill=color, width=line_width, joint="curve")
        return placed

    def box(self, placed: Points) -> Box | None:
        """The box around placed points with a margin, clipped to the frame; None if nothing is inside."""
        low, high = placed.min(0) - 0.03 * self.unit, placed.max(0) + 0.03 * self.unit
        x0, y0 = np.clip(low / self.shape, 0, 1)
        x1, y1 = np.clip(high / self.shape, 0, 1)
        return (float(x0), float(y0), float(x1), float(y1)) if x1 > x0 and y1 > y0 else None


def _oval(x: float, y: float, rx: float, ry: float, n: int = 20) -> Points:
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def _head_outline(width: float) -> Points:
    """The head: round at the top, narrower towards the chin."""
    angle = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    jaw = np.where(np.sin(angle) > 0, 1 - 0.22 * np.sin(angle) ** 2, 1.0)
    return np.stack([width * np.cos(angle) * jaw, np.sin(angle)], axis=1)


def _draw_head(pen: _Pen, person: Person) -> None:
    """Back hair, neck, shoulders, ears, head, hair, nose."""
    cloth, hair, skin = COLORS[person.clothes], HAIR[person.hair], person.skin
    if person.style == "长发":
        pen.fill(_oval(0, 0.2, person.width * 1.32, 1.35), hair, surface=False)
    pen.fill(np.array([[-0.3, 0.7], [0.3, 0.7], [0.34, 1.5], [-0.34, 1.5]]), shade(skin, 0.8), surface=False)
    pen.fill(
        np.array([[-0.42, 1.25], [0.42, 1.25], [1.5, 1.7], [1.7, 4], [-1.7, 4], [-1.5, 1.7]]), cloth, surface=False
    )
    for side in (-1, 1):
        pen.fill(_oval(side * person.width, 0.05, 0.1, 0.2), shade(skin, 0.9), surface=False)
    pen.fill(_head_outline(person.width), skin, surface=False)
    if person.style != "光头":
        edge = -0.45 if person.style == "刘海" else -0.58
        top = _head_outline(person.width * 1.06) * np.array([1, 1.08])
        cap = top[top[:, 1] < edge + 0.12]
        cap = cap[np.argsort(cap[:, 0])]
        line = np.stack([cap[::-1, 0] * 0.97, np.full(len(cap), edge)], axis=1)
        pen.fill(np.concatenate([cap, line]), hair, surface=False)
        if person.style == "卷发":
            for angle in np.linspace(np.pi * 1.05, np.pi * 1.95, 8):
                pen.fill(
                    _oval(np.cos(angle) * person.width * 1.05, np.sin(angle) * 1.02, 0.2, 0.2, 10), hair, surface=False
                )
    nose = np.array([[0.0, -0.12], [person.nose * 0.55, 0.2], [0.0, 0.24]])
    pen.stroke(nose, 0.035, shade(skin, 0.72))


def _draw_eye(pen: _Pen, person: Person, side: int, expression: Expression) -> Points:
    """One eye and its brow; returns the points of the brow."""
    t = np.linspace(-1, 1, 9)
    arch = 1 - t**2
    x, y, half_width = side * person.gap, -0.17, person.eyes
    half_height = 0.62 * half_width * expression.lids
    upper = np.stack([x + t * half_width, y - half_height * arch - 0.35 * expression.bend * half_width * arch], axis=1)
    lower = np.stack(
        [
            x + t * half_width,
            y + half_height * arch * (1 - expression.bend) - 0.3 * expression.bend * half_width * arch,
        ],
        axis=1,
    )
    if expression.lids > 0.12:
        pen.fill(np.concatenate([upper, lower[::-1]]), (240, 240, 238))
        middle = float((upper[4, 1] + lower[4, 1]) / 2)
        pen.fill(
            _oval(x, middle, 0.42 * half_width, min(0.42 * half_width, 0.5 * float(lower[4, 1] - upper[4, 1])), 10),
            (40, 30, 26),
        )
    pen.stroke(upper, 0.03, (45, 35, 32))
    # position along the brow: 0 at its inner end, 1 at its outer end
    s = np.linspace(0, 1, 7)
    height = y - 0.29 - 0.12 * expression.lift - 0.2 * expression.tilt * (1 - 1.7 * s) - 0.05 * np.sin(np.pi * s)
    brow = np.stack([side * (person.gap - 0.72 * half_width - 0.02 + s * (1.9 * half_width + 0.02)), height], axis=1)
    brow_color = HAIR[person.hair] if person.style != "光头" and person.hair not in ("白发", "黄发") else (70, 50, 40)
    return pen.stroke(brow, person.brow, brow_color)


def _draw_mouth(pen: _Pen, person: Person, expression: Expression) -> Points:
    """Lips, teeth and the dark between them; returns the points of the mouth."""
    t = np.linspace(-1, 1, 13)
    half_width = person.lips * (1 + 0.18 * max(expression.mouth, 0) - 0.22 * expression.open)
    corner = 0.5 - 0.15 * expression.mouth
    middle = 0.5 + 0.1 * expression.mouth
    midline = corner + (middle - corner) * (1 - t**2)
    opening = 0.26 * expression.open * np.sqrt(np.clip(1 - t**2, 0, 1))
    upper = np.stack([t * half_width, midline - 0.25 * opening], axis=1)
    lower = np.stack([t * half_width, midline + opening], axis=1)
    lips = shade((min(255, person.skin[0] + 35), int(person.skin[1] * 0.5), int(person.skin[2] * 0.55)), 0.85)
    outline = np.concatenate([upper, lower[::-1]])
    placed = pen.to_pixels(outline)
    if expression.open > 0.08:
        pen.fill(outline, (72, 22, 26))
        if expression.open > 0.3:
            teeth = np.stack([t * half_width * 0.8, midline - 0.2 * opening + 0.3 * opening], axis=1)
            pen.fill(np.concatenate([upper * [0.8, 1], teeth[::-1]]), (236, 232, 224))
        pen.stroke(lower, 0.06, lips)
    pen.stroke(upper, 0.075, lips if expression.open > 0.08 else shade(lips, 0.7))
    return placed


def _draw_cover(pen: _Pen, person: Person, cover: str) -> tuple[str, ...]:
    """Draw what hides a part of the face; returns the names of the hidden parts."""
    if cover == "口罩":
        mask = np.array(
            [[-0.95, 0.12], [0, 0.02], [0.95, 0.12], [0.78, 0.6], [0.45, 0.92], [-0.45, 0.92], [-0.78, 0.6]]
        )
        pen.fill(mask * [person.width, 1], (176, 205, 218))
        return ("mouth",)
    if cover == "贴纸":
        pen.fill(_oval(person.gap + 0.05, -0.32, 0.34, 0.34), (235, 205, 70), surface=False)
        pen.fill(_oval(person.gap + 0.05, -0.32, 0.2, 0.2), (240, 120, 60), surface=False)
        return ("brow_right",)
    if cover == "话筒":
        pen.fill(_oval(0.05, 0.56, 0.4, 0.34), (48, 48, 52))
        pen.fill(np.array([[-0.12, 0.8], [0.22, 0.8], [0.3, 2.2], [0.0, 2.2]]), (80, 80, 86))
    elif cover == "杯子":
        pen.fill(np.array([[-0.42, 0.28], [0.5, 0.28], [0.42, 1.1], [-0.34, 1.1]]), (240, 240, 236))
        pen.fill(np.array([[-0.4, 0.55], [0.48, 0.55], [0.46, 0.72], [-0.38, 0.72]]), (90, 150, 120))
    else:
        for finger in range(4):
            pen.fill(_oval(-0.33 + 0.22 * finger, 0.56, 0.12, 0.36), shade(person.skin, 0.93))
        pen.fill(_oval(0, 1.0, 0.5, 0.3), shade(person.skin, 0.88))
    return ("mouth",)


def draw(person: Person | None, scene: Scene, pose: Pose, expression: Expression, size: tuple[int, int], rng: Generator,
         back: Image.Image | None = None) -> Drawn:  # fmt: skip
    """One frame of ``size`` (width, height) pixels; without a person, a cutaway to the bare scene.

    ``back``: the scene's backdrop at OVERSAMPLE times the size, if the caller keeps it from frame to frame.
    """
    large_size = (size[0] * OVERSAMPLE, size[1] * OVERSAMPLE)
    image = back.copy() if back else backdrop(scene.background, scene.color, scene.seed, large_size)
    boxes: dict[str, Box] = {}
    if person is not None:
        pen = _Pen(image, pose, person.width)
        _draw_head(pen, person)
        brows = [_draw_eye(pen, person, side, expression) for side in (-1, 1)]
        if person.beard:
            pen.stroke(
                _head_outline(person.width * 0.9)[3:16] * [1, 0.92], 0.16, shade(HAIR[person.hair], 0.9), surface=False
            )
        parts = {"mouth": _draw_mouth(pen, person, expression), "brow_left": brows[0], "brow_right": brows[1]}
        parts["face"] = pen.to_pixels(_head_outline(person.width), surface=False)
        if person.glasses:
            for side in (-1, 1):
                ring = _oval(side * person.gap, -0.15, 0.25, 0.2, 16)
                pen.stroke(np.concatenate([ring, ring[:1]]), 0.03, (35, 35, 40))
        for name in _draw_cover(pen, person, scene.cover) if scene.cover else ():
            del parts[name]
        boxes = {name: box for name, points in parts.items() if (box := pen.box(points))}
    pixels = np.asarray(image.reduce(OVERSAMPLE), np.float32)
    x = np.linspace(-1, 1, size[0], dtype=np.float32)[None, :, None]
    pixels = pixels * (scene.light * (1 + scene.side * x) * np.asarray(scene.cast, np.float32))
    if scene.grain > 1:
        pixels += scene.grain * rng.standard_normal(pixels.shape[:2], np.float32)[..., None]
    return Drawn(np.clip(pixels, 0, 255).astype(np.uint8), boxes)
