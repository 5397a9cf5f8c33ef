"""Explains one clip's prediction on a page: heat maps, cross-attention, and the prediction without each part."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

import senticlip
from senticlip import cam
from senticlip.answers import make_callable, shown
from senticlip.data.video import Frames, VideoReader, read_frames
from senticlip.files import make_folder, write_atomically, write_text
from senticlip.occlusion import (
    Case,
    alone,
    characters,
    cross_attention,
    occlude,
    prediction_distance,
    support,
    unread_text,
)
from senticlip.pages import CHINESE, page
from senticlip.progress import counter
from senticlip.structures import LABELS, SURFACE, Batch, Clip, Prediction, UsageError, text_or_none

ENGLISH = {"text": "words", "video": "picture", "audio": "sound"}
HEIGHT, MAX_WIDTH = 256, 1024
"""Height of the page's pictures and their largest width, in pixels."""
FAINT = 0.01
"""If the prediction changes by less than this without the video, the page says so: heat maps are scaled to their
largest value, however small."""


class Attention(NamedTuple):
    """Cross-attention weights for the page: words×frames and frames×words; each row sums to 1."""

    words: list[str]
    frames: list[str]
    text_to_frames: list[list[float]]
    frames_to_text: list[list[float]]


class Explanation(NamedTuple):
    """Everything the page shows about a clip; ``maps``: k×h×w in 0 … 1, or None without heat maps.

    ``dropped``: the model reads only the main shot, so cutaways are missing from ``times``. ``unread``: the end of the
    text that the model does not read. ``reads_text``: whether it reads text at all.
    """

    name: str
    text: str | None
    prediction: Prediction
    cases: list[Case]
    alone: dict[str, Prediction]
    attention: Attention | None
    times: list[float]
    pictures: list[Image.Image]
    maps: np.ndarray | None
    method: str
    dropped: bool = False
    unread: str = ""
    reads_text: bool = True


