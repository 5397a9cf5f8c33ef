"""The cache: what is there is not computed again, and no accident leaves anything that is half there."""

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
    """A ragged row that its key determines."""
    seed = int(key.removeprefix("k"))
    return np.random.default_rng(seed).standard_normal((seed % 5, 4)).astype(np.float16)


class Computer:
    """Counts what it computes."""

    def __init__(self, keys: list[str]) -> None:
        self.keys, self.done = keys, []

    def __call__(self, places):
        for place in places:
            self.done.append(self.keys[place])
            yield row(self.keys[place])


def keys_of(n: int) -> list[str]:
    return [f"k{i}" for i in range(n)]


def check(store, keys: list[str], indices=None) -> None:
    """Every row is the one that its key determines."""
    indices = np.arange(len(keys)) if indices is None else np.asarray(indices)
    values, mask = store.gather(indices)
    assert values.shape[:2] == mask.shape
    for got, real, i in zip(values, mask, indices, strict=True):
        expected = row(keys[i]) if keys[i] else np.zeros((0, 4), np.float16)
        assert real.sum() == store.lengths[i] == len(expected)
        assert np.array_equal(got[real], expected)
        assert not got[~real].any()


def test_only_what_is_missing_is_computed(tmp_path):
    keys = keys_of(600)
    first = Computer(keys)
    store = cached(tmp_path, SPEC, keys[:500], first)
    assert len(store) == 500
    assert first.done == keys[:500]
    check(store, keys[:500])
    check(store, keys, [499, 0, 0, 257, 3])
    second = Computer(keys)
    check(cached(tmp_path, SPEC, keys, second), keys)
    assert second.done == keys[500:]
    third = Computer(keys)
    shuffled = keys[::-1]
    check(cached(tmp_path, SPEC, shuffled, third), shuffled)
    assert not third.done


def test_who_watches_sees_what_is_computed(tmp_path, terminal):
    cached(tmp_path, SPEC, keys_of(6), Computer(keys_of(6)), "reading made rows")
    assert "reading made rows" in terminal.getvalue()
    assert "6/6" in terminal.getvalue()
    before = len(terminal.getvalue())
    cached(tmp_path, SPEC, keys_of(6), Computer(keys_of(6)))
    assert len(terminal.getvalue()) == before


def test_another_spec_misses(tmp_path):
    keys = keys_of(3)
    cached(tmp_path, SPEC, keys, Computer(keys))
    other = Computer(keys)
    cached(tmp_path, {**SPEC, "version": 2}, keys, other)
    assert other.done == keys


def test_rows_that_are_there_twice_or_not_at_all(tmp_path):
    keys = ["k4", "", "k4", "k5", ""]
    computer = Computer(keys)
    store = cached(tmp_path, SPEC, keys, computer)
    assert sorted(computer.done) == ["k4", "k5"]
    check(store, keys)
    values, mask = store.gather(np.array([1, 4]))
    assert values.shape[:2] == (2, 1)
    assert not mask.any()
    nothing = cached(tmp_path, SPEC, ["", ""], computer)
    assert not nothing.gather(np.array([0, 1]))[1].any()
    assert len(cached(tmp_path, SPEC, [], computer)) == 0


