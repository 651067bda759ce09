"""Checkpoints: written whole as plain tensors and data, read without running anything in them.

`load_checkpoint` has one reader for every file that `torch.save` ever made for these projects (zip archives, the older
stacked pickles, plain pickles of tensors or arrays), whoever wrote it. Only the bytes of tensors and plain data are
taken from it: see `utils.safe_pickle`. torch's own `weights_only` reader isn't used, since it stops at RIDE's pickled
configuration, and on old torch versions it was itself not safe.
"""
from __future__ import annotations

import errno
import logging
import mmap
import os
import re
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import ConfigError
from utils.files import atomic_write
from utils.safe_pickle import CONSTRUCTORS, Inert, Reader, Refused

log = logging.getLogger(__name__)

# Where projects keep their weights, in the order they are looked for.
WEIGHT_KEYS = ("state_dict_best", "state_dict", "model_state_dict", "model", "net", "model_ema", "state_dict_ema")
_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8}
_LARGEST_EXPANSION = 1 << 27  # elements of a tensor that repeats a smaller storage


# --- writing -------------------------------------------------------------------------------------------------------
def save_checkpoint(path: str | os.PathLike, checkpoint: dict) -> None:
    """Write `checkpoint` whole or not at all; `torch.load(path, weights_only=True)` can read it.

    Tensors go to the CPU, numpy's numbers and arrays become Python's and torch's, and `state_dict` loses a leading
    "module." from its keys. Raises TypeError, naming the entry, for anything that isn't a tensor or plain data, and
    OSError, naming the file, where it can't be written; the file that was there before is then untouched.
    """
    plain = _plain(checkpoint, "checkpoint")
    if isinstance(plain.get("state_dict"), dict):
        plain["state_dict"] = {strip_module(key): value for key, value in plain["state_dict"].items()}
    try:
        with atomic_write(path) as handle:
            torch.save(plain, handle)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise OSError(errno.EIO, str(error).splitlines()[0], str(path)) from error


def strip_module(key: str) -> str:
    """`key` without the prefixes that data-parallel wrappers and torch.compile put before it."""
    while key.startswith(("module.", "_orig_mod.")):
        key = key.partition(".")[2]
    return key


