"""Reads pickles as plain data: nothing named in one is imported, no code in it runs.

CIFAR's original files are pickles (Python 2's, with numpy arrays), and every checkpoint holds one. A name in a pickle
is looked up in a table of functions that make plain data; any other gets a stand-in that only records what it was given
(`Inert`, e.g. for RIDE's configuration). A file with a call that looks like running code is refused as a whole.
"""
from __future__ import annotations

import pickletools
import sys
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from functools import lru_cache
from io import BytesIO
from os import PathLike
from pathlib import Path
from pickle import Unpickler
from typing import Any

import numpy as np
import torch

from utils.errors import ConfigError

_LARGEST_EXPANSION = 1 << 27  # elements of a tensor that is expanded from a smaller storage
# Names of the standard library that are kept as inert data; nothing else in _RUNNERS, which can run code, is.
_INERT_STDLIB = {
    "argparse.Namespace", "builtins.object", "builtins.range", "builtins.slice", "datetime.date", "datetime.datetime",
    "datetime.time", "datetime.timedelta", "datetime.timezone", "functools.partial", "itertools.count",
    "itertools.cycle", "logging.getLogger", "re._compile", "types.SimpleNamespace"}
_RUNNERS = {"builtins", "code", "codeop", "commands", "ctypes", "importlib", "io", "marshal", "multiprocessing", "nt",
            "os", "pickle", "posix", "pty", "runpy", "shutil", "socket", "subprocess", "sys", "threading", "types",
            "webbrowser"}


class Refused(Exception):
    """The file is damaged, isn't plain data, or tries to run code. The message says which."""


class Inert:
    """A name in a file, or an object of a class that isn't imported: a passive record of what the file holds of it.

    `name` is "module.Class"; `args` and `state` are what the file gave the object, `items` what was appended to it and
    `pairs` what was set in it, where it is a kind of list or dict.
    """

    __slots__ = ("args", "items", "name", "pairs", "state")

    def __init__(self, name: str, args: tuple = ()):
        self.name, self.args, self.state, self.items, self.pairs = name, args, None, [], {}

    def __repr__(self) -> str:
        return f"<inert {self.name}>"

    def attribute(self, name: str) -> Any:
        """The attribute that the object was pickled with, or None: `config.attribute("_config")`."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return state.get(name) if isinstance(state, dict) else None

    # The methods that unpicklers call.
    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.pairs[key] = value

    def extend(self, items: Iterable) -> None:
        self.items.extend(items)

    def append(self, item: Any) -> None:
        self.items.append(item)

    add = append


class _Name(type):
    """The metaclass of stand-ins for unknown names: a call gives an `Inert` that records the arguments."""

    def __call__(cls, *args: Any) -> Inert:
        last = cls.name.rpartition(".")[2]
        if cls.name not in _INERT_STDLIB and (_is_stdlib(cls.name) or last[:1].islower() or last.endswith("__")):
            raise Refused(f"it would run code: {cls.name[:100]}")
        return Inert(cls.name, args)


def _instance(cls: _Name, *args: Any, **keywords: Any) -> Inert:
    """An object made without calling its class, as pickles of protocol 2 do."""
    top, last = cls.name.partition(".")[0], cls.name.rpartition(".")[2].lstrip("_")
    if cls.name not in _INERT_STDLIB and _is_stdlib(cls.name) and (top in _RUNNERS or not last[:1].isupper()):
        raise Refused(f"it would run code: {cls.name[:100]}")
    return Inert(cls.name, args)


@lru_cache(maxsize=1000)
def stand_in(name: str) -> _Name:
    """A class that stands for the unknown `name`, "module.Class"."""
    return _Name("StandIn", (), {"__new__": _instance, "__slots__": (), "name": name})


def _is_stdlib(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names | {"nt", "commands", "popen2"}


class _Make:
    """A known name: `make` is called in its place."""

    __slots__ = ("make",)

    def __init__(self, make: Callable):
        self.make = make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __setstate__(self, state: Any) -> None:
        raise Refused("it sets the state of something that has none")


# --- numpy: an array is written as an empty one, then its state ------------------------------------------------------
class _Dtype:
    """A dtype of numbers or text, whose byte order comes later, with its state."""

    def __init__(self, name: Any, *_: Any):
        self.dtype = np.dtype(name if isinstance(name, str) else "O")
        if self.dtype.kind not in "biufcSU":
            raise Refused("it has an array whose type isn't a number's")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array under construction: its content comes with its state."""

    def __init__(self, *_: Any):
        self.array: Any = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, note: Any, shape: Any, order: Any) -> np.ndarray:
    dtype = _Dtype("O").dtype if not isinstance(note, _Dtype) else note.dtype
    raw = raw.encode("latin-1") if isinstance(raw, str) else raw  # Python 2 wrote bytes as text
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if order == "F" else "C").copy(order="K")


