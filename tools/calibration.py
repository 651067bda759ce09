"""The temperatures that `test.py --calibrate` found, kept beside the checkpoint for predictions and export.

calibration.json has one for each classifier of each set of weights. They are found by the weights themselves, so that
a checkpoint may be renamed, or copied together with the file, and others that take its name don't get its temperature.
"""
from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.files import write_json

FILE = "calibration.json"
JOINT = "joint"


def classifier_name(kind: str, tau: float | None = None) -> str:
    """A classifier and its parameter in one name: `joint`, `tau 0.7`, `la 1`."""
    return kind if tau is None else f"{kind} {tau:.10g}"


def keep_temperature(checkpoint: Path, epoch: Any, model: nn.Module, found: dict[str, float],
                     classifier: str = JOINT) -> None:
    """Write `found` (`temperature`, ECE `before` and `after`) to calibration.json beside the checkpoint, for these
    weights and this classifier (see `classifier_name`). File name and epoch are added for readers."""
    weights = fingerprint(model)
    kept = {key: one for key, one in _read(checkpoint).items() if _is_of(one, weights) != classifier}
    write_json(checkpoint.parent / FILE, {**kept, f"{weights:08x} {classifier}": {
        "checkpoint": checkpoint.name, "epoch": epoch, "weights": weights, "classifier": classifier, **found}})


def kept_temperatures(checkpoint: Path, model: nn.Module) -> dict[str, float]:
    """The usable temperatures that are kept beside the checkpoint for a model's weights, by classifier."""
    kept = _read(checkpoint)
    weights = fingerprint(model) if kept else 0
    found = {}
    for one in kept.values():
        try:
            value = float(one["temperature"]) if _is_of(one, weights) else 0.0
        except (ValueError, KeyError, TypeError):
            continue
        if math.isfinite(value) and value > 0:
            found[_is_of(one, weights)] = value
    return found


def fingerprint(model: nn.Module) -> int:
    """A CRC-32 of the state dict, which tells one set of weights from another."""
    value = 0
    for tensor in model.state_dict().values():
        value = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), value)
    return value


def _is_of(one: Any, weights: int) -> str | None:
    """The classifier of an entry if it is for these weights. Older entries are the trained classifier's."""
    return str(one.get("classifier", JOINT)) if isinstance(one, dict) and one.get("weights") == weights else None


def _read(checkpoint: Path) -> dict[str, Any]:
    try:
        kept = json.loads((checkpoint.parent / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
