"""The cache: cached rows are not computed again, and no crash or full disk leaves a half-written shard behind."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from senticlip.data import cache
from senticlip.data.cache import cached, clip_keys, file_key, file_keys, frame_store
from senticlip.data.video import Frames, read_frames
from senticlip.structures import Clip, UserError

SPEC = {"encoder": "made", "version": 1}


def row(key: str) -> np.ndarray:
    """A row whose length and values are determined by its key."""
    seed = int(key.removeprefix("k"))
    return np.random.default_rng(seed).standard_normal((seed % 5, 4)).astype(np.float16)


class RecordingCompute:
    """Computes rows and records their keys."""

    def __init__(self, keys: list[str]) -> None:
        self.keys, self.computed = keys, []

    def __call__(self, indices):
        for index in indices:
            self.computed.append(self.keys[index])
            yield row(self.keys[index])


def make_keys(n: int) -> list[str]:
    return [f"k{i}" for i in range(n)]


def check_rows(store, keys: list[str], indices=None) -> None:
    """Each row of the store is the one its key determines."""
    indices = np.arange(len(keys)) if indices is None else np.asarray(indices)
    values, mask = store.gather(indices)
    assert values.shape[:2] == mask.shape
    for row_values, present, i in zip(values, mask, indices, strict=True):
        expected = row(keys[i]) if keys[i] else np.zeros((0, 4), np.float16)
        assert present.sum() == store.lengths[i] == len(expected)
        assert np.array_equal(row_values[present], expected)
        assert not row_values[~present].any()


def test_only_missing_rows_are_computed(tmp_path):
    keys = make_keys(600)
    first = RecordingCompute(keys)
    store = cached(tmp_path, SPEC, keys[:500], first)
    assert len(store) == 500
    assert first.computed == keys[:500]
    check_rows(store, keys[:500])
    check_rows(store, keys, [499, 0, 0, 257, 3])
    second = RecordingCompute(keys)
    check_rows(cached(tmp_path, SPEC, keys, second), keys)
    assert second.computed == keys[500:]
    third = RecordingCompute(keys)
    shuffled = keys[::-1]
    check_rows(cached(tmp_path, SPEC, shuffled, third), shuffled)
    assert not third.computed


def test_progress_bar_only_while_computing(tmp_path, terminal):
    cached(tmp_path, SPEC, make_keys(6), RecordingCompute(make_keys(6)), "reading made rows")
    assert "reading made rows" in terminal.getvalue()
    assert "6/6" in terminal.getvalue()
    before = len(terminal.getvalue())
    cached(tmp_path, SPEC, make_keys(6), RecordingCompute(make_keys(6)))
    assert len(terminal.getvalue()) == before


def test_other_spec_misses_the_cache(tmp_path):
    keys = make_keys(3)
    cached(tmp_path, SPEC, keys, RecordingCompute(keys))
    other = RecordingCompute(keys)
    cached(tmp_path, {**SPEC, "version": 2}, keys, other)
    assert other.computed == keys


def test_duplicate_and_empty_keys(tmp_path):
    keys = ["k4", "", "k4", "k5", ""]
    compute = RecordingCompute(keys)
    store = cached(tmp_path, SPEC, keys, compute)
    assert sorted(compute.computed) == ["k4", "k5"]
    check_rows(store, keys)
    values, mask = store.gather(np.array([1, 4]))
    assert values.shape[:2] == (2, 1)
    assert not mask.any()
    empty = cached(tmp_path, SPEC, ["", ""], compute)
    assert not empty.gather(np.array([0, 1]))[1].any()
    assert len(cached(tmp_path, SPEC, [], compute)) == 0


def test_changed_content_changes_the_key(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    before, times = file_key(path), path.stat()
    assert file_key(path) == before
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_key(path) != before
    with pytest.raises(UserError, match="cannot be read"):
        file_key(tmp_path / "none")


def test_rows_before_an_error_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_ROWS", 10)
    keys = make_keys(35)

    def failing(indices):
        for index in indices:
            if index == 25:
                raise UserError("clip 25: cut off")
            yield row(keys[index])

    with pytest.raises(UserError, match="clip 25"):
        cached(tmp_path, SPEC, keys, failing)
    again = RecordingCompute(keys)
    check_rows(cached(tmp_path, SPEC, keys, again), keys)
    assert again.computed == keys[25:]


def build_cache(root: Path, count: int, pause: float) -> None:
    cache.SHARD_ROWS = 10
    keys = make_keys(count)

    def slow(indices):
        for index in indices:
            time.sleep(pause)
            yield row(keys[index])

    cached(root, SPEC, keys, slow)


@pytest.fixture
def fork():
    return multiprocessing.get_context("fork")


def test_two_concurrent_writers(tmp_path, fork):
    writers = [fork.Process(target=build_cache, args=(tmp_path, 60, 0.002)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    compute = RecordingCompute(make_keys(60))
    check_rows(cached(tmp_path, SPEC, make_keys(60), compute), make_keys(60))
    assert not compute.computed


def test_survives_kill_at_any_moment(tmp_path, fork):
    for delay in (0.02, 0.05, 0.09, 0.14):
        writer = fork.Process(target=build_cache, args=(tmp_path, 200, 0.002))
        writer.start()
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        compute = RecordingCompute(make_keys(20))
        check_rows(cached(tmp_path, SPEC, make_keys(20), compute), make_keys(20))
    check_rows(cached(tmp_path, SPEC, make_keys(200), RecordingCompute(make_keys(200))), make_keys(200))


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    keys = make_keys(5)
    cached(tmp_path, SPEC, keys, RecordingCompute(keys))
    (folder,) = tmp_path.iterdir()
    old, young = folder / "partial-old", folder / "partial-young"
    for path in (old, young, folder / "shard-orphan.npy"):
        path.write_bytes(b"half")
    for path in (old, folder / "shard-orphan.npy"):
        os.utime(path, (0, 0))
    cached(tmp_path, SPEC, make_keys(9), RecordingCompute(make_keys(9)))
    assert not old.exists()
    assert not (folder / "shard-orphan.npy").exists()
    # may belong to a writer that is still running
    assert young.exists()


def test_damaged_shard_is_recomputed(tmp_path):
    keys = make_keys(5)
    cached(tmp_path, SPEC, keys, RecordingCompute(keys))
    (shard,) = tmp_path.glob("*/shard-*.npy")
    shard.write_bytes(shard.read_bytes()[:-7])
    again = RecordingCompute(keys)
    check_rows(cached(tmp_path, SPEC, keys, again), keys)
    assert again.computed == keys


@pytest.mark.parametrize("damage", [Path.unlink, lambda shard: shard.write_bytes(shard.read_bytes()[:-7])])
def test_shard_lost_after_opening_gives_one_line_error(tmp_path, damage):
    store = cached(tmp_path, SPEC, make_keys(5), RecordingCompute(make_keys(5)))
    (shard,) = tmp_path.glob("*/shard-*.npy")
    damage(shard)
    message = f"^cache {shard.parent}: missing or damaged — run the same command again to rebuild it$"
    with pytest.raises(UserError, match=message):
        store.gather(np.arange(5))


def write_with_size_limit(root: Path, connection) -> None:
    """Cache a row of 100 kB in a process that may write only 40 kB per file, and send back the error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    try:
        cached(root, SPEC, ["k1"], lambda indices: (np.zeros((1, 100_000), np.uint8) for _ in indices))
    except UserError as error:
        connection.send(str(error))


