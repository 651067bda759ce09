"""One process (or job of several) at a time trains a run: two in one folder would mix their records."""
from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from base.run_paths import RunPaths
from utils.errors import ConfigError

try:
    import fcntl
except ImportError:     # Windows
    fcntl = None

NAME = ".running"       # in the run's models folder while it trains: machine and process


@contextlib.contextmanager
def sole_trainer() -> Iterator[None]:
    """Around a training: at its end other processes may train the runs that were held in it."""
    try:
        yield
    finally:
        while _held:
            file, handle = _held.pop()
            with contextlib.suppress(OSError):
                file.unlink()       # before the lock goes, so that it isn't another process's by then
            os.close(handle)


_held: list[tuple[Path, int]] = []


def hold(paths: RunPaths) -> RunPaths:
    """Create a run's folders, and refuse other processes there until the surrounding `sole_trainer` ends, or this
    process does; returns `paths`. On a file system without POSIX locks (network disks have them) nothing is refused.

    Raises ConfigError if another process trains the run, or if the folders can't be written to.
    """
    paths.create()
    file = paths.models / NAME
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(f"trainer.save_dir: can't write in {paths.models}: {error.strerror}") from None
    try:
        if fcntl is not None:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.write(handle, f"{socket.gethostname()}, process {os.getpid()}".encode())
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            who = os.read(handle, 200).decode(errors="replace")
            os.close(handle)
            raise ConfigError(f"{paths.models}: another process trains this run ({who}); wait for its end, or give "
                              "another --run_id") from None
    _held.append((file, handle))
    return paths
