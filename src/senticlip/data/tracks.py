"""The subtitle tracks inside a video file: which one is read, and its lines."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pysubs2
from av.codec.codec import Properties
from av.error import FFmpegError
from av.stream import Disposition
from av.subtitles.subtitle import AssSubtitle

from senticlip.data.sequential import clock_start, discard_others, open_container
from senticlip.data.subtitles import Cue, Line, merge
from senticlip.structures import UsageError, UserError

CHINESE = {"zh", "chi", "zho", "chs", "cht", "cmn", "yue"}
TITLED = re.compile(r"[中简繁簡粤粵]|[国國][语語]|(?<![a-z])(?:zh|chs|cht|chinese|mandarin)(?![a-z])", re.IGNORECASE)
"""Languages and titles of Chinese tracks."""

_ARE_IMAGES = "are images, not text — give them as a file: --subtitles F.srt"


def embedded(
    video: str | Path, track: int | None = None, shift: float = 0.0, tell: Callable[[str], None] = lambda message: None
) -> list[Line]:
    """The lines of a subtitle track inside a video file, on a player's clock; empty if it has no text track.

    Args:
        video: any container that FFmpeg reads.
        track: index of the subtitle track. None: a Chinese text track if there is one, else any text track; of several
            the default one, and a forced one (signs only) only if there is no other.
        shift: seconds added to every time.
        tell: called with a line for the user if image tracks are skipped that might be wanted.

    Raises:
        UsageError: no such track. UserError: the file cannot be opened, or the requested track holds images.
    """
    try:
        container = open_container(video)
    except (FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{video}: cannot be opened — {getattr(error, 'strerror', None) or error}") from None
    with container:
        streams = list(container.streams.subtitles)
        if track is None:
            streams = _text_tracks(streams, lambda message: tell(f"{video}: {message}"))
        elif not 0 <= track < len(streams):
            hint = f"there are 0 to {len(streams) - 1}" if streams else "it has none; give a file: --subtitles F.srt"
            raise UsageError(f"{video}: no subtitle track {track} — {hint}")
        if not streams:
            return []
        stream = streams[track] if track is not None else _best_track(streams)
        if stream.codec_context is None:
            raise UserError(f"{video}: no decoder for subtitle track {track} — give a file: --subtitles F.srt")
        clock_zero = clock_start(container)
        discard_others(container, stream)
        cues = []
        for packet in container.demux(stream):
            if packet.pts is None or not packet.size:
                continue
            start = float(packet.pts * packet.time_base) - clock_zero
            end = start + float((packet.duration or 0) * packet.time_base)
            try:
                subtitles = packet.decode()
            except FFmpegError:
                continue  # one damaged line must not fail the film
            for subtitle in subtitles:
                if not isinstance(subtitle, AssSubtitle):
                    raise UserError(f"{video}: its subtitles {_ARE_IMAGES}")
                # ReadOrder, Layer, Style, Name, three margins, Effect, Text
                words = subtitle.ass.decode("utf-8", errors="replace").split(",", 8)[-1]
                event = pysubs2.SSAEvent(text=words)
                if not event.is_drawing:
                    cues.append(Cue(start, end, event.plaintext.split("\n")))
    return merge(cues, shift)


def _text_tracks(streams: list[Any], tell: Callable[[str], None]) -> list[Any]:
    """The text tracks; calls ``tell`` if there are only image tracks, or if only these are Chinese."""
    decodable = [s for s in streams if s.codec_context is not None]  # teletext has no decoder here
    texts = [s for s in decodable if Properties.BITMAP_SUB not in Properties(s.codec_context.codec.properties)]
    if decodable and not texts:
        tell(f"its subtitles {_ARE_IMAGES}")
    elif any(map(_is_chinese, decodable)) and not any(map(_is_chinese, texts)):
        tell(f"using subtitle track {streams.index(_best_track(texts))}, not a Chinese one: those {_ARE_IMAGES}")
    return texts


def _is_chinese(stream: Any) -> bool:
    """Judged by the language or, since that is often missing or wrong, by the title."""
    language = (stream.language or "").split("-")[0].lower()
    return language in CHINESE or TITLED.search(stream.metadata.get("title", "")) is not None


def _best_track(streams: list[Any]) -> Any:
    """The track that most likely contains everything that is said."""
    candidates = [s for s in streams if _is_chinese(s)] or streams
    candidates = [s for s in candidates if not s.disposition & Disposition.forced] or candidates
    return next((s for s in candidates if s.disposition & Disposition.default), candidates[0])