def test_full_disk_gives_one_line_error(tmp_path, fork):
    receive, send = fork.Pipe()
    writer = fork.Process(target=write_with_size_limit, args=(tmp_path, send))
    writer.start()
    message = receive.recv()
    writer.join()
    assert "disk is full" in message
    assert str(tmp_path) in message
    assert "\n" not in message
    assert {path.name for path in tmp_path.glob("*/*")} == {"spec.json"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_write_error_keeps_finished_shards(tmp_path, monkeypatch, code):
    monkeypatch.setattr(cache, "SHARD_ROWS", 10)
    fsync, fsyncs = os.fsync, []

    def failing(file):
        # the spec, then the values and keys of two shards
        if len(fsyncs) == 5:
            raise OSError(code, os.strerror(code))
        fsyncs.append(fsync(file))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match="cannot be written" if code == errno.EACCES else "disk is full"):
        cached(tmp_path, SPEC, make_keys(40), RecordingCompute(make_keys(40)))
    assert not list(tmp_path.glob("*/partial-*"))
    monkeypatch.undo()
    again = RecordingCompute(make_keys(40))
    check_rows(cached(tmp_path, SPEC, make_keys(40), again), make_keys(40))
    assert again.computed == make_keys(40)[20:]


def test_cache_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="SENTICLIP_CACHE"):
        cached(tmp_path / "file", SPEC, ["k1"], RecordingCompute(["k1"]))


