"""C++ sources beside this file, compiled by this machine's own compiler when they are asked for.

Nothing compiled is kept on disk: what runs comes out of the source, each time.
"""
from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from utils.errors import ConfigError

_FOLDER = Path(__file__).parent
_FLAGS = ("-std=c++17", "-shared", "-fPIC", "-fno-exceptions", "-fno-rtti", "-w")


class Library:
    """The functions of one source, as `declare`d, and the threads they may use.

    source: a file's name. optimise: the compiler's flag. Raises ConfigError where there is no compiler, or where it
    can't compile the source.
    """

    def __init__(self, source: str, optimise: str):
        program = compiler()
        if program is None:
            raise ConfigError("trainer.compile: no C++ compiler found for the layers; install g++ or clang++ (or name "
                              "one in CXX), or leave the key at false")
        self.functions: dict[str, Callable] = {}
        self.parallel = _parallel()
        with tempfile.TemporaryDirectory() as folder:
            target = str(Path(folder) / "library.so")
            for native in (["-march=native"], []):       # which not every compiler knows for every processor
                result = subprocess.run([program, *_FLAGS, optimise, *native, "-o", target, str(_FOLDER / source)],
                                        capture_output=True, text=True)
                if result.returncode == 0:
                    try:
                        self._library = ctypes.CDLL(target)
                    except OSError as error:     # such as temporary files that mustn't be run
                        raise ConfigError(f"trainer.compile: what {program} made can't be loaded ({error}); name a "
                                          "folder in TMPDIR that programs may run from, or leave the key at false"
                                          ) from None
                    return
        raise ConfigError(f"trainer.compile: {program} can't compile the layers "
                          f"({(result.stderr.strip().splitlines() or ['no message'])[-1]}); leave the key at false")

    def declare(self, name: str, arguments: list) -> None:
        """Take up the function `name`, which returns nothing; arguments: their ctypes."""
        function = self.functions[name] = getattr(self._library, name)
        function.restype, function.argtypes = None, arguments

    def threads(self, most: int) -> int:
        """How many threads a call takes: torch's, but `most` at most."""
        return min(torch.get_num_threads(), most) if self.parallel else 1


def keeps_up() -> bool:
    """Whether compiled layers have as many threads as torch: one loses against several, however fast it is."""
    return torch.get_num_threads() == 1 or _parallel() is not None


def compiler() -> str | None:
    """The C++ compiler's path: `CXX`'s, or the system's."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)


@functools.cache
def _parallel() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP library that torch has loaded, so that no second set of threads is
    made; None where there is no such library."""
    home = str(Path(torch.__file__).parent)      # scikit-learn brings a copy of its own
    try:
        with open("/proc/self/maps") as maps:
            loaded = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line and ".so" in line}
    except OSError:
        loaded = {None}       # not Linux: among what is loaded already, if its names are found at all
    for path in sorted(loaded, key=lambda path: (not str(path).startswith((f"{home}/", f"{home}.libs/")), str(path))):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError, TypeError):
            continue
    return None
