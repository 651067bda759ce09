"""Images in tar files, with an index of names, labels and byte positions that is stored beside the shards.

A shard is an ordinary uncompressed tar file, as written by webdataset or `python -m tools.shard`: `key.jpg` beside
`key.cls` or `key.json`, or `CLASS/name.jpg`. Each image is read by its position (`data_loader.places`), so that any
sampler works with shards as with files.
"""
from __future__ import annotations

import hashlib
import itertools
import os
import posixpath
import re
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from data_loader.derived import afterwards, kept
from data_loader.places import KEY, close_shards, digest_of, member_path, open_image, stamp
from data_loader.shard_names import expand
from data_loader.tars import BESIDE, read_tar
from logger.log import get_logger
from utils import dist
from utils.errors import ConfigError
from utils.files import atomic_write

VERSION = 3             # of the index's layout and the way labels are read
MARKED = 16             # images of each shard whose surroundings tell a copied shard from another one


@dataclass
class Index:
    """The contents of a pattern's shards, with images in the order in which `os.walk` would list them.

    shards: paths or URLs [K]. stamps: int64 [K, 2], each shard's `places.stamp`. names: of the images [N]. shard
    (int32), offset and size (int64, bytes): each image's position, [N] each. kinds: the distinct labels, as text. kind:
    int32 [N], each image's index into kinds, or one of UNLABELLED, BESIDE and UNCLEAR of `data_loader.tars`. links: how
    many images are left out because they are links.
    """

    shards: list[str]
    stamps: np.ndarray
    names: list[str]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    kinds: list[str]
    kind: np.ndarray
    links: int = 0

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def paths(self) -> list[str]:
        """Each image's path [N], as `data_loader.images` reads it."""
        return [member_path(self.shards[k], offset, size, name) for k, offset, size, name in zip(
            self.shard.tolist(), self.offset.tolist(), self.size.tolist(), self.names)]

    def shard_of(self, at: int) -> str:
        """The path or URL of the shard with image `at`."""
        return self.shards[self.shard[at]]

    def save(self, file: Path) -> None:
        """Write the index to `file`, atomically. Raises OSError."""
        with atomic_write(file) as handle:
            np.savez(handle, version=np.int64(VERSION), links=np.int64(self.links), stamps=self.stamps,
                     marks=self._marks(np.arange(len(self.shards))), shard=self.shard, offset=self.offset,
                     size=self.size, kind=self.kind,
                     **_packed("names", self.names), **_packed("kinds", self.kinds),
                     **_packed("shards", _known_as(self.shards, file)))

    def _marks(self, which: np.ndarray) -> np.ndarray:
        """Digests, uint8 [n, 16], of what lies around MARKED of the images (headers, labels, their first bytes) and at
        the beginning of each shard of `which`: the same in copies, which have other times. 0 for URLs. Raises OSError.
        """
        order = np.lexsort((self.offset, self.shard))
        starts = np.searchsorted(self.shard[order], np.arange(len(self.shards) + 1))
        marks = np.zeros((len(which), 16), dtype=np.uint8)
        for row, k in enumerate(which.tolist()):
            own = order[starts[k]:starts[k + 1]]
            if "://" not in self.shards[k]:
                own = own[np.unique(np.linspace(0, len(own) - 1, MARKED).astype(int))] if len(own) else own
                places = [0, *self.offset[own].tolist(), *(self.offset[own] + self.size[own]).tolist()]
                marks[row] = np.frombuffer(digest_of(self.shards[k], places), np.uint8)
        return marks

    @classmethod
    def load(cls, file: Path, shards: list[str], stamps: np.ndarray) -> Index | None:
        """The index in `file`, if it belongs to these shards in their current state, or to others of which they are
        copies; else None."""
        try:
            with np.load(file) as found:  # refuses pickles by default
                if int(found["version"]) != VERSION or _unpacked(found, "shards") != _known_as(shards, file) or \
                        not np.array_equal(found["stamps"][:, 0], stamps[:, 0]):
                    return None
                index = cls(shards, stamps, _unpacked(found, "names"), found["shard"], found["offset"], found["size"],
                            _unpacked(found, "kinds"), found["kind"], int(found["links"]))
                other = np.flatnonzero(found["stamps"][:, 1] != stamps[:, 1])
                if len(other) and (any("://" in shards[k] for k in other) or
                                   not np.array_equal(index._marks(other), found["marks"][other])):
                    return None
                return index
        except Exception:  # zipfile and NumPy raise nearly anything for a damaged file, which is then made again
            return None


