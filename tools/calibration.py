"""The temperature that `test.py --calibrate` found, kept beside the checkpoint for predictions and export."""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from utils.files import write_json

FILE = "calibration.json"


def keep_temperature(checkpoint: Path, epoch: Any, found: dict[str, float]) -> None:
    """Write what was found (`temperature`, ECE `before` and `after`) under the checkpoint's file name and epoch."""
    kept = _read(checkpoint)
    write_json(checkpoint.parent / FILE, {**kept, checkpoint.name: {"epoch": epoch, **found}})


def kept_temperature(checkpoint: Path, epoch: Any) -> float:
    """What is kept for this file in this epoch; 1 where nothing usable is, or the file was written again since."""
    try:
        found = _read(checkpoint)[checkpoint.name]
        value = float(found["temperature"]) if found["epoch"] == epoch else 1.0
    except (ValueError, KeyError, TypeError):
        return 1.0
    return value if math.isfinite(value) and value > 0 else 1.0


def _read(checkpoint: Path) -> dict[str, Any]:
    try:
        kept = json.loads((checkpoint.parent / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
