"""Reading the splits in list files and finding the images that they name. Nothing is decoded here.

All files are looked for before training begins. A path that leads outside `data_dir` (by `..`, an absolute path or a
link) is refused unless `allow_outside` is set.
"""
from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_loader.class_names import read_class_names, refuse_other_names
from data_loader.datasets import ImageSet, Splits
from data_loader.images import shown
from data_loader.list_lines import read_list, refuse_two_labels
from data_loader.places import KEY
from logger.text import count_of
from utils.errors import ConfigError

DATA_DIR = "data_loader.args.data_dir"
#: (names, name of the list file, line number of each, "train", "val" or "test") -> paths
Find = Callable[[Sequence[str], str, Sequence[int], str], list[str]]
MOST_CLASSES = 10**6    # limit if there are only test images, and no checkpoint knows how many classes there are


def check_data_dir(data_dir: str, may_be_made: bool = False) -> None:
    """Raises ConfigError unless `data_dir` is a folder or, with `may_be_made` (data that can be downloaded), doesn't
    exist yet."""
    if not isinstance(data_dir, str | os.PathLike) or not str(data_dir) or "\0" in str(data_dir):
        raise ConfigError(f"{DATA_DIR}: must name a folder, not {str(data_dir)[:80]!r}")
    try:
        if os.path.isdir(data_dir) or (may_be_made and not os.path.lexists(data_dir)):
            return
    except ValueError:
        pass
    what = "is a file, not a folder" if os.path.exists(data_dir) else "no such folder"
    raise ConfigError(f"{DATA_DIR}: {shown(str(data_dir))}: {what}; --data_dir names the one to read")


# -- lists -----------------------------------------------------------------------------------------------------------
def list_folder(data_dir: str, lists: tuple[str, str | None, str | None], folder: str) -> Path:
    """The folder of the list files: `data_dir`, or its subfolder `folder` if that exists and `data_dir` lacks the first
    list."""
    root = Path(data_dir)
    return root / folder if folder and not (root / lists[0]).exists() and (root / folder).is_dir() else root


def read_lists(data_dir: str, lists: tuple[str, str | None, str | None], folder: str, training: bool,
               allow_outside: bool, find: Find | None = None, known: int | None = None) -> Splits:
    """Read the splits from list files in `data_dir` (or `data_dir/folder`). Without a test list, val is the test split.

    lists: names of the train, val and test lists. find: finds the images, if they aren't files. known: the number of
    classes of the checkpoint's model. Unless `training`, only the test images must be there, as of the others only
    the counts are needed. Classes are 0 to the largest training label; their names come from classes.txt
    beside the lists, or from a third column. Raises ConfigError for missing lists or images and for bad labels.
    """
    root = list_folder(data_dir, lists, folder)
    train_name, val_name, test_name = lists
    has = {name: name is not None and (root / name).exists() for name in lists}
    if not has[test_name] and has[val_name]:
        test_name, val_name = val_name, None
    for name in ([train_name] if training else []) + [test_name]:
        if not has[name]:
            needed = " and ".join(filter(None, (train_name, lists[2] or lists[1])))
            spare = f" (or {lists[1]} in its place)" if lists[1] and lists[2] else ""
            raise ConfigError(f"{shown(str(root / name))}: no such file; {DATA_DIR} must hold the list files "
                              f"{needed}{spare}{'' if find else about_tars(root)}")
    notes: list[str] = []
    named: dict[int, str] = {}
    more = (notes, named, find or find_files(root, Path(data_dir), allow_outside, None if training else "test"))
    train = _read_split(root / train_name, "train", None, *more) if has[train_name] else None
    if training and (train.targets == train.targets[0]).all():
        raise ConfigError(f"{shown(str(root / train_name))}: lists 1 class, training needs two or more")
    if train is not None:
        most, whose = int(train.targets.max()) + 1, "as in training"
    else:
        most, whose = known or MOST_CLASSES, "as the checkpoint's model knows them" if known else "without gaps"
    test = _read_split(root / test_name, "test", (most, whose), *more)
    val = _read_split(root / val_name, "val", (most, whose), *more) if has.get(val_name) else None
    for (one_name, one), (name, split) in itertools.combinations(
            ((train_name, train), (val_name, val), (test_name, test)), 2):
        both = 0 if one is None or split is None else len(same_files(one.paths, split.paths))
        if both:
            notes.append(f"warning: {count_of(both, 'image is', 'images are')} in {one_name} and in {name}")
    classes = int((train or test).targets.max()) + 1
    class_names = None
    if (root / "classes.txt").exists():
        class_names = read_class_names(root / "classes.txt", classes)
        refuse_other_names(root / "classes.txt", class_names, named)
        classes = len(class_names)
    elif set(named) >= set(range(classes)):
        class_names = [named[label] for label in range(classes)]
    return Splits(train, test, val=val, num_classes=classes, class_names=class_names, notes=notes,
                  named=named)


