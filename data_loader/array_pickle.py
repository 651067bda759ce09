"""Reading pickles of arrays, lists and dicts without running what they hold (CIFAR's official files are pickles)."""
from __future__ import annotations

import codecs
import os
import pickle
from typing import Any

import numpy as np

from utils.errors import ConfigError


def _encode(text: str, encoding: str = "utf-8", errors: str = "strict") -> bytes:
    """How pickle protocol 2 writes bytes; text codecs only."""
    return codecs.lookup(encoding).encode(text, errors)[0] if encoding in ("latin1", "utf-8", "ascii") else b""


# Where numpy keeps the two functions that rebuild its arrays has moved; older files name the older place.
_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")
_ALLOWED = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): _encode,
            **{(core, "_reconstruct"): np.empty(0).__reduce__()[0] for core in _CORES},
            **{(core, "scalar"): np.float64(0).__reduce__()[0] for core in _CORES}}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to outside objects")


def read_arrays(path: str | os.PathLike) -> Any:
    """The plain containers, numbers, text and numpy arrays pickled in `path`, text keys of Python 2 decoded as latin1.

    Raises ConfigError, naming the file, where it is missing or damaged, or holds anything else.
    """
    try:
        with open(path, "rb") as handle:
            return _ArrayUnpickler(handle, encoding="latin1").load()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ConfigError(f"{path}: not a readable file of plain arrays ({error or type(error).__name__}); "
                          "remove it and fetch it again") from None
