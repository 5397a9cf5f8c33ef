"""A clip's sound → waveform → log-mel frames. Needs no torch."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer

from senticlip.data.cache import Store, cached, clip_keys
from senticlip.data.sequential import clock_start, decoded_frames, default_audio_stream, open_container, packets
from senticlip.structures import Clip, UserError

RATE, WINDOW, HOP = 16000, 640, 320
FLOOR = 1e-6
CHUNK_FRAMES = 2048
"""Frames per Fourier transform: spectra take forty times the memory of their sound."""

MAX_SECONDS = 600.0
"""At most so many seconds of a clip are read: a whole film as one clip, or compressed silence, must fit in memory."""

MIN_RATE = 1000
"""Lowest accepted sample rate (Hz): with a lower one, a few bytes would last for hours."""

WARM_UP = 0.1
"""Seconds decoded before a piece and discarded."""

GAP = 0.05
"""Seconds of missing sound that count as a gap; shorter ones come from rounded times (to 1 ms in Matroska)."""


class AudioReader:
    """An open file from which many pieces of sound are read (opening a film takes longer than reading a line of it).

    A piece depends slightly on the pieces read before it: AAC decoders add random noise, and Opus differs by 7 ms.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._container: InputContainer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._container is not None:
            self._container.close()

    def read(
        self, start: float | None = None, end: float | None = None, max_seconds: float = MAX_SECONDS, gaps: bool = False
    ) -> np.ndarray:
        """See :func:`read_audio`."""
        already_open = self._container is not None
        try:
            container = self._container = self._container or open_container(self.path)
            if (sound := default_audio_stream(container)) is None:
                return np.zeros(0, np.float32)
            clock_zero, begin = clock_start(container), start or 0.0
            if start or already_open:
                _seek(container, sound, begin - WARM_UP + clock_zero)
            stop = min(begin + max_seconds, math.inf if end is None else end)
            first_time, parts = _decode_between(
                container, sound, begin + clock_zero - WARM_UP / 2 if start else -math.inf, stop + clock_zero, gaps
            )
        except (av.FFmpegError, OSError) as error:
            raise UserError(f"{self.path}: its sound cannot be read ({error.strerror}) — replace the file") from None
        samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        skip = max(0, round((begin + clock_zero - first_time) * RATE)) if start else 0
        if math.isinf(stop):
            return samples[skip:]
        return samples[skip : skip + max(0, round((stop - max(begin, first_time - clock_zero)) * RATE))]


def audio_start(path: str | Path) -> float:
    """When the sound of a file begins, in seconds on a player's clock; 0 if unknown."""
    with open_container(path) as container:
        sound = default_audio_stream(container)
        if sound is None or sound.start_time is None or sound.time_base is None:
            return 0.0
        return float(sound.start_time * sound.time_base) - clock_start(container)


def audio_end(path: str | Path) -> float:
    """When the last sound packet of a file ends, in seconds on a player's clock; 0 if there is none."""
    with open_container(path) as container:
        sound, clock_zero = default_audio_stream(container), clock_start(container)
        if sound is None or sound.time_base is None:
            return 0.0
        with suppress(av.FFmpegError):  # no way to seek: all packets are read
            _seek(container, sound, clock_zero + (container.duration or 0) / av.time_base - 1)
        ends = (p.pts + (p.duration or 0) for p in packets(container, sound) if p.pts is not None and p.size)
        return max(0.0, float(max(ends, default=0) * sound.time_base) - clock_zero)


def read_audio(
    path: str | Path,
    start: float | None = None,
    end: float | None = None,
    max_seconds: float = MAX_SECONDS,
    gaps: bool = False,
) -> np.ndarray:
    """The sound of a file, or of a piece of it: mono float32 in [-1, 1] at RATE Hz; empty if it has none.

    Args:
        path: a video or sound file; of several sound tracks, the one that players play.
        start: seconds; the file's beginning by default.
        end: seconds; the file's end by default.
        max_seconds: at most so many seconds are read.
        gaps: fill gaps with silence, so that times stay right; otherwise the parts are joined.

    Raises:
        UserError: the file cannot be opened.
    """
    with AudioReader(path) as reader:
        return reader.read(start, end, max_seconds, gaps)


def _seek(container: InputContainer, sound: AudioStream, time: float) -> None:
    """Seek to ``time``, a little before the piece: a codec's first frame after a seek is incomplete.

    Seeks in the sound track itself: the video's keyframes may come later.
    """
    unit = float(sound.time_base or 1 / av.time_base)
    try:
        container.seek(int(time / unit), stream=sound)  # below 0 at a clip's beginning, where AAC begins
    except av.FFmpegError:
        container.seek(int(max(0.0, time) / unit), stream=sound)  # AVI has no times below 0