def _plain(value: Any, where: str) -> Any:
    """`value` as tensors on the CPU and plain data; `where` names it in errors."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        # A view would drag its whole storage into the file.
        return value.clone() if value.untyped_storage().nbytes() > value.numel() * value.element_size() else value
    if isinstance(value, np.generic):  # before float, which numpy's float64 is a kind of
        return value.item()
    if type(value) in (type(None), bool, int, float, complex, str, bytes, torch.dtype):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, (os.PathLike, torch.device)):
        return str(value)
    if isinstance(value, dict):
        return {_plain(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(_plain(item, f"{where}.{i}") for i, item in enumerate(value))
    raise TypeError(f"{where}: a checkpoint holds tensors and plain data, not a {type(value).__name__}")


# --- reading -------------------------------------------------------------------------------------------------------
def load_checkpoint(path: str | os.PathLike, map_location: str | torch.device = "cpu") -> dict:
    """The checkpoint at `path` as a dict of tensors and plain data; nothing in the file is ever run.

    Objects beside the weights (RIDE's pickled configuration) come as `utils.safe_pickle.Inert`. Raises ConfigError,
    with the file's name and what is wrong, where it is missing, damaged, would run code, or holds no weights that can
    be read as plain tensors.
    """
    checkpoint = read_torch_file(path)
    try:
        _check_weights(checkpoint)
    except Refused as error:
        raise ConfigError(f"{path}: refused, {error}") from error
    return checkpoint if str(map_location) == "cpu" else _moved(checkpoint, torch.device(map_location), {})


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


# --- checks --------------------------------------------------------------------------------------------------------
def find_weights(checkpoint: dict) -> tuple[str, dict] | None:
    """(where, weights) of a checkpoint: the entry that holds its weights, "" for the dict itself; None if none does.

    classifier-balancing keeps one dict a network (`feat_model`, `classifier`) in its entry; they are returned so.
    """
    for key in WEIGHT_KEYS:
        if isinstance(checkpoint.get(key), (dict, Inert)):
            return key, checkpoint[key]
    bare = any(isinstance(value, (torch.Tensor, np.ndarray)) for value in checkpoint.values())
    return ("", checkpoint) if bare else None


def recover_config(checkpoint: dict) -> dict | None:
    """The config in a checkpoint as plain data: a dict, or the `_config` of RIDE's pickled ConfigParser; else None."""
    config = checkpoint.get("config")
    if isinstance(config, Inert):
        config = config.attribute("_config")
    config = plain_data(config)
    return config if isinstance(config, dict) and config else None


def plain_data(value: Any, depth: int = 0, budget: list[int] | None = None) -> Any:
    """`value` with text for keys and without inert objects: kinds of dict and list as such, any other as None.

    Raises ConfigError for data nested deeper than 50 levels or of more than a million parts.
    """
    budget = [1_000_000] if budget is None else budget
    budget[0] -= 1
    if depth > 50 or budget[0] < 0:
        raise ConfigError("the checkpoint: its data is nested too deeply")
    if isinstance(value, Inert):
        value = value.pairs or value.items or None
    if isinstance(value, dict):
        return {key: plain_data(item, depth + 1, budget) for key, item in value.items() if not isinstance(key, Inert)}
    if isinstance(value, (list, tuple)):
        return type(value)(plain_data(item, depth + 1, budget) for item in value)
    return value


def _check_weights(checkpoint: Any) -> None:
    """Refuse a file whose weights aren't plain tensors."""
    if isinstance(checkpoint, Inert):
        raise Refused(f"it is a pickled {checkpoint.name[:80]}, not plain tensors; save its state_dict() instead")
    found = find_weights(checkpoint) if isinstance(checkpoint, dict) else None
    if found is None:
        raise Refused("it holds no weights (a dict with a state_dict was expected)")
    where, weights = found
    if isinstance(weights, Inert):
        raise Refused(f"its {where} is a pickled {weights.name[:80]}, not plain tensors; save its state_dict() instead")
    groups = [value for value in weights.values() if isinstance(value, dict)] if where else []
    for key, value in (pair for group in (groups or [weights]) for pair in group.items()):
        if not isinstance(key, str) or (where and not isinstance(value, (torch.Tensor, np.ndarray))):
            shown = value.name if isinstance(value, Inert) else type(value).__name__
            raise Refused(f"its weights can't be read as plain tensors ({where}: {str(key)[:80]!r} is a {shown[:80]})")


def _moved(value: Any, device: torch.device, done: dict[int, Any]) -> Any:
    """`value` with its tensors on `device`; `done` keeps shared parts shared, and circles finite."""
    if id(value) in done:
        return done[id(value)][0]
    if isinstance(value, torch.Tensor):
        result: Any = value.to(device)
    elif isinstance(value, dict):
        result = type(value)()
        done[id(value)] = result, value
        result.update((key, _moved(item, device, done)) for key, item in value.items())
    elif type(value) is list:
        result = []
        done[id(value)] = result, value
        result.extend(_moved(item, device, done) for item in value)
    elif type(value) is tuple:
        result = tuple(_moved(item, device, done) for item in value)
    else:
        return value
    done[id(value)] = result, value
    return result


def newest_good_checkpoint(folder: str | os.PathLike) -> tuple[Path, dict] | None:
    """(path, checkpoint) of the latest readable `checkpoint-epochN.pth` in `folder`, or None.

    Damaged ones are named in a warning and skipped. `checkpoint-epochN-batchM.pth` is older than
    `checkpoint-epochN.pth`.
    """
    numbered = []
    for path in Path(folder).glob("checkpoint-epoch*.pth"):
        if match := re.fullmatch(r"checkpoint-epoch(\d+)(?:-batch(\d+))?\.pth", path.name):
            numbered.append((int(match[1]), int(match[2]) if match[2] else float("inf"), path))
    for _, _, path in sorted(numbered, reverse=True):
        try:
            return path, load_checkpoint(path)
        except ConfigError as error:
            log.warning("%s; trying an older one", error)
    return None