def explain(
    run: Any,
    video: str | Path | None = None,
    text: str | None = None,
    out: str | Path = "explain",
    method: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Explain the predicted class of one clip; writes ``OUT/explain.html`` (self-contained) and a PNG for each frame.

    Args:
        run: a RUN folder or a Predictor.
        video: the clip, or None.
        text: what is said in it, or None.
        out: the folder to write to.
        method: the heat maps: ablation-cam, grad-cam or rollout; None for Ablation-CAM if the model supports it, else
            no heat maps.
        device: cpu, cuda, cuda:N.

    Returns:
        ``{"html": path, "frames": [path, …]}``.

    Raises:
        UsageError: nothing to read, an unknown method, or one that this model does not support. UserError: the video
            cannot be read, or the folder cannot be written.
    """
    if method is not None and video is None:
        raise UsageError(f"--method {method}: heat maps need a video, and none was given")
    predictor = load(run, device)
    clip = Clip("", Path(video) if video is not None else None, text)
    return write(explanation(predictor, clip, method), out)


def load(run: Any, device: str | None = None) -> Any:
    """The Predictor of a RUN, or ``run`` itself if it is one; its model must be a torch model.

    Raises:
        UsageError: it is an exported file.
    """
    predictor = senticlip.load(run, device=device) if isinstance(run, str | Path) else run
    if not hasattr(predictor.model, "encode"):
        raise UsageError(f"{predictor.run}: an exported file cannot be explained — use the RUN it was made from")
    return predictor


def batch_of(predictor: Any, clip: Clip) -> tuple[Batch, list[float]]:
    """One clip as a batch, and the times of its frames in seconds (none without a video)."""
    frames_read: list[Frames] = []

    def read(*args: Any, **options: Any) -> Frames:
        frames_read.append(read_frames(*args, **options))
        return frames_read[-1]

    return predictor.batch([clip], read=read), [float(t) for frames in frames_read for t in frames.times]


def explanation(predictor: Any, clip: Clip, method: str | None = None) -> Explanation:
    """Explain one clip; writes nothing.

    Raises:
        UsageError, UserError: as ``explain``.
    """
    if method is not None and method not in cam.METHODS:
        raise UsageError(f"--method {method}: unknown — choose one of {', '.join(cam.METHODS)}")
    clip = clip._replace(text=text_or_none(clip.text))
    batch, times = batch_of(predictor, clip)
    with torch.no_grad():
        features = predictor.model.encode(batch)
        output = predictor.model.fuse(features, attention=True)
    prediction = predictor.predictions(output)[0]
    cases = occlude(predictor, features, clip.text)
    pictures = _read_pictures(clip.video, times) if clip.video is not None and times else []
    maps, method = _heat_maps(predictor, batch, prediction, method) if pictures else (None, "")
    weights = cross_attention(output, features)
    name = shown(clip.video) if clip.video is not None else ""
    return Explanation(
        name,
        clip.text,
        prediction,
        cases,
        alone(predictor, features),
        _label_attention(predictor, weights, features, clip.text, len(times)),
        times,
        pictures,
        maps,
        method or "",
        dropped=predictor.config.vision.cutaways == "drop",
        unread=unread_text(predictor, clip.text),
        reads_text="text" in predictor.model.encoders,
    )


def _heat_maps(
    predictor: Any, batch: Batch, prediction: Prediction, method: str | None
) -> tuple[np.ndarray | None, str | None]:
    """Heat maps of the predicted class, divided by the largest value in all frames, and the method's name."""
    supported = cam.methods_for(predictor.model)
    if method is not None and method not in supported:
        raise UsageError(f"--method {method}: not for this model, which has {', '.join(supported) or 'no heat maps'}")
    name = method or (supported[0] if supported else None)
    if name is None:
        return None, None
    index = LABELS.index(prediction.label)
    with counter(name) as advance:
        options = {"advance": advance} if name == "ablation-cam" else {}
        try:
            maps = cam.METHODS[name](predictor.model, batch, index, **options).cpu().numpy()
        except UsageError:
            if method is not None:
                raise
            return None, None
    return maps / (maps.max() or 1.0), name


def _read_pictures(video: Path, times: list[float]) -> list[Image.Image]:
    """The frames as displayed, read one at a time: many 8K frames would not fit in memory."""
    pictures = []
    with VideoReader(video) as reader:
        aspect = reader.aspect
        for time in times:
            frame = Image.fromarray(reader.read(times=[time]).pixels[0].transpose(1, 2, 0))
            height = min(HEIGHT, MAX_WIDTH / aspect)
            shape = max(1, round(height * aspect)), max(1, round(height))
            pictures.append(frame.resize(shape, Image.Resampling.BICUBIC))
    return pictures


def _label_attention(
    predictor: Any, weights: dict[str, torch.Tensor], features: Batch, text: str | None, frames: int
) -> Attention | None:
    """The weights with their words and frames; None if the model has none, or the clip lacks text or video."""
    maps = [weights.get("text_asks_vision"), weights.get("vision_asks_text")]
    present = all(bool(features.modalities[n].mask.any()) for n in ("text", "vision") if n in features.modalities)
    if maps[0] is None or maps[1] is None or not present or predictor.tokenizer is None or not text:
        return None
    ids = predictor.tokenizer(text, truncation=True, max_length=predictor.config.text.max_length)["input_ids"]
    words = [f"[{token.strip('[]<>/')}]" for token in predictor.tokenizer.convert_ids_to_tokens(ids)]
    for span in characters(predictor.tokenizer, text, predictor.config.text.max_length):
        words[span.token] = text[span.start : span.end]
    columns = [*["全片 all"] * (maps[0].shape[1] - frames), *(str(i + 1) for i in range(frames))]
    if maps[0].shape != (len(words), len(columns)) or maps[1].shape != (len(columns), len(words)):
        return None
    return Attention(words, columns, maps[0].tolist(), maps[1].tolist())


def overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """A frame blended with its heat map h×w in 0 … 1; where the map is 0, the frame is unchanged."""
    strength = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC))
    strength = strength.clip(0, 1)
    alpha = 0.7 * strength[..., None] ** 0.7
    blended = (1 - alpha) * np.asarray(picture) + alpha * 255 * colormaps["turbo"](strength)[..., :3]
    return Image.fromarray(blended.astype(np.uint8))


