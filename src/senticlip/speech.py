"""Transcripts of videos by faster-whisper (extra ``asr``)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from senticlip.data.subtitles import Line, clean
from senticlip.structures import UsageError, UserError


def transcribe(video: str | Path, model: str = "small", device: str | None = None) -> list[Line]:
    """The transcript of a video's speech, in Chinese, as timed lines.

    Args:
        video: any file with sound; of several tracks that is heard which players play.
        model: a size that faster-whisper knows (tiny, base, small, medium, large-v3), or a folder with a model.
        device: cpu, cuda or cuda:N; None chooses.

    Raises:
        UsageError: the extra or the model is missing, or no such device. UserError: no sound that can be read.
    """
    try:
        from faster_whisper import WhisperModel
    except ImportError:
        raise UsageError("--transcribe needs faster-whisper: pip install 'senticlip[asr]'") from None
    from senticlip.data.audio import audio_start, read_audio
    from senticlip.data.video import probe

    if not probe(video).has_audio:
        raise UserError(f"{video}: no sound in it — nothing can be transcribed")
    late = audio_start(video)  # faster-whisper counts from the first sample
    folder = model if Path(model).is_dir() else _fetch(model)
    kind, colon, number = (device or "auto").partition(":")
    if colon and not number.isdecimal():
        raise UsageError(f"--device {device}: unknown — choose cpu, cuda or cuda:N")
    # faster-whisper itself reads the first track, not the one that is played, and joins what a gap divides
    sound = read_audio(video, most=math.inf, gaps=True)
    options: dict[str, Any] = {"device": kind, "device_index": int(number or 0), "compute_type": "default"}
    try:
        whisper = WhisperModel(folder, **options)
        segments, _ = whisper.transcribe(sound, language="zh", vad_filter=True)
        lines = [Line(round(s.start + late, 3), round(s.end + late, 3), clean(s.text)) for s in segments]
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{video}: not transcribed — {' '.join(str(error).split())}") from None
    return [line for line in lines if line.text and line.end > line.start]


def _fetch(model: str) -> str:
    """The local folder of a model by its size, from disk, else from the hub if that can be reached."""
    from senticlip.encoders.hub import fetch

    if "/" in model:
        raise UsageError(f"--asr-model {model}: no such folder")
    try:
        return str(fetch(f"Systran/faster-whisper-{model}", "asr"))
    except UsageError as error:
        reason = str(error).split(";")[0].removeprefix("asr: ")
        raise UsageError(f"--asr-model {model}: {reason}; give a folder with the model: --asr-model FOLDER") from None
