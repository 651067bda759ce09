"""The temperature that `test.py --calibrate` found, kept beside the checkpoint for predictions and export."""
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


def keep_temperature(checkpoint: Path, epoch: Any, model: nn.Module, found: dict[str, float]) -> None:
    """Write what was found (`temperature`, ECE `before` and `after`) under the checkpoint's file name, with its epoch
    and a fingerprint of the model's weights."""
    kept = _read(checkpoint)
    write_json(checkpoint.parent / FILE, {**kept, checkpoint.name: {"epoch": epoch, "weights": fingerprint(model),
                                                                    **found}})


def kept_temperature(checkpoint: Path, epoch: Any, model: nn.Module) -> float:
    """What is kept for this file, epoch and weights; 1 where nothing usable is, or the file was written again since:
    a run that goes on from an earlier epoch writes the later ones anew."""
    try:
        found = _read(checkpoint)[checkpoint.name]
        same = found["epoch"] == epoch and ("weights" not in found or found["weights"] == fingerprint(model))
        value = float(found["temperature"]) if same else 1.0
    except (ValueError, KeyError, TypeError):
        return 1.0
    return value if math.isfinite(value) and value > 0 else 1.0


def fingerprint(model: nn.Module) -> int:
    """A number that another set of weights hardly ever has."""
    value = 0
    for tensor in model.state_dict().values():
        value = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), value)
    return value


def _read(checkpoint: Path) -> dict[str, Any]:
    try:
        kept = json.loads((checkpoint.parent / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
