"""Packs a data set's image files into shards: tar files, which disks read faster than millions of small files.

    python -m tools.shard my_images my_shards
    python -m tools.shard data/iNaturalist18 shards --size 500M
    python -m tools.shard their_shards --index "train-{000..123}.tar" "test-{00..49}.tar"

IN holds folders of classes (with or without train/, val/ and test/ above them) or lists (`*train.txt`, `*val.txt`,
`*test.txt`). OUT, a new or empty folder, gets `train-00000.tar` and so on, the lists and classes.txt (all or nothing),
then the index that loaders read. Files are packed unchanged, in an order shuffled by --seed. webdataset reads the
shards too: each image has its class's number beside it. With --index, only the index of shards in IN is written.
"""
from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import tarfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_loader.datasets import ImageSet
from data_loader.images import is_system, shown
from data_loader.places import key_of, name_below, name_in_shard
from data_loader.tars import is_member
from tools.cli import Parser
from utils.cli import run_main
from utils.errors import ConfigError
from utils.files import atomic_write, write_text

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
UNFINISHED = ".unfinished"      # the folder in OUT that all is written to until it is complete
LOADERS = ("ImageNetLTDataLoader", "PlacesLTDataLoader", "iNaturalistDataLoader", "ListFileDataLoader")


class Source(NamedTuple):
    """What is packed: each split's images and their names in the shards, the class names, the list files to copy along,
    and notes to print."""

    splits: dict[str, tuple[ImageSet, list[str]]]
    class_names: list[str] | None
    lists: list[Path]
    notes: list[str]


def read_source(source: Path, allow_outside: bool = False) -> Source:
    """Read a folder of lists or of classes. Raises ConfigError as loaders do, and for names unfit for shards."""
    from data_loader import data_loaders
    from data_loader.files import list_folder
    for kind in (getattr(data_loaders, name) for name in LOADERS):
        root = list_folder(str(source), kind.lists, kind.folder)
        lists = [root / file for file in kind.lists if file and (root / file).is_file()]
        if (root / kind.lists[0]).is_file() and len(lists) > 1:
            return _listed(source, root, kind, lists, allow_outside)
    from data_loader.folders import read_parts, split_folders
    notes: list[str] = []
    # No images are held out here: the loader does that, by the images' names, from shards as from folders.
    sets, names = read_parts(source, split_folders(source), allow_outside, notes)
    return Source({split: (images, [name_below(path, str(source)) for path in images.paths])
                   for split, images in sets.items()}, [shown(name) for name in names], [], notes)


def _listed(source: Path, root: Path, kind: Any, lists: list[Path], allow_outside: bool) -> Source:
    """The Source of a folder of lists: images keep the names of their lists in shards, wherever they lie."""
    from data_loader.files import find_files, read_lists
    named: dict[str, list[str]] = {}
    files = find_files(root, source, allow_outside)

    def find(names: Sequence[str], where: str, lines: Sequence[int], split: str) -> list[str]:
        paths = files(names, where, lines, split)
        # Backslashes become slashes only in lists made on Windows; file names that contain some here keep them.
        named[split] = [name_in_shard(name if not _windows(name, path) else name.replace("\\", "/"))
                        for name, path in zip(names, paths)]
        _check_names(names, named[split], paths, where, lines)
        return paths
    found = read_lists(str(source), kind.lists, kind.folder, True, allow_outside, find)
    splits = {split: (images, named[split]) for split, images in
              (("train", found.train), ("val", found.val), ("test", found.test)) if images is not None}
    more = [root / "classes.txt"] if (root / "classes.txt").is_file() else []
    return Source(splits, found.class_names, lists + more, found.notes)


def _windows(name: str, path: str) -> bool:
    return "\\" in name and not path.endswith(name)


