"""Images in tar files: an index of names, labels and byte positions beside the shards.

A shard is an ordinary uncompressed tar file, as webdataset or `python -m tools.shard` writes it: `key.jpg` beside
`key.cls` or `key.json`, or `CLASS/name.jpg`. Since each image is read from its own place (`data_loader.places`), any
sampler works on shards as on files.
"""
from __future__ import annotations

import itertools
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_loader.images import EXTENSIONS, is_system
from data_loader.places import KEY, key_of, member_path, remote
from logger.log import get_logger
from utils.errors import ConfigError
from utils.files import atomic_write

RANGE = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<words>[^{}]*,[^{}]*))\}")
VERSION = 1             # of the index's layout
LABELS = (".cls", ".json")
JSON_KEYS = ("label", "cls", "class")
SPLITS = ("train", "val", "test")


# ---------------------------------------------------------------------- which shards

def expand(pattern: str) -> list[str]:
    """The names that a pattern stands for: `{000..999}` counts with leading zeros, `{a,b}` lists.

    >>> expand("t-{08..10}.tar")
    ['t-08.tar', 't-09.tar', 't-10.tar']
    """
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"{KEY}: must be a pattern like \"train-{{000..999}}.tar\", or one for each split, "
                          f"not {pattern!r}")
    parts, at = [], 0
    for found in RANGE.finditer(pattern):
        parts.append([pattern[at:found.start()]])
        at = found.end()
        if found["words"] is not None:
            parts.append(found["words"].split(","))
            continue
        first, last = int(found["first"]), int(found["last"])
        if first > last:
            raise ConfigError(f"{KEY}: {pattern}: {found[0]} counts down; write {{{found['last']}..{found['first']}}}")
        parts.append([str(number).zfill(len(found["first"])) for number in range(first, last + 1)])
    parts.append([pattern[at:]])
    return ["".join(words) for words in itertools.product(*parts)]


def patterns(spec: str | dict[str, str]) -> dict[str, str]:
    """Split -> pattern; one pattern alone is for all splits, under the name "". Raises ConfigError."""
    if isinstance(spec, str):
        return {"": spec}
    wrong = not isinstance(spec, dict) or not spec or set(spec) - set(SPLITS)
    if wrong or not all(isinstance(value, str) for value in spec.values()):
        raise ConfigError(f"{KEY}: must be a pattern like \"train-{{000..999}}.tar\", or an object of them with the "
                          f"keys train, val and test, not {spec!r}")
    if "train" not in spec and "test" not in spec:
        raise ConfigError(f"{KEY}: has no train and no test shards")
    return dict(spec)


# ---------------------------------------------------------------------- the index

@dataclass
class Index:
    """What is in a pattern's shards, images in the order in which folders would be walked.

    shards: paths or URLs [K]; stamps: size and time of change of each, int64 [K, 2]. names: of the images [N]; shard
    int32, offset and size int64: where each is, [N]. kinds: texts of .cls and .json members; kind: which is whose,
    int32 [N], -1 where an image has none.
    """

    shards: list[str]
    stamps: np.ndarray
    names: list[str]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    kinds: list[str]
    kind: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def paths(self) -> list[str]:
        """Each image's path, which `data_loader.images` reads."""
        return [member_path(self.shards[k], offset, size, name) for k, offset, size, name in zip(
            self.shard.tolist(), self.offset.tolist(), self.size.tolist(), self.names)]

    def save(self, file: Path) -> None:
        """Write it, whole or not at all."""
        names, kinds = ([os.fsencode(text) for text in texts] for texts in (self.names, self.kinds))
        with atomic_write(file) as handle:
            np.savez(handle, version=np.int64(VERSION), stamps=self.stamps, shard=self.shard, offset=self.offset,
                     size=self.size, kind=self.kind, **_packed("names", names), **_packed("kinds", kinds),
                     **_packed("shards", [os.path.basename(shard).encode() for shard in self.shards]))

    @classmethod
    def load(cls, file: Path, shards: list[str]) -> Index | None:
        """The index in `file`, if it is one of these shards; None else."""
        try:
            with np.load(file) as found:  # no pickles, by default
                if int(found["version"]) != VERSION or _unpacked(found, "shards") != [
                        os.path.basename(shard) for shard in shards]:
                    return None
                return cls(shards, found["stamps"], _unpacked(found, "names"), found["shard"], found["offset"],
                           found["size"], _unpacked(found, "kinds"), found["kind"])
        except (OSError, ValueError, KeyError, EOFError, tarfile.TarError, RuntimeError):
            return None


def _packed(name: str, texts: list[bytes]) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(b"".join(texts), np.uint8),
            f"{name}_ends": np.cumsum([len(text) for text in texts], dtype=np.int64)}


def _unpacked(found: Any, name: str) -> list[str]:
    text, ends = found[name].tobytes(), found[f"{name}_ends"].tolist()
    return [os.fsdecode(text[start:end]) for start, end in zip([0, *ends], ends)]


