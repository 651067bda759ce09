"""Where an image is: in a file of its own, or at a position in a shard (a tar file on a disk or in an object store).

An image in a shard has a path of three parts: the shard, `1536+20480` (first byte and bytes), its name there. Zero
bytes lie between them, which no file's name can hold, so that no file is taken for one, whatever it is called.
"""
from __future__ import annotations

import errno
import hashlib
import io
import os
import posixpath
import re
import stat
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

from utils.errors import ConfigError

KEY = "data_loader.args.shards"
MEMBER = re.compile("([^\0]+)\0(\\d+)\\+(\\d+)\0(.*)", re.DOTALL)
MOST_OPEN = 64          # shards that a process keeps open
#: What object stores call that which changes with a file's content, the surest first.
CHANGES = ("etag", "mtime", "lastmodified", "last_modified", "updated", "modified", "created")


class Member(NamedTuple):
    """An image in a shard: `size` bytes from `offset` on."""

    shard: str
    offset: int
    size: int
    name: str


def member_of(path: str) -> Member | None:
    """Which image in which shard a path names; None for an ordinary file."""
    found = MEMBER.fullmatch(path) if "\0" in path else None
    return None if found is None else Member(found[1], int(found[2]), int(found[3]), found[4])


def member_path(shard: str, offset: int, size: int, name: str) -> str:
    """The path of `size` bytes from `offset` on in a shard."""
    return f"{shard}\0{offset}+{size}\0{name}"


def open_image(path: str) -> BinaryIO:
    """An image to read from: a file, or a place in a shard.

    Raises OSError where it can't be read, EOFError where the shard ends before the image does.
    """
    found = member_of(path)
    if found is None:
        return open(path, "rb", opener=_open_file)
    return io.BytesIO(_opened(found.shard).read(found.offset, found.size))


def _open_file(path: str, flags: int) -> int:
    """A descriptor of a file; a named pipe of an image's name would be waited for without end."""
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    kind = os.fstat(handle).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # of a folder `open` itself says so
        os.close(handle)
        raise OSError(errno.EINVAL, "neither a file nor a link to one", path)
    return handle


def file_of(path: str) -> str:
    """The file that an image is in: its own, or its shard."""
    found = member_of(path)
    return path if found is None else found.shard


def name_below(path: str, root: str) -> str:
    """An image's name below `root`, of one in a shard its name there, with slashes on every system."""
    found = member_of(path)
    return os.path.relpath(path, root).replace(os.sep, "/") if found is None else found.name


def key_of(name: str) -> str:
    """What webdataset calls a sample: its path up to the first dot of its last part."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def name_in_shard(name: str) -> str:
    """A path as shards have it: without `./`, without `/` or `../` at its beginning."""
    return "/".join(part for part in posixpath.normpath(name).split("/") if part not in ("", ".."))


# ---------------------------------------------------------------------- whether a file is still the same

_known: dict[str, tuple[int, int]] = {}     # of URLs, each of which is a request


def stamp(file: str, known: bool = False) -> tuple[int, int]:
    """(bytes, a number that changes when the file is replaced) of a file or a URL; the number is 0 where a store has
    nothing of the kind. known: of a URL that was asked for before, what it was then.

    Raises OSError, FileNotFoundError where there is none, and ConfigError as `remote`.
    """
    if "://" not in file:
        found = os.stat(file)
        return found.st_size, found.st_mtime_ns
    if not known or file not in _known:
        system, path = remote(file)
        try:
            about = {name.lower(): value for name, value in system.info(path).items()}
            size = int(about["size"])
        except OSError:
            raise
        except Exception as error:  # a driver's own: no credentials, no network
            raise OSError(f"{type(error).__name__}: {error}".splitlines()[0]) from None
        change = next((f"{name} {about[name]}" for name in CHANGES if about.get(name)), None)
        digest = hashlib.blake2b((change or "").encode(), digest_size=7).digest()
        _known[file] = size, int.from_bytes(digest, "little") if change else 0
    return _known[file]


# ---------------------------------------------------------------------- shards that are open

class _Local:
    """A shard on a disk. Reads by position share no state, so threads may use one descriptor."""

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


def close_shards() -> None:
    """Forget the shards that are open; those that are read on open again."""
    _opened.cache_clear()


# A store's driver has a thread that a fork doesn't copy: what the parent has opened for itself (the first images, for
# their sizes) can't be used by its workers.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=close_shards)


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