def _plain(paths: Sequence[str], links: bool = False) -> list[str]:
    """One canonical path per image, however it is written (`a.jpg`, `./a.jpg`, absolute) and with links among its
    folders resolved. links: also resolve files that are links themselves, which takes one system call per file."""
    # Paths of images in shards contain zero bytes, at which Python 3.11's abspath cuts them off.
    plain = [path if "\0" in path else os.path.abspath(path) for path in paths]
    # Resolve each folder once, not each of a million files.
    folders = {path.rpartition(os.sep)[0] for path in plain}
    moved = {folder: real for folder in folders if "\0" not in folder and (real := os.path.realpath(folder)) != folder}
    if links:
        plain = [os.path.realpath(path) if os.path.islink(path) else path for path in plain]
    if moved:
        parts = (path.rpartition(os.sep) for path in plain)
        plain = [f"{moved.get(folder, folder)}{sep}{name}" for folder, sep, name in parts]
    return plain


def same_files(one: Sequence[str], other: Sequence[str], links: bool = False) -> set[str]:
    """The canonical paths of images that are in both lists. links: also follow files that are links."""
    return set(_plain(one, links)) & set(_plain(other, links))


def repeats(paths: Sequence[str], links: bool = False) -> dict[int, int]:
    """{index of a path: index of the first path to the same image}, for repeated images only. links: also follow files
    that are links."""
    plain, first = _plain(paths, links), {}
    if len(set(plain)) == len(plain):
        return {}
    return {at: before for at, path in enumerate(plain) if (before := first.setdefault(path, at)) != at}


def _read_split(file: Path, split: str, limit: tuple[int, str] | None, notes: list[str], named: dict[int, str],
                find: Find) -> ImageSet:
    """One list's images; class names in it are added to `named`. limit: (the number of classes, the reason for error
    messages), or None for the list that determines it."""
    names, labels, lines, repeated, called = read_list(file)
    for label, text in ((label, shown(name)) for label, name in called.items()):
        if named.setdefault(label, text) != text:
            raise ConfigError(f"{shown(str(file))}: class {label} is {text} here and {named[label]} in another list")
    most = len(names) if limit is None else limit[0]
    wrong = np.flatnonzero((labels < 0) | (labels >= most))
    if len(wrong):
        at = int(wrong[0])
        right = f"0 to {most - 1}, {limit[1]}" if limit is not None else \
            f"0, 1, 2, ... without gaps ({most} images can't fill more than {most} classes)"
        number = "; names of classes that are numbers stand in classes.txt" if re.search(r" \d+$", names[at]) else ""
        raise ConfigError(f"{shown(str(file))}, line {lines[at]}: label {labels[at]} is out of range; "
                          f"labels are {right}{number}")
    images = ImageSet(labels, paths=find(names, shown(str(file)), lines, split), where=(shown(str(file)), lines))
    again = repeats(images.paths)
    for at, before in again.items():
        refuse_two_labels(file, names[at], (labels[at], lines[at]), (labels[before], lines[before]))
    repeated += len(again)
    if repeated:
        notes.append(f"warning: {file.name}: {count_of(repeated, 'repeated line is', 'repeated lines are')} left out")
    return images.subset(np.delete(np.arange(len(images)), list(again))) if again else images


