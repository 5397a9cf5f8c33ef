"""Atomic writes, one writer at a time in a folder, and a full disk as a one-line error."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
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


@contextmanager
def workshop(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out``, in which it is made before it is renamed; those of killed processes go.

    Raises:
        UserError: the disk is full.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}-{'?' * 8}"):
        with suppress(OSError):  # gone meanwhile, or not ours
            if abandoned(left):
                shutil.rmtree(left)
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
        raise UsageError(f"{key} {folder}: no folder to write to — {error.strerror}") from None
    return folder


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: ``write`` gets a temporary path in the same folder, which is then renamed to ``path``.

    Raises:
        UserError: it cannot be written (no space, no permission).
    """
    # a unique name, since two processes may write the same file at once
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
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
