"""The frame of a video file that is shown at a given time, with as little decoding as possible.

A frame is shown from its presentation time until the next frame's. Packets carry their presentation times before they
are decoded, so the frame shown at a time is known exactly, at any frame rate: decoding starts at the last keyframe
before it, and frames that no other frame refers to are skipped (``NONREF``) unless wanted themselves. Where a file
breaks that promise (no presentation times, a "keyframe" that cannot be decoded alone), the frame does not come out, and
the file is decoded from its start, skipping nothing.
"""

from __future__ import annotations

import re
from bisect import insort
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame

from senticlip.data.sequential import MAX_PIXELS, SMALLER, Sequential, open_video, packets, times_are_guessed
from senticlip.structures import UserError

MAX_READ_AHEAD = 20
"""Up to so many seconds ahead, packets are read instead of seeking: reading is cheap, and a seek may overshoot."""

SEEKABLE = ("mp4", "matroska", "mpegts", "flv")
"""Formats whose frames have the same times after a seek as before it (in MPEG program streams they differ)."""

MAX_QUEUED_PACKETS = 2000
"""Most packets kept while looking for the next keyframe, so that memory stays bounded however long a GOP is."""

REORDERED = 16
"""How many frames can come before one in the file yet be shown after it: at most this many in H.264 and H.265."""

SMALL_FILE_BYTES = 16 << 20
"""Up to so many bytes, all packets of a file are read on opening, not once for its end and again for its frames."""

_RECOVERY_POINT = re.compile(rb"\x00\x00(?:\x01|\x00[\x04-\x10])\x06\x06.[\x00-\x7f]", re.DOTALL)
"""H.264's recovery point of a "keyframe" that is complete only some frames later (intra refresh)."""

MAX_TIMESTAMP_GAP = 60
"""A longer gap between pictures (seconds) means that the clock of a transport stream has jumped."""


class Read(NamedTuple):
    """A packet that was read: its frame's time, whether decoding can start at it, and whether it is ever shown."""

    pts: int
    is_key: bool
    is_shown: bool
    packet: Packet


