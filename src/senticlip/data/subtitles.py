"""Subtitle files (.srt .ass .ssa .vtt) → timed lines of what is said.

Subtitles are written for a screen: styles, positions, karaoke syllables, shadows drawn as second lines, rolling lines,
music notes. Here, a line is what is said from one time to another, and no two lines overlap.
"""

from __future__ import annotations

import html
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pysubs2

from senticlip.data.table import decode_marked, score_chinese_encodings
from senticlip.structures import UsageError, UserError

SUFFIXES = (".srt", ".ass", ".ssa", ".vtt")
MAX_LINE, MIN_LINE = 10.0, 0.5
"""Longest and shortest spoken line, in seconds; lines that only partly overlap are merged up to the longest."""
MANY, LONGEST = 200, 10_000
"""Bounds against quadratic time where thousands of cues are shown at once: neighbours of a cue and rows of a screen
that are compared; characters of a line beyond which nothing is joined to it."""

_COLUMNS = ("layer", "start", "end", "style", "name", "marginl", "marginr", "marginv", "effect", "text")
_SOUNDS = (
    r"(?:[^\]】)）]{0,8}(?:音乐|音樂|配乐|歌声|掌声|掌聲|笑声|笑聲|哭声|铃声|枪声|脚步声|雷声|敲门声)"
    r"|[^\]】)）]{0,24}\b(?:music|applause|laughter|laughs|singing|cheering|sighs?)\b)[^\]】)）]{0,8}"
)
_SOUND_NOTES = re.compile(rf"[\[【(（]\s*{_SOUNDS}\s*[\]】)）]|[♩♪♫♬♭♯🎵🎶🎼]+", re.IGNORECASE)
_TAGS = re.compile(r"</?[a-zA-Z][^<>]*>|<\d[\d:.]*>|\{\\[^{}]{0,200}\}|\{[^{}]{0,200}\\[a-zA-Z][^{}]{0,200}\}")
_HIDDEN = "\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff"
_TIME = r"-?(?:(\d{1,9}):)?-?\d{1,2}:\d{1,2}(?:[.,]\d{1,9}|:\d{3})?"
_TIMING = re.compile(rf"^[ \t]*{_TIME}[ \t]*-->[ \t]*{_TIME}(?=[\s{_HIDDEN}]|$)", re.MULTILINE)
_LIKE_TIMING = re.compile(
    r"(?m)^[ \t]*-?\d+[ \t]*[:;：][ \t]*\d+[ \t]*[:;：][\d:;：.,，' \t-]{0,40}([-–—]{1,9}>|→)[ \t]*-?\d"
)
# U+200D joins the parts of an emoji
_INVISIBLE = re.compile(f"(?!\u200d[\u2190-\u2bff\U0001f000-\U0001faff])[{_HIDDEN}\x00-\x08\x0e-\x1f]")


class Line(NamedTuple):
    """What is said from ``start`` to ``end`` (seconds); the text is empty for a window or a shot."""

    start: float
    end: float
    text: str


class Cue(NamedTuple):
    """A subtitle as written: its rows on the screen."""

    start: float
    end: float
    rows: list[str]


