"""Reading pickles as plain data: what may be made of the names in one, and nothing else.

CIFAR's own files are pickles (of Python 2, with numpy arrays), and so is the outline of every checkpoint. Both are read
by `pickle_machine`, which runs nothing; this file is its table of constructors for Python's containers and
numpy's arrays. `store` adds torch's tensors.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from utils.checkpoint.pickle_machine import Inert, Reader, Refused, plain_key
from utils.errors import ConfigError

__all__ = ["CONSTRUCTORS", "Inert", "Reader", "Refused", "loads", "read_arrays"]


# --- Python's containers ---------------------------------------------------------------------------------------------
def _sequence(kind: type) -> Callable:
    def make(reader: Reader, values: Any = (), *_: Any) -> Any:
        if not isinstance(values, (list, tuple, set, frozenset)):
            raise Refused("it is damaged: a sequence made from something else")
        reader.spend(len(values))
        return kind(map(plain_key, values)) if kind in (set, frozenset) else kind(values)
    return make


def _pairs(kind: type) -> Callable:
    def make(reader: Reader, pairs: Any = ()) -> Any:
        pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
        if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
            raise Refused("it is damaged: a dict made from something else")
        reader.spend(len(pairs))
        return kind((plain_key(key), value) for key, value in pairs)
    return make


def _number(kind: type) -> Callable:
    def make(reader: Reader, *values: Any) -> Any:
        if len(values) > 2 or not all(isinstance(value, (int, float)) for value in values):
            raise Refused("it is damaged: a number made from something else")
        return kind(*values)
    return make


def _text(reader: Reader, value: Any = "") -> str:
    if not isinstance(value, str):
        raise Refused("it is damaged: text made from something else")
    return value


def _bytes(kind: type) -> Callable:
    """Protocols before 3 write bytes as `_codecs.encode(text, "latin1")`, and none as `bytes()`."""
    def make(reader: Reader, value: Any = b"", encoding: Any = "latin1") -> Any:
        if isinstance(value, str) and encoding in ("latin1", "latin-1"):
            value = value.encode("latin-1")
        if not isinstance(value, (bytes, bytearray)):
            raise Refused("it is damaged: bytes made from something else")
        reader.spend(len(value))
        return kind(value)
    return make


def _path(reader: Reader, *parts: Any) -> str:
    """A path is read as its text."""
    if not all(isinstance(part, str) for part in parts):
        raise Refused("it is damaged: a path made from something else")
    reader.spend(sum(map(len, parts)))
    return "/".join(parts).replace("//", "/")


def _instance(reader: Reader, cls: Any, base: Any, state: Any = None) -> Any:
    """`copyreg._reconstructor`: how protocols 0 and 1 write an instance."""
    if not isinstance(base, Inert) or base.name.partition(".")[0] != "builtins":
        raise Refused("it makes an instance of something that isn't a class")
    return reader.instance(cls, () if state is None else (state,))


# --- numpy -----------------------------------------------------------------------------------------------------------
def _dtype(reader: Reader, name: Any, *_: Any) -> Inert:
    """A dtype stays a note of its name until an array uses it: its byte order comes later, with its state."""
    return Inert("numpy.dtype", (name,))


def _numpy_type(note: Any) -> np.dtype:
    if not (isinstance(note, Inert) and note.name == "numpy.dtype" and note.called and isinstance(note.args[0], str)):
        raise Refused("it has an array whose type isn't a number's")
    order = note.state[1] if isinstance(note.state, tuple) and len(note.state) > 1 else "="
    dtype = np.dtype(note.args[0])
    if dtype.kind not in "biufcSU" or order not in ("<", ">", "|", "="):
        raise Refused("it has an array whose type isn't a number's")
    return dtype.newbyteorder(order)


def _raw(reader: Reader, value: Any) -> bytes:
    raw = value.encode("latin-1") if isinstance(value, str) else value  # Python 2 wrote bytes as text
    if not isinstance(raw, (bytes, bytearray)):
        raise Refused("it has an array of objects")
    reader.spend(len(raw))
    return bytes(raw)


def _shape(shape: Any) -> tuple:
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise Refused("it is damaged: an array's shape")
    return shape


def _empty_array(reader: Reader, *_: Any) -> np.ndarray:
    """numpy writes an array as an empty one of no type, then its state."""
    return np.empty(0, np.int8)


def _fill_array(reader: Reader, array: np.ndarray, state: Any) -> None:
    """The state of an array as numpy writes it: (version, shape, dtype, in Fortran order, bytes)."""
    if type(array) is not np.ndarray:  # the table is open to the file: it may call this with anything
        raise Refused("it is damaged: an array's state")
    _, shape, dtype, fortran, raw = state
    array.__setstate__((1, _shape(shape), _numpy_type(dtype), bool(fortran), _raw(reader, raw)))


def _array_from_buffer(reader: Reader, raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    flat = np.frombuffer(_raw(reader, raw), _numpy_type(dtype))
    return flat.reshape(_shape(shape), order="F" if order == "F" else "C").copy(order="K")


def _numpy_number(reader: Reader, dtype: Any, raw: Any) -> Any:
    """A numpy number is read as Python's."""
    return np.frombuffer(_raw(reader, raw), _numpy_type(dtype), count=1)[0].item()


CONSTRUCTORS: dict[str, Callable] = {
    "collections.OrderedDict": _pairs(OrderedDict), "collections.Counter": _pairs(dict), "builtins.dict": _pairs(dict),
    "collections.defaultdict": lambda reader, *factory: {}, "collections.deque": _sequence(list),
    "builtins.list": _sequence(list), "builtins.tuple": _sequence(tuple), "builtins.set": _sequence(set),
    "builtins.frozenset": _sequence(frozenset), "builtins.int": _number(int), "builtins.float": _number(float),
    "builtins.bool": _number(bool), "builtins.complex": _number(complex), "builtins.str": _text,
    "builtins.bytes": _bytes(bytes), "builtins.bytearray": _bytes(bytearray), "_codecs.encode": _bytes(bytes),
    "copyreg._reconstructor": _instance,
    "copyreg.__newobj__": lambda reader, cls, *args: reader.instance(cls, args),
    "copyreg.__newobj_ex__": lambda reader, cls, args, keywords: reader.instance(cls, args),
    **{f"{module}.{kind}": _path for module in ("pathlib", "pathlib._local") for kind in (
        "Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")},
    "numpy.dtype": _dtype, "numpy.ndarray.__setstate__": _fill_array,
    **{f"numpy.{core}.multiarray._reconstruct": _empty_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _numpy_number for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array_from_buffer for core in ("core", "_core")},
}


# --- for callers -----------------------------------------------------------------------------------------------------
def loads(data: bytes) -> Any:
    """The object in a pickle's bytes, as plain data and `Inert` objects; Python 2's text is latin-1. Raises Refused."""
    return Reader(BytesIO(data), len(data), CONSTRUCTORS).read()


def read_arrays(path: str | Path) -> Any:
    """The containers, numbers, text and numpy arrays pickled in `path`; text of Python 2 is read as latin-1.

    Raises ConfigError, naming the file, where it is missing or damaged, or holds anything else.
    """
    try:
        data = Path(path).read_bytes()
        return Reader(BytesIO(data), len(data), CONSTRUCTORS, keep_inert=False).read()
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except Refused as error:
        raise ConfigError(f"{path}: not a readable file of plain arrays ({error}); "
                          "remove it and fetch it again") from error
