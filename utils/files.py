"""Atomic file writing: to a temporary name beside the target, flushed to disk, then renamed."""
from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from utils.errors import ConfigError


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", **open_args: Any) -> Iterator[IO]:
    """Open a temporary file that becomes `path` when the block ends well; otherwise `path` stays as it was.

    A symbolic link is kept and its target replaced. A device, a pipe, and the file behind /dev/stdout, are written to
    directly. Raises OSError where the folder can't be written or the disk is full, without the temporary file."""
    stream = {"/dev/stdout": 1, "/dev/stderr": 2}.get(os.fspath(path))
    if stream or (os.path.exists(path) and not os.path.isfile(path)):
        with open(os.dup(stream) if stream else path, mode, **open_args) as handle:
            yield handle
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, mode, **open_args) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        # mkstemp makes private files; a checkpoint is as readable as any file the user makes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all. Raises OSError."""
    with atomic_write(path, "w", encoding="utf-8", newline="") as handle:
        handle.write(text)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def check_folder_name(name: str, key: str) -> None:
    """Raise ConfigError, naming `key`, for an empty name, one over 200 bytes, and one with slashes or control codes."""
    if name in ("", ".", "..") or len(name.encode(errors="replace")) > 200 or any(c in "/\\" or c < " " for c in name):
        raise ConfigError(f"{key}: {name[:80]!r} can't name a folder; use letters, digits, '-' and '_'")
