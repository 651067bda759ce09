"""torch's file formats, read without torch's reader: tensors and plain data only, nothing in the file is run.

One reader for every file that `torch.save` made: zip archives (since 1.6), the stacked pickles before them, and plain
pickles of tensors or arrays. `pickle_machine` reads the outline; this file adds the tensors' bytes. torch's own
`weights_only` reader isn't used, since it stops at RIDE's pickled configuration, and on old versions of torch it was
itself not safe.
"""
from __future__ import annotations

import mmap
import os
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.checkpoint.safe_pickle import CONSTRUCTORS, Inert, Reader, Refused
from utils.errors import ConfigError

_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8}
_LARGEST_EXPANSION = 1 << 27  # elements of a tensor that repeats a smaller storage


def read_torch_file(path: str | os.PathLike) -> Any:
    """What `torch.save` or `pickle.dump` wrote to `path`, read as tensors and plain data. Raises ConfigError."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path}: no such checkpoint")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a checkpoint file in it")
    try:
        size = path.stat().st_size
        if size == 0:
            raise Refused("it is empty")
        with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[:4] == b"PK\x03\x04":
                return _read_zip(handle, size)
            return _read_stacked(content, size)
    except Refused as error:
        raise ConfigError(f"{path}: refused, {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from error


class _Storage:
    """The memory behind tensors: `raw`, its bytes as a uint8 tensor, and the type that its elements have."""

    def __init__(self, raw: torch.Tensor, dtype: torch.dtype):
        self.raw, self.dtype = raw, dtype


def _storage_facts(identifier: Any) -> tuple[torch.dtype, str, int, Any]:
    """(element type, key, number of elements, view) of a storage as the pickle refers to it."""
    if not (isinstance(identifier, tuple) and len(identifier) in (5, 6) and identifier[0] == "storage"
            and isinstance(identifier[1], Inert) and isinstance(identifier[4], int) and identifier[4] >= 0):
        raise Refused("its tensors aren't stored as tensors")
    kind = identifier[1].name
    dtype = _STORAGES.get(kind.rpartition(".")[2])
    if dtype is None or kind.partition(".")[0] != "torch":
        raise Refused(f"its tensors have a type that isn't read: {kind[:60]}")
    return dtype, str(identifier[2])[:200], identifier[4], identifier[5] if len(identifier) == 6 else None


def _read_zip(handle: Any, size: int, constructors: dict | None = None) -> Any:
    """torch's archive since 1.6: a pickle, and one entry a storage, all uncompressed."""
    try:
        with zipfile.ZipFile(handle) as archive:
            return _read_archive(archive, size, TENSORS if constructors is None else constructors)
    except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        raise Refused(f"it is truncated or damaged ({str(error)[:100]})") from error


def _read_archive(archive: zipfile.ZipFile, size: int, constructors: dict) -> Any:
    names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(names) != 1:
        raise Refused("it is a zip file, but not one of torch's")
    root = names[0].partition("/")[0]
    if f"{root}/constants.pkl" in archive.namelist():
        raise Refused("it is a TorchScript program, not a checkpoint; save the model's state_dict instead")
    if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder").strip() != b"little":
        raise Refused("it was written on a big-endian machine")
    storages: dict[str, torch.Tensor] = {}

    def entry(name: str) -> torch.Tensor:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
            raise Refused("it is compressed in a way that torch never does")
        raw = torch.empty(info.file_size, dtype=torch.uint8)
        view, start = memoryview(raw.numpy()), 0
        with archive.open(info) as source:  # reading to the end also checks the entry's checksum
            while chunk := source.read(1 << 22):
                view[start:start + len(chunk)] = chunk
                start += len(chunk)
        if start != info.file_size:
            raise Refused(f"it is truncated or damaged ({name})")
        return raw

    def load(identifier: Any) -> _Storage:
        dtype, key, numel, _ = _storage_facts(identifier)
        if key not in storages:
            storages[key] = entry(f"{root}/data/{key}")
        if storages[key].numel() < numel * dtype.itemsize:
            raise Refused(f"it is damaged: tensor data {key} is too short")
        return _Storage(storages[key], dtype)

    program = entry(names[0]).numpy().tobytes()
    return Reader(BytesIO(program), size, constructors, persistent_load=load, resolve=_DTYPES.get).read()