class Decoder:
    """An open video file that returns the frames shown at increasing times (going back costs a seek).

    ``first`` and ``end`` are the times of the first keyframe and of the end of the video, in units of ``tick`` seconds.
    Set ``single_call`` if the next call of ``frames`` is the only one: the decoder may then be drained.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.container, self.stream = open_video(path)
        self.tick = self.stream.time_base or Fraction(1, 90000)
        self.single_call = False
        self._max_read_ahead = int(MAX_READ_AHEAD / self.tick)
        self._frame_ticks = int(1 / (self.tick * (self.stream.average_rate or self.stream.guessed_rate or 25)))
        self._seekable = any(name in self.container.format.name.split(",") for name in SEEKABLE)
        may_be_joined = self.container.format.name in ("mpegts", "mpeg")
        self._may_be_joined, has_edits = may_be_joined, "mp4" in self.container.format.name.split(",")
        # how far decoding times may go back
        self._max_step_back = int(1 / self.tick) if may_be_joined else 0 if has_edits else 1 << 62
        self._sequential: Sequential | None = None
        # APNG marks every frame as a keyframe, but most depend on the one before
        self._trusted = self.container.format.name != "apng" and not times_are_guessed(self.container, self.stream)
        self._start_reading()
        if self._trusted and not self._queue:
            self.close()
            raise UserError(f"{self.path}: no frame in this video (zero frames, or cut off) — replace the file")
        self.first: int = self._queue[0].pts if self._trusted else (self.stream.start_time or 0)
        self.end = self._find_end()

    def close(self) -> None:
        """Close the file."""
        self.container.close()
        if self._sequential:
            self._sequential.container.close()

    def frames(self, stamps: list[int]) -> Iterator[tuple[int, VideoFrame]]:
        """For each of the increasing ``stamps``, the time and the picture of the frame shown then."""
        done = 0
        while done < len(stamps) and self._trusted:
            shown, drain = self._plan(stamps[done:])
            if not self._trusted:  # _plan may have found that out
                break
            start, stop = done, done + len(shown)
            for frame in self._decode(sorted(set(shown)), drain):
                while done < stop and shown[done - start] == frame.pts:
                    yield shown[done - start], frame
                    done += 1
            for stamp in stamps[done:stop]:  # frames that did not come out
                yield self._decode_sequentially(stamp)
            done = stop
        for stamp in stamps[done:]:
            yield self._decode_sequentially(stamp)

    # --- reading packets

    def _start_reading(self) -> None:
        """Reset the state, and read up to the next keyframe."""
        self._packets = packets(self.container, self.stream)
        self._queue: deque[Read] = deque()  # read but not yet decoded
        self._decoded: list[int] = []  # times of the packets decoded since the last keyframe
        self._keyframe: int | None = None  # the time of that keyframe; None: the decoder begins at _queue[0]
        self._last_frame: VideoFrame | None = None  # the last wanted frame
        self._read_until = -(1 << 62)  # every packet still to be read is shown after this time
        self._latest: list[int] = []  # the latest times of the frames read
        self._finished = False
        self._skip_to_keyframe()

    def _skip_to_keyframe(self) -> None:
        self._decoded, self._keyframe = [], None
        while not (self._queue and self._queue[0].is_key):
            if self._queue:
                self._queue.popleft()
            elif self._finished:
                return
            else:
                self._read_packet()

    def _read_packet(self) -> None:
        packet = next(self._packets, None)
        if packet is None or (packet.pts is None and not packet.size):
            self._finished = True
        elif packet.pts is None or (packet.is_keyframe and _begins_intra_refresh(packet)):
            self._trusted, self._finished = False, True
        else:
            # without decoding times: what is still to come is shown after all but the latest REORDERED frames read
            insort(self._latest, packet.pts)
            del self._latest[: -REORDERED - 1]
            until = packet.dts if packet.dts is not None else self._latest[0] if len(self._latest) > REORDERED else None
            until = self._read_until if until is None else until
            gap = until - self._read_until if self._read_until > -(1 << 62) else 0
            if gap < -self._max_step_back and not self._may_be_joined:
                self._trusted, self._finished = False, True  # several edits, whose packets overlap in the file
                return
            if self._may_be_joined and not -self._max_step_back <= gap <= MAX_TIMESTAMP_GAP / self.tick:
                problem = f"its timestamps {'go back' if gap < 0 else 'jump'} by {abs(float(gap * self.tick)):.1f} s"
                raise UserError(f"{self.path}: {problem}, as in joined files — repair it: ffmpeg -i FILE -c copy OTHER")
            self._read_until = max(self._read_until, until)
            self._queue.append(Read(packet.pts, packet.is_keyframe, not packet.is_discard, packet))

    def _find_end(self) -> int:
        """When the last frame present in the file ends (headers can be wrong, and files get cut off)."""
        while not self._finished and len(self._queue) < MAX_QUEUED_PACKETS and self.container.size <= SMALL_FILE_BYTES:
            self._read_packet()
        if self._finished and self._trusted:
            shown = [read for read in self._queue if read.is_shown]
            return self._end_of_frame(max(shown, key=lambda read: read.pts)) if shown else self.first
        if not self._trusted:
            sequential = Sequential(self.path)
            last_end = sequential.end()
            sequential.container.close()
            return last_end
        if self._seekable and self.container.duration:
            self._seek_before(int(((self.container.start_time or 0) + self.container.duration) / 1_000_000 / self.tick))
        end = self._read_to_end()
        if end is None:
            # nothing where the header puts the end
            self._seek_before(self.first)
            end = self._read_to_end()
        if not self._trusted:
            return self._find_end()
        self._seek_before(self.first)
        return self.first if end is None else end

    def _read_to_end(self) -> int | None:
        last: Read | None = None
        while self._queue or not self._finished:
            if self._queue:
                read = self._queue.popleft()
                last = read if read.is_shown and (last is None or read.pts >= last.pts) else last
            else:
                self._read_packet()
        return None if last is None else self._end_of_frame(last)

    def _end_of_frame(self, read: Read) -> int:
        """When the last frame ends. (For other frames, an MP4's packet duration is the gap between decoding times.)"""
        return read.pts + (read.packet.duration or self._frame_ticks)

    def _seek_before(self, stamp: int) -> None:
        """Restart at a keyframe at or before ``stamp``: the last one, according to the file's index."""
        distance = 0
        while True:
            target = stamp - distance
            try:
                if not self._seekable or (target <= self.first and distance):
                    raise ValueError
                self.container.seek(target, stream=self.stream, backward=True)
            except (FFmpegError, ValueError):
                # cannot seek: reopen
                self.container.close()
                self.container, self.stream = open_video(self.path)
                distance = -1
            self._start_reading()
            if distance < 0 or (self._queue and self._queue[0].pts <= stamp):
                return
            distance = distance * 4 + int(1 / self.tick)

    # --- choosing packets

    def _plan(self, stamps: list[int], has_sought: bool = False) -> tuple[list[int], bool]:
        """The times of the frames shown at the first few stamps: those that can be decoded from one keyframe.

        Leaves the packets to decode in ``_queue``. Also returns whether the decoder may be drained after them.
        """
        shown: list[int] = []
        for stamp in stamps:
            stamp = max(stamp, self.first)
            if not shown:
                self._seek_if_needed(stamp)
            elif stamp - self._read_until > self._max_read_ahead or len(self._queue) > MAX_QUEUED_PACKETS:
                return shown, False
            if not self._read_past(stamp, may_restart=not shown):
                return shown, True
            times = self._decoded + [read.pts for read in self._queue if read.is_shown]
            time = max((pts for pts in times if pts <= stamp), default=min(times, default=stamp))
            if time in self._decoded and not (self._last_frame and self._last_frame.pts == time):
                # already passed: decoded or skipped before it was wanted
                if shown or has_sought:
                    return shown or [time], False
                self._seek_before(stamp)
                return self._plan(stamps, has_sought=True)
            shown.append(time)
        return shown, self.single_call

    def _seek_if_needed(self, stamp: int) -> None:
        """Seek if needed, so that the decoder's keyframe, or the next one, is at or before ``stamp``."""
        keyframe = self._keyframe if self._keyframe is not None else self._queue[0].pts if self._queue else stamp + 1
        is_far = self._seekable and not self._finished and stamp - self._read_until > self._max_read_ahead
        if stamp < keyframe or (is_far and not self._is_same_gop(stamp)):
            self._seek_before(stamp)

    def _is_same_gop(self, stamp: int) -> bool:
        """Whether the file's index has no keyframe between the decoder's and ``stamp``."""
        entries = self.stream.index_entries
        index = entries.search_timestamp(stamp, backward=True)
        return self._keyframe is not None and index >= 0 and entries[index].timestamp <= self._keyframe

    def _read_past(self, stamp: int, may_restart: bool) -> bool:
        """Read until everything shown at or before ``stamp`` has been read; restart at keyframes on the way.

        Without ``may_restart``, stop at such a keyframe, leave it in ``_queue`` and return False.
        """
        checked = 0
        while True:
            while checked < len(self._queue):
                read = self._queue[checked]
                if read.is_key and read.pts <= stamp and (checked or self._keyframe is not None):
                    if not may_restart:
                        return False
                    for _ in range(checked):
                        self._queue.popleft()
                    self._decoded, self._keyframe, checked = [], None, 0
                checked += 1
            if self._finished or self._read_until > stamp:
                return True
            if len(self._queue) > MAX_QUEUED_PACKETS:
                self._decode_packet(self._queue.popleft(), skip=True)
                checked -= 1
            self._read_packet()

    # --- decoding

    def _decode_packet(self, read: Read, skip: bool) -> list[VideoFrame]:
        codec = self.stream.codec_context
        with suppress(FFmpegError):  # decoding fails below instead
            codec.open(strict=False)  # before skip_frame is set: dav1d reads it only once, on opening
        if self._keyframe is None:
            codec.flush_buffers()
        if self._keyframe is None or read.is_key:
            self._keyframe, self._decoded = read.pts, []
        self._decoded.append(read.pts)
        codec.skip_frame = "NONREF" if skip else "DEFAULT"
        try:
            return self.stream.decode(read.packet)
        except FFmpegError:
            return []

    def _decode(self, wanted: list[int], drain: bool) -> Iterator[VideoFrame]:
        """The frames with the ``wanted`` times, in order; stops at the first that cannot be decoded."""
        remaining, undecoded = deque(wanted), set(wanted)
        if self._last_frame and remaining and self._last_frame.pts == remaining[0]:
            undecoded.discard(remaining.popleft())
            yield self._last_frame
        while remaining:
            if not self._queue and not self._finished:
                self._read_packet()
            is_last = not self._queue
            frames: list[VideoFrame] = []
            if not is_last:
                read = self._queue.popleft()
                frames = self._decode_packet(read, skip=read.pts not in remaining)
                undecoded.discard(read.pts)
                # all wanted frames, not just the last: a P-frame is decoded before the B-frames shown before it
                is_last = drain and not undecoded
            if is_last:
                with suppress(FFmpegError):
                    frames = frames + self.stream.decode(None)
            for frame in frames:
                if remaining and frame.pts == remaining[0] and not frame.is_corrupt:
                    remaining.popleft()
                    self._last_frame = frame
                    yield frame
                elif remaining and frame.pts is not None and frame.pts > remaining[0]:
                    remaining.clear()
            if is_last:
                # a drained decoder must restart at a keyframe
                self._skip_to_keyframe()
                return

    def _decode_sequentially(self, stamp: int) -> tuple[int, VideoFrame]:
        if self._sequential is None or self._sequential.passed(stamp):
            if self._sequential:
                self._sequential.container.close()
            self._sequential = Sequential(self.path)
        result = self._sequential.at(stamp)
        if result is None:
            if not 0 < self.stream.width * self.stream.height <= MAX_PIXELS:  # FFmpeg resets most sizes it refuses
                raise UserError(f"{self.path}: its pictures are damaged or too large — replace the file, or {SMALLER}")
            raise UserError(f"{self.path}: no frame can be decoded (damaged, cut off or unknown) — replace the file")
        return result


def _begins_intra_refresh(packet: Packet) -> bool:
    """Whether a keyframe's packet only begins an intra refresh; FFmpeg may show its picture before it is complete."""
    return packet.stream.codec_context.name == "h264" and bool(_RECOVERY_POINT.search(bytes(memoryview(packet)[:512])))
