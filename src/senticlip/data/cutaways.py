"""Which frames of a clip show its main shot, and which a cutaway: a listener, a place, something that is talked of."""

from __future__ import annotations

import numpy as np

GRID = 16
"""Pixels a side of the small pictures that are compared."""

SHIFT, ALIKE = 2, 0.67
"""Two pictures are of one shot if they correlate by more than ALIKE, rolled by up to SHIFT pixels down and across.

On weibofaces' valid split (faces under zoom, pan and changing light, and other faces for a moment) the same frames stay
in 98 % of the clips as by the features of a network that was trained on faces.
"""

BLACK = 24
"""A line of pixels none of which is brighter in any frame, of 255, is of a black bar."""

PLAIN = 4.0
"""A picture none of whose colours deviates by more, of 255, shows nothing that it could share with another."""


def without_bars(frames: np.ndarray) -> np.ndarray:
    """The part of frames k×3×H×W that is not black in all of them: bars, which all share, make all shots alike."""
    bright = frames.max((0, 1), initial=0) > BLACK
    if not bright.any():
        return frames
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    return frames[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def main_shot(small: np.ndarray) -> np.ndarray:
    """The frames of the largest group that looks alike; all of them, unless it is more than half of the clip.

    A frame belongs to a group if it is like any frame of it: a camera may move on slowly.

    Args:
        small: k×3×GRID×GRID, 0 … 255, without bars.

    Returns:
        k bool, True where a frame stays.
    """
    k = len(small)
    if k < 3:
        return np.ones(k, bool)
    plain = small.std((2, 3), dtype=np.float32).max(1) < PLAIN
    small = small - small.mean((1, 2, 3), keepdims=True, dtype=np.float32)
    small /= np.linalg.norm(small.reshape(k, -1), axis=1)[:, None, None, None] + 1e-6
    steps = range(-SHIFT, SHIFT + 1)
    rolled = np.stack([np.roll(small, (down, across), (2, 3)).reshape(k, -1) for down in steps for across in steps])
    alike = ((rolled @ small.reshape(k, -1).T).max(0) > ALIKE) & ~plain & ~plain[:, None]
    linked = np.linalg.matrix_power(alike | np.eye(k, dtype=bool), k)  # of bool: numbers of ways would overflow
    group = linked[linked.sum(1).argmax()]
    return group if 2 * group.sum() > k else np.ones(k, bool)
