"""A checkpoint as a callable: the basis of analyze, explain, bulk and serve."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import torch

from senticlip import runtime
from senticlip.data.audio import log_mel, read_audio
from senticlip.data.loader import padded
from senticlip.data.video import Frames, read_frames
from senticlip.encoders.text import tokenize
from senticlip.metrics import score_class
from senticlip.precision import lower_precision
from senticlip.sources import reads_log_mel
from senticlip.structures import (
    LABELS,
    PRECISIONS,
    SURFACE,
    Batch,
    Clip,
    Output,
    Prediction,
    Sequence,
    UsageError,
    UserError,
    text_or_none,
)


def load(run: str | Path, device: str | None = None, precision: str = "fp32") -> Predictor:
    """Load the Predictor of a RUN folder, a hub id, or an ONNX file written by ``senticlip export``.

    Sets torch's threads and matmul precision for the whole process (``runtime.setup``).

    Args:
        run: the folder, hub id or file.
        device: cpu, cuda, cuda:N; by default, a GPU if there is one.
        precision: fp32, bf16 or int8 (of the encoders; an ONNX file keeps its own).

    Raises:
        UsageError: no such RUN, device or precision. UserError: a file of the RUN is broken or missing.
    """
    return Predictor(run, device, precision)


class Predictor:
    """``predictor("clip.mp4", text="…")`` → Prediction; video or text may be left out. Made by :func:`load`.

    ``run`` is the folder (for a hub id, its snapshot) or the ONNX file. ``disagreement`` is how much a reduced
    precision changes on synthetic input (``senticlip export RUN --data DIR`` measures it on your data); empty for fp32.
    """

    def __init__(self, run: str | Path, device: str | None = None, precision: str = "fp32") -> None:
        runtime.setup()
        if precision not in PRECISIONS:
            raise UsageError(f"precision: {precision!r} — choose one of {', '.join(PRECISIONS)}")
        self.run, self.precision = Path(run), precision
        self.disagreement: dict[str, float] = {}
        self.model: Any
        if self.run.suffix == ".onnx":
            if precision != "fp32":
                raise UsageError(f"{run}: the precision of an ONNX file is chosen at export (--int8)")
            if device not in (None, "cpu"):
                raise UsageError(f"device {device}: an exported file runs on the CPU — leave it out")
            from senticlip.export import OnnxModel

            self.model = OnnxModel(self.run)
        else:
            from senticlip.models.base import SentimentModel, run_folder

            torch_device = runtime.device(device)
            self.run = run_folder(run)
            self.model = SentimentModel.from_pretrained(self.run).to(torch_device)
        self.tokenizer, self.config = self.model.tokenizer, self.model.experiment
        if precision != "fp32":
            self.model, self.disagreement = lower_precision(self.model, self.run, precision)

    def __call__(
        self,
        video: str | Path | None = None,
        text: str | None = None,
        start: float | None = None,
        end: float | None = None,
    ) -> Prediction:
        """Predict one clip, or its piece from ``start`` to ``end`` seconds; a blank text or path counts as missing.

        Raises:
            UsageError: the input has nothing that this model reads. UserError: the video cannot be read.
        """
        path: Any = video  # batch converts a str
        return next(self.predict([Clip("", path, text, start=start, end=end)]))

    def predict(self, clips: Iterable[Clip], batch_size: int = 8) -> Iterator[Prediction]:
        """Yield the prediction of each clip, in order, computed ``batch_size`` at a time.

        Raises:
            UsageError: ``batch_size`` is below 1. UsageError, UserError: as for a single clip.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size: {batch_size} — must be at least 1")
        clips = iter(clips)
        while chunk := list(islice(clips, batch_size)):
            yield from self.predictions(self.output(self.batch(chunk)))

    def batch(
        self,
        clips: list[Clip],
        read: Callable[..., Frames] = read_frames,
        listen: Callable[..., np.ndarray] = read_audio,
    ) -> Batch:
        """Read clips (frames, log-mel, token ids) into one batch on the model's device.

        Args:
            clips: as many as fit in memory together.
            read: replaces ``data.video.read_frames``, for a film that is already open.
            listen: replaces ``data.audio.read_audio``, likewise.

        Raises:
            UsageError: there are no clips, one is not a Clip, or one has nothing that this model reads. UserError: a
                video cannot be read.
        """
        if not clips:
            raise UsageError("batch: no clip given — give at least one")
        clips = [_validated(clip) for clip in clips]
        inputs: dict[str, tuple[Any, Any]] = {}  # values and mask
        if "text" in self.model.encoders:
            inputs["text"] = tokenize(self.tokenizer, [clip.text for clip in clips], self.config.text.max_length)
        if "vision" in self.model.encoders:
            inputs["vision"] = self._padded_frames(clips, read)
        if reads_log_mel(self.config):
            inputs["audio"] = self._padded_sound(clips, listen)
        for i, clip in enumerate(clips):
            if not any(mask[i].any() for _, mask in inputs.values()):
                needs = " or ".join(SURFACE[name] for name in inputs) or "feature files, not clips"
                raise UsageError(f"{clip.id or clip.video or 'clip'}: nothing to read — this model reads {needs}")
        device = self.model.device
        pairs = {name: [torch.as_tensor(part).to(device) for part in parts] for name, parts in inputs.items()}
        return Batch({name: Sequence(*pair) for name, pair in pairs.items()}, {})

    def _padded_frames(self, clips: list[Clip], read: Callable[..., Frames]) -> tuple[np.ndarray, np.ndarray]:
        encoder: Any = self.model.encoders["vision"]
        m, size, cutaways = self.config.vision.frames, encoder.size, self.config.vision.cutaways
        no_frames = np.zeros((0, 3, size, size), np.uint8)
        rows = [
            no_frames if c.video is None else read(c.video, m, c.start, c.end, size=size, cutaways=cutaways).pixels
            for c in clips
        ]
        return padded(rows)

    def _padded_sound(self, clips: list[Clip], listen: Callable[..., np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The log-mel of each clip; a clip without a video, or whose video has no sound, gets an empty row."""
        bands, average = self.config.audio.bands, self.config.audio.average
        sounds = [np.zeros(0) if c.video is None else listen(c.video, c.start, c.end) for c in clips]
        return padded([log_mel(sound, bands, average) for sound in sounds])

    @torch.inference_mode()
    def output(self, batch: Batch, attention: bool = False) -> Output:
        """The model's output for a batch, with ``alone`` filled in."""
        return self.model(batch, attention=attention, alone=True)

    def predictions(self, output: Output) -> list[Prediction]:
        """A Prediction for each row of an output, with modalities by their surface names.

        Raises:
            UserError: the output contains NaN.
        """
        if not output.are_numbers().all():
            raise UserError("the model's answer is NaN, so its weights are broken — train or copy it again")
        if output.score is not None:
            scores = output.score.float().cpu().numpy()
            return [
                Prediction(LABELS[c], {}, {}, {}, float(s)) for s, c in zip(scores, score_class(scores), strict=True)
            ]
        assert output.log_probs is not None
        fused = output.log_probs.exp().cpu().tolist()
        alone = {name: log_probs.exp().cpu().tolist() for name, log_probs in output.alone.items()}
        weights = {name: weight.cpu().tolist() for name, weight in output.weights.items()}
        answers = []
        for i, row in enumerate(fused):
            present = [name for name in weights if weights[name][i] > 0]
            answers.append(
                Prediction(
                    LABELS[int(np.argmax(row))],
                    dict(zip(LABELS, row, strict=True)),
                    {SURFACE[name]: dict(zip(LABELS, alone[name][i], strict=True)) for name in present if alone},
                    {SURFACE[name]: weights[name][i] for name in present},
                )
            )
        return answers


def _validated(clip: Clip) -> Clip:
    """The clip, with a blank text or path as None. Refuses other types, such as NaN from an empty pandas cell."""
    if not isinstance(clip, Clip):
        raise UsageError(f"{clip!r}: not a clip — give senticlip.structures.Clip(id, video, text)")
    name = clip.id or "clip"
    if not isinstance(clip.text, str | None):
        raise UsageError(f"{name}: {clip.text!r} is not a text — give a string or None")
    if not isinstance(clip.video, str | PathLike | None):
        raise UsageError(f"{name}: {clip.video!r} is not a path — give a path or None")
    if not all(time is None or (isinstance(time, SupportsFloat) and isfinite(time)) for time in (clip.start, clip.end)):
        raise UsageError(f"{clip.video}: a segment from {clip.start!r} to {clip.end!r} s — give finite times")
    start, end = (None if time is None else float(time) for time in (clip.start, clip.end))
    video = Path(clip.video) if clip.video else None
    return clip._replace(text=text_or_none(clip.text), video=video, start=start, end=end)
