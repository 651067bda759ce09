"""Compiling the C++ sources beside this file on demand, with the local machine's compiler.

Nothing compiled is kept on disk, so the code that runs always matches the source.
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
    """The functions of one C++ source, made available by `declare`, and the threads they may use.

    source: name of a file in this folder. optimise: the compiler flag, such as "-O2". Raises ConfigError if there is no
    compiler, or if the source can't be compiled or loaded.
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
            for native in (["-march=native"], []):       # not every compiler supports the flag on every processor
                result = subprocess.run([program, *_FLAGS, optimise, *native, "-o", target, str(_FOLDER / source)],
                                        capture_output=True, text=True)
                if result.returncode == 0:
                    try:
                        self._library = ctypes.CDLL(target)
                    except OSError as error:     # for example a temporary folder mounted noexec
                        raise ConfigError(f"trainer.compile: what {program} made can't be loaded ({error}); name a "
                                          "folder in TMPDIR that programs may run from, or leave the key at false"
                                          ) from None
                    return
        raise ConfigError(f"trainer.compile: {program} can't compile the layers "
                          f"({(result.stderr.strip().splitlines() or ['no message'])[-1]}); leave the key at false")

    def declare(self, name: str, arguments: list) -> None:
        """Add the library's void function `name` to `functions`. arguments: their ctypes."""
        function = self.functions[name] = getattr(self._library, name)
        function.restype, function.argtypes = None, arguments

    def threads(self, most: int) -> int:
        """The number of threads for a call: torch's, but at most `most`; 1 without OpenMP."""
        return min(torch.get_num_threads(), most) if self.parallel else 1


def keeps_up() -> bool:
    """Whether compiled layers can use as many threads as torch; otherwise torch's own layers are faster."""
    return torch.get_num_threads() == 1 or _parallel() is not None


def compiler() -> str | None:
    """The path of the C++ compiler: the one named by `CXX`, or else the system's; None if there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)


@functools.cache
def _parallel() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP library that torch has loaded, so that its threads are reused; None
    if there is no such library."""
    home = str(Path(torch.__file__).parent)      # preferred: scikit-learn may have loaded its own copy
    try:
        with open("/proc/self/maps") as maps:
            loaded = {line.split(maxsplit=5)[5].strip() for line in maps if "omp" in line and ".so" in line}
    except OSError:
        loaded = {None}       # not Linux: search this process's own symbols
    for path in sorted(loaded, key=lambda path: (not str(path).startswith((f"{home}/", f"{home}.libs/")), str(path))):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError, TypeError):
            continue
    return None
