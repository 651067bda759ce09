"""Files that loaders derive from data and keep beside it, such as shards' indexes; a dry run keeps none."""
from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from utils import dist

_leaving: contextlib.ExitStack | None = None


def kept() -> bool:
    """Whether files that are derived from data may be written beside it."""
    return _leaving is None


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Within this context nothing is written beside the data; at its end, what was derived in it is removed."""
    global _leaving
    with contextlib.ExitStack() as _leaving:
        try:
            yield
        finally:
            _leaving = None


def afterwards(undo: Callable[..., object], *args: object) -> None:
    """Call `undo(*args)` at the end of the surrounding `nothing_kept`."""
    assert _leaving is not None
    _leaving.callback(undo, *args)


def temporary_folder() -> Path:
    """A new folder until the end of the surrounding `nothing_kept`: one on each machine, whose processes share it. All
    ranks must call it. Raises OSError."""
    name = dist.broadcast_object(f"derived-{secrets.token_hex(8)}")
    folder = Path(tempfile.gettempdir(), str(name))
    if dist.local_rank() == 0:
        folder.mkdir(mode=0o700)
        afterwards(shutil.rmtree, folder, True)
    dist.barrier()
    return folder