def _check_names(names: Sequence[str], members: Sequence[str], paths: Sequence[str], where: str,
                 lines: Sequence[int]) -> None:
    from data_loader.files import repeats
    before: dict[str, str] = {}
    for name, member, line in zip(names, members, lines):
        if not is_member(member):
            raise ConfigError(f"{where}, line {line}: {shown(name)} wouldn't be found in a shard, where images are "
                              "told by their ending and hidden files are left out; rename it")
        other = before.setdefault(member, name)
        if other != name:
            raise ConfigError(f"{where}, line {line}: {shown(name)} and {shown(other)} would both be {shown(member)} "
                              "in a shard; list it once")
    for at, other in repeats(paths).items():
        raise ConfigError(f"{where}, line {lines[at]}: {shown(names[at])} and {shown(names[other])} are one image; "
                          "list it once")


def can_be_labelled(names: list[str]) -> bool:
    """Whether all keys (names up to the first dot) are unique, as labels beside the images require."""
    return len({key_of(name) for name in names}) == len(names)


def write_split(images: ImageSet, names: list[str], split: str, target: Path, size: int, seed: int,
                labelled: bool) -> int:
    """Write a split's shards, each whole or not at all; returns how many.

    size: approximate bytes of images in one. seed: of the images' order, 0 or more. labelled: each image's class number
    goes beside it.

    Raises ConfigError where an image can't be read or a shard can't be written.
    """
    order = np.random.default_rng([seed, len(images)]).permutation(len(images))
    number = -1
    try:
        for number, members in enumerate(_cut(order, images.paths, size)):
            file = target / f"{split}-{number:05d}.tar"
            with atomic_write(file) as handle, tarfile.open(fileobj=handle, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for at in members:
                    _add(tar, images.paths[at], names[at], int(images.targets[at]) if labelled else None)
            print(f"{file.name}  {len(members):,} images")
    except OSError as error:
        raise ConfigError(f"{error.filename or target}: {error.strerror or error}") from None
    return number + 1


def write_classes(names: list[str], file: Path) -> None:
    """Write classes.txt such that it reads as these names. Raises ConfigError where a name can't be a line of it."""
    from data_loader.class_names import read_class_names
    # Names that end in their own class number, `blue 0`, would lose it: then all get one, as in Places365's file.
    for lines in (names, [f"{name} {number}" for number, name in enumerate(names)]):
        write_text(file, "".join(f"{line}\n" for line in lines))
        try:
            if read_class_names(file, len(names)) == names:
                return
        except ConfigError:     # a name of two lines, or a blank one
            pass
    odd = next((name for name in names if name.splitlines() != [name.strip()]), names[0])
    raise ConfigError(f"{odd!r}: no name for a line of {file.name}; rename the class")


def _cut(order: np.ndarray, paths: list[str], size: int) -> Iterator[list[int]]:
    members, full = [], 0
    for at in order.tolist():
        length = os.path.getsize(paths[at])
        if members and full + length > size:
            yield members
            members, full = [], 0
        members.append(at)
        full += length
    if members:
        yield members


def _add(tar: tarfile.TarFile, path: str, name: str, label: int | None) -> None:
    """An image under its name, and its class's number beside it."""
    members = {name: Path(path).read_bytes()}
    if label is not None:
        members[f"{key_of(name)}.cls"] = str(label).encode()
    for member, content in members.items():
        about = tarfile.TarInfo(member)
        about.size = len(content)
        tar.addfile(about, io.BytesIO(content))


def pattern(split: str, count: int) -> str:
    """A split's value in `data_loader.args.shards`: the pattern of its `count` shards."""
    return f"{split}-{{00000..{count - 1:05d}}}.tar" if count > 1 else f"{split}-00000.tar"


# ---------------------------------------------------------------------- the command

def byte_count(text: str) -> int:
    """500M -> 500,000,000. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ConfigError(f"--size: {text!r} should be bytes, like 500M or 1G")
    return int(float(found[1]) * UNITS[found[2].upper()])


def parse(argv: Sequence[str] | None) -> Namespace:
    """The flags, with `size` in bytes. Raises ConfigError."""
    parser = Parser(prog="python -m tools.shard", description="Pack image files into tar files.", allow_abbrev=False)
    parser.add_argument("source", metavar="IN", help="a folder of classes, or of lists")
    parser.add_argument("target", metavar="OUT", nargs="?", help="where the shards go")
    parser.add_argument("--index", nargs="+", metavar="PATTERN",
                        help="only write the index of these shards in IN (of URLs: into IN)")
    parser.add_argument("--size", default="500M", help="bytes of images in a shard, about (default 500M)")
    parser.add_argument("--seed", type=int, default=0, help="of the images' order in the shards")
    parser.add_argument("--allow_outside", action="store_true", help="images may lie outside IN (lists, links)")
    args = parser.parse_args(argv)
    args.size = byte_count(args.size)
    if args.seed < 0:
        raise ConfigError(f"--seed: must be 0 or more, not {args.seed}")
    if not Path(args.source).is_dir():
        wanted = "shards" if args.index else "classes or of lists"
        raise ConfigError(f"{args.source}: no such folder; give one of {wanted}")
    if bool(args.index) == bool(args.target):
        raise ConfigError(f"OUT: {args.target} isn't used with --index" if args.index else
                          "OUT: is missing; give the folder for the shards (or --index for shards that are there)")
    if args.index:
        return args
    target = Path(args.target)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target}: is a file; shards go into a folder")
    # Old shards, lists or names of classes would be taken for those of this set.
    there = sorted(name for name in os.listdir(target) if not is_system(name)) if target.exists() else []
    if there:
        why = "has part of a set, whose making was interrupted" if (target / UNFINISHED).exists() else "isn't empty"
        raise ConfigError(f"{target}: {why} ({there[0]} is there); empty it or choose another folder")
    if target.resolve().is_relative_to(Path(args.source).resolve()):
        raise ConfigError(f"{target}: lies in {args.source}; the shards would be taken for images of it")
    return args


def pack(source: Source, target: Path, size: int, seed: int) -> dict[str, str]:
    """Write everything, whole or not at all; returns split -> the pattern of its shards. Raises ConfigError."""
    labelled = all(can_be_labelled(names) for _, names in source.splits.values())
    if not labelled:
        print("no .cls members: some images share a name up to its first dot; loaders here don't need them")
    unfinished = target / UNFINISHED
    try:
        if unfinished.exists():
            print(f"{unfinished}: of a run that was interrupted, is removed")
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        for file in source.lists:
            shutil.copyfile(file, unfinished / file.name)
        if source.class_names and not (unfinished / "classes.txt").exists():
            write_classes(source.class_names, unfinished / "classes.txt")
        spec = {split: pattern(split, write_split(images, names, split, unfinished, size, seed, labelled))
                for split, (images, names) in source.splits.items() if len(images)}
        for file in sorted(unfinished.iterdir()):
            os.replace(file, target / file.name)
    except OSError as error:
        raise ConfigError(f"{error.filename or target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return spec


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises ConfigError."""
    args = parse(argv)
    from data_loader.shards import locate, open_index
    if args.index:
        for text in args.index:
            index, (_, file) = open_index(text, args.source), locate(text, args.source)
            if not file.is_file():
                raise ConfigError(f"{file}: the index can't be written there")
            print(f"{file}: {len(index):,} images in {len(index.shards):,} shards")
        return
    target = Path(args.target)
    source = read_source(Path(args.source), args.allow_outside)
    for note in source.notes:
        print(note)
    spec = pack(source, target, args.size, args.seed)
    for text in spec.values():
        open_index(text, str(target))
    shards = ", ".join(f'"{split}": "{text}"' for split, text in spec.items())
    print(f"train with: --data_dir {shlex.quote(str(target))} --set 'data_loader.args.shards={{{shards}}}'")


if __name__ == "__main__":
    run_main(main)