def test_memory_is_bounded_by_one_shard(tmp_path, monkeypatch):
    """At most one shard of rows is held in memory."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        store = cached(
            tmp_path, SPEC, make_keys(100), lambda indices: (np.ones((1, 1 << 17), np.uint8) for _ in indices)
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 1 << 20 <= peak < 1.5 * (1 << 20)
    assert store.gather(np.array([99]))[0].shape == (1, 1, 1 << 17)


def test_file_renamed_during_cleanup(tmp_path, monkeypatch):
    """A partial file is listed, but renamed by its writer before it is examined."""
    keys = make_keys(9)
    cached(tmp_path, SPEC, keys[:5], RecordingCompute(keys))
    (folder,) = tmp_path.iterdir()
    (folder / "partial-other").write_bytes(b"half")
    exists = Path.exists

    def exists_after_rename(path: Path) -> bool:
        (folder / "partial-other").unlink(missing_ok=True)
        return exists(path)

    monkeypatch.setattr(Path, "exists", exists_after_rename)
    check_rows(cached(tmp_path, SPEC, keys, RecordingCompute(keys)), keys)


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """Records the files whose content is read to hash them."""
    paths = []
    monkeypatch.setattr(cache, "file_key", lambda path: paths.append(path) or file_key(path))
    return paths


def test_unchanged_file_is_hashed_once(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED", -1)
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path in paths:
        path.write_bytes(path.name.encode())
    root = tmp_path / "cache"
    first = file_keys([*paths, *paths], root)
    assert first == {path: file_key(path) for path in paths}
    assert hashed == paths
    assert file_keys(paths, root) == first
    assert hashed == paths
    before = paths[0].stat()
    paths[0].write_bytes(b"other")
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))  # same size and modification time as before
    assert file_keys(paths, root) == {path: file_key(path) for path in paths}
    assert hashed == [*paths, paths[0]]
    (root / "files.json").write_text("[1")
    assert file_keys(paths, root)[paths[1]] == first[paths[1]]
    with pytest.raises(UserError, match="cannot be read"):
        file_keys([tmp_path / "none"], root)


def test_recently_written_file_is_hashed_again(tmp_path, hashed):
    """It may be written again before the file system's clock ticks."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    os.utime(path, (0, 0))  # an old modification time proves nothing
    for _ in range(2):
        file_keys([path], tmp_path / "cache")
    assert hashed == [path, path]


def hash_files(paths: list[Path], root: Path) -> None:
    cache.SETTLED = -1
    for path in paths:
        file_keys([path], root)


def test_two_concurrent_writers_of_file_hashes(tmp_path, fork, hashed):
    paths = [tmp_path / f"{i}.bin" for i in range(40)]
    for path in paths:
        path.write_bytes(path.name.encode())
    writers = [fork.Process(target=hash_files, args=(part, tmp_path / "cache")) for part in (paths[::2], paths[1::2])]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert file_keys(paths, tmp_path / "cache") == {path: file_key(path) for path in paths}
    assert len(hashed) < len(paths)  # some entries of one writer may be lost, not all


