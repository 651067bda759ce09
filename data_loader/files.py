"""Finding image files that lists of `path label` lines name. Nothing is decoded here.

All files are looked for before training begins. A path that leaves `data_dir` (by `..`, from the root, by a link that
points out) is refused unless `allow_outside` is set.
"""
from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_loader.datasets import ImageSet, Splits
from data_loader.images import shown
from data_loader.list_lines import read_list, read_text_bytes, refuse_two_labels
from data_loader.places import KEY
from logger.text import count_of
from utils.errors import ConfigError

DATA_DIR = "data_loader.args.data_dir"
#: (names, the list, each one's line, "train", "val" or "test") -> paths
Find = Callable[[Sequence[str], str, Sequence[int], str], list[str]]
MOST_CLASSES = 10**6    # of images for testing alone, where no checkpoint knows how many there are


def check_data_dir(data_dir: str, may_be_made: bool = False) -> None:
    """ConfigError unless `data_dir` names a folder, or (for data that can be downloaded) one that can be made."""
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
def read_class_names(file: Path, num_classes: int) -> list[str]:
    """classes.txt: a name a line, in the order of the labels, or `name label` as Places365 writes it, in any order.

    Raises ConfigError where there are fewer names than classes.
    """
    text = read_text_bytes(file).decode("utf-8", "surrogateescape")
    names = [line.strip() for line in text.splitlines() if line.strip()]
    bare, numbers = ([name.rpartition(" ")[part].strip() for name in names] for part in (0, 2))
    if all(bare) and sorted(numbers) == sorted(map(str, range(len(names)))) and len(set(bare)) == len(bare):
        names = [name for _, name in sorted(zip(map(int, numbers), bare))]  # of equal ones the number is part: class 0
    if len(names) < num_classes:
        raise ConfigError(f"{shown(str(file))}: names {len(names)} classes, and the lists have {num_classes}; a line a "
                          "class, in the order of the labels")
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ConfigError(f"{shown(str(file))}: {shown(twice)} is there twice")
    return [shown(name) for name in names]


def list_folder(data_dir: str, lists: tuple[str, str | None, str | None], folder: str) -> Path:
    """Where list files are looked for: in `data_dir`, or in its `folder` where that alone has the first of them."""
    root = Path(data_dir)
    return root / folder if folder and not (root / lists[0]).exists() and (root / folder).is_dir() else root


