"""Opening video files, and decoding every frame from the start."""

from __future__ import annotations

import errno
import os
import re
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Discard, Disposition, Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from senticlip.structures import UsageError, UserError

FORMATS = (
    "mov,matroska,avi,flv,live_flv,mpegts,mpegtsraw,mpeg,mpegvideo,asf,ogg,mxf,rm,nut,dv,wtv,swf,gif,apng,ivf,obu,av1,"
    "h261,h263,h264,hevc,vvc,m4v,vc1,dirac,cavsvideo,mjpeg,yuv4mpegpipe,image2,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,"
    "wav,w64,mp3,aac,ac3,eac3,flac,amr,aiff,caf,au,ape,wv,tta,dts,truehd"
)
"""Allowed formats: those that contain their streams. A playlist (HLS, concat, DASH, …) could make FFmpeg read any file
on this machine, or wait forever."""

MAX_PIXELS = 128 << 20
"""Most pixels of a picture, enough for a phone's photos: a 1 MB file could hold a picture that fills the memory."""

SMALLER = f"reduce them to at most {MAX_PIXELS // 10**6} million pixels"

_PACKED_B_FRAMES = re.compile(rb"DivX\d+(?:b|Build)\d+p")
"""What MPEG-4 encoders write into the header if B-frames are packed."""


def open_container(path: str | Path, **options: str) -> InputContainer:
    """FFmpeg's container of a file, whatever its name (a colon marks no protocol, ``%d`` no image sequence) and however
    broken its metadata."""
    options |= {"format_whitelist": FORMATS, "pattern_type": "none", "max_pixels": str(MAX_PIXELS)}
    return av.open(os.path.abspath(path), metadata_errors="replace", options=options)


def clock_start(container: InputContainer) -> float:
    """The time on a file's clock, in seconds, that players show as 0: the clock of a recording starts elsewhere."""
    return (container.start_time or 0) / av.time_base


def open_video(path: str | Path) -> tuple[InputContainer, VideoStream]:
    """Open a file and its video stream for decoding in one thread.

    Raises:
        UsageError: no such file. UserError: an empty file, a format FFmpeg does not know, or no video in it.
    """
    path = Path(path)
    try:
        is_file = path.is_file()
    except OSError as error:
        if error.errno == errno.EACCES:  # for a folder on its path
            raise UserError(f"{path}: cannot be read (permission denied) — ask its owner") from None
        raise UserError(f"{path}: this cannot be a file name ({error.strerror}) — is it the text?") from None
    if not is_file:
        if re.search(r"(^|/)[a-z][a-z0-9]+:/", str(path)):
            raise UsageError(f"{path}: no such video file — URLs must be downloaded first")
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: a pipe or a device, not a video file — write it to a file first")
        raise UsageError(f"{path}: no such video file — check the path" + (" (a folder)" if path.is_dir() else ""))
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read (permission denied) — ask its owner")
    if not path.stat().st_size:
        raise UserError(f"{path}: the file is empty — copy or download it again")
    try:
        container = _open_container_fast(path)
    except (FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: not a video file, or cut off before its index ({reason}) — replace it") from None
    tracks = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]  # cover art
    if not tracks:
        kinds = ", ".join(sorted({_kind_of_stream(stream) for stream in container.streams})) or "nothing"
        container.close()
        raise UserError(f"{path}: no video in this file (it contains: {kinds}) — give a video, or leave it out")
    stream = next((s for s in tracks if s.disposition & Disposition.default), tracks[0])  # as players choose
    if stream.codec_context is None:
        container.close()
        raise UserError(f"{path}: no decoder for its video — convert it to H.264")
    if stream.width * stream.height > MAX_PIXELS:  # many sizes are unknown until decoding
        container.close()
        raise UserError(f"{path}: pictures of {stream.width} x {stream.height} pixels — {SMALLER}")
    discard_others(container, stream)
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # open_container's apply to the header only
    stream.codec_context.thread_count = 1
    stream.codec_context.thread_type = "NONE"
    return container, stream


def discard_others(container: InputContainer, stream: Stream) -> None:
    """Have FFmpeg skip the packets of all other streams."""
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all


def _kind_of_stream(stream: Any) -> str:
    return "cover art" if stream.type == "video" else stream.type