def read(path: str | Path, shift: float = 0.0) -> list[Line]:
    """The lines of a subtitle file, in order and without overlap; ``shift`` seconds are added to every time.

    Raises:
        UsageError: no such file, or an unsupported kind. UserError: no subtitles can be read from it.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such subtitle file")
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: not a subtitle file — choose one of {', '.join(SUFFIXES)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read — {error.strerror}") from None
    text = re.sub(r"\r{1,3}\n|\r", "\n", guess_text(data, path))
    if not text.strip():
        return []
    has_timings = "[Events]" not in text and (_TIMING.search(text) or _LIKE_TIMING.search(text))
    cues = _parse_timed(text, path) if has_timings else _parse_with_pysubs2(text, path)
    if not cues:
        raise UserError(f"{path}: has no timed line — is it a {path.suffix[1:]} file?")
    return merge(cues, shift)


def _with_usual_columns(text: str) -> str:
    """ASS text with the usual columns, which pysubs2 takes for granted; its Format line may name others."""
    header = re.search(r"^\[Events\][^\[]*?^Format:(.*)$", text, re.MULTILINE)
    names = [name.strip().casefold() for name in header[1].split(",")] if header else []
    if not {"start", "end"} <= set(names) or names[-1] != "text" or (names[1:3], len(names)) == (["start", "end"], 10):
        return text

    def reorder(event: re.Match[str]) -> str:
        cells = dict(zip(names, event[2].split(",", len(names) - 1), strict=False))
        return f"{event[1]} " + ",".join(cells.get(name, "0") for name in _COLUMNS)

    return re.sub(r"^(Dialogue:|Comment:)(.*)$", reorder, text, flags=re.MULTILINE)


def _parse_timed(text: str, path: Path) -> list[Cue]:
    """The cues of SRT or WebVTT: the text between timing lines, without the numbers and names of cues."""
    is_vtt = text.startswith("WEBVTT")
    matches = list(_TIMING.finditer(text))
    timing_starts = {match.start() for match in matches}
    for candidate in _LIKE_TIMING.finditer(text):
        if candidate.start() not in timing_starts:
            row = text.count("\n", 0, candidate.start()) + 1
            line = text[candidate.start() :].partition("\n")[0].strip()[:60]
            raise UserError(f"{path}, row {row}: {line} is not a timing — write 00:00:01,000 --> 00:00:02,000")
    cues = []
    for match, following in zip(matches, [*matches[1:], None], strict=True):
        if not is_vtt and max(len(hours or "") for hours in match.groups()) > 2:
            row = text.count("\n", 0, match.start()) + 1
            time = match[0].split("-->")[0].strip()
            raise UserError(f"{path}, row {row}: {time} is not a time in a film — hours have two digits")
        rows = text[match.end() : following and following.start()].split("\n")[1:]
        if is_vtt:  # an empty row ends a cue: names, NOTE, STYLE and REGION blocks may follow
            rows = rows[: rows.index("")] if "" in rows else rows
        elif (
            following and len(rows) > 1 and rows[-2].strip().isdecimal()
        ):  # the next cue's number; the last row is empty
            del rows[-2]
        words = "\n".join(rows).replace("\\N", "\n").replace("\\h", " ")  # left over from ASS
        start, end = map(_parse_time, match[0].split("-->"))
        cues.append(Cue(start, end, words.split("\n")))
    return cues


def _parse_time(time: str) -> float:
    """``1:02:03,5`` in seconds; negative times become 0."""
    if "-" in time:
        return 0.0
    time = re.sub(r":(\d{3})$", r".\1", time.strip()).replace(",", ".")
    return sum(float(part) * 60**i for i, part in enumerate(reversed(time.split(":"))))


def _parse_with_pysubs2(text: str, path: Path) -> list[Cue]:
    lacks_styles = "[Events]" in text and "Styles]" not in text  # pysubs2 recognizes ASS by its styles
    try:
        return [
            Cue(event.start / 1000, event.end / 1000, event.plaintext.split("\n"))
            for event in pysubs2.SSAFile.from_string(
                _with_usual_columns(text), "ass" if lacks_styles else None, keep_unknown_html_tags=True
            )
            if not event.is_comment and not event.is_drawing
        ]
    except (pysubs2.Pysubs2Error, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not readable as {path.suffix[1:]} subtitles ({reason})") from None


def clean(text: str) -> str:
    """A line's words, single-spaced: without tags, positions, music symbols and descriptions of sounds."""
    text = _TAGS.sub("", html.unescape(_TAGS.sub("", text)))
    text = _SOUND_NOTES.sub(" ", _INVISIBLE.sub("", text))
    text = " ".join(text.split()).strip("-–—#* ")
    # without a letter, a digit or a sentence mark, nothing is said
    return text if any(unicodedata.category(c)[0] in "LN" or c in "?!？！…" for c in text) else ""


def merge(cues: Iterable[Cue], shift: float = 0.0) -> list[Line]:
    """Cues as written → lines as said.

    Rows already shown by the previous cue (rolling captions, second layers) are left out. Cues shown together (karaoke
    syllables, two styles, two speakers) become one line, as do cues that grow syllable by syllable. A line that then
    still overlaps the next ends where that begins; a title begins where speech ends. Times are shifted; what ends
    before 0 is dropped.
    """
    cleaned = [Cue(c.start, c.end, [row for row in map(clean, c.rows) if row]) for c in cues if c.end > c.start]
    ordered = sorted((cue for cue in cleaned if cue.rows), key=lambda cue: cue.start)
    titles = [_is_title(cue, ordered, index) for index, cue in enumerate(ordered)]
    lines: list[tuple[Line, bool]] = []
    shown: list[str] = []
    brief = False
    # of cues that begin together, a title comes last
    for cue, is_title in sorted(zip(ordered, titles, strict=True), key=lambda pair: (pair[0].start, pair[1])):
        last, last_is_title = lines[-1] if lines else (None, False)
        touches = last is not None and cue.start - last.end < 0.1
        new_rows = _new_rows(shown, cue.rows) if touches else cue.rows
        shown = cue.rows if last is None or not touches or cue.start >= last.end else (shown + new_rows)[-MANY:]
        text = _join(new_rows)
        # karaoke; after a full second, it is rather a reply that begins with the same words
        grows = last is not None and text.startswith(last.text) and (brief or cue.start < last.end)
        brief = cue.end - cue.start < 1
        if (
            last is not None
            and touches
            and (not text or grows or _shown_together(last, cue, is_title or last_is_title))
        ):
            if not grows:
                full = len(last.text) > LONGEST or text in last.text
                text = last.text if full else _join([last.text, text])
            lines[-1] = Line(last.start, max(last.end, cue.end), text), last_is_title
        elif text:
            lines.append((Line(cue.start, cue.end, text), is_title))
    shifted = (
        Line(round(max(0.0, start + shift), 3), round(end + shift, 3), text)
        for start, end, text in _without_overlaps(lines)
    )
    return [line for line in shifted if line.end > line.start]


