"""Reads a pickle without trusting it or loading it into memory: arrays, numbers, strings, lists and dicts only.

Nothing that the file names is imported or called; the few names that numpy arrays need are replaced by stand-ins from
this module. The bytes of a large array are not read: the array becomes a memory map of the file.
"""

from __future__ import annotations

import codecs
import io
import math
import pickle
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from senticlip.structures import UserError

LARGE = 1 << 16
CHUNK = 1 << 20


class Refused(Exception):
    """The file contains something that is not allowed."""


class DType:
    """Stands in for ``numpy.dtype``: numbers, fixed strings, and object (a list follows)."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code
        self.order: Any = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, *parts = state
        if parts[:3] != [None, None, None]:  # subarray type, field names, field types
            raise Refused("an array of records")
        self.order = order

    @property
    def value(self) -> np.dtype[Any]:
        """The dtype itself."""
        dtype = np.dtype(self.code)
        if dtype.kind not in "biufUSO":
            raise Refused(f"an array of {dtype}")
        return dtype.newbyteorder(self.order) if self.order in "<>" else dtype


class Array:
    """Stands in for ``numpy.ndarray``; :meth:`value` makes the real one."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def value(self) -> Any:
        """The array; a list if it holds objects."""
        _, shape, dtype, fortran, data = self.state
        dtype = dtype.value
        if dtype.kind == "O":
            return data
        data = data.encode("latin1") if isinstance(data, str) else data
        order: Literal["F", "C"] = "F" if fortran else "C"
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise Refused(f"an array of shape {shape} with {len(data)} bytes")
        return np.frombuffer(data, dtype).reshape(shape, order=order)


def _from_buffer(data: Any, dtype: DType, shape: tuple[int, ...], order: str = "C", *_: Any) -> Array:
    array = Array()
    array.state = (1, shape, dtype, order == "F", data)
    return array


def _scalar(dtype: DType, data: bytes | str = b"") -> Any:
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype.value)[0].item()


def _encode(text: Any, encoding: str) -> Any:
    if encoding not in ("latin1", "latin-1"):
        raise Refused(f"_codecs.encode to {encoding}")
    return text if isinstance(text, np.ndarray) else text.encode("latin1")


STAND_INS = {
    ("_reconstruct", "multiarray"): Array,
    ("scalar", "multiarray"): _scalar,
    ("_frombuffer", "numeric"): _from_buffer,
    ("ndarray", "numpy"): Array,
    ("dtype", "numpy"): DType,
    ("encode", "_codecs"): _encode,
}


class Unpickler(pickle._Unpickler):  # the Python implementation: its opcodes can be replaced
    """Handles the opcodes that plain data and arrays need."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    # set up by the base class when it loads
    read: Any
    append: Any
    stack: list[Any]
    proto: int
    _unframer: Any

    def __init__(self, file: io.BufferedReader) -> None:
        super().__init__(file, encoding="latin1")
        self.file, self.size = file, Path(file.name).stat().st_size

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name; any other name is refused."""
        parts = module.split(".")
        stand_in = STAND_INS.get((name, parts[-1]))
        if stand_in is None or parts[0] not in ("numpy", "_codecs"):
            raise Refused(f"{module}.{name}")
        return stand_in

    def persistent_load(self, pid: Any) -> Any:
        """Refused: no data is outside the file."""
        raise Refused("a persistent object")

    def get_extension(self, code: int) -> Any:
        """Refused: there is no registry."""
        raise Refused(f"extension {code}")

    def load_build(self) -> None:
        """Only stand-ins for data may have a state; setting a function's would change this process."""
        if not isinstance(self.stack[-2], Array | DType):
            raise Refused(f"a state of a {type(self.stack[-2]).__name__}")
        super().load_build()  # type: ignore[misc]

    def _map_if_large(self, length: int) -> np.ndarray | None:
        """Map and skip a large object (never inside a pickle frame); None if it must be read."""
        frame = self._unframer.current_frame
        if length < LARGE or (frame is not None and frame.tell() < len(frame.getbuffer())):
            return None
        offset = self.file.tell()
        if offset + length > self.size:
            raise EOFError
        self.file.seek(length, io.SEEK_CUR)
        return np.memmap(self.file.name, np.uint8, "r", offset, (length,))

    def _load_bytes(self, width: int) -> None:
        length = int.from_bytes(self.read(width), "little")
        mapped = self._map_if_large(length)
        self.append(self.read(length) if mapped is None else mapped)

    def _load_text(self, width: int) -> None:
        """Protocol 2 writes bytes as text, a character per byte: large ones are decoded into a temporary file."""
        length = int.from_bytes(self.read(width), "little")
        mapped = self._map_if_large(length) if self.proto < 3 else None
        if mapped is None:
            self.append(str(self.read(length), "utf-8", "surrogatepass"))
            return
        decoder = codecs.getincrementaldecoder("utf-8")()
        with tempfile.TemporaryFile() as decoded:
            for begin in range(0, length, CHUNK):
                chunk = mapped[begin : begin + CHUNK].tobytes()
                decoded.write(decoder.decode(chunk, final=begin + CHUNK >= length).encode("latin1"))
            decoded.flush()
            self.append(np.memmap(decoded, np.uint8, "r"))  # outlives the file


for opcode, reader, width in (
    (pickle.BINBYTES, Unpickler._load_bytes, 4),
    (pickle.BINBYTES8, Unpickler._load_bytes, 8),
    (pickle.BYTEARRAY8, Unpickler._load_bytes, 8),
    (pickle.BINUNICODE, Unpickler._load_text, 4),
    (pickle.BINUNICODE8, Unpickler._load_text, 8),
):
    Unpickler.dispatch[opcode[0]] = lambda self, reader=reader, width=width: reader(self, width)
Unpickler.dispatch[pickle.BUILD[0]] = Unpickler.load_build


def load(path: str | Path) -> Any:
    """The plain data of a pickle; large arrays are read-only memory maps of the file.

    Raises:
        UserError: no such file, not a pickle, cut off, or it contains anything but plain data.
    """
    try:
        with open(path, "rb") as file:
            return _replace_stand_ins(Unpickler(file).load(), {})
    except Refused as error:
        raise UserError(
            f"{path}: contains {error}, but a feature file may hold only arrays, numbers, strings, lists and dicts — "
            "it was not run; get the file from a source you trust"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:
        # a broken pickle can fail in any way
        raise UserError(f"{path}: not a complete pickle ({type(error).__name__}) — copy it again") from None


def _replace_stand_ins(value: Any, replaced: dict[int, Any]) -> Any:
    """Replace all stand-ins by arrays; shared parts stay shared."""
    if id(value) in replaced:
        return replaced[id(value)][1]
    result = value
    if isinstance(value, Array):
        result = _replace_stand_ins(value.value(), replaced)
    elif isinstance(value, dict):
        result = {_replace_stand_ins(k, replaced): _replace_stand_ins(v, replaced) for k, v in value.items()}
    elif isinstance(value, list | tuple):
        result = [_replace_stand_ins(v, replaced) for v in value]
    elif isinstance(value, int) and abs(value) >= 1 << 63:
        raise Refused(f"a number of {value.bit_length()} bits")
    elif not isinstance(value, np.ndarray | str | bytes | bytearray | int | float | bool | type(None)):
        raise Refused(f"a {type(value).__name__}")
    replaced[id(value)] = (value, result)  # keeps the value alive, so that its id is not reused
    return result
