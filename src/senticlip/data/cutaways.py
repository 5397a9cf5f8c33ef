"""Which frames of a clip show its main shot, and which a cutaway: a listener, a place, something that is talked of."""

from __future__ import annotations

import numpy as np

GRID = 16
"""Pixels a side of the small pictures that are compared."""

SHIFT, ALIKE = 2, 0.67
"""Two pictures are of one shot if, moved by up to SHIFT pixels across and down, they correlate by more than ALIKE.

Of weibofaces' valid clips (zoom, pan, changing light, other faces) 98 % are told apart as features of a network that
was trained on faces tell them, between 0.65 and 0.7; docs/results.md has what it brings.
"""


def main_shot(small: np.ndarray) -> np.ndarray:
    """The frames of the largest group that looks alike; all of them, unless it is more than half of the clip.

    A frame belongs to a group if it is like any frame of it: a camera may move on slowly.

    Args:
        small: k×3×GRID×GRID.

    Returns:
        k bool, True where a frame stays.
    """
    k = len(small)
    if k < 3:
        return np.ones(k, bool)
    small = small - small.mean((1, 2, 3), keepdims=True, dtype=np.float32)
    small /= np.linalg.norm(small.reshape(k, -1), axis=1)[:, None, None, None] + 1e-6
    steps = range(-SHIFT, SHIFT + 1)
    moved = np.stack([np.roll(small, (down, across), (2, 3)).reshape(k, -1) for down in steps for across in steps])
    alike = (moved @ small.reshape(k, -1).T).max(0) > ALIKE
    linked = np.linalg.matrix_power((alike | alike.T | np.eye(k, dtype=bool)).astype(np.int64), k) > 0
    group = linked[linked.sum(1).argmax()]
    return group if 2 * group.sum() > k else np.ones(k, bool)
