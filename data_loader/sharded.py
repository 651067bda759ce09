"""The splits of a data set in shards: given by shard patterns, by folders in the shards, or by list files."""
from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_loader.class_names import match_classes, read_class_names, stranger
from data_loader.datasets import ImageSet, Splits
from data_loader.files import DATA_DIR, MOST_CLASSES, Find
from data_loader.folder_notes import SPLIT_NAMES, doubtful_classes
from data_loader.folders import class_key
from data_loader.images import shown
from data_loader.places import KEY, key_of, name_in_shard
from data_loader.shard_names import patterns
from data_loader.shards import Index, open_index
from data_loader.splitting import Division
from data_loader.tars import BESIDE, JSON_KEYS, UNCLEAR, UNLABELLED
from logger.text import count_of
from utils.errors import ConfigError


def open_shards(spec: str | dict[str, str], data_dir: str) -> dict[str, Index]:
    """The index of each split in `data_loader.args.shards`; a single pattern's has the key "". Raises ConfigError, see
    `open_index`."""
    return {split: open_index(pattern, data_dir) for split, pattern in patterns(spec).items()}


def finder(found: dict[str, Index]) -> Find:
    """The function that finds the paths of listed images in shards, preferring those of the list's own split."""
    def find(names: Sequence[str], source: str, lines: Sequence[int], split: str) -> list[str]:
        places: dict[str, str] = {}
        for key in sorted(found, key=lambda key: (key == split, key == "")):     # later ones override earlier ones
            places |= zip(found[key].names, found[key].paths)
        paths = [_place_of(name, places) for name in names]
        if None in paths:
            at = paths.index(None)
            rest, count = paths.count(None) - 1, sum(len(index.shards) for index in found.values())
            said = (f"{source}, line {lines[at]}: {shown(names[at])} is in none of the {count} shards",
                    f"{rest} more are missing" if rest else "", _links(found))
            raise ConfigError("; ".join(filter(None, said)))
        _refuse_several(found, set(paths), source)
        return paths
    return find


def _place_of(name: str, places: dict[str, str]) -> str | None:
    """The entry of `places` for a listed name, as written or in a shard's spelling (lists from Windows have
    backslashes)."""
    return places.get(name) or places.get(name_in_shard(name)) or places.get(name_in_shard(name.replace("\\", "/")))


def _refuse_several(found: dict[str, Index], paths: set[str], source: str) -> None:
    """Raises ConfigError if a listed name is in several shards of one split (as webdataset allows), so that the list is
    ambiguous."""
    for index in found.values():
        for at, (one, two) in enumerate(itertools.pairwise(index.names)):
            if one == two and not paths.isdisjoint(index.paths[at:at + 2]):
                raise ConfigError(f"{source}: {shown(one)} is in {index.shard_of(at)} and in {index.shard_of(at + 1)}; "
                                  "lists need names that are there once")


def _links(found: dict[str, Index]) -> str:
    """A message about images that are links to other members; "" if there are none."""
    count = sum(index.links for index in found.values())
    return f"{count_of(count, 'image in the shards is a link', 'images in the shards are links')} and left out; " \
           "tar's --dereference --hard-dereference writes the images instead" if count else ""


def read_shards(data_dir: str, found: dict[str, Index], division: Division, whole: bool = False,
                known: int | None = None) -> Splits:
    """The splits in shards. An image's class is the label in its .cls or .json, or else the first folder in its name.

    If every training image has a number in a .cls or .json, these are the labels, named in data_dir's classes.txt; else
    classes are in alphabetical order. Images of a single pattern are split by their first folder, train, val or test
    (any of SPLIT_NAMES); without such folders, some are set aside for testing as with folders. whole: without a
    training split, all images are for testing. known: the number of classes of the checkpoint's model. Raises
    ConfigError for missing or bad labels and splits.
    """
    parts: dict[str, tuple[Index, np.ndarray, list[str]]] = {}
    notes = []
    for split, index in found.items():
        for part, chosen in _by_folder(index, split).items():
            kept = chosen[index.kind[chosen] != BESIDE]
            if len(kept) < len(chosen):
                notes.append(f"warning: {len(chosen) - len(kept)} images are left out, as they lie under the key of "
                             f"another that has a label, like {shown(index.paths[np.setdiff1d(chosen, kept)[0]])}")
            _check_labels(index, kept)
            parts[part] = (index, kept, [_class_of(index, int(at), part) for at in kept])
    if _links(found):
        notes.append(f"warning: {_links(found)}")
    if "" in parts and whole:
        parts = {"test": parts[""]}
    if not whole and not {"", "train"} & parts.keys():
        raise ConfigError(f"{KEY}: there are no shards of a training split; give them as \"train\"")
    first = next(parts[part] for part in ("", "train", "test", "val") if part in parts)
    trained = not parts.keys().isdisjoint({"", "train"})
    names, named = _classes(*first, Path(data_dir), None if trained else known or MOST_CLASSES)
    notes += doubtful_classes(names, KEY)
    sets = {part: _image_set(*parts[part], names) for part in parts}
    if len(names) < (1 if whole else 2):
        raise ConfigError(f"{DATA_DIR}: the shards hold one class, {shown(names[0])}; training needs two or more")
    about = {"class_names": named, "num_classes": len(names)}
    if whole:
        return Splits(sets.get("train"), sets.get("test", sets.get("val")), notes=notes, **about)
    return division.splits(sets, KEY, "shards", notes, **about)


