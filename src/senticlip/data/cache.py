"""A cache on disk, keyed by content: the frames of clips, the features of frozen encoders.

A cache is a folder of shards. A shard is two files, ``NAME.npy`` (rows of different lengths, concatenated) and
``NAME.json`` (their keys and lengths). Each is written under another name and renamed, the JSON last: a killed writer
leaves nothing that would be read, and two writers at worst do some work twice.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from senticlip import runtime
from senticlip.data.video import Frames, read_frames
from senticlip.files import abandoned, is_full
from senticlip.progress import track
from senticlip.structures import Clip, UserError

SHARD_ROWS, SHARD_BYTES = 256, 64 << 20
SETTLED = 2
"""Seconds after which another change to a file is sure to change its modification time, on any file system."""

MISSING = ""
"""The key of an empty row: its sequence has length 0."""


class Store:
    """N sequences of different lengths, memory-mapped."""

    def __init__(self, keys: list[str], shards: list[tuple[Path, list[str], list[int]]]) -> None:
        self.keys = keys
        self.paths = [path for path, _, _ in shards]
        self._maps: dict[int, np.ndarray] = {}
        locations: dict[str, tuple[int, int, int]] = {}
        for number, (_, names, lengths) in enumerate(shards):
            ends = np.cumsum(lengths)
            locations.update((k, (number, int(e) - n, n)) for k, e, n in zip(names, ends, lengths, strict=True))
        table = [locations[key] if key else (-1, 0, 0) for key in keys]
        self.shard, self.start, self.lengths = np.array(table, dtype=np.int64).reshape(-1, 3).T

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def take(self, indices: np.ndarray) -> Store:
        """The rows at ``indices``, in this order; −1 gives an empty row."""
        taken, present = copy.copy(self), indices >= 0
        taken.keys = [self.keys[index] if index >= 0 else MISSING for index in indices]
        parts = (np.where(present, part[indices], 0) for part in (self.shard, self.start, self.lengths))
        taken.shard, taken.start, taken.lengths = parts
        return taken

    def _memory_map(self, number: int) -> np.ndarray:
        if number not in self._maps:
            try:
                self._maps[number] = np.load(self.paths[number], mmap_mode="r")
            except (FileNotFoundError, ValueError, EOFError):
                problem = f"cache {self.paths[number].parent}: missing or damaged"
                raise UserError(f"{problem} — run the same command again to rebuild it") from None
        return self._maps[number]

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values k×Lmax×… (zero where masked) and mask k×Lmax of some rows.

        Copied row by row: fancy indexing of each shard takes 1.3 to 1.7 times as long, since it copies twice.

        Raises:
            UserError: a file of the cache has disappeared since it was opened.
        """
        indices = np.asarray(indices)
        lengths = self.lengths[indices]
        longest = max(1, int(lengths.max(initial=0)))
        sample = self._memory_map(0) if self.paths else np.zeros((0, 1), np.float16)
        values = np.zeros((len(indices), longest, *sample.shape[1:]), sample.dtype)
        locations = zip(self.shard[indices].tolist(), self.start[indices].tolist(), lengths.tolist(), strict=True)
        for row, (shard, start, length) in enumerate(locations):
            if length:
                values[row, :length] = self._memory_map(shard)[start : start + length]
        return values, np.arange(longest) < lengths[:, None]