def inline(picture: Image.Image) -> str:
    """A picture as a data URL."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def sentences(explained: Explanation) -> list[tuple[str, str]]:
    """The explanation in sentences, each in Chinese and English: do the modalities agree, what changes the label."""
    result = _agreement(
        {name: prediction.label for name, prediction in explained.alone.items()}, explained.prediction.label
    )
    before = explained.cases[0].prediction
    flips = [case for case in explained.cases[1:] if case.prediction.label != before.label]
    parts = [case for case in flips if case.kind in SURFACE.values()]
    small_parts = [case for case in flips if case.kind in ("frame", "character")]
    for case in parts:
        label = case.prediction.label
        result.append(
            (f"去掉{CHINESE[case.kind]}，预测会变为{CHINESE[label]}。", f"Without the {case.kind} it would be {label}.")
        )
    if small_parts:
        names = [f"第 {c.shown} 帧" if c.kind == "frame" else f"“{c.shown}”" for c in small_parts]
        english = [f"frame {c.shown}" if c.kind == "frame" else f"“{c.shown}”" for c in small_parts]
        zh, en = ("也", "also ") if parts else ("就", "")
        result.append(
            (
                f"只去掉{_join(names, '、', '或')}，预测{zh}会改变。",
                f"Leaving out {' or '.join(english)} alone {en}changes the answer.",
            )
        )
    elif not parts and len(explained.cases) > 1:
        result.append(("去掉任何一部分，预测都不变。", "No single part changes the answer when left out."))
    return result


def _agreement(alone: dict[str, str], answer: str) -> list[tuple[str, str]]:
    """Whether the modalities, each alone, give the same label, and which of them the answer follows."""
    if not alone:
        return []
    chinese, english = _list_modalities(alone)
    same, *others = set(alone.values())
    if not others:
        quantifier = "both" if len(alone) == 2 else "all"
        return [(f"{chinese}一致，都是{CHINESE[same]}。", f"{english.capitalize()} agree: {quantifier} are {same}.")]
    zh, en = [], []
    for name, label in alone.items():
        zh.append(f"只{'听' if name == 'audio' else '看'}{CHINESE[name]}是{CHINESE[label]}")
        en.append(f"the {ENGLISH[name]} alone {'are' if name == 'text' else 'is'} {label}")
    ends = "，".join(zh), ", ".join(en)
    if followed := [name for name, label in alone.items() if label == answer]:
        followed_names = _list_modalities(followed)
        ends = f"{ends[0]}；模型采信了{followed_names[0]}", f"{ends[1]}; the model follows the {followed_names[1]}"
    if {alone.get("text"), alone.get("video")} == {"positive", "negative"}:
        ends = ends[0] + "，可能是反话", ends[1] + ". This may be irony"
    return [(f"{chinese}不一致：{ends[0]}。", f"{english.capitalize()} disagree: {ends[1]}.")]


def _list_modalities(modalities: Iterable[str]) -> tuple[str, str]:
    """The modalities as a phrase: 文本、视频与音频; words, picture and sound."""
    names = list(modalities)
    return _join([CHINESE[name] for name in names], "、", "与"), _join([ENGLISH[name] for name in names], ", ", " and ")


def _join(names: list[str], comma: str, last: str) -> str:
    return last.join(filter(None, (comma.join(names[:-1]), names[-1])))


def write(explained: Explanation, out: str | Path) -> dict[str, Any]:
    """Write the page and the PNGs of an explanation.

    Raises:
        UsageError, UserError: the folder cannot be made or written to.
    """
    folder, frames = make_folder(out), heated(explained)
    paths = [folder / f"frame-{i + 1}.png" for i in range(len(frames))]
    target = folder / "explain.html"
    stale = _stale_frames(folder, len(paths)) if target.is_file() else []
    for path, picture in zip(paths, frames, strict=True):
        write_atomically(path, functools.partial(picture.save, format="PNG"))
    write_text(target, html(explained, frames))
    for old in stale:
        old.unlink()
    return {"html": str(target), "frames": [str(path) for path in paths]}


def heated(explained: Explanation) -> list[Image.Image]:
    """The frames blended with their heat maps; unchanged if there are none."""
    if explained.maps is None:
        return explained.pictures
    return [overlay(picture, heat) for picture, heat in zip(explained.pictures, explained.maps, strict=True)]


def html(explained: Explanation, frames: list[Image.Image]) -> str:
    """The page of an explanation; ``frames``: as returned by ``heated``."""
    label, original = explained.prediction.label, explained.cases[0].prediction
    pictures = zip(explained.pictures, frames, explained.times, strict=True)
    # differences of rounded values, so that the numbers on the page add up
    supports = [(case, round(support(case.prediction, label), 3)) for case in explained.cases]
    differences = [(case, shown, shown - supports[0][1]) for case, shown in supports[1:]]
    return page(
        "explain.html",
        found=explained,
        label=label,
        sentences=sentences(explained),
        frames=[(inline(plain), inline(blended), time) for plain, blended, time in pictures],
        before=supports[0][1],
        differences=differences,
        pieces=[(case.shown, difference) for case, _, difference in differences if case.kind == "character"],
        faint=any(
            case.kind == "video" and prediction_distance(original, case.prediction) < FAINT for case in explained.cases
        ),
    )


def _stale_frames(folder: Path, count: int) -> list[Path]:
    """Pictures left by an earlier explanation in this folder, of a clip with more frames."""
    numbers = {path: path.stem.removeprefix("frame-") for path in folder.glob("frame-*.png")}
    return [p for p, n in numbers.items() if n.isascii() and n.isdigit() and n[0] != "0" and int(n) > count]


make_callable(__name__)
