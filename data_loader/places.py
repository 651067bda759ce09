"""Where an image is: in its own file, or at a position in a shard (a tar file on a disk or in an object store).

The path of an image in a shard has three parts: the shard, `1536+20480` (offset and size in bytes), and its name there.
They are separated by zero bytes, which no file name can contain, so that ordinary files can't be mistaken for them.
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
AROUND = 2048           # a member's header, with a label's beside it, is nearer to an image than this
MOST_OPEN = 64          # the number of shards that a process keeps open
#: Object stores' names for attributes that change with a file's content, the most reliable first.
CHANGES = ("etag", "mtime", "lastmodified", "last_modified", "updated", "modified", "created")


class Member(NamedTuple):
    """An image in a shard: `size` bytes from byte `offset` on."""

    shard: str
    offset: int
    size: int
    name: str


def member_of(path: str) -> Member | None:
    """The image in a shard that a path refers to; None for an ordinary file's path."""
    found = MEMBER.fullmatch(path) if "\0" in path else None
    return None if found is None else Member(found[1], int(found[2]), int(found[3]), found[4])


def member_path(shard: str, offset: int, size: int, name: str) -> str:
    """The path of an image in a shard: `size` bytes from byte `offset` on, called `name`."""
    return f"{shard}\0{offset}+{size}\0{name}"


def open_image(path: str) -> BinaryIO:
    """Open an image for reading, from a file or a position in a shard.

    Raises OSError if it can't be read, EOFError if the shard ends within the image.
    """
    found = member_of(path)
    if found is None:
        return open(path, "rb", opener=_open_file)
    return io.BytesIO(_opened(found.shard).read(found.offset, found.size))


def _open_file(path: str, flags: int) -> int:
    """A file descriptor, opened without blocking, as opening a named pipe could wait forever."""
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    kind = os.fstat(handle).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # for a folder, `open` raises the error itself
        os.close(handle)
        raise OSError(errno.EINVAL, "neither a file nor a link to one", path)
    return handle


def file_of(path: str) -> str:
    """The file that contains an image: the image file itself, or its shard."""
    found = member_of(path)
    return path if found is None else found.shard


def name_below(path: str, root: str) -> str:
    """An image's path relative to `root`, with slashes on every system; for an image in a shard, its name there."""
    found = member_of(path)
    return os.path.relpath(path, root).replace(os.sep, "/") if found is None else found.name


def key_of(name: str) -> str:
    """webdataset's key of a sample: its path up to the first dot in its last part."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def name_in_shard(name: str) -> str:
    """A path as it is spelled in shards: without `./`, and without leading `/` or `../`."""
    return "/".join(part for part in posixpath.normpath(name).split("/") if part not in ("", ".."))


# ---------------------------------------------------------------------- whether a file is still the same

_known: dict[str, tuple[int, int]] = {}     # stamps of URLs, cached because each takes a request


def stamp(file: str, known: bool = False) -> tuple[int, int]:
    """(size in bytes, a number that changes when the file is replaced) of a file or URL; the number is 0 if an object
    store provides none. known: for a URL, return the previous result if there is one.

    Raises OSError if the file can't be accessed (FileNotFoundError if it doesn't exist), and ConfigError as `remote`.
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
        except Exception as error:  # drivers' own exceptions, for missing credentials or network
            raise OSError(f"{type(error).__name__}: {error}".splitlines()[0]) from None
        change = next((f"{name} {about[name]}" for name in CHANGES if about.get(name)), None)
        digest = hashlib.blake2b((change or "").encode(), digest_size=7).digest()
        _known[file] = size, int.from_bytes(digest, "little") if change else 0
    return _known[file]


def digest_of(file: str, places: list[int]) -> bytes:
    """A hash, 16 bytes, of what a file on a disk holds within AROUND bytes of each of `places`. Raises OSError."""
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb", buffering=0) as handle:
        for place in places:
            handle.seek(max(0, place - AROUND))
            digest.update(handle.read(2 * AROUND))
    return digest.digest()


# ---------------------------------------------------------------------- shards that are open

class _Local:
    """A shard on a disk. Positional reads share no state, so that threads may use the same descriptor."""

    def __init__(self, path: str):
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def read(self, offset: int, size: int) -> bytes:
        if not hasattr(os, "pread"):  # Windows
            with open(self.path, "rb") as handle:
                handle.seek(offset)
                return handle.read(size)
        parts, missing = [], size
        while missing:  # a network disk may return fewer bytes than requested
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
    """A shard in an object store; each image is a separate request."""

    def __init__(self, url: str):
        self.system, self.path = remote(url)

    def read(self, offset: int, size: int) -> bytes:
        found = self.system.cat_file(self.path, start=offset, end=offset + size)
        if len(found) < size:
            raise EOFError("the shard ends too early; copy or write it again")
        return found


@lru_cache(MOST_OPEN)  # an evicted shard is closed once nothing reads it any more
def _opened(shard: str) -> _Local | _Remote:
    return _Remote(shard) if "://" in shard else _Local(shard)


def close_shards() -> None:
    """Close all open shards; they are reopened when they are read again."""
    _opened.cache_clear()


# An object store's driver has a thread that isn't copied by a fork, so workers can't use shards that their parent has
# opened (to read the sizes of the first images).
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=close_shards)


def remote(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL. Raises ConfigError if fsspec or the URL's driver isn't installed."""
    try:
        import fsspec
    except ImportError:
        raise ConfigError(f"{KEY}: {url}: shards that aren't on a disk need fsspec: pip install fsspec (for s3:// also "
                          "s3fs, for gs:// gcsfs)") from None
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{KEY}: {url}: {error}") from None