def _open_container_fast(path: Path) -> InputContainer:
    """The container; its first frames are decoded only if the header lacks something.

    For a short clip, that decoding is a tenth of all work. The header of an MP4 with an index has everything but the
    pixel format, which each frame has, too.
    """
    if path.suffix.lower() in (".mp4", ".m4v", ".mov"):
        container = open_container(path, skip_frame="all")
        if "mp4" in container.format.name and all(stream.frames for stream in container.streams.video):
            return container
        container.close()
    return open_container(path)


def default_audio_stream(container: InputContainer) -> AudioStream | None:
    """The sound track that players play: the default one, else the first; None if there is none."""
    tracks = container.streams.audio
    return next((track for track in tracks if track.disposition & Disposition.default), tracks[0] if tracks else None)


def packets(container: InputContainer, stream: VideoStream | AudioStream) -> Iterator[Packet]:
    """The remaining packets of a stream, then an empty one; if a damaged file ends early, those read until then."""
    while True:
        try:
            yield from container.demux(stream)
            return
        except IndexError:  # damaged data can look like a new stream: go on after it
            continue
        except FFmpegError:
            return


def decoded_frames(container: InputContainer, stream: VideoStream | AudioStream) -> Iterator[Any]:
    """The remaining frames of a stream (of video or sound); damaged packets are skipped, as players do."""
    for packet in packets(container, stream):
        with suppress(FFmpegError):
            yield from packet.decode()


def times_are_guessed(container: InputContainer, stream: VideoStream) -> bool:
    """Whether presentation times are guesses: AVI stores none, and FFmpeg guesses those of some B-frames wrong.

    These are B-frames of H.264 and H.265, and of DivX and Xvid if packed into one packet with the frame before.
    """
    codec = stream.codec_context
    packed = codec.name == "mpeg4" and _PACKED_B_FRAMES.search(codec.extradata or b"") is not None
    return container.format.name in ("avi", "asf") and (packed or codec.name in ("h264", "hevc"))


class Sequential:
    """Decodes every frame from the start, for increasing times."""

    def __init__(self, path: str | Path) -> None:
        self.container, self.stream = open_video(path)
        rate = self.stream.average_rate or self.stream.guessed_rate or Fraction(25)
        self._frame_ticks = 1 / (rate * (self.stream.time_base or Fraction(1, 90000)))
        self._frames = self._decode()
        self._next = next(self._frames, None)
        self._shown: tuple[int, VideoFrame] | None = None

    def _decode(self) -> Iterator[tuple[int, VideoFrame]]:
        """Frames and their times; a frame without a time follows the one before it at the file's frame rate.

        Where only decoding times can be trusted, the n-th frame is shown at the n-th of them.
        """
        guessed = times_are_guessed(self.container, self.stream)
        dts_queue: deque[int] = deque()
        next_stamp = Fraction(self.stream.start_time or 0)
        for packet in chain(packets(self.container, self.stream), [None]):
            if guessed and packet is not None and packet.dts is not None:
                dts_queue.append(packet.dts)
            frames: list[VideoFrame] = []
            with suppress(FFmpegError):  # skip a damaged packet; None drains the decoder
                frames = self.stream.decode(packet)
            for frame in frames:
                stamp = dts_queue.popleft() if dts_queue else frame.pts if frame.pts is not None else frame.dts
                stamp = round(next_stamp) if stamp is None else stamp
                yield stamp, frame
                next_stamp = stamp + self._frame_ticks

    def passed(self, stamp: int) -> bool:
        """Whether the frame shown at ``stamp`` has been passed and can no longer be returned."""
        return self._shown is not None and self._shown[0] > stamp

    def at(self, stamp: int) -> tuple[int, VideoFrame] | None:
        """The frame shown at ``stamp`` (in the stream's time base) and its time; None if nothing decodes."""
        while self._next and (self._shown is None or self._next[0] <= stamp):
            self._shown, self._next = self._next, next(self._frames, None)
        return self._shown

    def end(self) -> int:
        """Decode everything that is left; returns the time at which the last frame ends."""
        last = self.at(1 << 62)
        return last[0] + round(self._frame_ticks) if last else 0