def file_key(path: str | Path) -> str:
    """A hash of a file's content."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def file_keys(paths: Iterable[Path], root: Path) -> dict[Path, str]:
    """``file_key`` of each file, computed only for files that are new or changed since recorded in ``root``.

    A file changed just now is not recorded: another change within the same clock tick would not change its times. If
    two processes record at once, entries of one may be lost; those files are then hashed again.
    """
    record_path = root / "files.json"
    recorded, keys, new = _read_record(record_path), {}, {}
    for path in dict.fromkeys(paths):
        name, state = str(path.absolute()), _file_state(path)
        old_state, keys[path] = recorded.get(name, (None, ""))
        if state is None or old_state != state:
            keys[path] = file_key(path)
            if state and state == _file_state(path) and time.time() - max(state[1:3]) / 1e9 > SETTLED:
                new[name] = (state, keys[path])
    if new:
        with suppress(OSError):  # a folder that cannot be written is reported when rows are cached
            root.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(root)
            _write_file(record_path, [json.dumps({**_read_record(record_path), **new}).encode()])
    return keys


def _read_record(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_bytes())
        return {name: (state, key) for name, (state, key) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _file_state(path: Path) -> list[int] | None:
    """What changes with a file's content; ctime changes even if the modification time is set back."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def cached(
    root: Path,
    spec: dict[str, Any],
    keys: list[str],
    compute: Callable[[list[int]], Iterable[np.ndarray]],
    what: str = "caching",
) -> Store:
    """The rows of ``keys`` from the cache of ``spec``; missing ones are computed now and added to it.

    Args:
        root: the folder of all caches.
        spec: everything that the rows depend on besides their content (encoder, preprocessing), as JSON.
        keys: a content key for each row; an empty key stands for an empty row.
        compute: given the indices (into ``keys``) of the missing rows, yields an L×… array for each, in that order.
        what: the label of the progress bar.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    digest = hashlib.blake2b(json.dumps(spec, sort_keys=True).encode(), digest_size=12).hexdigest()
    folder = Path(root) / digest
    shards = _open_shards(folder)
    available = {key for _, names, _ in shards for key in names}
    missing = {key: index for index, key in enumerate(keys) if key and key not in available}
    if missing:
        with _reporting_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            _write_file(folder / "spec.json", [json.dumps(spec, ensure_ascii=False, indent=1).encode()])
        computed = track(compute(list(missing.values())), what, len(missing))
        for names, rows in _portions(list(missing), computed):
            with _reporting_write_errors(folder):
                _write_shard(folder, names, rows)
        shards = _open_shards(folder)
    wanted = set(keys)
    return Store(keys, [shard for shard in shards if not wanted.isdisjoint(shard[1])])


@contextmanager
def _reporting_write_errors(folder: Path) -> Iterator[None]:
    """Turn a failure to write into a one-line UserError."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if is_full(error) else f"cannot be written ({error.strerror})"
        raise UserError(f"cache {folder}: {reason} — make room or set SENTICLIP_CACHE to another folder") from None


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left behind: unfinished files, and values without their keys."""
    for path in [*folder.glob("partial-*"), *folder.glob("shard-*.npy")]:
        with suppress(FileNotFoundError):  # another writer has just renamed it
            if not path.with_suffix(".json").exists() and abandoned(path):
                path.unlink()


def _open_shards(folder: Path) -> list[tuple[Path, list[str], list[int]]]:
    """The complete shards of a cache: path, keys, lengths; damaged ones are ignored."""
    shards = []
    for path in sorted(folder.glob("shard-*.json")):
        values = path.with_suffix(".npy")
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            if len(np.load(values, mmap_mode="r")) == sum(entry["lengths"]):
                shards.append((values, entry["keys"], entry["lengths"]))
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            continue
    return shards


def _portions(names: list[str], rows: Iterable[np.ndarray]) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Rows in portions of at most SHARD_ROWS and about SHARD_BYTES, so that memory stays bounded.

    If ``rows`` raises, the rows before the error are yielded first, so that they need not be computed again.
    """
    chunk: list[np.ndarray] = []
    done = size = 0
    failure: BaseException | None = None
    rows = iter(rows)
    while failure is None:
        try:
            row = next(rows, None)
        except (Exception, KeyboardInterrupt) as error:
            row, failure = None, error
        if row is not None:
            chunk.append(np.ascontiguousarray(row))
            size += row.nbytes
        if chunk and (row is None or len(chunk) == SHARD_ROWS or size >= SHARD_BYTES):
            yield names[done : done + len(chunk)], chunk
            done, size = done + len(chunk), 0
            chunk.clear()  # the caller has written the rows: free them before the next ones are computed
        if row is None:
            break
    if failure is not None:
        raise failure
    assert done == len(names), "compute must yield a row for each missing key"


