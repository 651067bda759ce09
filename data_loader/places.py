"""Where an image is: in a file of its own, or at a position in a shard (a tar file on a disk or in an object store).

An image in a shard has a path like `train-000.tar#1536+20480#ant/1.jpg`: shard, first byte, bytes, name.
"""
from __future__ import annotations

import io
import os
import posixpath
import re
from functools import lru_cache
from typing import Any, BinaryIO

from utils.errors import ConfigError

KEY = "data_loader.args.shards"
MEMBER = re.compile(r"(?P<shard>.*?\.tar)#(?P<offset>\d+)\+(?P<size>\d+)#(?P<name>.*)", re.DOTALL)
MOST_OPEN = 64          # shards that a process keeps open


def member_of(path: str) -> re.Match | None:
    """The parts `shard`, `offset`, `size`, `name` of an image's path in a shard; None for an ordinary file."""
    return MEMBER.fullmatch(path) if ".tar#" in path else None


def member_path(shard: str, offset: int, size: int, name: str) -> str:
    """The path of `size` bytes from `offset` on in a shard."""
    return f"{shard}#{offset}+{size}#{name}"


def open_image(path: str) -> BinaryIO:
    """An image to read from: a file, or a place in a shard.

    Raises OSError where it can't be read, EOFError where the shard ends before the image does.
    """
    parts = member_of(path)
    if parts is None:
        return open(path, "rb")
    return io.BytesIO(_opened(parts["shard"]).read(int(parts["offset"]), int(parts["size"])))


def file_of(path: str) -> str:
    """The file that an image is in: its own, or its shard."""
    parts = member_of(path)
    return path if parts is None else parts["shard"]


def name_below(path: str, root: str) -> str:
    """An image's name below `root`, of one in a shard its name there, with slashes on every system."""
    parts = member_of(path)
    return os.path.relpath(path, root).replace(os.sep, "/") if parts is None else parts["name"]


def key_of(name: str) -> str:
    """What webdataset calls a sample: its path up to the first dot of its last part."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


class _Local:
    """A shard on a disk. Reads by position share no state, so threads and forked workers may use one descriptor."""

    def __init__(self, path: str):
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def read(self, offset: int, size: int) -> bytes:
        if not hasattr(os, "pread"):  # Windows
            with open(self.path, "rb") as handle:
                handle.seek(offset)
                return handle.read(size)
        parts, missing = [], size
        while missing:  # a network disk may give less than it is asked for
            part = os.pread(self.descriptor, missing, offset + size - missing)
            if not part:
                raise EOFError("the shard ends too early; copy or write it again")
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Remote:
    """A shard in an object store, each image a request of its own."""

    def __init__(self, url: str):
        self.system, self.path = remote(url)

    def read(self, offset: int, size: int) -> bytes:
        found = self.system.cat_file(self.path, start=offset, end=offset + size)
        if len(found) < size:
            raise EOFError("the shard ends too early; copy or write it again")
        return found


@lru_cache(MOST_OPEN)  # one that is pushed out closes once nobody reads it any more
def _opened(shard: str) -> _Local | _Remote:
    return _Remote(shard) if "://" in shard else _Local(shard)


def remote(url: str) -> tuple[Any, str]:
    """(file system, path in it) of a URL. Raises ConfigError where fsspec or its driver isn't installed."""
    try:
        import fsspec
    except ImportError:
        raise ConfigError(f"{KEY}: {url}: shards that aren't on a disk need fsspec: pip install fsspec (for s3:// also "
                          "s3fs, for gs:// gcsfs)") from None
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{KEY}: {url}: {error}") from None
