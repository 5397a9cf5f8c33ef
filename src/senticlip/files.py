"""Atomic writes, one writer per folder at a time, a one-line error for a full disk, and cleanup on termination."""

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
"""Seconds after which an unfinished file or folder is taken for a leftover of a killed process."""


@contextmanager
def report_full_disk(path: Path, then: str = "run the same command again") -> Iterator[None]:
    """Turn the error of a full disk, whichever library raises it, into one line for the user.

    Raises:
        UserError: the disk is full. Other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise UserError(f"{path}: the disk is full — make room, then {then}") from error
        raise


def is_full(error: BaseException | None) -> bool:
    """Whether an error means a full disk.

    Python sets errno, safetensors (Rust) puts its number into the message, torch only says that bytes are missing.
    """
    if error is None:
        return False
    match = re.search(r"\(os error (\d+)\)", str(error))
    number = int(match[1]) if match else getattr(error, "errno", None)
    is_truncated = isinstance(error, RuntimeError) and re.search(
        r"unexpected pos \d+ vs \d+|file write failed", str(error)
    )
    return bool(is_truncated) or number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or is_full(error.__cause__)


@contextmanager
def terminable() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP like Ctrl-C; by default, they end the process without cleanup.

    Signals already handled or ignored (nohup) are left alone. A signal during a long library call waits for its end.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()  # only this thread may set handlers
    signals = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)} if in_main_thread else set()
    handled = [number for number in signals if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in handled:
            signal.signal(number, _interrupt)
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Do what Ctrl-C does at this time (uvicorn handles it itself), even in background jobs, which ignore Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    (handler if callable(handler) else signal.default_int_handler)(number, frame)


@contextmanager
def folder_lock(folder: Path, what: str, patience: float = 0, key: str = "--out") -> Iterator[None]:
    """Hold the lock of a folder, made if missing; the kernel releases the lock of a killed process.

    Args:
        folder: the folder this process will write to.
        what: the work, for the message "another ``what`` is writing here".
        patience: seconds to wait for another process.
        key: the option that sets the folder, for messages.

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


def _remove_abandoned(paths: Iterable[Path]) -> None:
    """Remove those files and folders that killed processes left behind."""
    for path in paths:
        with suppress(OSError):  # already gone, or not ours
            if abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A temporary folder next to ``out``, to make it in and rename it from; removes those of killed processes.

    Raises:
        UserError: the disk is full.
    """
    _remove_abandoned(path for path in out.parent.glob(f".{glob.escape(out.name)}-{'?' * 8}") if path.is_dir())
    with report_full_disk(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        yield Path(folder)


def make_folder(out: str | Path, key: str = "--out") -> Path:
    """The folder to write to, made if missing.

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
def _remove_partial_files(folder: Path) -> None:
    """Remove unfinished files from a folder, once per process: a folder of many files takes long to list."""
    _remove_abandoned(folder.glob(f".*.{'[0-9a-f]' * 12}.partial"))


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: ``write`` gets a temporary path in the same folder, which is then renamed to ``path``.

    Also removes temporary files that killed processes left in the folder.

    Raises:
        UserError: it cannot be written (no space, no permission).
    """
    # a unique name, since two processes may write the same file at once
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        _remove_partial_files(path.parent)
        with report_full_disk(path):
            write(partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())  # else a power loss could leave an empty file at ``path``
            os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written — {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; raises as ``write_atomically``."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