def _write_shard(folder: Path, names: list[str], rows: list[np.ndarray]) -> None:
    stem = folder / f"shard-{uuid.uuid4().hex}"
    lengths = [len(row) for row in rows]
    header = io.BytesIO()
    fields = np.lib.format.header_data_from_array_1_0(rows[0])
    np.lib.format.write_array_header_1_0(header, {**fields, "shape": (sum(lengths), *rows[0].shape[1:])})
    # not np.save, whose errors do not say why it cannot write
    _write_file(stem.with_suffix(".npy"), [header.getvalue(), *(row.data for row in rows if row.size)])
    _write_file(stem.with_suffix(".json"), [json.dumps({"keys": names, "lengths": lengths}).encode()])


def _write_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    partial = path.with_name(f"partial-{uuid.uuid4().hex}")
    try:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def frame_spec(frames: int, size: int, cutaways: str = "keep") -> dict[str, Any]:
    """Everything cached frames depend on besides their clip; raise ``version`` when decoding gives other pixels."""
    return {"frames": frames, "size": size, "cutaways": cutaways, "version": 6}


def frame_store(
    clips: list[Clip], frames: int, size: int, root: Path, workers: int | None = None, cutaways: str = "keep"
) -> Store:
    """The frames of clips, uint8 k×3×size×size each, from the cache; see ``decoded``.

    Raises:
        UserError: a video that cannot be read.
    """

    def compute(indices: list[int]) -> Iterator[np.ndarray]:
        return decoded([clips[index] for index in indices], frames, size, workers, cutaways=cutaways)

    return cached(root, frame_spec(frames, size, cutaways), clip_keys(clips, root), compute, "reading video")


def clip_keys(clips: list[Clip], root: Path) -> list[str]:
    """A key for each clip, from its video's content and its piece of it; MISSING for a clip without a video."""
    contents = file_keys((clip.video for clip in clips if clip.video is not None), root)
    return [MISSING if clip.video is None else piece_key(contents[clip.video], clip) for clip in clips]


def piece_key(content: str, clip: Clip) -> str:
    """The key of a clip, which is a whole file or a piece of one; ``content`` is the file's key."""
    return content if clip.start is None and clip.end is None else f"{content}-{clip.start}-{clip.end}"


def decoded(
    clips: list[Clip],
    frames: int,
    size: int,
    workers: int | None = None,
    ahead: int | None = None,
    cutaways: str = "keep",
) -> Iterator[np.ndarray]:
    """The frames of each clip, in order, decoded by threads while the caller works on earlier ones.

    Args:
        clips: the clips to decode; each must have a video.
        frames: m, see read_frames.
        size: side of the squashed frames, in pixels.
        workers: threads (default: the number of cores; FFmpeg and torch release the GIL).
        ahead: decoded clips that may wait for the caller, which bounds memory (default: two for each worker).
        cutaways: see read_frames.

    Raises:
        UserError: a video that cannot be read.
    """
    import torch

    count, threads = workers or runtime.cores(), torch.get_num_threads()
    # each worker resizes with one torch thread, so that there are never more threads than cores
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[Frames]] = deque()
    try:
        for clip in clips:
            assert clip.video is not None, "a clip without a video has no key, and is not computed"
            piece = clip.video, frames, clip.start, clip.end
            waiting.append(pool.submit(read_frames, *piece, size=size, cutaways=cutaways))
            if len(waiting) > max(2 * count, ahead or 0):
                yield waiting.popleft().result().pixels
        while waiting:
            yield waiting.popleft().result().pixels
        pool.shutdown()
    finally:
        # wait=False: an abandoned generator may be closed by the garbage collector in one of the pool's own threads
        pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(threads)