def _known_as(shards: list[str], file: Path) -> list[str]:
    """Shards as recorded in an index: URLs, or paths relative to its folder, so that both can be moved together."""
    return [shard if "://" in shard else os.path.relpath(shard, file.parent).replace(os.sep, "/") for shard in shards]


def _packed(name: str, texts: list[str]) -> dict[str, np.ndarray]:
    parts = [os.fsencode(text) for text in texts]
    return {name: np.frombuffer(b"".join(parts), np.uint8),
            f"{name}_ends": np.cumsum([len(part) for part in parts], dtype=np.int64)}


def _unpacked(found: Any, name: str) -> list[str]:
    text, ends = found[name].tobytes(), found[f"{name}_ends"].tolist()
    return [os.fsdecode(text[start:end]) for start, end in zip([0, *ends], ends)]


#: Indices that weren't written, by their intended files, so that a run's loaders can share them.
_unwritten: dict[Path, Index] = {}


def open_index(pattern: str, data_dir: str) -> Index:
    """The index of a pattern's shards, read from beside them (for URLs, from `data_dir`), or made if there is none or a
    shard has changed.

    All ranks must call it: a rank without an index receives rank 0's, which is made only once. Raises ConfigError,
    naming the shard, if it is missing, compressed, truncated or damaged, or if an image is there twice.
    """
    close_shards()  # a shard may have been replaced by another file of the same name
    shards, file = locate(pattern, data_dir)
    stamps = _stamps(shards)
    index = _unwritten.get(file)
    if index is None or index.shards != shards or not np.array_equal(index.stamps, stamps):
        index = Index.load(file, shards, stamps)
    if not dist.any_rank(index is None):
        return index
    first = dist.on_main(lambda: _make(shards, stamps, file) if index is None else index)
    if index is not None or dist.is_main():
        return first if index is None else index
    other = np.flatnonzero(first.stamps[:, 0] != stamps[:, 0])
    if len(other):
        at = int(other[0])
        raise ConfigError(f"{shards[at]}: has {stamps[at, 0]} bytes here and {first.stamps[at, 0]} where rank 0 is; "
                          "copy it again")
    first = replace(first, shards=shards, stamps=stamps)
    if dist.local_rank() == 0 and Index.load(file, shards, stamps) is None:  # this machine has its own copy of the data
        _save(first, file)
    return first


def locate(pattern: str, data_dir: str) -> tuple[list[str], Path]:
    """The paths or URLs of a pattern's shards, and their index's file. Raises ConfigError as `expand`."""
    far = "://" in pattern
    shards = [name if far else os.path.join(data_dir, name) for name in expand(pattern)]
    return shards, index_file(pattern, shards, Path(data_dir if far else os.path.dirname(shards[0]) or "."))


def index_file(pattern: str, shards: list[str], folder: Path) -> Path:
    """The path of the index in `folder`: a readable name with a digest of all shards, as patterns in different buckets
    may have equal names."""
    name = re.sub(r"[{}]", "", os.path.basename(pattern)).removesuffix(".tar")[:80]
    every = "\0".join(_known_as(shards, folder / name))
    digest = hashlib.blake2b(os.fsencode(every), digest_size=4)
    return folder / f"{name}.{digest.hexdigest()}.index.npz"


