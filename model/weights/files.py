"""Reading weight files as a checkpoint dict: torch's, without executing any code in them, and safetensors."""
from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from utils.checkpoint.store import load_checkpoint
from utils.errors import ConfigError


def load_file(path: str | os.PathLike) -> dict[str, Any]:
    """The contents of a weight file: as `load_checkpoint` returns them, or {"state_dict": tensors} for `.safetensors`.

    Raises ConfigError, with the file's name, if it can't be read.
    """
    if not str(path).lower().endswith(".safetensors"):
        return load_checkpoint(path)
    if find_spec("safetensors") is None:
        raise ConfigError(f"{path}: needs the package safetensors; pip install safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file as read
    try:
        return {"state_dict": read(str(path))}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read as safetensors ({error})") from None
