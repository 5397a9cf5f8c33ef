"""Six frames of a clip: OpenCV reading all of it, against read_frames.

read_frames saves decoding B-frames and converting unused frames; how much that is depends on the bits per frame.

    python -m benchmarks.decode [--quick] [VIDEO …]     # your own videos instead of generated clips of 4 seconds
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from benchmarks import timing

from senticlip.data.video import read_frames


def read_all(path: Path, frames: int = 6) -> np.ndarray:
    """Decode every frame, keep those shown in the middle of ``frames`` equal parts: k×3×H×W RGB."""
    video = cv2.VideoCapture(str(path))
    images, times = [], []
    while True:
        ok, image = video.read()
        if not ok:
            break
        images.append(image)
        times.append(video.get(cv2.CAP_PROP_POS_MSEC))
    video.release()
    length = times[-1] - times[0] + sum(np.diff(times)[-1:])
    middles = times[0] + (np.arange(frames) + 0.5) * length / frames
    chosen = np.searchsorted(times, middles + 0.01, side="right") - 1
    return np.stack([images[i][..., ::-1].transpose(2, 0, 1) for i in chosen])


def frame_difference(one: np.ndarray, two: np.ndarray) -> float:
    """The largest mean difference between corresponding frames (0 … 255); different frames differ by more than 3."""
    assert one.shape == two.shape, (one.shape, two.shape)
    differences = np.abs(one.astype(np.int16) - two).mean((1, 2, 3))
    assert differences.max() < 3, f"not the same frames: {differences}"
    return float(differences.max())


def compare(title: str, path: Path, quick: bool) -> None:
    """Time both ways of reading one video."""
    ways = {"OpenCV, read all": lambda: read_all(path), "ours": lambda: read_frames(path, 6).pixels}
    answers, costs = timing.interleave(ways, 3 if quick else 9)
    gap = f"difference {frame_difference(*answers.values()):.2f}/255"
    timing.show(title, costs, {"OpenCV, read all": timing.describe(path), "ours": gap})


def run(quick: bool, videos: list[Path] | None = None) -> None:
    """720p and 360p, with the noise of a dim room and of daylight; or the given videos."""
    for path in videos or []:
        compare(f"decode {path.name}", path, quick)
    if videos:
        return
    with timing.folder() as folder:
        for name, width, height in (("720p", 1280, 720), ("360p", 640, 360)):
            for kind, noise in (("noisy", 4), ("clean", 2)):
                path = timing.make_video(folder / f"{name}-{kind}.mp4", width, height, 4, noise=noise)
                compare(f"decode {name} {kind}", path, quick)


if __name__ == "__main__":
    timing.main(run, __doc__, files=True)