def _is_title(cue: Cue, ordered: list[Cue], index: int) -> bool:
    """Whether the cue at ``index`` is a title or a sign: longer than any line, or shown while lines come and go."""
    if cue.end - cue.start > MAX_LINE:
        return True
    begin, end = (bisect_left(ordered, time, key=lambda other: other.start) for time in (cue.start - MIN_LINE, cue.end))
    later = ordered[index + 1 : min(end, index + 1 + MANY)]
    neighbours = ordered[max(begin, index - MANY) : index] + later
    begins_with_another = any(abs(c.start - cue.start) <= MIN_LINE < cue.end - c.end for c in neighbours)
    if begins_with_another and any(abs(c.end - cue.end) <= MIN_LINE < c.start - cue.start for c in neighbours):
        return False  # the others are its translation or its syllables
    # cues that begin or end with it are parts of it, too
    within = [c for c in later if c.start - cue.start > MIN_LINE < cue.end - c.end and c.end - c.start >= MIN_LINE]
    words = _join(cue.rows)
    within = [c for c in within if _join(c.rows) not in words]
    return bool(within) and min(c.end for c in within) <= max(c.start for c in within)


def _without_overlaps(lines: list[tuple[Line, bool]]) -> list[Line]:
    """Remove overlaps: a line ends where the next begins, but a title begins where the line before it ends."""
    result: list[tuple[Line, bool]] = []
    for line, is_title in lines:
        while result and result[-1][0].start >= line.start and (result[-1][1] or not is_title):
            result.pop()  # it would be empty
        last, last_is_title = result[-1] if result else (Line(0, 0, ""), True)
        if is_title and not last_is_title:
            line = line._replace(start=max(line.start, last.end))
        elif result:
            result[-1] = last._replace(end=min(last.end, line.start)), last_is_title
        result.append((line, is_title))
    return [line for line, _ in result if line.end > line.start]


def _new_rows(shown: list[str], rows: list[str]) -> list[str]:
    """``rows`` without the first ones that are also the last of those ``shown``."""
    for count in range(min(len(shown), len(rows), MANY), 0, -1):
        if shown[-count:] == rows[:count]:
            return rows[count:]
    return rows


def _shown_together(line: Line, cue: Cue, is_title: bool) -> bool:
    """Whether both are shown together for most of their time; half the shorter's is enough if neither is a title."""
    overlap = min(line.end, cue.end) - max(line.start, cue.start)
    line_length, cue_length = line.end - line.start, cue.end - cue.start
    span = max(line.end, cue.end) - min(line.start, cue.start)
    return overlap >= 0.8 * span or (
        span <= MAX_LINE and not is_title and overlap >= 0.5 * min(line_length, cue_length)
    )


def _join(parts: list[str]) -> str:
    """Parts joined by spaces, but without a space between two Chinese characters."""
    text = ""
    for part in parts:
        wide = bool(text) and all(unicodedata.east_asian_width(c) in "WF" for c in (text[-1], part[:1] or "a"))
        text += part if wide or not text else f" {part}"
    return text.strip()


def guess_text(data: bytes, path: Path) -> str:
    """The text of a subtitle file: by its BOM, as UTF-16 or UTF-8, else as GB18030 or Big5 if likely, else a guess.

    Raises:
        UserError: no encoding fits.
    """
    if (decoded := decode_marked(data)) is not None:
        return decoded
    text = data.decode("utf-8", errors="replace")
    if 10 * text.count("\ufffd") <= sum(ord(c) > 127 for c in text):  # UTF-8 with damaged bytes
        return text
    share, encoding = score_chinese_encodings(data)
    if share >= 0.5:
        return data.decode(encoding, errors="replace")
    from charset_normalizer import from_bytes

    best = from_bytes(data).best()
    if best is None:
        raise UserError(f"{path}: its encoding is unknown — save the subtitles as UTF-8")
    return str(best)
