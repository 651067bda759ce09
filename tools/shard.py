"""A data set's image files packed into shards: tar files that disks with millions of files read faster.

    python -m tools.shard my_images my_shards
    python -m tools.shard data/iNaturalist18 shards --size 500M

IN holds folders of classes (with or without train/, val/ and test/ above them) or lists (`*train.txt`, `*val.txt`,
`*test.txt`). OUT gets `train-00000.tar` and so on, the lists and classes.txt where there are any, and the index that
loaders read. Files go in as they are, in an order shuffled by --seed. webdataset reads the shards too: each image has
its class's number beside it.
"""
from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_loader.places import key_of, name_below
from tools.cli import Parser
from utils.cli import run_main
from utils.errors import ConfigError
from utils.files import atomic_write, write_text

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
LOADERS = ("ImageNetLTDataLoader", "PlacesLTDataLoader", "iNaturalistDataLoader", "ListFileDataLoader")


def read_splits(source: Path) -> tuple[dict[str, Any], list[str] | None, list[Path]]:
    """(split -> its images, the classes' names, list files) of a folder of lists or of classes. Raises ConfigError."""
    from data_loader import data_loaders
    from data_loader.files import list_folder, read_lists
    from data_loader.folders import read_folders
    from data_loader.splitting import Division
    for name in LOADERS:
        kind = getattr(data_loaders, name)
        root = list_folder(str(source), kind.lists, kind.folder)
        lists = [root / file for file in kind.lists if file and (root / file).is_file()]
        if (root / kind.lists[0]).is_file() and len(lists) > 1:
            splits = read_lists(str(source), kind.lists, kind.folder, True, False)
            files = [*lists, *([root / "classes.txt"] if (root / "classes.txt").is_file() else [])]
            break
    else:
        files = []
        # Nothing is set aside here: the loader does that, by the images' names, on shards as on folders.
        splits = read_folders(str(source), Division(str(source), 0, 0.2, 0.1), False)
        if not _has_test(source):
            from data_loader.datasets import ImageSet
            both = (splits.train, splits.test)
            splits.train = ImageSet(np.concatenate([part.targets for part in both]),
                                    paths=[path for part in both for path in part.paths])
            splits.test = None
    found = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {split: images for split, images in found.items() if images is not None}, splits.class_names, files


def _has_test(source: Path) -> bool:
    from data_loader.folders import split_folders
    return len(split_folders(source)) > 1


def can_be_labelled(paths: list[str], root: str) -> bool:
    """Whether every image has a key of its own, its name up to the first dot, for a label beside it."""
    keys = {key_of(name_below(path, root)) for path in paths}
    return len(keys) == len(paths)


def write_split(images: Any, split: str, root: str, target: Path, size: int, seed: int, labelled: bool) -> int:
    """Write a split's shards, each whole or not at all; returns how many.

    size: bytes of images in one, about. labelled: each image's class goes beside it.

    Raises ConfigError where an image can't be read or a shard can't be written.
    """
    order = np.random.default_rng([seed, len(images)]).permutation(len(images))
    shards = list(_cut(order, images.paths, size))
    for number, members in enumerate(shards):
        file = target / f"{split}-{number:05d}.tar"
        try:
            with atomic_write(file) as handle, tarfile.open(fileobj=handle, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for at in members:
                    _add(tar, images.paths[at], root, int(images.targets[at]) if labelled else None)
        except OSError as error:
            raise ConfigError(f"{error.filename or file}: {error.strerror or error}") from None
        print(f"{file}  {len(members):,} images")
    return len(shards)


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


def _add(tar: tarfile.TarFile, path: str, root: str, label: int | None) -> None:
    """An image under its name below `root`, and its class's number beside it."""
    name = name_below(path, root)
    members = {name: Path(path).read_bytes()}
    if label is not None:
        members[f"{key_of(name)}.cls"] = str(label).encode()
    for member, content in members.items():
        about = tarfile.TarInfo(member)
        about.size = len(content)
        tar.addfile(about, io.BytesIO(content))


def pattern(split: str, count: int) -> str:
    """What `data_loader.args.shards` says of `count` shards."""
    return f"{split}-{{00000..{count - 1:05d}}}.tar" if count > 1 else f"{split}-00000.tar"


# ---------------------------------------------------------------------- the command

def byte_count(text: str) -> int:
    """500M -> 500,000,000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ConfigError(f"--size: {text!r} should be bytes, like 500M or 1G")
    return int(float(found[1]) * UNITS[found[2].upper()])


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(prog="python -m tools.shard", description="Pack image files into tar files.", allow_abbrev=False)
    parser.add_argument("source", metavar="IN", help="a folder of classes, or of lists")
    parser.add_argument("target", metavar="OUT", help="where the shards go")
    parser.add_argument("--size", default="500M", help="bytes of images in a shard, about (default 500M)")
    parser.add_argument("--seed", type=int, default=0, help="of the images' order in the shards")
    args = parser.parse_args(argv)
    args.size = byte_count(args.size)
    if not Path(args.source).is_dir():
        raise ConfigError(f"{args.source}: no such folder; give one of classes or of lists")
    target = Path(args.target)
    if target.exists() and (not target.is_dir() or any(target.glob("*.tar"))):
        raise ConfigError(f"{target}: has shards already; choose another folder" if target.is_dir() else
                          f"{target}: is a file; shards go into a folder")
    if target.resolve().is_relative_to(Path(args.source).resolve()):
        raise ConfigError(f"{target}: lies in {args.source}; the shards would be taken for images of it")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    from data_loader.shards import open_index
    source, target = Path(args.source), Path(args.target)
    splits, names, lists = read_splits(source)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file in lists:
            shutil.copyfile(file, target / file.name)
        if names and not (target / "classes.txt").exists():
            write_text(target / "classes.txt", "".join(f"{name}\n" for name in names))
    except OSError as error:
        raise ConfigError(f"{target}: can't be written: {error.strerror}") from None
    labelled = all(can_be_labelled(images.paths, str(source)) for images in splits.values())
    if not labelled:
        print("no .cls members: some images share a name up to its first dot; loaders here don't need them")
    spec = {}
    for split, images in splits.items():
        spec[split] = pattern(split, write_split(images, split, str(source), target, args.size, args.seed,
                                                 labelled))
        open_index(spec[split], str(target))
    shown = ", ".join(f'"{split}": "{text}"' for split, text in spec.items())
    print(f"train with: --data_dir {target} --set 'data_loader.args.shards={{{shown}}}'")


if __name__ == "__main__":
    run_main(main)