def _read_stacked(content: Any, size: int, constructors: dict | None = None) -> Any:
    """torch's format before 1.6 (pickles one after another, then the storages), or a single pickle."""
    constructors = TENSORS if constructors is None else constructors
    storages: dict[str, tuple[torch.Tensor, torch.dtype]] = {}
    room = size

    def load(identifier: Any) -> Any:
        nonlocal room
        if isinstance(identifier, tuple) and identifier[:1] == ("module",) and len(identifier) == 4:
            return identifier[1]  # a class with its source text: only the name is kept
        dtype, key, numel, view = _storage_facts(identifier)
        if key not in storages:
            room -= numel * dtype.itemsize
            if room < 0:
                raise Refused("it is truncated or damaged (tensor data missing)")
            storages[key] = torch.empty(numel * dtype.itemsize, dtype=torch.uint8), dtype
        raw, dtype = storages[key]
        if view is not None:
            _, start, length = view
            if min(start, length) < 0 or (start + length) * dtype.itemsize > raw.numel():
                raise Refused("it is damaged: a view of tensor data")
            raw = raw[start * dtype.itemsize:(start + length) * dtype.itemsize]
        return _Storage(raw, dtype)

    def read() -> Any:
        return Reader(content, size, constructors, persistent_load=load, resolve=_DTYPES.get).read()

    first = read()
    if first != _MAGIC or isinstance(first, bool):
        return first
    protocol, system = read(), read()
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise Refused("it is in a version of torch's format that isn't known")
    if system.get("little_endian") is not True:
        raise Refused("it was written on a big-endian machine")
    result, keys = read(), read()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise Refused("it is truncated or damaged (tensor data missing)")
    for key in map(str, keys):
        raw, dtype = storages[key]
        count = int.from_bytes(content.read(8), "little")
        data = content.read(raw.numel())
        if count * dtype.itemsize != raw.numel() or len(data) != raw.numel():
            raise Refused("it is truncated or damaged (tensor data missing)")
        if data:
            raw.numpy()[:] = np.frombuffer(data, np.uint8)
    return result


# --- tensors: torch's part of the table of constructors ------------------------------------------------------------
def _tensor(reader: Reader, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> torch.Tensor:
    """`torch._utils._rebuild_tensor` and `_v2`: (storage, offset, size, stride, requires_grad, hooks, metadata)."""
    if not isinstance(storage, _Storage):
        raise Refused("its tensors aren't stored as tensors")
    return _view(storage.raw, storage.dtype, offset, size, stride)


def _tensor_v3(reader: Reader, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any,
               *more: Any) -> torch.Tensor:
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        raise Refused("its tensors aren't stored as tensors")
    return _view(storage.raw, dtype, offset, size, stride)


def _view(raw: torch.Tensor, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> torch.Tensor:
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(isinstance(n, int) and 0 <= n < 1 << 62 for n in numbers):
        raise Refused("it is damaged: a tensor's shape")
    numel = 1
    for n in size:
        numel *= n
    flat = raw[:raw.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
    if numel > max(flat.numel(), _LARGEST_EXPANSION):
        raise Refused("it is damaged: a tensor larger than its data")
    return torch.empty(size, dtype=dtype) if numel == 0 else flat.as_strided(size, stride, offset)


def _parameter(reader: Reader, data: Any, *more: Any) -> torch.Tensor:
    """A parameter is read as its tensor."""
    if not isinstance(data, torch.Tensor):
        raise Refused("its tensors aren't stored as tensors")
    return data


def _typed(reader: Reader, rebuild: Any, cls: Any, args: Any, state: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with attributes, or of a subclass, is read as its tensor."""
    if not isinstance(rebuild, Inert) or rebuild.name not in TENSORS:
        raise Refused("its tensors aren't stored as tensors")
    return reader.call(rebuild, args)


def _storage_from_bytes(reader: Reader, data: Any) -> _Storage:
    """`torch.storage._load_from_bytes`: how a plain pickle holds a tensor's data, as a whole file in bytes."""
    if not isinstance(data, bytes):
        raise Refused("its tensors aren't stored as tensors")
    reader.spend(len(data))
    read = _read_zip if data[:4] == b"PK\x03\x04" else _read_stacked
    storage = read(BytesIO(data), len(data), {})  # no table of tensors: files in files end here
    if not isinstance(storage, _Storage):
        raise Refused("its tensors aren't stored as tensors")
    return storage


def _device(reader: Reader, kind: Any, index: Any = None) -> str:
    """A device is read as its name: the file's devices mean nothing here."""
    return str(kind)[:20] if index is None else f"{str(kind)[:20]}:{index}"


def _size(reader: Reader, numbers: Any = ()) -> torch.Size:
    if not isinstance(numbers, (list, tuple)) or not all(isinstance(n, int) and abs(n) < 1 << 62 for n in numbers):
        raise Refused("it is damaged: a tensor's shape")
    reader.spend(len(numbers))
    return torch.Size(numbers)


TENSORS: dict[str, Callable] = {
    **CONSTRUCTORS, "torch._utils._rebuild_tensor": _tensor, "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3, "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter, "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.storage._load_from_bytes": _storage_from_bytes, "torch.device": _device, "torch.Size": _size}
