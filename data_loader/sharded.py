"""The splits of a data set in shards: by the shards' patterns, by folders in them, or by lists of their images."""
from __future__ import annotations

import posixpath
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_loader.datasets import ImageSet, Splits
from data_loader.files import DATA_DIR, Find, read_class_names
from data_loader.folders import SPLIT_NAMES
from data_loader.images import shown
from data_loader.places import KEY
from data_loader.shards import Index, open_index, patterns
from data_loader.splitting import Division, match_classes
from utils.errors import ConfigError


def open_shards(spec: str | dict[str, str], data_dir: str) -> dict[str, Index]:
    """`data_loader.args.shards` -> the index of each split, "" for one pattern alone. Raises ConfigError.
    """
    return {split: open_index(pattern, data_dir) for split, pattern in patterns(spec).items()}


def finder(found: dict[str, Index]) -> Find:
    """What gives lists the paths of their images in shards."""
    def find(names: Sequence[str], source: str, lines: Sequence[int]) -> list[str]:
        places = {name: path for index in found.values() for name, path in zip(index.names, index.paths)}
        paths = [places.get(posixpath.normpath(name)) for name in names]
        missing = [at for at, path in enumerate(paths) if path is None]
        if missing:
            at, count = missing[0], sum(len(index.shards) for index in found.values())
            more = f"; {len(missing) - 1} more are missing" if len(missing) > 1 else ""
            raise ConfigError(f"{source}, line {lines[at]}: {shown(names[at])} is in none of the {count} shards{more}")
        return paths
    return find


def read_shards(data_dir: str, found: dict[str, Index], division: Division, whole: bool = False) -> Splits:
    """The splits in shards. An image's class is what its .cls or .json says, else the folder in front of its name.

    Classes that are numbers have their names from classes.txt in data_dir, where that is; others are in alphabetical
    order. One pattern's images are parted by a first folder train, val or test (any of SPLIT_NAMES), else some are set
    aside for testing as in folders. whole: where there is no training split, all is for testing. Raises ConfigError.
    """
    parts: dict[str, tuple[Index, np.ndarray, list[str]]] = {}
    for split, index in found.items():
        for part, chosen in _by_folder(index, split).items():
            parts[part] = (index, chosen, [_class_of(index, int(at), part) for at in chosen])
    if "" in parts and whole:
        parts = {"test": parts[""]}
    if not whole and not {"", "train"} & parts.keys():
        raise ConfigError(f"{KEY}: there are no shards of a training split; give them as \"train\"")
    first = next(parts[part] for part in ("", "train", "test", "val") if part in parts)
    names, named = _classes(first[2], Path(data_dir))
    sets = {part: _image_set(*parts[part], names) for part in parts}
    if len(names) < (1 if whole else 2):
        raise ConfigError(f"{DATA_DIR}: the shards hold {len(names)} class, training needs two or more")
    about = {"class_names": named, "num_classes": len(names)}
    if whole:
        return Splits(sets.get("train"), sets.get("test", sets.get("val")), **about)
    train = sets.get("train", sets.get(""))
    if len(sets) == 1:
        kept, taken = division.divide(train, "test")
        if not len(taken):
            raise ConfigError(f"{KEY}: every class has one image; none is left to test on")
        note = (f"no test shards: {len(taken)} of {len(train)} images, about {division.test_share:.0%} of each class, "
                "are set aside for testing, chosen by their names: they stay the same when you add images")
        return Splits(train.subset(kept), train.subset(taken), **about, notes=[note])
    test = sets.get("test", sets.get("val"))
    return Splits(train, test, val=sets.get("val") if "test" in sets else None, **about)


def _by_folder(index: Index, split: str) -> dict[str, np.ndarray]:
    """Which images are whose: split -> their numbers. Of one pattern all are "" where the folders name no splits."""
    if split:
        return {split: np.arange(len(index))}
    tops = {name: part for part, names in SPLIT_NAMES.items() for name in names}
    part_of = [tops.get(name.partition("/")[0].lower(), "") if "/" in name else "" for name in index.names]
    parts = np.array(part_of)
    if "train" not in part_of or "" in part_of:
        return {"": np.arange(len(index))}
    return {part: np.flatnonzero(parts == part) for part in ("train", "val", "test") if part in part_of}


def _class_of(index: Index, at: int, part: str) -> str:
    """An image's class as text."""
    if index.kind[at] >= 0:
        return index.kinds[index.kind[at]]
    folders = index.names[at].split("/")[:-1]
    if part and folders and folders[0].lower() in SPLIT_NAMES[part] and len(folders) > 1:
        folders = folders[1:]
    if not folders:
        raise ConfigError(f"{index.shards[index.shard[at]]}: {index.names[at]} has no label: no .cls or .json beside "
                          "it, and no folder that is its class")
    return folders[0]


def _classes(texts: list[str], data_dir: Path) -> tuple[list[str], list[str] | None]:
    """(the classes' texts in the order of their labels, their names or None), of the training images' texts."""
    if not all(text.isdecimal() for text in texts):
        names = sorted(set(texts))
        return names, [shown(name) for name in names]
    count = max(map(int, texts)) + 1
    if count > len(texts):
        raise ConfigError(f"{KEY}: labels are 0, 1, 2, ... without gaps; {len(texts)} images can't fill {count} "
                          "classes")
    file = data_dir / "classes.txt"
    named = read_class_names(file, count) if file.exists() else None
    return [str(label) for label in range(len(named or range(count)))], named


def _image_set(index: Index, chosen: np.ndarray, texts: list[str], names: list[str]) -> ImageSet:
    """The images `chosen`, ordered by class and then as in the index: as folders are read."""
    own = sorted(set(texts))
    numbers = [int(text) for text in own] if all(name.isdecimal() for name in (*names, *own)) else \
        match_classes(own, names, some=True)
    if numbers is None or max(numbers) >= len(names):
        stranger = next(n for n, text in enumerate(texts) if text not in names)
        at = int(chosen[stranger])
        raise ConfigError(f"{index.shards[index.shard[at]]}: {index.names[at]} is of class {shown(texts[stranger])}, "
                          "which no training image has")
    label_of = dict(zip(own, numbers))
    targets = np.array([label_of[text] for text in texts], dtype=np.int64)
    order = np.argsort(targets, kind="stable")
    return ImageSet(targets[order], paths=[index.paths[at] for at in chosen[order]])