def test_changed_content_is_another_key(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    before, times = file_key(path), path.stat()
    assert file_key(path) == before
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_key(path) != before
    with pytest.raises(UserError, match="cannot be read"):
        file_key(tmp_path / "none")


def test_an_error_of_the_encoder_keeps_what_was_done(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_ROWS", 10)
    keys = keys_of(35)

    def failing(places):
        for place in places:
            if place == 25:
                raise UserError("clip 25: cut off")
            yield row(keys[place])

    with pytest.raises(UserError, match="clip 25"):
        cached(tmp_path, SPEC, keys, failing)
    again = Computer(keys)
    check(cached(tmp_path, SPEC, keys, again), keys)
    assert again.done == keys[25:]


def build(root: Path, count: int, pause: float) -> None:
    cache.SHARD_ROWS = 10
    keys = keys_of(count)

    def slow(places):
        for place in places:
            time.sleep(pause)
            yield row(keys[place])

    cached(root, SPEC, keys, slow)


@pytest.fixture
def fork():
    return multiprocessing.get_context("fork")


def test_two_writers_at_once(tmp_path, fork):
    writers = [fork.Process(target=build, args=(tmp_path, 60, 0.002)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    computer = Computer(keys_of(60))
    check(cached(tmp_path, SPEC, keys_of(60), computer), keys_of(60))
    assert not computer.done


def test_killed_at_any_moment(tmp_path, fork):
    for after in (0.02, 0.05, 0.09, 0.14):
        writer = fork.Process(target=build, args=(tmp_path, 200, 0.002))
        writer.start()
        time.sleep(after)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        computer = Computer(keys_of(20))
        check(cached(tmp_path, SPEC, keys_of(20), computer), keys_of(20))
    check(cached(tmp_path, SPEC, keys_of(200), Computer(keys_of(200))), keys_of(200))


def test_what_a_kill_left_is_swept_up(tmp_path):
    keys = keys_of(5)
    cached(tmp_path, SPEC, keys, Computer(keys))
    (folder,) = tmp_path.iterdir()
    old, young = folder / "partial-old", folder / "partial-young"
    for path in (old, young, folder / "shard-orphan.npy"):
        path.write_bytes(b"half")
    for path in (old, folder / "shard-orphan.npy"):
        os.utime(path, (0, 0))
    cached(tmp_path, SPEC, keys_of(9), Computer(keys_of(9)))
    assert not old.exists()
    assert not (folder / "shard-orphan.npy").exists()
    # it may be another writer's
    assert young.exists()


def test_a_damaged_shard_is_computed_again(tmp_path):
    keys = keys_of(5)
    cached(tmp_path, SPEC, keys, Computer(keys))
    (shard,) = tmp_path.glob("*/shard-*.npy")
    shard.write_bytes(shard.read_bytes()[:-7])
    again = Computer(keys)
    check(cached(tmp_path, SPEC, keys, again), keys)
    assert again.done == keys


@pytest.mark.parametrize("damage", [Path.unlink, lambda shard: shard.write_bytes(shard.read_bytes()[:-7])])
def test_a_shard_that_goes_after_it_was_opened_is_one_line(tmp_path, damage):
    store = cached(tmp_path, SPEC, keys_of(5), Computer(keys_of(5)))
    (shard,) = tmp_path.glob("*/shard-*.npy")
    damage(shard)
    said = f"^cache {shard.parent}: missing or damaged — run the same command again to rebuild it$"
    with pytest.raises(UserError, match=said):
        store.gather(np.arange(5))


def limited(root: Path, result) -> None:
    """A writer who may write files of 40 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    try:
        cached(root, SPEC, ["k1"], lambda places: (np.zeros((1, 100_000), np.uint8) for _ in places))
    except UserError as error:
        result.send(str(error))


def test_no_room(tmp_path, fork):
    receive, send = fork.Pipe()
    writer = fork.Process(target=limited, args=(tmp_path, send))
    writer.start()
    message = receive.recv()
    writer.join()
    assert "disk is full" in message
    assert str(tmp_path) in message
    assert "\n" not in message
    assert {path.name for path in tmp_path.glob("*/*")} == {"spec.json"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_the_disk_fills_between_two_shards(tmp_path, monkeypatch, number):
    monkeypatch.setattr(cache, "SHARD_ROWS", 10)
    fsync, written = os.fsync, []

    def failing(file):
        # spec, and values and keys of two shards
        if len(written) == 5:
            raise OSError(number, os.strerror(number))
        written.append(fsync(file))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match="cannot be written" if number == errno.EACCES else "disk is full"):
        cached(tmp_path, SPEC, keys_of(40), Computer(keys_of(40)))
    assert not list(tmp_path.glob("*/partial-*"))
    monkeypatch.undo()
    again = Computer(keys_of(40))
    check(cached(tmp_path, SPEC, keys_of(40), again), keys_of(40))
    assert again.done == keys_of(40)[20:]


def test_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="SENTICLIP_CACHE"):
        cached(tmp_path / "file", SPEC, ["k1"], Computer(["k1"]))


def test_memory_stays_flat(tmp_path, monkeypatch):
    """At most one shard is held: rows wait for no one."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        store = cached(tmp_path, SPEC, keys_of(100), lambda places: (np.ones((1, 1 << 17), np.uint8) for _ in places))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 1 << 20 <= most < 1.5 * (1 << 20)
    assert store.gather(np.array([99]))[0].shape == (1, 1, 1 << 17)


def test_a_writer_renames_while_another_sweeps(tmp_path, monkeypatch):
    """A partial file that is seen, and gone when it is looked at."""
    keys = keys_of(9)
    cached(tmp_path, SPEC, keys[:5], Computer(keys))
    (folder,) = tmp_path.iterdir()
    (folder / "partial-other").write_bytes(b"half")
    exists = Path.exists

    def renamed(path: Path) -> bool:
        (folder / "partial-other").unlink(missing_ok=True)
        return exists(path)

    monkeypatch.setattr(Path, "exists", renamed)
    check(cached(tmp_path, SPEC, keys, Computer(keys)), keys)


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """The files that were read to be hashed."""
    done = []
    monkeypatch.setattr(cache, "file_key", lambda path: done.append(path) or file_key(path))
    return done


def test_a_file_is_hashed_once(tmp_path, hashed, monkeypatch):
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
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size, and as old as before
    assert file_keys(paths, root) == {path: file_key(path) for path in paths}
    assert hashed == [*paths, paths[0]]
    (root / "files.json").write_text("[1")
    assert file_keys(paths, root)[paths[1]] == first[paths[1]]
    with pytest.raises(UserError, match="cannot be read"):
        file_keys([tmp_path / "none"], root)


def test_a_file_that_was_just_written_is_hashed_again(tmp_path, hashed):
    """It may be written again before the clock of the file system ticks."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    os.utime(path, (0, 0))  # whatever it says of its age
    for _ in range(2):
        file_keys([path], tmp_path / "cache")
    assert hashed == [path, path]


def hash_files(paths: list[Path], root: Path) -> None:
    cache.SETTLED = -1
    for path in paths:
        file_keys([path], root)


def test_two_writers_of_hashes(tmp_path, fork, hashed):
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
    assert len(hashed) < len(paths)  # one may have lost what the other added, not all of it


def make_clip(path: Path, number: int) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(number):
            image = np.full((48, 64, 3), 10 * i + number, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        out.mux(stream.encode(None))
    return path


def test_frames_of_clips(tmp_path):
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


def test_workers_give_the_same(tmp_path):
    path = make_clip(tmp_path / "a.mp4", 20)
    clips = [Clip(str(i), path, start=i / 10, end=i / 10 + 0.5) for i in range(12)]
    one = frame_store(clips, 3, 16, tmp_path / "one", workers=1)
    two = frame_store(clips, 3, 16, tmp_path / "two", workers=2)
    assert np.array_equal(one.gather(np.arange(12))[0], two.gather(np.arange(12))[0])
    clips[5] = Clip("gone", tmp_path / "gone.mp4")
    with pytest.raises(UserError, match="gone"):
        frame_store(clips, 3, 16, tmp_path / "three", workers=2)


def test_decoding_does_not_run_far_ahead_of_the_asker(tmp_path, monkeypatch):
    """Or the frames of a whole data set would wait in memory."""
    read = []
    monkeypatch.setattr(cache, "read_frames", lambda *piece, **options: read.append(1) or Frames(np.zeros(1), None))
    rows = cache.decoded([Clip("a", tmp_path)] * 50, 1, 8, workers=1, ahead=4)
    next(rows)
    time.sleep(0.05)
    assert len(read) <= 5
    assert len(list(rows)) == 49
    assert len(read) == 50


def test_a_bad_clip_among_workers_is_told_and_the_rest_is_kept(tmp_path):
    path = make_clip(tmp_path / "a.mp4", 20)
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    clips = [Clip(str(i), path, start=i / 20, end=i / 20 + 0.5) for i in range(20)]
    clips[15] = Clip("bad", tmp_path / "bad.mp4")
    with pytest.raises(UserError, match="bad"):
        frame_store(clips, 3, 16, tmp_path / "cache", workers=2)
    entries = [json.loads(p.read_text()) for p in (tmp_path / "cache").glob("*/shard-*.json")]
    assert sum(len(entry["keys"]) for entry in entries) == 15


def test_no_thread_is_left(tmp_path):
    path = make_clip(tmp_path / "a.mp4", 5)
    for other in {*threading.enumerate()} - {threading.current_thread()}:
        other.join(5)  # what an earlier test has abandoned is still ending
    before = threading.active_count()
    frame_store([Clip(str(i), path, start=i / 50) for i in range(12)], 2, 16, tmp_path / "cache", workers=2)
    assert threading.active_count() == before
    assert "torch" in sys.modules


def test_what_is_abandoned_may_be_closed_by_one_of_its_own_threads(tmp_path, monkeypatch):
    """As the garbage collector does where an interrupt has left the generator in a traceback."""
    abandoned, closed, faults = threading.Event(), threading.Event(), []

    def read(*piece, **options):
        if abandoned.wait(0.2) and not closed.is_set():
            try:
                rows.close()
            except RuntimeError as error:
                faults.append(error)
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
        assert not faults
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_every_piece_of_a_film_has_a_key_of_its_own(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"film")
    times = [(None, None), (0.0, 1.0), (0.0, 2.0), (1.0, 2.0), (0.0, None), (None, 2.0)]
    clips = [Clip("a", tmp_path / "film.mp4", start=start, end=end) for start, end in times]
    keys = clip_keys([*clips, Clip("none")], tmp_path / "cache")
    assert len({*keys}) == len(clips) + 1
    assert clip_keys([clip._replace(id="b", text="好") for clip in clips], tmp_path / "cache") == keys[:-1]
