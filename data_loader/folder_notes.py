"""Warnings about folders that are probably not meant as they are read: splits taken for classes, copied images."""
from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from data_loader.class_names import folded
from data_loader.datasets import ImageSet
from data_loader.images import shown
from logger.text import count_of, first_of

#: Usual names of a split's folder (compared in lower case) -> the split.
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
               "test": "test", "testing": "test"}
#: A word of a folder's name that speaks of a split: the last of seg_test, the first of training_set and TrainData.
_SPLIT_WORD = re.compile(rf"({'|'.join(SPLIT_NAMES)}|dev|eval)(set|data|s)?", re.IGNORECASE)
LAYOUT_OF_SPLITS = "train/CLASS/*, val/CLASS/* and test/CLASS/*"
MOST_COPIES = 100       # after so many copied images, no more are looked for


def doubtful_classes(names: Iterable[str], place: str) -> list[str]:
    """Warnings for classes with a split's name, which a folder `test` without class folders in it would become, and for
    classes whose names differ in case or blanks only, unless they are single letters.

    place: where the classes are, for the message.
    """
    notes, first = [], {}
    for name in names:
        if name.lower() in SPLIT_NAMES:
            notes.append(f"warning: {place}: {shown(name)} is taken for a class, though it is named as a split; splits "
                         f"are {LAYOUT_OF_SPLITS}")
        other = first.setdefault(folded(name), name)
        if other != name and len(name) > 1:
            notes.append(f"warning: {place}: {shown(other)} and {shown(name)} are taken for two classes, though their "
                         "names differ in case or blanks only; if they are one, put their images into one folder")
    return notes


def nested_splits(bare: Mapping[str, set[str]], place: str) -> list[str]:
    """A warning if classes are probably splits (training_set/ant, test_set/ant), or hold splits (ant/train, ant/test).

    bare: {class: the folders in its folder} of class folders without images of their own. It is given if these share
    two folders or more, and one of all these names speaks of a split: species/healthy and species/sick are silent.
    """
    common = set.intersection(*bare.values()) if len(bare) > 1 else set()
    words = (word for name in (*bare, *common) for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name))
    if len(common) < 2 or not any(map(_SPLIT_WORD.fullmatch, words)):
        return []
    return [f"warning: {place}: {shown(first_of(sorted(bare)))} are taken for classes, though they look like splits or "
            f"hold some: each has the folders {shown(first_of(sorted(common)))}; splits are {LAYOUT_OF_SPLITS}"]


def copies(read: Mapping[str, ImageSet], folders: Mapping[str, Path]) -> list[str]:
    """A warning for each split that has images of train as copies, in the same class and under the same name.

    read: {split: its images}; folders: {split: its folder}. Images that share no name cost nothing; of the others,
    only those of equal size are read, up to MOST_COPIES true copies a split.
    """
    notes = []
    for part in [part for part in read if part != "train"]:
        other_cut, cut = (len(os.path.join(folders[key], "")) for key in (part, "train"))
        other = {path[other_cut:]: path for path in read[part].paths}
        pairs = ((path, other[path[cut:]]) for path in read["train"].paths if path[cut:] in other)
        both = len(list(islice((pair for pair in pairs if _are_copies(*pair)), MOST_COPIES)))
        if both:
            some = f"{both} or more images are" if both == MOST_COPIES else count_of(both, "image is", "images are")
            notes.append(f"warning: {some} in train and, as copies, in {part}")
    return notes


def _are_copies(one: str, other: str) -> bool:
    """Whether two files have the same content, not being one file through links."""
    try:
        return filecmp.cmp(one, other, shallow=False) and os.path.realpath(one) != os.path.realpath(other)
    except OSError:     # reported when the image is read
        return False