def make_clip(path: Path, frames: int) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            image = np.full((48, 64, 3), 10 * i + frames, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        out.mux(stream.encode(None))
    return path


def test_frame_store_matches_read_frames(tmp_path):
    clips = [Clip(str(n), make_clip(tmp_path / f"{n}.mp4", n)) for n in (1, 3, 20)]
    clips += [Clip("none"), Clip("piece", tmp_path / "20.mp4", start=0.5, end=1.0)]
    store = frame_store(clips, 6, 32, tmp_path / "cache", workers=1)
    assert store.lengths.tolist() == [1, 3, 6, 0, 5]
    values, mask = store.gather(np.arange(5))
    assert values.shape == (5, 6, 3, 32, 32)
    for i in (0, 1, 2, 4):
        clip = clips[i]
        assert clip.video is not None
        assert np.array_equal(values[i][mask[i]], read_frames(clip.video, 6, clip.start, clip.end, size=32).pixels)
    make_clip(tmp_path / "3.mp4", 4)
    assert frame_store(clips, 6, 32, tmp_path / "cache", workers=1).lengths.tolist() == [1, 4, 6, 0, 5]
    assert frame_store(clips, 2, 32, tmp_path / "cache", workers=1).lengths.max() == 2


def test_number_of_workers_does_not_change_frames(tmp_path):
    path = make_clip(tmp_path / "a.mp4", 20)
    clips = [Clip(str(i), path, start=i / 10, end=i / 10 + 0.5) for i in range(12)]
    one = frame_store(clips, 3, 16, tmp_path / "one", workers=1)
    two = frame_store(clips, 3, 16, tmp_path / "two", workers=2)
    assert np.array_equal(one.gather(np.arange(12))[0], two.gather(np.arange(12))[0])
    clips[5] = Clip("gone", tmp_path / "gone.mp4")
    with pytest.raises(UserError, match="gone"):
        frame_store(clips, 3, 16, tmp_path / "three", workers=2)


def test_decoding_does_not_run_far_ahead_of_consumer(tmp_path, monkeypatch):
    """Otherwise, the frames of a whole data set would wait in memory."""
    read = []
    monkeypatch.setattr(cache, "read_frames", lambda *segment, **options: read.append(1) or Frames(np.zeros(1), None))
    rows = cache.decoded([Clip("a", tmp_path)] * 50, 1, 8, workers=1, ahead=4)
    next(rows)
    time.sleep(0.05)
    assert len(read) <= 5
    assert len(list(rows)) == 49
    assert len(read) == 50


def test_bad_clip_is_reported_and_earlier_rows_are_kept(tmp_path):
    path = make_clip(tmp_path / "a.mp4", 20)
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    clips = [Clip(str(i), path, start=i / 20, end=i / 20 + 0.5) for i in range(20)]
    clips[15] = Clip("bad", tmp_path / "bad.mp4")
    with pytest.raises(UserError, match="bad"):
        frame_store(clips, 3, 16, tmp_path / "cache", workers=2)
    entries = [json.loads(p.read_text()) for p in (tmp_path / "cache").glob("*/shard-*.json")]
    assert sum(len(entry["keys"]) for entry in entries) == 15


def test_no_thread_is_left_running(tmp_path):
    path = make_clip(tmp_path / "a.mp4", 5)
    for other in {*threading.enumerate()} - {threading.current_thread()}:
        other.join(5)  # threads that an earlier test abandoned may still be ending
    before = threading.active_count()
    frame_store([Clip(str(i), path, start=i / 50) for i in range(12)], 2, 16, tmp_path / "cache", workers=2)
    assert threading.active_count() == before
    assert "torch" in sys.modules


def test_abandoned_decoder_may_be_closed_by_its_own_worker(tmp_path, monkeypatch):
    """The garbage collector does so if an interrupt left the generator in a traceback."""
    abandoned, closed, errors = threading.Event(), threading.Event(), []

    def read(*segment, **options):
        if abandoned.wait(0.2) and not closed.is_set():
            try:
                rows.close()
            except RuntimeError as error:
                errors.append(error)
            closed.set()
        return Frames(np.zeros((1, 3, 8, 8), np.uint8), np.zeros(1))

    monkeypatch.setattr(cache, "read_frames", read)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = cache.decoded([Clip(str(i), tmp_path) for i in range(50)], 1, 8, workers=1)
        next(rows)
        abandoned.set()
        assert closed.wait(30)
        assert not errors
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_each_segment_of_film_has_its_own_key(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"film")
    times = [(None, None), (0.0, 1.0), (0.0, 2.0), (1.0, 2.0), (0.0, None), (None, 2.0)]
    clips = [Clip("a", tmp_path / "film.mp4", start=start, end=end) for start, end in times]
    keys = clip_keys([*clips, Clip("none")], tmp_path / "cache")
    assert len({*keys}) == len(clips) + 1
    assert clip_keys([clip._replace(id="b", text="好") for clip in clips], tmp_path / "cache") == keys[:-1]