def _decode_between(
    container: InputContainer, sound: AudioStream, start: float, end: float, gaps: bool
) -> tuple[float, list[np.ndarray]]:
    """The time (file clock, seconds) of the first frame that ends after ``start``, and the samples from there until
    ``end``; with ``gaps``, gaps are filled with silence."""
    parts: list[np.ndarray] = []
    first_time, time, resampler, frame_format = None, clock_start(container), None, None
    max_gap, seconds = (container.duration or 0) / av.time_base, 0.0  # bounds a gap, whose times may be damaged
    for frame in decoded_frames(container, sound):
        if frame.rate < MIN_RATE:
            raise OSError(errno.EINVAL, f"{frame.rate} samples a second")
        time = time if frame.time is None else frame.time
        if time + frame.samples / frame.rate <= start:  # there may be a gap before the piece
            time += frame.samples / frame.rate
            continue
        first_time = time if first_time is None else first_time
        if gaps and GAP < (gap := time - first_time - seconds) <= max_gap:
            parts += [*_resampled(resampler, None), np.zeros(round(gap * RATE), np.float32)]
            resampler, frame_format, seconds = None, None, seconds + gap
        seconds += frame.samples / frame.rate
        if frame_format != (frame_format := (frame.format.name, frame.layout.name, frame.rate)):
            # the channel layout may change within a recording, but a resampler takes frames of one kind only
            parts += _resampled(resampler, None)
            resampler = av.AudioResampler("fltp", "mono" if frame.layout.nb_channels == 1 else "stereo", RATE)
        parts += _resampled(resampler, frame)
        if time > end:
            break
        time += frame.samples / frame.rate
    return first_time or 0.0, parts + _resampled(resampler, None)


def _resampled(resampler: av.AudioResampler | None, frame: AudioFrame | None) -> list[np.ndarray]:
    """A frame's samples, resampled; for None, what is left in the resampler.

    Averages two channels: FFmpeg's own downmix is 3 dB too loud where both are the same.
    """
    return [piece.to_ndarray().mean(0) for piece in resampler.resample(frame)] if resampler else []


def mel_filters(bands: int) -> np.ndarray:
    """Triangles on the mel scale (2595 log10(1 + f/700)) from 20 Hz to half of RATE: bands×(1 + WINDOW/2)."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    low = 2595 * math.log10(1 + 20 / 700)
    edges = 700 * (10 ** (np.linspace(low, top, bands + 2) / 2595) - 1)  # Hz
    frequencies = np.fft.rfftfreq(WINDOW, 1 / RATE)
    rise = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return np.clip(np.minimum(rise, fall), 0, None).astype(np.float32)


def log_mel(sound: np.ndarray, bands: int = 33, average: int = 1) -> np.ndarray:
    """Waveform n at RATE → log-mel L×bands float32, L = ⌈(1 + (n − WINDOW) // HOP) / average⌉.

    Each step is the mean of ``average`` frames of 20 ms, the last one of what remains. Sound shorter than a window is
    padded to one; empty sound has no frames.
    """
    if len(sound) == 0:
        return np.zeros((0, bands), np.float32)
    if len(sound) < WINDOW:
        sound = np.pad(sound, (0, WINDOW - len(sound)))
    frames, filters = np.lib.stride_tricks.sliding_window_view(sound, WINDOW)[::HOP], mel_filters(bands).T
    mel = np.zeros((len(frames), bands), np.float32)
    for begin in range(0, len(frames), CHUNK_FRAMES):
        part = frames[begin : begin + CHUNK_FRAMES] * np.hanning(WINDOW).astype(np.float32)
        power = np.abs(np.fft.rfft(part)) ** 2  # frames×(1 + WINDOW/2)
        mel[begin : begin + CHUNK_FRAMES] = np.log(power.astype(np.float32) @ filters + FLOOR)
    starts = np.arange(0, len(mel), average)
    return np.add.reduceat(mel, starts) / np.diff(starts, append=len(mel))[:, None].astype(np.float32)


def audio_store(clips: list[Clip], bands: int, root: Path, average: int = 1) -> Store:
    """The log-mel frames of clips, from the cache; a clip without a video, or without sound, is an empty row."""

    def compute(missing: list[int]) -> Iterator[np.ndarray]:
        for index in missing:
            clip = clips[index]
            assert clip.video is not None
            yield log_mel(read_audio(clip.video, clip.start, clip.end), bands, average)

    spec = {
        "log_mel": bands,
        "average": average,
        "rate": RATE,
        "window": WINDOW,
        "hop": HOP,
        "most": MAX_SECONDS,
        "version": 6,
    }
    return cached(root, spec, clip_keys(clips, root), compute, "reading audio")
