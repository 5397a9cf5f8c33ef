"""Six frames of a 10-minute 720p video: OpenCV grabbing all and retrieving six, against read_frames."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from benchmarks import timing
from benchmarks.decode import frame_difference

from senticlip.data.video import read_frames


def grab_all(path: Path, count: int, frames: int = 6) -> np.ndarray:
    """Decode every frame, convert only the wanted ones: k×3×H×W RGB."""
    video = cv2.VideoCapture(str(path))
    wanted = {int((i + 0.5) * count / frames) for i in range(frames)}
    kept = []
    for number in range(count):
        assert video.grab()
        if number in wanted:
            kept.append(video.retrieve()[1][..., ::-1].transpose(2, 0, 1))
    video.release()
    return np.stack(kept)


def run(quick: bool) -> None:
    """Ten minutes; one if quick. ``read_frames`` decodes only from the keyframe before a wanted frame to that frame."""
    minutes = 1 if quick else 10
    with timing.folder() as folder:
        for gop in (2,) if quick else (2, 6):
            short = timing.make_video(folder / f"short-{gop}.mp4", 1280, 720, 6, gop=gop)
            path = timing.repeat_video(short, folder / f"long-{gop}.mp4", 10 * minutes)
            ways = {
                "OpenCV, grab all": lambda path=path: grab_all(path, 1500 * minutes),
                "ours": lambda path=path: read_frames(path, 6).pixels,
            }
            answers, costs = timing.interleave(ways, 1 if quick else 2)
            title = f"{minutes} min, key each {gop} s"
            timing.show(title, costs, {"ours": f"mean difference {frame_difference(*answers.values()):.2f}/255"})


if __name__ == "__main__":
    timing.main(run, __doc__)
