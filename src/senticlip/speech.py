"""Transcripts of videos by faster-whisper (extra ``asr``), cached because transcription is slow."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from senticlip.data.audio import RATE, audio_start, read_audio
from senticlip.data.cache import file_keys
from senticlip.data.subtitles import Line, clean
from senticlip.data.video import probe
from senticlip.files import make_folder, write_text
from senticlip.progress import counter, spinner
from senticlip.sources import cache_root
from senticlip.structures import UsageError, UserError

NEEDED = ("model.bin", "tokenizer.json")
"""Files of a speech model; without them, faster-whisper fails late or asks the hub."""


def transcript(video: str | Path, model: str = "small", device: str | None = None) -> list[Line]:
    """The transcript of a video's Chinese speech as timed lines; from the cache if it was made before.

    Args:
        video: any file with video and sound; of several sound tracks, the one that players play.
        model: a size that faster-whisper knows (tiny, base, small, medium, large-v3), or a folder with a model.
        device: cpu, cuda or cuda:N; None lets faster-whisper choose.

    Raises:
        UsageError: the extra or the model is missing, or no such device. UserError: no sound that can be read.
    """
    folder, video = model_folder(model), Path(video)
    if not probe(video).has_audio:
        raise UserError(f"{video}: has no sound — nothing to transcribe")
    kind, colon, number = (device or "auto").partition(":")
    if colon and not number.isdecimal():
        raise UsageError(f"--device {device}: unknown — choose cpu, cuda or cuda:N")
    from faster_whisper import __version__

    with spinner(f"reading {video.name}"):
        keys = file_keys([video, folder / "model.bin"], cache_root())
    spec = json.dumps([1, __version__, *keys.values()])
    cache_file = cache_root() / "transcripts" / f"{hashlib.blake2b(spec.encode(), digest_size=12).hexdigest()}.json"
    with suppress(OSError, ValueError, TypeError):
        return [Line(*line) for line in json.loads(cache_file.read_text(encoding="utf-8"))]
    lines = _transcribe(video, folder, {"device": kind, "device_index": int(number or 0), "compute_type": "default"})
    with suppress(UserError):  # a cache that cannot be written
        make_folder(cache_file.parent)
        write_text(cache_file, json.dumps(lines, ensure_ascii=False))
    return lines


def _transcribe(video: Path, folder: Path, options: dict[str, Any]) -> list[Line]:
    """Transcribe a video with faster-whisper."""
    from ctranslate2 import set_random_seed
    from faster_whisper import WhisperModel

    offset = audio_start(video)  # faster-whisper counts from the first sample
    with counter(f"transcribing {video.name}, seconds") as progress:
        # faster-whisper's own reader takes the first track, not the one players play, and drops gaps
        sound = read_audio(video, max_seconds=math.inf, gaps=True)
        duration, lines = len(sound) / RATE, []
        set_random_seed(0)  # it samples where it is unsure
        try:
            segments, _ = WhisperModel(str(folder), **options).transcribe(sound, language="zh", vad_filter=True)
            for segment in segments:
                end = min(segment.end, duration)  # it pads the last 30 s with silence, and may hear words there
                lines.append(Line(round(segment.start + offset, 3), round(end + offset, 3), clean(segment.text)))
                progress(round(end), round(duration))
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(f"{video}: cannot be transcribed — {' '.join(str(error).split())}") from None
    return [line for line in lines if line.text and line.end > line.start]


def model_folder(model: str) -> Path:
    """The local folder of a speech model, given as a folder or a size; a size is taken from disk or else the hub.

    Raises:
        UsageError: there is no such model, it lacks a file, or faster-whisper is not installed.
    """
    try:
        from faster_whisper import utils
    except ImportError:
        raise UsageError("--transcribe needs faster-whisper: pip install 'senticlip[asr]'") from None
    if not model.strip():
        raise UsageError("--asr-model: no name given — is a shell variable unset?")
    repository = getattr(utils, "_MODELS", {}).get(model, f"Systran/faster-whisper-{model}")
    folder = Path(model) if Path(model).is_dir() else _fetch_model(model, repository)
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        raise UsageError(f"--asr-model {model}: no {missing[0]} in {folder} — copy or convert the model again")
    return folder


def _fetch_model(model: str, repository: str) -> Path:
    """The local folder of a model of this size, from disk, or else from the hub if that can be reached."""
    from senticlip.encoders.hub import fetch

    if "/" in model:
        raise UsageError(f"--asr-model {model}: no such folder")
    try:
        return fetch(repository, "asr")
    except UsageError as error:
        reason = str(error).split(";")[0].removeprefix("asr: ")
        raise UsageError(f"--asr-model {model}: {reason} — give a folder with the model: --asr-model FOLDER") from None
