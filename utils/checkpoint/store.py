"""Checkpoints: written whole as plain tensors and data, read without running anything in them.

What is read is tensors and plain data, whoever wrote the file: see `torch_file` and `plain_pickle`.
"""
from __future__ import annotations

import errno
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.checkpoint.plain_pickle import Inert, Refused, settled
from utils.checkpoint.torch_file import read_torch_file
from utils.errors import ConfigError
from utils.files import atomic_write

log = logging.getLogger("ltr.checkpoint")  # a child of the project's logger

# Where projects keep their weights, in the order they are looked for.
WEIGHT_KEYS = ("state_dict_best", "state_dict", "model_state_dict", "model", "net", "model_ema", "state_dict_ema")

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
    if isinstance(value, np.generic):  # before float, of which numpy's float64 is a subclass
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

    Objects beside the weights (RIDE's pickled configuration) become `plain_pickle.Inert`; `optimizer` is the plain
    dict that its project wrote (RIDE's: the decayed `lr`, the `initial_lr`, and no schedule's state). Raises
    ConfigError, with the file's name and what is wrong, where it is missing, damaged, would run code, or holds no
    weights that can be read as plain tensors.
    """
    checkpoint = read_torch_file(path)
    try:
        _check_weights(checkpoint)
    except Refused as error:
        raise ConfigError(f"{path}: refused, {error}") from error
    return checkpoint if str(map_location) == "cpu" else settled(checkpoint, torch.device(map_location))


# --- checks --------------------------------------------------------------------------------------------------------
def find_weights(checkpoint: dict, depth: int = 3) -> tuple[str, dict] | None:
    """(where, weights) of a checkpoint: the entry that holds its weights, "" for the dict itself; None if none does.

    classifier-balancing's entry holds one dict per network (`feat_model`, `classifier`), returned as it is. Where none
    of WEIGHT_KEYS is there, it's the first entry that holds tensors (BYOL's `online_network_state_dict`), at most
    `depth` dicts deep.
    """
    for key in WEIGHT_KEYS:
        if isinstance(checkpoint.get(key), (dict, Inert)):
            inner = checkpoint[key]
            deeper = isinstance(inner, dict) and any(isinstance(inner.get(name), dict) for name in WEIGHT_KEYS)
            found = find_weights(inner, depth - 1) if deeper and depth else None
            return (f"{key}.{found[0]}", found[1]) if found else (key, inner)
    bare = any(isinstance(value, (torch.Tensor, np.ndarray)) for value in checkpoint.values())
    if bare:
        return "", checkpoint
    for key, value in checkpoint.items() if depth else ():
        if isinstance(value, dict) and "optim" not in str(key) and (found := find_weights(value, depth - 1)):
            return f"{key}.{found[0]}".rstrip("."), found[1]
    return None


def recover_config(checkpoint: dict) -> dict | None:
    """The config in a checkpoint as plain data: a dict, or the `_config` of RIDE's pickled ConfigParser; else None."""
    config = checkpoint.get("config")
    if isinstance(config, Inert):
        config = config.attribute("_config")
    config = plain_data(config)
    return config if isinstance(config, dict) and config else None


def plain_data(value: Any, depth: int = 0, budget: list[int] | None = None) -> Any:
    """`value` without inert objects: kinds of dict and list become plain, others None; inert keys are dropped.

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


def newest_good_checkpoint(folder: str | os.PathLike) -> tuple[Path, dict] | None:
    """(path, checkpoint) of the latest readable `checkpoint-epochN.pth` in `folder`, or of `model_best.pth` where that
    is of a later epoch and holds an optimizer's state; None where there is neither.

    Damaged ones are named in a warning and skipped. `checkpoint-epochN-batchM.pth` counts as older than
    `checkpoint-epochN.pth`.
    """
    best, found, numbered = Path(folder) / "model_best.pth", None, []
    for path in Path(folder).glob("checkpoint-epoch*.pth"):
        if match := re.fullmatch(r"checkpoint-epoch(\d+)(?:-batch(\d+))?\.pth", path.name):
            numbered.append((int(match[1]), int(match[2]) if match[2] else float("inf"), path))
    last = 0
    for epoch, _, path in sorted(numbered, reverse=True):
        try:
            last, found = epoch, (path, load_checkpoint(path))
            break
        except ConfigError as error:
            log.warning("%s; trying an older one", error)
    try:
        checkpoint = load_checkpoint(best) if best.is_file() else {}
    except ConfigError as error:
        log.warning("%s", error)
        return found
    newer = "optimizer" in checkpoint and isinstance(checkpoint.get("epoch"), int) and checkpoint["epoch"] > last
    return (best, checkpoint) if newer else found
