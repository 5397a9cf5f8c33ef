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

from senticlip.data.sequential import MOST_PIXELS, SMALLER, Sequential, open_video, packets, times_are_guessed
from senticlip.structures import UserError

NEAR = 20
"""Up to so many seconds ahead, packets are read instead of seeking: reading is cheap, and a seek may overshoot."""

SEEKABLE = ("mp4", "matroska", "mpegts", "flv")
"""Formats whose frames have the same times after a seek as before it (in MPEG program streams they differ)."""

MANY = 2000
"""Most packets kept while looking for the next keyframe, so that memory stays bounded however long a GOP is."""

REORDERED = 16
"""How many frames can come before one in the file yet be shown after it: at most this many in H.264 and H.265."""

SHORT = 16 << 20
"""Up to so many bytes, all packets of a file are read on opening, not once for its end and again for its frames."""

_REFRESH = re.compile(rb"\x00\x00(?:\x01|\x00[\x04-\x10])\x06\x06.[\x00-\x7f]", re.DOTALL)
"""H.264's recovery point of a "keyframe" that is complete only some frames later (intra refresh)."""

JUMP = 60
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
    Set ``alone`` if the next call of ``frames`` is the only one: the decoder may then be drained.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.container, self.stream = open_video(path)
        self.tick = self.stream.time_base or Fraction(1, 90000)
        self.alone = False
        self._near = int(NEAR / self.tick)
        self._step = int(1 / (self.tick * (self.stream.average_rate or self.stream.guessed_rate or 25)))
        self._seekable = any(name in self.container.format.name.split(",") for name in SEEKABLE)
        joins = self.container.format.name in ("mpegts", "mpeg")
        self._joins, edited = joins, "mp4" in self.container.format.name.split(",")
        self._back = int(1 / self.tick) if joins else 0 if edited else 1 << 62  # how far decoding times may go back
        self._slow: Sequential | None = None
        # APNG marks every frame as a keyframe, but most depend on the one before
        self._trusted = self.container.format.name != "apng" and not times_are_guessed(self.container, self.stream)
        self._start_reading()
        if self._trusted and not self._ahead:
            self.close()
            raise UserError(f"{self.path}: no frame in this video (zero frames, or cut off) — replace the file")
        self.first: int = self._ahead[0].pts if self._trusted else (self.stream.start_time or 0)
        self.end = self._find_end()

    def close(self) -> None:
        """Close the file."""
        self.container.close()
        if self._slow:
            self._slow.container.close()

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
                yield self._sequential(stamp)
            done = stop
        for stamp in stamps[done:]:
            yield self._sequential(stamp)

    # --- reading packets

    def _start_reading(self) -> None:
        """Reset the state, and read up to the next keyframe."""
        self._packets = packets(self.container, self.stream)
        self._ahead: deque[Read] = deque()  # read but not yet decoded
        self._fed: list[int] = []  # times of the packets decoded since the keyframe
        self._key: int | None = None  # the time of that keyframe; None: the decoder begins at _ahead[0]
        self._held: VideoFrame | None = None  # the last wanted frame
        self._read_until = -(1 << 62)  # all that is still to be read is shown after this
        self._latest: list[int] = []  # the latest times of the frames read
        self._finished = False
        self._to_keyframe()

    def _to_keyframe(self) -> None:
        self._fed, self._key = [], None
        while not (self._ahead and self._ahead[0].is_key):
            if self._ahead:
                self._ahead.popleft()
            elif self._finished:
                return
            else:
                self._read()

    def _read(self) -> None:
        packet = next(self._packets, None)
        if packet is None or (packet.pts is None and not packet.size):
            self._finished = True
        elif packet.pts is None or (packet.is_keyframe and _is_refresh(packet)):
            self._trusted, self._finished = False, True
        else:
            # without decoding times: what is still to come is shown after all but the latest REORDERED frames read
            insort(self._latest, packet.pts)
            del self._latest[: -REORDERED - 1]
            until = packet.dts if packet.dts is not None else self._latest[0] if len(self._latest) > REORDERED else None
            until = self._read_until if until is None else until
            gap = until - self._read_until if self._read_until > -(1 << 62) else 0
            if gap < -self._back and not self._joins:
                self._trusted, self._finished = False, True  # several edits: their pieces overlap in the file
                return
            if self._joins and not -self._back <= gap <= JUMP / self.tick:
                told = f"its timestamps {'go back' if gap < 0 else 'jump'} by {abs(float(gap * self.tick)):.1f} s"
                raise UserError(f"{self.path}: {told}, as in joined files — repair it: ffmpeg -i FILE -c copy OTHER")
            self._read_until = max(self._read_until, until)
            self._ahead.append(Read(packet.pts, packet.is_keyframe, not packet.is_discard, packet))

    def _find_end(self) -> int:
        """When the last frame present in the file ends (headers can be wrong, and files get cut off)."""
        while not self._finished and len(self._ahead) < MANY and self.container.size <= SHORT:
            self._read()
        if self._finished and self._trusted:
            shown = [read for read in self._ahead if read.is_shown]
            return self._after(max(shown, key=lambda read: read.pts)) if shown else self.first
        if not self._trusted:
            slow = Sequential(self.path)
            last = slow.end()
            slow.container.close()
            return last
        if self._seekable and self.container.duration:
            self._seek_before(int(((self.container.start_time or 0) + self.container.duration) / 1_000_000 / self.tick))
        end = self._read_all()
        if end is None:
            # nothing where the header puts the end
            self._seek_before(self.first)
            end = self._read_all()
        if not self._trusted:
            return self._find_end()
        self._seek_before(self.first)
        return self.first if end is None else end

    def _read_all(self) -> int | None:
        last: Read | None = None
        while self._ahead or not self._finished:
            if self._ahead:
                read = self._ahead.popleft()
                last = read if read.is_shown and (last is None or read.pts >= last.pts) else last
            else:
                self._read()
        return None if last is None else self._after(last)

    def _after(self, read: Read) -> int:
        """When the last frame ends. (For others, an MP4's packet duration is the gap between decoding times.)"""
        return read.pts + (read.packet.duration or self._step)

    def _seek_before(self, stamp: int) -> None:
        """Restart at a keyframe at or before ``stamp``: the last one, according to the file's index."""
        back = 0
        while True:
            target = stamp - back
            try:
                if not self._seekable or (target <= self.first and back):
                    raise ValueError
                self.container.seek(target, stream=self.stream, backward=True)
            except (FFmpegError, ValueError):
                # cannot seek: reopen
                self.container.close()
                self.container, self.stream = open_video(self.path)
                back = -1
            self._start_reading()
            if back < 0 or (self._ahead and self._ahead[0].pts <= stamp):
                return
            back = back * 4 + int(1 / self.tick)

    # --- choosing packets

    def _plan(self, stamps: list[int], again: bool = False) -> tuple[list[int], bool]:
        """The times of the frames shown at the first few stamps: those that can be decoded from one keyframe.

        Leaves the packets to decode in ``_ahead``. Also returns whether the decoder may be drained after them.
        """
        shown: list[int] = []
        for stamp in stamps:
            stamp = max(stamp, self.first)
            if not shown:
                self._approach(stamp)
            elif stamp - self._read_until > self._near or len(self._ahead) > MANY:
                return shown, False
            if not self._read_past(stamp, fresh=not shown):
                return shown, True
            known = self._fed + [read.pts for read in self._ahead if read.is_shown]
            time = max((pts for pts in known if pts <= stamp), default=min(known, default=stamp))
            if time in self._fed and not (self._held and self._held.pts == time):
                # already passed: decoded or skipped before it was wanted
                if shown or again:
                    return shown or [time], False
                self._seek_before(stamp)
                return self._plan(stamps, again=True)
            shown.append(time)
        return shown, self.alone

    def _approach(self, stamp: int) -> None:
        """Seek if needed, so that the decoder's keyframe, or the next one, is at or before ``stamp``."""
        begin = self._key if self._key is not None else self._ahead[0].pts if self._ahead else stamp + 1
        far = self._seekable and not self._finished and stamp - self._read_until > self._near
        if stamp < begin or (far and not self._same(stamp)):
            self._seek_before(stamp)

    def _same(self, stamp: int) -> bool:
        """Whether the file's index has no keyframe between the decoder's and ``stamp``."""
        entries = self.stream.index_entries
        at = entries.search_timestamp(stamp, backward=True)
        return self._key is not None and at >= 0 and entries[at].timestamp <= self._key

    def _read_past(self, stamp: int, fresh: bool) -> bool:
        """Read until everything shown at or before ``stamp`` has been read; restart at keyframes on the way.

        Without ``fresh``, stop at such a keyframe, leave it in ``_ahead`` and return False.
        """
        checked = 0
        while True:
            while checked < len(self._ahead):
                read = self._ahead[checked]
                if read.is_key and read.pts <= stamp and (checked or self._key is not None):
                    if not fresh:
                        return False
                    for _ in range(checked):
                        self._ahead.popleft()
                    self._fed, self._key, checked = [], None, 0
                checked += 1
            if self._finished or self._read_until > stamp:
                return True
            if len(self._ahead) > MANY:
                self._feed(self._ahead.popleft(), skip=True)
                checked -= 1
            self._read()

    # --- decoding

    def _feed(self, read: Read, skip: bool) -> list[VideoFrame]:
        codec = self.stream.codec_context
        with suppress(FFmpegError):  # decoding fails below instead
            codec.open(strict=False)  # before skip_frame is set: dav1d reads it only once, on opening
        if self._key is None:
            codec.flush_buffers()
        if self._key is None or read.is_key:
            self._key, self._fed = read.pts, []
        self._fed.append(read.pts)
        codec.skip_frame = "NONREF" if skip else "DEFAULT"
        try:
            return self.stream.decode(read.packet)
        except FFmpegError:
            return []

    def _decode(self, wanted: list[int], drain: bool) -> Iterator[VideoFrame]:
        """The frames with the ``wanted`` times, in order; stops at the first that cannot be decoded."""
        left, unfed = deque(wanted), set(wanted)
        if self._held and left and self._held.pts == left[0]:
            unfed.discard(left.popleft())
            yield self._held
        while left:
            if not self._ahead and not self._finished:
                self._read()
            last = not self._ahead
            frames: list[VideoFrame] = []
            if not last:
                read = self._ahead.popleft()
                frames = self._feed(read, skip=read.pts not in left)
                unfed.discard(read.pts)
                # all wanted frames, not just the last: a P-frame is decoded before the B-frames shown before it
                last = drain and not unfed
            if last:
                with suppress(FFmpegError):
                    frames = frames + self.stream.decode(None)
            for frame in frames:
                if left and frame.pts == left[0] and not frame.is_corrupt:
                    left.popleft()
                    self._held = frame
                    yield frame
                elif left and frame.pts is not None and frame.pts > left[0]:
                    left.clear()
            if last:
                # a drained decoder must restart at a keyframe
                self._to_keyframe()
                return

    def _sequential(self, stamp: int) -> tuple[int, VideoFrame]:
        if self._slow is None or self._slow.passed(stamp):
            if self._slow:
                self._slow.container.close()
            self._slow = Sequential(self.path)
        found = self._slow.at(stamp)
        if found is None:
            if not 0 < self.stream.width * self.stream.height <= MOST_PIXELS:  # FFmpeg resets most sizes it refuses
                raise UserError(f"{self.path}: its pictures are damaged or too large — replace the file, or {SMALLER}")
            raise UserError(f"{self.path}: no frame can be decoded (damaged, cut off or unknown) — replace the file")
        return found


def _is_refresh(packet: Packet) -> bool:
    """Whether a keyframe's packet only begins an intra refresh; FFmpeg may show its picture before it is complete."""
    return packet.stream.codec_context.name == "h264" and bool(_REFRESH.search(bytes(memoryview(packet)[:512])))