def _bytes(kind: type) -> Callable:
    """Protocols before 3 write bytes as `_codecs.encode(text, "latin1")`, and empty bytes as `bytes()`."""
    def make(value: Any = b"", encoding: Any = "latin1") -> Any:
        if not isinstance(value, (str, bytes, bytearray)) or encoding not in ("latin1", "latin-1"):
            raise Refused("it is damaged: bytes made from something else")
        return kind(value.encode("latin-1") if isinstance(value, str) else value)
    return make


def _reconstructed(cls: Any, base: Any, state: Any = None) -> Inert:
    """`copyreg._reconstructor`: how protocols 0 and 1 write an instance."""
    if not isinstance(cls, _Name):
        raise Refused("it makes an instance of something that isn't a class")
    return _instance(cls) if state is None else _instance(cls, state)


def _storage(data: bytes) -> torch.TypedStorage:
    """`torch.storage._load_from_bytes`: how a plain pickle holds a tensor's data, as a whole file in bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storage = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.TypedStorage):
        raise Refused("its tensors aren't stored as tensors")
    return storage


STATEFUL = (Inert, _Array, _Dtype)  # what may be given its state
KNOWN: dict[str, _Make] = {name: _Make(make) for name, make in {
    "collections.OrderedDict": OrderedDict, "collections.Counter": Counter,
    "collections.defaultdict": lambda *factory: {}, "collections.deque": lambda items=(), *_: list(items),
    "builtins.set": set, "builtins.frozenset": frozenset, "builtins.complex": complex,
    "builtins.bytes": _bytes(bytes), "builtins.bytearray": _bytes(bytearray), "_codecs.encode": _bytes(bytes),
    "copyreg._reconstructor": _reconstructed,
    **{f"{module}.{kind}": lambda *parts: "/".join(parts).replace("//", "/") for module in ("pathlib", "pathlib._local")
       for kind in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")},
    "numpy.dtype": _Dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": lambda note, raw: _array(raw, note, (), "C").item()
       for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array for core in ("core", "_core")},
    "torch.storage._load_from_bytes": _storage, "torch.Size": torch.Size,
    "torch.device": lambda kind, index=None: str(kind) if index is None else f"{kind}:{index}",
    **{f"torch._utils._rebuild_tensor{v}": lambda storage, offset, size, stride, *_: torch._utils._rebuild_tensor(
        storage, offset, size, stride) for v in ("", "_v2")},
    "torch._utils._rebuild_tensor_v3": lambda storage, offset, size, stride, grad, hooks, dtype, *_:
        torch._utils._rebuild_tensor_v3(storage, offset, size, stride, False, hooks, dtype),
    **{f"torch._utils._rebuild_parameter{s}": lambda data, *_: data for s in ("", "_with_state")},
    "torch._tensor._rebuild_from_type_v2": lambda make, kind, args, state: make(*args),
}.items()}
_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Pickle(Unpickler):
    """Python's unpickler with names looked up in KNOWN. Text of Python 2 is read as latin-1."""

    def __init__(self, program: bytes, storage: Callable[[Any], Any] | None, objects: bool):
        super().__init__(BytesIO(program), encoding="latin1")
        self.storage, self.objects = storage, objects

    def find_class(self, module: str, name: str) -> Any:
        full = full_name(module, name)
        found = KNOWN.get(full) or _DTYPES.get(full)
        if found is None and not self.objects and full != "numpy.ndarray":  # arrays name it, nothing calls it
            raise Refused(f"it holds a {full[:100]}")
        return found or stand_in(full)

    def persistent_load(self, identifier: Any) -> Any:
        if self.storage is None:
            raise Refused("it refers to data outside of itself")
        return self.storage(identifier)