def read_lists(data_dir: str, lists: tuple[str, str | None, str | None], folder: str, training: bool,
               allow_outside: bool, find: Find | None = None, known: int | None = None) -> Splits:
    """The splits that list files in `data_dir` (or `data_dir/folder`) name; a missing test list: val is the test split.

    find: of images that aren't files. known: how many classes the checkpoint's model has.

    Classes are 0 to the largest training label. Their names come from classes.txt beside the lists, or from a third
    column.
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
    more = (notes, named, find or find_files(root, Path(data_dir), allow_outside))
    train = _read_split(root / train_name, "train", None, *more) if has[train_name] else None
    if training and (train.targets == train.targets[0]).all():
        raise ConfigError(f"{shown(str(root / train_name))}: lists 1 class, training needs two or more")
    if train is not None:
        most, whose = int(train.targets.max()) + 1, "as in training"
    else:
        most, whose = known or MOST_CLASSES, "as the checkpoint's model knows them" if known else "without gaps"
    test = _read_split(root / test_name, "test", (most, whose), *more)
    val = _read_split(root / val_name, "val", (most, whose), *more) if has.get(val_name) else None
    if train is not None:
        for name, split in ((test_name, test), (val_name, val)):
            both = 0 if split is None else len(same_files(train.paths, split.paths))
            if both:
                notes.append(f"warning: {count_of(both, 'image is', 'images are')} in {train_name} and in {name}")
    classes = int((train or test).targets.max()) + 1
    class_names = None
    if (root / "classes.txt").exists():
        class_names = read_class_names(root / "classes.txt", classes)
        classes = len(class_names)
    elif set(named) >= set(range(classes)):
        class_names = [shown(named[label]) for label in range(classes)]
    return Splits(train, test, val=val, num_classes=classes, class_names=class_names, notes=notes)


def _plain(paths: Sequence[str], links: bool = False) -> list[str]:
    """One text for each image, however it's written (`a.jpg`, `./a.jpg`, `/all/of/it/a.jpg`) and whichever links its
    folder lies behind. links: those that are links themselves are followed too, which takes a look at each."""
    # Of an image in a shard a zero byte is part; Python 3.11 cuts there.
    plain = [path if "\0" in path else os.path.abspath(path) for path in paths]
    # A look at each folder, not at each of a million files.
    folders = {path.rpartition(os.sep)[0] for path in plain}
    moved = {folder: real for folder in folders if "\0" not in folder and (real := os.path.realpath(folder)) != folder}
    if links:
        plain = [os.path.realpath(path) if os.path.islink(path) else path for path in plain]
    if moved:
        parts = (path.rpartition(os.sep) for path in plain)
        plain = [f"{moved.get(folder, folder)}{sep}{name}" for folder, sep, name in parts]
    return plain


def same_files(one: Sequence[str], other: Sequence[str], links: bool = False) -> set[str]:
    """The images that are in both. links: see `_plain`."""
    return set(_plain(one, links)) & set(_plain(other, links))


def repeats(paths: Sequence[str], links: bool = False) -> dict[int, int]:
    """Which of the paths name an image that one before names, and which one that is. links: see `_plain`."""
    plain, first = _plain(paths, links), {}
    if len(set(plain)) == len(plain):
        return {}
    return {at: before for at, path in enumerate(plain) if (before := first.setdefault(path, at)) != at}


def _read_split(file: Path, split: str, limit: tuple[int, str] | None, notes: list[str], named: dict[int, str],
                find: Find) -> ImageSet:
    """One list's images; the names of classes that it gives go into `named`. limit: how many classes there may be, and
    why; None for the list that says so itself."""
    names, labels, lines, repeated, called = read_list(file)
    for label, text in called.items():
        if named.setdefault(label, text) != text:
            raise ConfigError(f"{shown(str(file))}: class {label} is {shown(text)} here and {shown(named[label])} in "
                              "another list")
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


def find_files(root: Path, data_dir: Path, allow_outside: bool) -> Find:
    """What finds the files that lists in `root` name."""
    def find(names: Sequence[str], source: str, lines: Sequence[int], split: str) -> list[str]:
        # Places365's own lists begin paths with a slash, Windows writes backslashes: both are meant below data_dir.
        if not allow_outside:
            names = [name.replace("\\", "/") if "\\" in name and not os.path.lexists(data_dir / name) else name
                     for name in names]
            if names[0].startswith("/") and not os.path.lexists(names[0]):
                names = [name.lstrip("/") for name in names]
        # Images are relative to data_dir; official lists may lie, with their images, in a folder of it.
        base = root if not os.path.lexists(data_dir / names[0]) and os.path.lexists(root / names[0]) else data_dir
        return check_paths(base, names, allow_outside, source, lines)
    return find


def about_tars(root: Path) -> str:
    """What an error says where no images were found in `root`, but tar files that may hold them."""
    tars = sorted(name for name in os.listdir(root) if name.lower().endswith(".tar")) if root.is_dir() else []
    return f"; {len(tars)} tar files are there, like {shown(tars[0])}: where they hold the images, name them with " \
           f"{KEY}" if tars else ""


def check_paths(root: Path, names: list[str], allow_outside: bool, source: str, lines: list[int]) -> list[str]:
    """`names` below `root` as full paths. Raises ConfigError where one is missing or leaves `root`."""
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
    """Whether a file is there: `look(name)`, a name below `root`, is True, False, or None where it leads out of all the
    folders `within` (None: it may lead anywhere).

    Looks at each folder once, not at each file: a million names take seconds, not minutes.
    """

    def __init__(self, root: Path, within: Sequence[Path] | None):
        self.root, self.within = root, within and [os.path.realpath(folder) for folder in within]
        self.folders: dict[str, dict[str, bool] | None] = {}    # what each holds; None of one that leads out

    def __call__(self, name: str) -> bool | None:
        folder, base = os.path.split(name)
        if folder not in self.folders:
            entries = _entries(os.path.join(self.root, folder))
            far = os.path.isabs(name) or ".." in Path(name).parts  # refused unseen: what is there is nobody's business
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
    """What a folder holds: name -> is it a link. None where there is no such folder."""
    try:
        with os.scandir(folder) as found:
            return {entry.name: entry.is_symlink() for entry in found if entry.is_symlink() or entry.is_file()}
    except OSError:
        return None


def is_inside(path: str, real_root: str) -> bool:
    """Whether a path, links followed, is `real_root` or lies in it."""
    real = os.path.realpath(path)
    return real == real_root or real.startswith(os.path.join(real_root, ""))


def check_inside(path: str, real_root: str, where: str, name: str, root: Path) -> None:
    """Raises ConfigError where a path, links followed, lies outside `real_root`."""
    if not is_inside(path, real_root):
        raise outside(where, name, root)


def outside(where: str, name: str, root: Path) -> ConfigError:
    """The error for a name that leads out of `root`; where: what names it."""
    return ConfigError(f"{where}: {shown(name)} leads outside {shown(str(root))}; "
                       "set data_loader.args.allow_outside to true (of tools.shard: --allow_outside) if that is meant")