def _make(shards: list[str], stamps: np.ndarray, file: Path) -> Index:
    get_logger().info("making the index of %d shards, %s, once", len(shards), file if kept() else "which isn't written")
    index = make_index(shards, stamps)
    _save(index, file)
    return index


def _save(index: Index, file: Path) -> None:
    if not kept():
        _unwritten[file] = index
        afterwards(_unwritten.pop, file, None)
        return
    try:
        index.save(file)
    except OSError as error:
        get_logger().info("%s: can't be written (%s), so every run makes it again", file, error.strerror or error)
        _unwritten[file] = index


def _stamps(shards: list[str]) -> np.ndarray:
    stamps, missing = [], []
    for shard in shards:
        try:
            stamps.append(stamp(shard))
        except (FileNotFoundError, NotADirectoryError):
            missing.append(shard)
        except OSError as error:
            raise ConfigError(f"{shard}: can't be opened: {error.strerror or error} ({KEY})") from None
    if missing:
        more = f"; {len(missing) - 1} more of {len(shards)} are missing" if len(missing) > 1 else ""
        raise ConfigError(f"{missing[0]}: no such shard ({KEY}){more}")
    return np.array(stamps, dtype=np.int64).reshape(-1, 2)


def make_index(shards: list[str], stamps: np.ndarray) -> Index:
    """Build the index from the headers of all shards; stamps: int64 [K, 2]. Raises ConfigError as `open_index`, and if
    there is no image."""
    found: list[tuple[str, int, int, int, str | int]] = []
    links = 0
    for number, shard in enumerate(shards):
        contents = read_tar(shard, int(stamps[number, 0]))
        links += contents.links
        found += [(name, number, offset, size, label)
                  for (name, offset, size), label in zip(contents.images, contents.labels)]
    if not found:
        raise ConfigError(f"{shards[0]}: the {len(shards)} shards hold no image" + (
            f"; {links} are links, write them with tar's --dereference --hard-dereference" if links else ""))
    # In the order of os.walk: a folder's files before its subfolders, both by name.
    found.sort(key=lambda member: (*_walk_order(member[0]), member[1]))
    for _, group in itertools.groupby(found, key=itemgetter(0)):
        _refuse_twice(list(group), shards)
    names, shard, offset, size, label = zip(*found)
    kinds = sorted({text for text in label if isinstance(text, str)})
    number_of = {text: number for number, text in enumerate(kinds)}
    kind = [number_of.get(text, text) for text in label]
    return Index(shards, stamps, list(names), np.array(shard, np.int32), np.array(offset, np.int64),
                 np.array(size, np.int64), kinds, np.array(kind, np.int32), links)


def _walk_order(name: str) -> tuple[tuple[str, ...], str]:
    folder, base = posixpath.split(name)
    return tuple(folder.split("/")) if folder else (), base


def _refuse_twice(members: list[tuple[str, int, int, int, str | int]], shards: list[str]) -> None:
    """Raises ConfigError if members of one name are the same photo. webdataset's keys may start again in each shard, so
    that equal names can be different photos; only their bytes tell them apart."""
    if len(members) == 1:
        return
    members = sorted((member for member in members if member[4] != BESIDE), key=itemgetter(3))
    had: set[int] = set()
    for _, group in itertools.groupby(members, key=itemgetter(3)):
        alike, of_content = list(group), {}
        for name, number, offset, size, _ in alike:
            if number in had:
                raise ConfigError(f"{shards[number]}: {name} is there twice")
            had.add(number)
            content = _digest(shards[number], offset, size) if len(alike) > 1 else b""
            before = of_content.setdefault(content, number)
            if before != number:
                raise ConfigError(f"{shards[number]}: {name} is there twice, also in {shards[before]}")


def _digest(shard: str, offset: int, size: int) -> bytes:
    try:
        with open_image(member_path(shard, offset, size, "")) as handle:
            return hashlib.blake2b(handle.read()).digest()
    except OSError as error:
        raise ConfigError(f"{shard}: can't be read ({error.strerror or error})") from None
