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
    """Write `found` (`temperature`, ECE `before` and `after`) to calibration.json beside the checkpoint, under its file
    name, with its epoch and a fingerprint of the model's weights."""
    kept = _read(checkpoint)
    write_json(checkpoint.parent / FILE, {**kept, checkpoint.name: {"epoch": epoch, "weights": fingerprint(model),
                                                                    **found}})


def kept_temperature(checkpoint: Path, epoch: Any, model: nn.Module) -> float:
    """The temperature kept for this file, epoch and weights; 1 where there is no usable one, or the checkpoint was
    rewritten since (a run that is resumed from an earlier epoch writes the later ones again)."""
    try:
        found = _read(checkpoint)[checkpoint.name]
        same = found["epoch"] == epoch and ("weights" not in found or found["weights"] == fingerprint(model))
        value = float(found["temperature"]) if same else 1.0
    except (ValueError, KeyError, TypeError):
        return 1.0
    return value if math.isfinite(value) and value > 0 else 1.0


def fingerprint(model: nn.Module) -> int:
    """A CRC-32 of the state dict, which tells one set of weights from another."""
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