def find_files(root: Path, data_dir: Path, allow_outside: bool, only: str | None = None) -> Find:
    """The function that finds the files named by lists in `root`. only: the split whose files must be there (None: all
    splits'); of the others only names and labels are needed."""
    def find(names: Sequence[str], source: str, lines: Sequence[int], split: str) -> list[str]:
        # Places365's own lists begin paths with a slash, and Windows uses backslashes: both mean paths below data_dir.
        if not allow_outside:
            names = [name.replace("\\", "/") if "\\" in name and not os.path.lexists(data_dir / name) else name
                     for name in names]
            if names[0].startswith("/") and not os.path.lexists(names[0]):
                names = [name.lstrip("/") for name in names]
        # Paths are relative to data_dir; but official lists and their images may both be in a subfolder of it.
        base = root if not os.path.lexists(data_dir / names[0]) and os.path.lexists(root / names[0]) else data_dir
        if only not in (None, split):
            return [os.path.join(base, name) for name in names]
        return check_paths(base, names, allow_outside, source, lines)
    return find


def about_tars(root: Path) -> str:
    """A hint for an error about missing images: the tar files in `root`, which may hold them; "" if there are none."""
    tars = sorted(name for name in os.listdir(root) if name.lower().endswith(".tar")) if root.is_dir() else []
    return f"; {len(tars)} tar files are there, like {shown(tars[0])}: where they hold the images, name them with " \
           f"{KEY}" if tars else ""


def check_paths(root: Path, names: list[str], allow_outside: bool, source: str, lines: list[int]) -> list[str]:
    """`names` below `root` as full paths. source, lines: the list file and line numbers, for errors. Raises ConfigError
    if one is missing, or leads outside `root` without `allow_outside`."""
    look = Look(root, None if allow_outside else [root])
    missing: list[int] = []
    for at, name in enumerate(names):
        there = look(name)
        if there:
            continue
        if there is None:
            raise outside(f"{source}, line {lines[at]}", name, root)
        missing.append(at)
    if missing:
        at = missing[0]
        more = f"; {len(missing) - 1} more are missing" if len(missing) > 1 else ""
        raise ConfigError(f"{shown(os.path.join(root, names[at]))}: no such image ({source}, line {lines[at]}{more})")
    return [os.path.join(root, name) for name in names]


class Look:
    """Whether a file exists: `look(name)`, for a name below `root`, returns True, False, or None if it leads outside
    all the folders `within` (None: it may lead anywhere).

    Reads each folder once instead of checking each file, so that a million names take seconds, not minutes.
    """

    def __init__(self, root: Path, within: Sequence[Path] | None):
        self.root, self.within = root, within and [os.path.realpath(folder) for folder in within]
        self.folders: dict[str, dict[str, bool] | None] = {}    # see _entries; None for a folder outside

    def __call__(self, name: str) -> bool | None:
        folder, base = os.path.split(name)
        if folder not in self.folders:
            entries = _entries(os.path.join(self.root, folder))
            far = os.path.isabs(name) or ".." in Path(name).parts  # refused even if the folder doesn't exist
            out = (far or entries is not None) and self._leads_out(folder)
            self.folders[folder] = None if out else entries or {}
        entries = self.folders[folder]
        if entries is None:
            return None
        link = entries.get(base)
        if not link:
            return link is not None
        return None if self._leads_out(name) else True

    def _leads_out(self, name: str) -> bool:
        return self.within is not None and not any(is_inside(os.path.join(self.root, name), folder)
                                                   for folder in self.within)


def _entries(folder: str) -> dict[str, bool] | None:
    """{name: whether it is a link} of the files and links in a folder; None if it can't be read."""
    try:
        with os.scandir(folder) as found:
            return {entry.name: entry.is_symlink() for entry in found if entry.is_symlink() or entry.is_file()}
    except OSError:
        return None


def is_inside(path: str, real_root: str) -> bool:
    """Whether a path, with links resolved, is `real_root` (itself resolved) or lies in it."""
    real = os.path.realpath(path)
    return real == real_root or real.startswith(os.path.join(real_root, ""))


def check_inside(path: str, real_root: str, where: str, name: str, root: Path) -> None:
    """Raises ConfigError, as by `outside`, if a path, with links resolved, lies outside `real_root`."""
    if not is_inside(path, real_root):
        raise outside(where, name, root)


def outside(where: str, name: str, root: Path) -> ConfigError:
    """The error for a name that leads outside `root`. where: the file or key that contains the name."""
    return ConfigError(f"{where}: {shown(name)} leads outside {shown(str(root))}; "
                       "set data_loader.args.allow_outside to true (of tools.shard: --allow_outside) if that is meant")
