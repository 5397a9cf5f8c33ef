"""A long video and its lines → a timeline: a row for each line, and an HTML page."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv

from senticlip import answers
from senticlip.answers import HEADS
from senticlip.data.audio import AudioReader, audio_end
from senticlip.data.cache import file_keys
from senticlip.data.subtitles import Line
from senticlip.data.video import Frames, VideoReader, probe
from senticlip.dialogue import LineSource
from senticlip.files import folder_lock, make_folder, write_atomically, write_text
from senticlip.progress import console, spinner
from senticlip.sources import cache_root
from senticlip.structures import LABELS, Clip, UsageError, UserError

BATCH = 8
"""Lines per batch; a kill loses at most one batch."""

THUMBNAIL = 96
"""Height of a thumbnail in pixels."""

LONGER = 1.0
"""If the sound outlasts the pictures by more seconds than this, the film goes on without them; rounding by encoders
stays below it."""

SCHEMA = pa.schema(
    [("start", pa.float64()), ("end", pa.float64()), ("text", pa.string()), *answers.FIELDS], {"senticlip": "timeline"}
)
_PART_SCHEMA = SCHEMA.append(pa.field("thumbnail", pa.binary()))


class _Job(NamedTuple):
    """A film to analyze: its lines, its end and that of its pictures (in seconds), their aspect ratio, the folder of
    the timeline, and the job's key."""

    video: Path
    lines: list[Line]
    end: float
    pictures_end: float
    aspect: float
    out: Path | None
    key: str

    @property
    def parts(self) -> Path | None:
        """The folder of finished batches; removed when all are finished."""
        return None if self.out is None else self.out / ".timeline"


