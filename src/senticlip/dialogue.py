"""The lines of a film: a subtitle file, an embedded subtitle track, a transcript, or else windows or shots."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import NamedTuple

from senticlip.data import subtitles as subs
from senticlip.data.shots import shots, windows
from senticlip.data.subtitles import Line
from senticlip.data.tracks import embedded
from senticlip.progress import console
from senticlip.structures import UsageError, UserError


class LineSource(NamedTuple):
    """Where the lines of a film come from; the fields are arguments of ``analyze``."""

    subtitles: str | Path | None
    shift: float
    track: int | None
    transcribe: bool
    asr_model: str
    cut: str
    seconds: float

    def check(self) -> None:
        """Refuse options that are invalid or would have no effect.

        Raises:
            UsageError: there are such options, or faster-whisper or the speech model is missing.
        """
        if self.cut not in ("windows", "shots"):
            raise UsageError(f"cut {self.cut!r}: unknown — choose windows or shots")
        if not isfinite(self.shift):
            raise UsageError(f"--shift {self.shift}: must be a number of seconds")
        if self.transcribe and (self.shift or self.subtitles is not None or self.track is not None):
            raise UsageError("--transcribe ignores subtitles — leave it out, or --subtitles, --track and --shift")
        if self.subtitles is not None and self.track is not None:
            raise UsageError("--track is for the film's own subtitles — leave out --subtitles or --track")
        if self.transcribe:
            from senticlip.speech import model_folder

            model_folder(self.asr_model)

    def lines(self, video: Path, end: float, device: str | None) -> list[Line]:
        """The lines of ``video``, which ends at ``end`` seconds; ``device`` is for the speech model.

        Raises:
            UsageError, UserError: no line, none that can belong to this film, or something cannot be read.
        """
        if self.transcribe:
            from senticlip.speech import transcript

            if not (spoken := transcript(video, self.asr_model, device)):
                raise UserError(f"{video}: no speech detected — leave out --transcribe")
            return spoken
        lines = subs.read(self.subtitles, self.shift) if self.subtitles is not None else self._embedded_lines(video)
        if lines is None:
            lines = shots(video, end) if self.cut == "shots" else windows(end, self.seconds)
        self._check_times(lines, video, end)
        return lines

    def _embedded_lines(self, video: Path) -> list[Line] | None:
        """The film's embedded lines, or None; tells the user if there are none, and of tracks that cannot be read."""
        messages: list[str] = []
        lines: list[Line] | None = embedded(video, self.track, self.shift, messages.append)
        if not lines and not (self.shift < 0 and embedded(video, self.track)):
            reason = messages[0] if messages else f"{video}: has no subtitles, and none were given (--subtitles F.srt)"
            if self.shift:
                raise UsageError(f"{reason}; --shift has nothing to move")
            lines, messages = None, [f"{reason}; cutting the film without text"]
        for message in messages:
            console.print(message, soft_wrap=True, highlight=False)
        return lines

    def _check_times(self, lines: list[Line], video: Path, end: float) -> None:
        """Refuse lines that cannot belong to this film; warn of lines that begin after its end."""
        source = self.subtitles or video
        if not lines:
            hint = f" after 0 s: --shift {self.shift:g} moves all of them before it" if self.shift < 0 else ""
            raise UserError(f"{source}: contains no spoken line{hint} — leave out the subtitles to cut by time")
        n_late = sum(line.start >= end for line in lines)
        if n_late == len(lines):
            raise UserError(f"{source}: all lines begin after the end of {video} ({end:.1f} s) — check --shift")
        if n_late:
            message = f"{n_late} of {len(lines)} lines begin after the end of {video} ({end:.1f} s) — check --shift"
            console.print(message, soft_wrap=True)