def full_name(module: str, name: str) -> str:
    """`module.name` as Python 3 spells it."""
    return ".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))


def check_memo(program: bytes) -> None:
    """Raise Refused for operations that would use Python's extension registry, or unlimited memory."""
    for operation, argument, _ in pickletools.genops(program):
        if operation.name.startswith("EXT"):
            raise Refused(f"it uses the pickle operation {operation.name}, which plain data never needs")
        if operation.name in ("PUT", "LONG_BINPUT") and argument > len(program):
            raise Refused("it unpacks to far more data than it holds")


def loads(program: bytes, storage: Callable[[Any], Any] | None = None, objects: bool = True) -> Any:
    """The object in a pickle's bytes. storage: gives the memory that a tensor refers to. objects: False reads only
    containers, numbers, text, arrays and tensors. Raises Refused for a pickle that isn't plain data."""
    try:
        check_memo(program)
        return settled(_Pickle(program, storage, objects).load())
    except Refused:
        raise
    except Exception as error:  # whatever the file's values make Python's, numpy's or torch's functions raise
        raise Refused("it is damaged, or isn't a file of this kind") from error


def read_arrays(path: str | PathLike) -> Any:
    """The containers, numbers, text and numpy arrays pickled in `path`; text of Python 2 is read as latin-1. Raises
    ConfigError, naming the file, where it is missing or damaged, or holds anything else."""
    try:
        return loads(Path(path).read_bytes(), objects=False)
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except Refused as error:
        raise ConfigError(f"{path}: not a readable file of plain arrays ({error}); "
                          "remove it and fetch it again") from error


def settled(value: Any, device: str | torch.device = "cpu", done: dict[int, Any] | None = None) -> Any:
    """`value` with all that was read in its final form: detached tensors on `device`, arrays, names as `Inert`.

    `done` keeps shared parts shared, and cycles finite. A torch.device becomes its name, as it means nothing here.
    """
    if value is None or type(value) in (str, bytes, bool, int, float, complex):
        return value
    done = {} if done is None else done
    if id(value) in done:
        return done[id(value)][0]
    result: Any = value
    if isinstance(value, torch.Tensor):
        if value.numel() > max(value.untyped_storage().nbytes() // value.element_size(), _LARGEST_EXPANSION):
            raise Refused("it is damaged: a tensor larger than its data")
        result = value.detach().to(device)
    elif isinstance(value, _Array):
        result = value.array
    elif isinstance(value, torch.device):
        result = str(value)
    elif isinstance(value, _Name):
        result = Inert(value.name)
    elif isinstance(value, (_Make, _Dtype)):
        raise Refused("it is damaged: a name in place of data")
    elif isinstance(value, Inert):
        done[id(value)] = value, value
        for part in ("args", "state", "items", "pairs"):
            setattr(value, part, settled(getattr(value, part), device, done))
    elif isinstance(value, dict):
        result = type(value)()
        done[id(value)] = result, value
        for key, item in value.items():
            result[settled(key, device, done)] = settled(item, device, done)
    elif type(value) is list:
        result = []
        done[id(value)] = result, value
        result.extend(settled(item, device, done) for item in value)
    elif type(value) is tuple:
        result = tuple(settled(item, device, done) for item in value)
    done[id(value)] = result, value
    return result