def open_index(pattern: str, data_dir: str) -> Index:
    """The index of a pattern's shards, read from beside them; made, or made again, where a shard is new or changed.

    Raises ConfigError naming the shard: missing, compressed, truncated, damaged, or with an image that is there twice.
    """
    far = "://" in pattern
    shards = [name if far else os.path.join(data_dir, name) for name in expand(pattern)]
    stamps = _stamps(shards)
    name = re.sub(r"[{}]", "", os.path.basename(pattern)).removesuffix(".tar") + ".index.npz"
    file = Path(data_dir if far else os.path.dirname(shards[0]) or ".") / name
    index = Index.load(file, shards)
    if index is not None and np.array_equal(index.stamps, stamps):
        return index
    get_logger().info("making the index of %d shards, %s, once", len(shards), file)
    index = make_index(shards, stamps)
    try:
        index.save(file)
    except OSError as error:
        get_logger().info("%s: can't be written (%s), so every run makes it again", file, error.strerror)
    return index


def _stamps(shards: list[str]) -> np.ndarray:
    stamps, missing = [], []
    for shard in shards:
        try:
            if "://" in shard:
                system, path = remote(shard)
                stamps.append((int(system.info(path)["size"]), 0))
            else:
                found = os.stat(shard)
                stamps.append((found.st_size, found.st_mtime_ns))
        except OSError:
            missing.append(shard)
    if missing:
        more = f"; {len(missing) - 1} more of {len(shards)} are missing" if len(missing) > 1 else ""
        raise ConfigError(f"{missing[0]}: no such shard ({KEY}){more}")
    return np.array(stamps, dtype=np.int64).reshape(-1, 2)


def make_index(shards: list[str], stamps: np.ndarray) -> Index:
    """Read the headers of all shards. Raises ConfigError as `open_index`."""
    found: list[tuple[str, int, int, int]] = []
    labels: dict[str, str] = {}
    for number, shard in enumerate(shards):
        try:
            for name, offset, size, text in _members(shard, int(stamps[number, 0])):
                if text is None:
                    found.append((name, number, offset, size))
                elif labels.setdefault(key_of(name), text) != text:
                    raise ConfigError(f"{shard}: {name} gives {key_of(name)} another label than before")
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise ConfigError(f"{shard}: damaged or not a tar file ({error}); write or copy it again") from None
        except OSError as error:
            raise ConfigError(f"{shard}: can't be read ({error.strerror or error})") from None
    if not found:
        raise ConfigError(f"{shards[0]}: the {len(shards)} shards hold no image")
    # As os.walk goes: a folder's files before the folders in it, both by name.
    found.sort(key=lambda member: (*_walk_order(member[0]), member[1]))
    for one, two in itertools.pairwise(found):
        if one[0] == two[0]:
            raise ConfigError(f"{shards[two[1]]}: {two[0]} is there twice, also in {shards[one[1]]}")
    kinds = sorted(set(labels.values()))
    number_of = {text: number for number, text in enumerate(kinds)}
    names, shard, offset, size = zip(*found)
    kind = [number_of.get(labels.get(key_of(name)), -1) for name in names]
    return Index(shards, stamps, list(names), np.array(shard, np.int32), np.array(offset, np.int64),
                 np.array(size, np.int64), kinds, np.array(kind, np.int32))


def _walk_order(name: str) -> tuple[tuple[str, ...], str]:
    folder, base = posixpath.split(name)
    return tuple(folder.split("/")) if folder else (), base


def _members(shard: str, length: int) -> Iterator[tuple[str, int, int, str | None]]:
    """(name, offset, size, None) of each image, (name, 0, 0, label) of each .cls or .json member."""
    with _stream(shard) as handle:
        if handle.read(2) == b"\x1f\x8b":
            raise ConfigError(f"{shard}: is compressed, so images can't be read by position; unpack it with gunzip")
        handle.seek(0)
        with tarfile.open(fileobj=handle, mode="r:") as tar:
            for member in tar:
                tar.members = []  # else it keeps them all
                name = posixpath.normpath(member.name)
                if not member.isfile() or any(is_system(part) for part in name.split("/")):
                    continue
                ending = posixpath.splitext(name)[1].lower()
                if member.offset_data + member.size > length:
                    raise ConfigError(f"{shard}: ends within {name}; it is truncated, write or copy it again")
                if ending in EXTENSIONS:
                    yield name, member.offset_data, member.size, None
                elif ending in LABELS:
                    yield name, 0, 0, _label(tar.extractfile(member).read(), ending, f"{shard}: {name}")
            if tar.offset >= length:  # cut between two images it would only have fewer
                raise ConfigError(f"{shard}: has no end mark; it is truncated, write or copy it again")


def _stream(shard: str) -> BinaryIO:
    if "://" not in shard:
        return open(shard, "rb")
    system, path = remote(shard)
    return system.open(path, "rb")


def _label(content: bytes, ending: str, where: str) -> str:
    try:
        text = content.decode("utf-8").strip()
        if ending == ".json":
            known = json.loads(text)
            key = next(key for key in JSON_KEYS if key in known)
            text = str(known[key]).strip()
    except (ValueError, TypeError, StopIteration):
        text = ""
    if not text:
        raise ConfigError(f"{where}: holds no label; a .cls is a class's number or name, a .json has it as "
                          f"{', '.join(JSON_KEYS)}")
    return text