def analyze(
    run: Any,
    video: str | Path,
    subtitles: str | Path | None = None,
    out: str | Path | None = None,
    shift: float = 0.0,
    resume: bool = False,
    transcribe: bool = False,
    cut: str = "windows",
    seconds: float = 5.0,
    track: int | None = None,
    asr_model: str = "small",
    device: str | None = None,
    precision: str = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the sentiment of each line of a film as a row: start, end (seconds), text, and answers.FIELDS.

    Args:
        run: a RUN folder, or a Predictor.
        video: the film; it is read from beginning to end.
        subtitles: .srt, .ass, .ssa or .vtt; by default the film's embedded track; without any, see ``cut``.
        out: a folder for timeline.parquet, timeline.csv and timeline.html; None writes nothing.
        shift: seconds added to the times of all subtitles.
        resume: continue where a killed run stopped.
        transcribe: get the lines from faster-whisper (extra ``asr``) and ignore embedded subtitles.
        cut: the lines of a film without any text: ``windows`` of about ``seconds`` each, or ``shots``.
        track: index of the embedded subtitle track.
        asr_model: size or folder of the speech model.
        device: cpu, cuda, cuda:N.
        precision: fp32, bf16 or int8; ignored if ``run`` is a Predictor.
        progress: called after each batch with (lines done, total lines).

    Raises:
        UsageError: wrong arguments, a missing extra, or a film with nothing that this model reads. UserError: the film
            or subtitles cannot be read, or another process writes to ``out``.
    """
    video = Path(video)
    source = LineSource(subtitles, shift, track, transcribe, asr_model, cut, seconds)
    source.check()
    info = probe(video)
    if info.problem:
        console.print(info.problem, soft_wrap=True)
    pictures_end = end = info.start + info.duration
    if info.has_audio and not info.problem and (sound_end := audio_end(video)) > end + LONGER:
        message = f"{video}: the sound runs {sound_end - end:.0f} s longer than the pictures; the last picture is held"
        console.print(message, soft_wrap=True, highlight=False)
        end = sound_end
    if transcribe:  # slow: report an unusable model or folder first
        run = _load_predictor(run, device, precision)
        out = out and make_folder(out)
    lines = source.lines(video, end, device)
    predictor = _load_predictor(run, device, precision)
    key = "" if out is None else _job_key(predictor, video, lines)
    job = _Job(video, lines, end, pictures_end, info.aspect, None if out is None else Path(out), key)
    return _stream(job, predictor, resume, progress or (lambda done, total: None))


def _load_predictor(run: Any, device: str | None, precision: str) -> Any:
    """The Predictor of a RUN, or ``run`` itself if it is one."""
    if not isinstance(run, (str, Path)):
        return run
    import senticlip

    return senticlip.load(run, device=device, precision=precision)


def _job_key(predictor: Any, video: Path, lines: list[Line]) -> str:
    """A hash of everything the timeline depends on: model, precision, film and lines."""
    with spinner(f"reading {video.name}"):
        film = [str(video.resolve()), file_keys([video], cache_root())[video]]
    job = [answers.fingerprint(predictor.run), predictor.precision, *film, BATCH, lines]
    serialized = json.dumps(job, ensure_ascii=False)
    return hashlib.blake2b(serialized.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _stream(job: _Job, predictor: Any, resume: bool, progress: Callable[[int, int], None]) -> Iterator[dict[str, Any]]:
    """The rows; with an ``out`` folder, also write its files at the end."""
    if job.out is None or job.parts is None:
        yield from _rows(job, predictor, progress)
        return
    timeline = job.out / "timeline.parquet"
    is_finished = resume and _finished_key(timeline) == job.key and (job.out / "timeline.html").is_file()
    if is_finished and (table := answers.read_parquet_or_none(timeline)) is not None:
        yield from table.to_pylist()
        return
    with folder_lock(job.out, "analyze"):
        _prepare_parts(job.out, job.parts, job.key, resume)
        yield from _rows(job, predictor, progress)
        _write_timeline(job.out, job.parts, job)


def _rows(job: _Job, predictor: Any, progress: Callable[[int, int], None]) -> Iterator[dict[str, Any]]:
    """The rows, batch by batch: from the batch's part file if there is one, else from the model."""
    with VideoReader(job.video) as reader:
        for number, first in enumerate(range(0, len(job.lines), BATCH)):
            part = None if job.parts is None else job.parts / f"{number:06}.parquet"
            if part is not None and (table := answers.read_parquet_or_none(part)) is not None:
                rows = table.to_pylist()
            else:
                rows = list(_rows_of_batch(job, predictor, reader, first))
                if part is not None:
                    answers.write_parquet(part, pa.Table.from_pylist(rows, _PART_SCHEMA))
            for row in rows:
                row.pop("thumbnail")
                yield row
            progress(first + len(rows), len(job.lines))


def _finished_key(path: Path) -> str | None:
    """The key of the job that wrote a timeline; None if there is no timeline."""
    footer = answers.parquet_metadata(path)
    return None if footer is None else (footer.metadata or {}).get(b"job", b"").decode()


def _prepare_parts(out: Path, parts: Path, key: str, resume: bool) -> None:
    """Make the folder of parts; with ``resume``, keep that of the same job."""
    stamp = parts / "job"
    try:
        if resume and stamp.is_file() and stamp.read_text() != key:
            raise UsageError(f"{out}: started with a different film, lines or model — leave out --resume to start over")
        if not resume or not stamp.is_file():
            if stamp.is_file() and stamp.read_text() == key and (done := len(list(parts.glob("[0-9]*.parquet")))):
                message = f"starting over; up to {done * BATCH} finished lines are discarded"
                console.print(f"{out}: {message} — --resume would have continued", soft_wrap=True, highlight=False)
            shutil.rmtree(parts, ignore_errors=True)
            parts.mkdir(parents=True)
            write_text(stamp, key)
    except OSError as error:
        raise UserError(f"{out}: cannot be written — {error.strerror}") from None


def _frame_reader(reader: VideoReader, pictures_end: float) -> Callable[..., Frames]:
    """``read_frames`` for the open film; from ``pictures_end`` on, the last picture, as players show it."""

    def read(_: Path, frames: int, start: float, end: float, **options: Any) -> Frames:
        return reader.read(frames, start, end, None if start < pictures_end else [pictures_end], **options)

    return read


def _rows_of_batch(job: _Job, predictor: Any, reader: VideoReader, first: int) -> Iterator[dict[str, Any]]:
    """The rows of one batch of lines."""
    lines = job.lines[first : first + BATCH]
    clips = [
        # a line after the end of the film has text only
        Clip(
            f"line {number}",
            job.video if line.start < job.end else None,
            line.text or None,
            start=line.start,
            end=line.end,
        )
        for number, line in enumerate(lines, first + 1)
    ]

    # opened for each batch, so that a resumed run gives the same: decoded AAC noise depends on all decoded before
    with AudioReader(job.video) as sound:
        read = _frame_reader(reader, job.pictures_end)
        results = list(answers.answer(predictor, clips, read=read, listen=lambda _, *piece: sound.read(*piece)))
    if first == 0 and all(isinstance(error, UsageError) for _, error, _ in results):
        if job.parts is not None:
            shutil.rmtree(job.parts, ignore_errors=True)  # nothing to resume
        raise UsageError(f"{job.video}: {results[0][1]}")  # the film has nothing that the model reads
    for line, (prediction, error, frames) in zip(lines, results, strict=True):
        row = {"start": line.start, "end": line.end, "text": line.text, **answers.record(prediction, error)}
        yield row | {"thumbnail": None if frames is None else _thumbnail(frames[len(frames) // 2], job.aspect)}


def _thumbnail(pixels: Any, aspect: float) -> bytes:
    """A frame as read by the model, 3×S×S uint8 → a JPEG in the film's aspect ratio."""
    from PIL import Image

    picture = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    data = io.BytesIO()
    width = max(32, min(3 * THUMBNAIL, round(THUMBNAIL * aspect)))
    picture.resize((width, THUMBNAIL), Image.Resampling.BICUBIC).save(data, "JPEG", quality=72)
    return data.getvalue()


def _write_timeline(out: Path, parts: Path, job: _Job) -> None:
    """Write the three files from the parts; timeline.parquet comes last, to mark a finished job."""
    files = sorted(parts.glob("[0-9]*.parquet"))
    page = resources.files("senticlip").joinpath("templates", "timeline.html").read_text(encoding="utf-8")
    before, after = page.split("/*DATA*/")

    def write_page(path: Path) -> None:
        head = json.dumps(
            {"name": answers.shown(job.video), "film": job.end, "duration": max(job.end, job.lines[-1].end)},
            ensure_ascii=False,
        )
        with path.open("w", encoding="utf-8") as file:
            file.write(before + _escape_for_script(head[:-1]) + ', "rows": [')
            for number, part in enumerate(files):
                rows = [_page_row(row) for row in answers.read_parquet(part).to_pylist()]
                rows_json = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
                file.write((",\n" if number else "") + _escape_for_script(rows_json))
            file.write("]}" + after)

    def write_csv(path: Path) -> None:
        with path.open("wb") as file:
            pyarrow.csv.write_csv(table, file)

    table = pa.concat_tables(answers.read_parquet(part).drop_columns("thumbnail") for part in files)
    table = table.cast(SCHEMA).replace_schema_metadata({"job": job.key})
    with suppress(OSError):  # a kill from here on must not leave another job's
        (out / "timeline.parquet").unlink(missing_ok=True)
    write_atomically(out / "timeline.html", write_page)
    write_atomically(out / "timeline.csv", write_csv)
    answers.write_parquet(out / "timeline.parquet", table)
    shutil.rmtree(parts, ignore_errors=True)


def _escape_for_script(text: str) -> str:
    """JSON without "<", so that it cannot end the script element around it."""
    return text.replace("<", "\\u003c")


def _page_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the page reads it: short names and few digits (more for values that rows are sorted by)."""

    def short(value: float | None, digits: int = 3) -> float | None:
        return None if value is None else round(value, digits)

    def probabilities(prefix: str) -> list[float | None] | None:
        values = [short(row[prefix + name]) for name in LABELS]
        return None if values[0] is None else values

    thumbnail = row["thumbnail"]
    return {
        "s": row["start"],
        "e": row["end"],
        "x": row["text"],
        "l": row["label"],
        "f": short(row["sentiment"], 7),
        "c": short(row["conflict"], 7),
        "p": probabilities(""),
        **{head: probabilities(f"{head}_") for head in HEADS},
        "w": {head: short(row[f"weight_{head}"]) for head in HEADS},
        "error": row["error"],
        "i": thumbnail and "data:image/jpeg;base64," + base64.b64encode(thumbnail).decode(),
    }


answers.make_callable(__name__)