def _by_folder(index: Index, split: str) -> dict[str, np.ndarray]:
    """{split: indices of its images}. For a single pattern (split ""), by first folders if all of these are splits'
    names, including train; otherwise all images are in ""."""
    if split:
        return {split: np.arange(len(index))}
    part_of = [SPLIT_NAMES.get(name.partition("/")[0].lower(), "") if "/" in name else "" for name in index.names]
    parts = np.array(part_of)
    if "train" not in part_of or "" in part_of:
        return {"": np.arange(len(index))}
    return {part: np.flatnonzero(parts == part) for part in ("train", "val", "test") if part in part_of}


def _check_labels(index: Index, chosen: np.ndarray) -> None:
    """Raises ConfigError for negative labels, for labels that are shared by several photos, and for images without one
    among others that have one: their folder, such as `images/`, would be a class of its own."""
    without = chosen[index.kind[chosen] == UNLABELLED]
    if 0 < len(without) < len(chosen):
        at = int(without[0])
        more = f"; {len(without) - 1} more have none" if len(without) > 1 else ""
        raise ConfigError(f"{index.shard_of(at)}: {shown(index.names[at])} has no label beside it (.cls or .json), but "
                          f"other images of these shards have one; write its label or leave it out{more}")
    negative = [k for k, text in enumerate(index.kinds) if re.fullmatch(r"-\d+", text)]
    for at in chosen[np.isin(index.kind[chosen], [UNCLEAR, *negative])].tolist():
        where = f"{index.shard_of(at)}: {shown(index.names[at])}"
        if index.kind[at] == UNCLEAR:
            raise ConfigError(f"{where} shares its label with other images, and none is the photo by its name, "
                              f"{key_of(index.names[at])}.FORMAT; rename it or leave the others out")
        raise ConfigError(f"{where} has the label {index.kinds[index.kind[at]]}; labels are 0, 1, 2, ..., leave images "
                          "without one out")


def _class_of(index: Index, at: int, part: str) -> str:
    """The class of image `at` as text: its label, or else its folder. Raises ConfigError if it has neither."""
    if index.kind[at] >= 0:
        return index.kinds[index.kind[at]]
    folders = index.names[at].split("/")[:-1]
    if part and folders and SPLIT_NAMES.get(folders[0].lower()) == part and len(folders) > 1:
        folders = folders[1:]
    if not folders:
        raise ConfigError(f"{index.shard_of(at)}: {shown(index.names[at])} has no label: no .cls beside it, no .json "
                          f"with one (a text or a number as {', '.join(JSON_KEYS)}), and no folder that is its class")
    return class_key(folders[0])


def _numbers(index: Index, chosen: np.ndarray, texts: Sequence[str]) -> bool:
    """Whether classes are numbers, all from labels; a folder called 10 is a name, not a number."""
    return bool((index.kind[chosen] >= 0).all()) and all(text.isascii() and text.isdigit() and len(text) < 19
                                                         for text in texts)


def _classes(index: Index, chosen: np.ndarray, texts: list[str], data_dir: Path,
             most: int | None) -> tuple[list[str], list[str] | None]:
    """(class texts in the order of the labels, class names or None), from the training images' class `texts`. most: the
    largest possible number of classes; None: the number of images."""
    if not _numbers(index, chosen, set(texts)):
        names = sorted(set(texts))
        return names, [shown(name) for name in names]
    count = max(map(int, set(texts)), default=-1) + 1
    if most is None and count > len(texts):
        raise ConfigError(f"{KEY}: labels are 0, 1, 2, ... without gaps; {len(texts)} images can't fill {count} "
                          "classes")
    if most is not None and count > most:
        raise ConfigError(f"{KEY}: label {count - 1} is out of range; labels are 0 to {most - 1}")
    file = data_dir / "classes.txt"
    named = read_class_names(file, count) if file.exists() else None
    return [str(label) for label in range(len(named or range(count)))], named


def _image_set(index: Index, chosen: np.ndarray, texts: list[str], names: list[str]) -> ImageSet:
    """The images `chosen`, sorted by class and then as in the index, which is the order of folders."""
    own = sorted(set(texts))
    if _numbers(index, chosen, own) and names == [str(label) for label in range(len(names))]:
        label_of = {text: int(text) for text in own}                # "007" is 7
        odd = next((text for text in own if label_of[text] >= len(names)), None)
    else:
        numbers = match_classes(own, names, some=True)
        label_of = dict(zip(own, numbers or ()))
        odd = stranger(own, names) if numbers is None else None
    if odd is not None:
        at = int(chosen[texts.index(odd)])
        raise ConfigError(f"{index.shard_of(at)}: {shown(index.names[at])} is of class {shown(odd)}, which no training "
                          "image has")
    targets = np.array([label_of[text] for text in texts], dtype=np.int64)
    order = np.argsort(targets, kind="stable")
    return ImageSet(targets[order], paths=[index.paths[at] for at in chosen[order]])
