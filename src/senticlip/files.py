"""Atomic writes, one writer at a time in a folder, a full disk as a one-line error, and an end that tidies up."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout

from senticlip.structures import UsageError, UserError

ABANDONED = 3600
"""Seconds after which an unfinished file or folder is taken for that of a killed process."""


@contextmanager
def disk(place: Path, then: str = "run the same command again") -> Iterator[None]:
    """Turn the error of a full disk, whichever library raises it, into one line for the user.

    Raises:
        UserError: instead of the error of a full disk; other errors pass.
    """
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise UserError(f"{place}: the disk is full — make room, then {then}") from error
        raise


def is_full(error: BaseException | None) -> bool:
    """Whether an error means a full disk.

    Python gives the errno, safetensors (Rust) a message with its number, torch a message that bytes are missing.
    """
    if error is None:
        return False
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = int(told[1]) if told else getattr(error, "errno", None)
    short = isinstance(error, RuntimeError) and re.search(r"unexpected pos \d+ vs \d+|file write failed", str(error))
    return bool(short) or number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or is_full(error.__cause__)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP as Ctrl-C; by themselves they would end the process with no time to tidy up.

    What somebody handles or ignores (nohup) stays as it is. Inside a long call of a library it waits for its end.
    """
    here = threading.current_thread() is threading.main_thread()  # no other may change what signals do
    both = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)} if here else set()
    mine = [number for number in both if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in mine:
            signal.signal(number, _interrupt)
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """What Ctrl-C does just now (uvicorn has a way of its own), also in a job in the background, which ignores that."""
    handler = signal.getsignal(signal.SIGINT)
    (handler if callable(handler) else signal.default_int_handler)(number, frame)


@contextmanager
def alone(folder: Path, what: str, patience: float = 0, key: str = "--out") -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing; the kernel frees the lock of a killed process.

    Args:
        folder: where this process will write.
        what: the work, for the message: "another ``what`` is writing here".
        patience: seconds to wait for another process.
        key: the setting that names another folder, for messages.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written to.
    """
    lock = FileLock(make_folder(folder, key) / ".lock")
    with suppress(NotImplementedError):  # some network file systems have no locks
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            raise UserError(f"{folder}: another {what} is writing here — wait, or choose another {key}") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be written — {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def abandoned(path: Path) -> bool:
    """Whether an unfinished file or folder is so old that its writer must have been killed."""
    return time.time() - path.stat().st_mtime > ABANDONED


def _sweep(found: Iterable[Path]) -> None:
    """Remove those of the files and folders that killed processes have left."""
    for left in found:
        with suppress(OSError):  # gone meanwhile, or not ours
            if abandoned(left):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def workshop(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out``, in which it is made before it is renamed; those of killed processes go.

    Raises:
        UserError: the disk is full.
    """
    _sweep(left for left in out.parent.glob(f".{glob.escape(out.name)}-{'?' * 8}") if left.is_dir())
    with disk(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        yield Path(folder)


def make_folder(out: str | Path, key: str = "--out") -> Path:
    """The folder to write to, made if it is missing.

    Raises:
        UsageError: it cannot be made.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{key} {folder}: cannot create this folder — {error.strerror}") from None
    return folder


@cache
def _tidy(folder: Path) -> None:
    """Remove half-written files from a folder, once a process: one of many files takes long to list."""
    _sweep(folder.glob(f".*.{'[0-9a-f]' * 12}.partial"))


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: ``write`` gets a temporary path in the same folder, which is then renamed to ``path``.

    Those that killed processes have left in the folder go.

    Raises:
        UserError: it cannot be written (no space, no permission).
    """
    # a unique name, since two processes may write the same file at once
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        _tidy(path.parent)
        with disk(path):
            write(partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())  # else a power loss may leave an empty file under the new name
            os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written — {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; raises as ``write_whole``."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
