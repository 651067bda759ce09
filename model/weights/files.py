"""Files of weights, as a checkpoint's dict: torch's, read without running anything in them, and safetensors."""
from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from utils.checkpoint.store import load_checkpoint
from utils.errors import ConfigError


def load_file(path: str | os.PathLike) -> dict[str, Any]:
    """What is in a file of weights: see `load_checkpoint`; of a `.safetensors` its tensors as `state_dict`.

    Raises ConfigError, with the file's name, where it can't be read.
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
