"""Sentiment of one clip from an exported file, without torch: onnxruntime, tokenizers, PyAV and numpy.

senticlip export RUN --out model.onnx
python examples/onnx_only.py model.onnx clip.mp4 --text "你今天心情很好"
"""

import argparse
import json
import os
from itertools import takewhile

import av
import numpy as np
from av.stream import Disposition
from tokenizers import Tokenizer

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime  # only after that line, or it sends usage data to Microsoft


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5, as in PIL and torch's antialiased bicubic."""
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))


def weights(length: int, size: int) -> np.ndarray:
    """size×length: the antialiased bicubic filter along one axis."""
    scale = length / size
    filter_scale = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale
    table = cubic((np.arange(length) + 0.5 - centers[:, None]) / filter_scale)
    return table / table.sum(1, keepdims=True)


def squash(image: np.ndarray, size: int) -> np.ndarray:
    """H×W×3 uint8 → 3×size×size uint8; each pass is rounded, as in PIL."""
    wide = np.einsum("sw,hwc->hsc", weights(image.shape[1], size), image.astype(np.float64))
    wide = np.rint(wide).clip(0, 255)
    tall = np.einsum("sh,hwc->csw", weights(image.shape[0], size), wide)
    return np.rint(tall).clip(0, 255).astype(np.uint8)


def frames(path: str, count: int, size: int) -> np.ndarray:
    """The frames shown at (i + ½)·T/count, upright, as uint8 k×3×size×size (decodes every frame: a clip is short)."""
    with av.open(path) as container:
        decoded = list(container.decode(video=0))
        last = decoded[-1]
        step = last.duration * last.time_base if last.duration else 1 / (container.streams.video[0].average_rate or 25)
    starts = np.array([frame.time for frame in decoded])
    end = starts[-1] + float(step)
    wanted = starts[0] + (np.arange(count) + 0.5) * (end - starts[0]) / count
    shown = np.unique(np.searchsorted(starts, wanted + 1e-6, side="right") - 1)
    return np.stack([squash(upright(decoded[i]), size) for i in shown])


def main_shot(pixels: np.ndarray) -> np.ndarray:
    """Which frames of k×3×S×S show the clip's main shot; see senticlip/data/cutaways.py."""
    k, steps = len(pixels), range(-2, 3)
    bright = pixels.max((0, 1)) > 24  # black in all frames: bars
    rows, columns = [np.flatnonzero(bright.any(axis)) if bright.any() else [0, -2] for axis in (1, 0)]
    picture = pixels[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    small = np.stack([squash(image.transpose(1, 2, 0), 16) for image in picture])
    is_plain = small.std((2, 3)).max(1) < 4
    small = small - small.mean((1, 2, 3), keepdims=True)
    small /= np.linalg.norm(small.reshape(k, -1), axis=1)[:, None, None, None] + 1e-6
    rolled = np.stack([np.roll(small, (down, across), (2, 3)).reshape(k, -1) for down in steps for across in steps])
    similar = ((rolled @ small.reshape(k, -1).T).max(0) > 0.67) & ~is_plain & ~is_plain[:, None]
    linked = np.linalg.matrix_power(similar | np.eye(k, dtype=bool), k)
    group = linked[linked.sum(1).argmax()]
    return group if 2 * group.sum() > k else np.ones(k, bool)


def upright(frame: av.VideoFrame) -> np.ndarray:
    """H×W×3 RGB; phones store frames as the sensor saw them, and how far to rotate them."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def log_mel(path: str, bands: int, average: int) -> np.ndarray:
    """The sound's log-mel, steps×bands, each step the mean of ``average`` frames of 20 ms; no steps without sound."""
    parts: list[np.ndarray] = []
    with av.open(path) as container:
        tracks = sorted(container.streams.audio, key=lambda track: not track.disposition & Disposition.default)
        sounds = container.decode(tracks[0]) if tracks else []  # the track that players play
        decoded = list(takewhile(lambda frame: (frame.time or 0) < 600, sounds))  # senticlip reads no more of a clip
        # FFmpeg's own downmix is 3 dB louder than the mean of two channels
        mono = bool(decoded) and decoded[0].layout.nb_channels == 1
        resampler = av.AudioResampler("fltp", "mono" if mono else "stereo", 16000)
        for frame in [*decoded, None] if decoded else []:
            parts += [piece.to_ndarray().mean(0) for piece in resampler.resample(frame)]
    if not parts:
        return np.zeros((0, bands), np.float32)
    sound = np.concatenate(parts)[: 600 * 16000]
    sound = np.pad(sound, (0, max(0, 640 - len(sound))))
    windows = np.lib.stride_tricks.sliding_window_view(sound, 640)[::320] * np.hanning(640)
    mel = 2595 * np.log10(1 + np.array([20, 8000]) / 700)
    edges = 700 * (10 ** (np.linspace(*mel, bands + 2) / 2595) - 1)
    hertz, (low, middle, high) = np.fft.rfftfreq(640, 1 / 16000), (edges[i : i + bands, None] for i in range(3))
    filters = np.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle)).clip(0)
    logs = np.log(np.abs(np.fft.rfft(windows)) ** 2 @ filters.T + 1e-6)
    return np.stack([logs[i : i + average].mean(0) for i in range(0, len(logs), average)]).astype(np.float32)


def predict(model: str, video: str | None, text: str | None) -> dict[str, float]:
    """Label → probability."""
    text = text if text and text.strip() else None
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    properties = session.get_modelmeta().custom_metadata_map
    metadata = json.loads(properties["senticlip"])
    feed = {}
    if "text" in metadata["names"]:
        tokenizer = Tokenizer.from_str(properties["tokenizer"])
        tokenizer.enable_truncation(metadata["max_length"])
        ids = np.array([tokenizer.encode(text or "").ids], np.int64)
        feed |= {"text": ids, "text_mask": np.full(ids.shape, text is not None)}
    if "vision" in metadata["names"]:
        size = metadata["size"]
        pixels = frames(video, metadata["frames"], size) if video else np.zeros((1, 3, size, size), np.uint8)
        if metadata["experiment"]["vision"].get("cutaways") == "drop":
            pixels = pixels[main_shot(pixels)]
        feed |= {"vision": pixels[None], "vision_mask": np.full((1, len(pixels)), video is not None)}
    if "audio" in metadata["names"]:
        bands, average = (metadata["experiment"]["audio"][key] for key in ("bands", "average"))
        steps = log_mel(video, bands, average) if video else np.zeros((0, bands), np.float32)
        mask = np.arange(max(1, len(steps))) < len(steps)
        feed |= {"audio": np.resize(steps, (1, len(mask), bands)), "audio_mask": mask[None]}
    if not any(mask.any() for name, mask in feed.items() if name.endswith("_mask")):
        raise SystemExit(f"{model}: nothing to read — give it a video, --text or both")
    log_probs = session.run(["log_probs"], feed)[0][0]
    if np.isnan(log_probs).any():
        raise SystemExit(f"{model}: its answer is NaN, so its weights are broken — export it again")
    return {label: float(p) for label, p in zip(metadata["labels"], np.exp(log_probs), strict=True)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("video", nargs="?")
    parser.add_argument("--text")
    options = parser.parse_args()
    print(json.dumps(predict(options.model, options.video, options.text)))
