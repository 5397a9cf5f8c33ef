"""A stand-in for Predictor whose answers are easy to predict, and films for it."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch

from senticlip.data.video import read_frames
from senticlip.structures import LABELS, Batch, Output, Prediction, Sequence, UserError

SHADES = {"negative": (200, 60, 40), "neutral": (120, 120, 120), "positive": (40, 160, 90)}


class FakePredictor:
    """Classifies text by 好 and 坏, and video by its colour; video has twice the weight. Either may be missing.

    ``fail_after``: the number of batches after which it raises an error, as if it had been killed.
    """

    def __init__(self, run: str | Path = "", fail_after: int | None = None, precision: str = "fp32") -> None:
        self.run, self.precision, self.fail_after, self.batches = Path(run), precision, fail_after, 0

    def batch(self, clips, read=read_frames, listen=None):
        self.batches += 1
        if self.fail_after is not None and self.batches > self.fail_after:
            raise RuntimeError("killed")
        values = torch.zeros(len(clips), 3, 3, 16, 16, dtype=torch.uint8)
        mask = torch.zeros(len(clips), 3, dtype=torch.bool)
        self.texts = [clip.text for clip in clips]
        for i, clip in enumerate(clips):
            if clip.text == "broken":
                raise UserError(f"{clip.id}: broken")
            if clip.video is not None:
                pixels = read(clip.video, 3, clip.start, clip.end, size=16).pixels
                values[i, : len(pixels)], mask[i, : len(pixels)] = torch.from_numpy(pixels), True
        self.seen = mask.any(1).tolist()
        return Batch({"vision": Sequence(values, mask)}, {})

    def output(self, batch):
        return Output(logits={"vision": batch.modalities["vision"].values.float().mean((1, 3, 4))})

    def predictions(self, output):
        answers = []
        colours = output.logits["vision"].tolist()
        for text, seen, (red, green, _) in zip(self.texts, self.seen, colours, strict=True):
            heads = {}
            if seen:
                heads["video"] = soft((red - green) / 40 - 1, 0.0, (green - red) / 40 - 1)
            if text is not None:
                heads["text"] = soft(2.0 * ("坏" in text), 0.5, 2.0 * ("好" in text))
            weights = {"video": 2 / 3, "text": 1 / 3} if len(heads) == 2 else dict.fromkeys(heads, 1.0)
            fused = {n: sum(weights[h] * heads[h][n] for h in heads) for n in LABELS}
            answers.append(Prediction(max(fused, key=fused.__getitem__), fused, heads, weights))
        return answers

    def predict(self, clips, batch_size=8):
        clips = list(clips)
        for i in range(0, len(clips), batch_size):
            yield from self.predictions(self.output(self.batch(clips[i : i + batch_size])))


def soft(*logits: float) -> dict[str, float]:
    """The softmax of three logits, by label."""
    exponentials = np.exp(np.array(logits) - max(logits))
    return dict(zip(LABELS, (exponentials / exponentials.sum()).tolist(), strict=True))


def write_film(path: Path, moods: list[str], seconds: float = 1.0, rate: int = 10, size=(64, 48)) -> Path:
    """A film with one plain-coloured, slightly noisy shot for each label in ``moods``."""
    random = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for mood in moods:
            for _ in range(round(seconds * rate)):
                pixels = np.full((size[1], size[0], 3), SHADES[mood], np.int16) + random.integers(
                    -5, 6, (size[1], size[0], 1)
                )
                out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), format="rgb24")))
        out.mux(stream.encode())
    return path
