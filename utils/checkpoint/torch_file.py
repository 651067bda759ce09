"""Reads torch's own files with its `weights_only` reader, with stand-ins for names that this doesn't know."""
from __future__ import annotations

import pickletools
import threading
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from os import PathLike
from pathlib import Path
from pickle import Unpickler
from typing import Any

import torch

from utils.checkpoint.plain_pickle import (
    KNOWN,
    STATEFUL,
    Refused,
    check_memo,
    full_name,
    loads,
    settled,
    stand_in,
)
from utils.errors import ConfigError

_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of torch's format before 1.6
_READING = threading.Lock()  # torch's table of safe names is global to the process
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "QInt8": torch.qint8,
    "QInt32": torch.qint32, "QUInt8": torch.quint8, "QUInt4x2": torch.quint4x2, "QUInt2x4": torch.quint2x4}.items()}


def read_torch_file(path: str | PathLike) -> Any:
    """What `torch.save` or `pickle.dump` wrote to `path`, as tensors and plain data. Raises ConfigError."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path}: no such checkpoint")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a checkpoint file in it")
    try:
        with open(path, "rb") as handle:
            start = handle.read(len(_MAGIC))
            handle.seek(0)
            if not start:
                raise Refused("it is empty")
            if start.startswith(b"PK\x03\x04"):
                return _read_archive(path)
            return _read_stacked(path) if start == _MAGIC else loads(handle.read())
    except Refused as error:
        raise ConfigError(f"{path}: refused, {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror or error})") from error


def _read_archive(path: Path) -> Any:
    """torch's zip format since 1.6: a pickle and one entry per storage, all uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            outlines = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(outlines) != 1:
                raise Refused("it is a zip file, but not one of torch's checkpoints (an export isn't one)")
            root = outlines[0].partition("/")[0]
            if f"{root}/constants.pkl" in entries:
                raise Refused("it is a TorchScript program, not a checkpoint; save the model's state_dict instead")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
                raise Refused("it is compressed in a way that torch never does")
            if f"{root}/byteorder" in entries and archive.read(f"{root}/byteorder").strip() != b"little":
                raise Refused("it was written on a big-endian machine")
            if damaged := archive.testzip():  # torch's reader ignores the checksums
                raise Refused(f"it is truncated or damaged ({damaged[:60]})")
            program = archive.read(outlines[0])
            storages: dict[str, torch.TypedStorage] = {}

            def check(key: str, dtype: torch.dtype, numel: int) -> None:
                if entries[f"{root}/data/{key}"].file_size < numel * dtype.itemsize:
                    raise Refused(f"it is damaged: tensor data {key} is too short")

            def storage(identifier: Any) -> torch.TypedStorage:
                _, kind, key, _, numel = identifier
                dtype = _STORAGES[kind.name]
                check(key, dtype, numel)
                raw = archive.read(f"{root}/data/{key}")
                memory = torch.frombuffer(bytearray(raw or b"0"), dtype=torch.uint8).untyped_storage()
                return storages.setdefault(key, torch.TypedStorage(wrap_storage=memory, dtype=dtype, _internal=True))
            try:
                _Storages(program, check).load()  # torch 2.9's reader reads past a storage's end
                return _by_torch(path, _names(BytesIO(program)))
            except Refused:
                raise
            except Exception:  # a kind of dict or list, or a newer protocol, for which torch's reader takes no stand-in
                return loads(program, storage)
    except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        raise Refused(f"it is truncated or damaged ({str(error)[:100]})") from error


class _Part:
    """Stands for any object that a pickle names, makes, calls or fills."""
    dtype = torch.uint8

    def __init__(self, *_: Any, **__: Any):
        pass

    __setstate__ = __setitem__ = __call__ = append = extend = add = __init__


class _Storages(Unpickler):
    """Unpickles an archive's data.pkl only to check the storages that it refers to."""

    def __init__(self, program: bytes, check: Callable[[str, torch.dtype, int], None]):
        check_memo(program)
        super().__init__(BytesIO(program), encoding="latin1")
        self.check = check

    def persistent_load(self, identifier: Any) -> None:
        _, kind, key, _, numel = identifier
        self.check(key, kind.dtype, numel)

    def find_class(self, module: str, name: str) -> type[_Part]:
        return type(name, (_Part,), {"dtype": _STORAGES.get(f"torch.{name}", torch.uint8)})


def _read_stacked(path: Path) -> Any:
    """torch's format before 1.6: five pickles (magic number, version, system, object, storage keys), then the data."""
    try:
        with open(path, "rb") as handle:
            names = set().union(*(_names(handle) for _ in range(5)))
        return _by_torch(path, names)
    except Refused:
        raise
    except Exception as error:
        raise Refused("it is truncated or damaged, or holds more than plain tensors and data") from error


def _names(handle: Any) -> set[str]:
    """The names in the pickle at the handle's position, which is left just after it."""
    return {full_name(*argument.split(" ", 1)) for operation, argument, _ in pickletools.genops(handle)
            if operation.name in ("GLOBAL", "INST")}


def _by_torch(path: Path, names: set[str]) -> Any:
    if system := sorted(name for name in names if name.partition(".")[0] in ("os", "posix", "nt", "sys")):
        raise Refused(f"it would run code: {system[0][:100]}")  # torch's reader can't be given stand-ins for these
    made = [(kind, kind.__name__) for kind in STATEFUL]  # objects that may be given their state
    with _READING, warnings.catch_warnings(), torch.serialization.safe_globals(
            [*made, *((KNOWN.get(name) or stand_in(name), name) for name in names)]):
        warnings.simplefilter("ignore")
        return settled(torch.load(path, map_location="cpu", weights_only=True))
