"""Images in class folders: finding splits and classes, and reporting what is left out. Nothing is decoded here."""
from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_loader.class_names import match_classes, stranger
from data_loader.datasets import ImageSet, Splits
from data_loader.files import DATA_DIR, about_tars, check_inside, repeats, same_files
from data_loader.folder_notes import SPLIT_NAMES, copies, doubtful_classes, nested_splits
from data_loader.images import EXTENSIONS, HEIC, is_image, is_system, refuse_folder, shown, walk
from data_loader.splitting import Division
from logger.text import count_of
from utils.errors import ConfigError

LAYOUT = "data_dir/train/CLASS/* or data_dir/CLASS/*"


def class_key(name: str) -> str:
    """A name in normal form (NFC), equal for all Unicode spellings: é may be one character or two."""
    return unicodedata.normalize("NFC", name)


def read_folders(data_dir: str, division: Division, allow_outside: bool, whole: bool = False) -> Splits:
    """The splits in a folder: `train/CLASS/*` and likewise `val` and `test`, or `CLASS/*` only, a part of which is set
    aside for testing.

    Split folders may have any of SPLIT_NAMES. A class consists of its folder and everything below it. The classes are
    those of the training split in alphabetical order. With only train and val, val is the test split. division: how
    test images are set aside. allow_outside: links may lead outside `data_dir`. whole: without a `train` folder, all of
    `CLASS/*` or `test/CLASS/*` is for testing. Files left out are counted in the notes. Raises ConfigError for a layout
    that can't be used.
    """
    root, notes = Path(data_dir), []
    parts = split_folders(root)
    if whole and "train" not in parts and parts:  # test/CLASS/* alone
        root, parts = parts.get("test", parts.get("val")), {}
    sets, names = read_parts(root, parts, allow_outside, notes, least=1 if whole else 2)
    about = {"class_names": [shown(name) for name in names], "num_classes": len(names)}
    if whole and len(sets) == 1:
        if root == Path(data_dir) and division.test_share < 1:
            raise ConfigError(f"{DATA_DIR}: {shown(data_dir)} has no test folder, and isn't where the model's training "
                              f"photos are; to test all of it, put its class folders into {shown(data_dir)}/test/ or "
                              "set data_loader.args.test_share to 1")
        return Splits(None, sets["train"], notes=notes, **about)
    return division.splits(sets, f"{DATA_DIR}: {shown(str(parts.get('train', root)))}", "folder", notes, **about)


def read_parts(root: Path, parts: dict[str, Path], allow_outside: bool, notes: list[str],
               least: int = 2) -> tuple[dict[str, ImageSet], list[str]]:
    """(split -> its images, class names) as the folders are, with nothing set aside: `root/CLASS/*` alone is "train".

    parts: the splits' folders (`split_folders`). notes: lines for the log are appended to it. least: the least number
    of classes. Raises ConfigError for a layout that can't be used.
    """
    if "train" not in parts and any(class_folders(part) for part in parts.values()):
        raise ConfigError(f"{shown(str(root / 'train'))}: no such folder; images belong into {LAYOUT}")
    first = parts.get("train", root)
    names = class_folders(first)
    if len(names) < least:
        raise ConfigError(f"{DATA_DIR}: {shown(str(first))} has {count_of(len(names), 'class folder', 'class folders')}"
                          f", training needs two or more; images belong into {LAYOUT}{about_tars(root)}")
    notes += doubtful_classes(names, shown(str(first)))
    if "train" in parts:
        note_rest(root, set(parts.values()), notes)
    read: dict[str, ImageSet] = {}
    read["train"], linked = read_classes(first, names, root, allow_outside, notes, needed=True)
    for part in ("val", "test"):
        if "train" in parts and part in parts:
            own = class_folders(parts[part])
            numbers = match_classes(list(own), list(names), some=True)
            if numbers is None:
                raise ConfigError(f"{shown(str(parts[part] / stranger(list(own), list(names))))}: no such class in "
                                  f"{shown(str(first))}; add training photos of it or take the folder out")
            places = dict(zip(numbers, own.values()))
            read[part], too = read_classes(parts[part], {name: places.get(k, []) for k, name in enumerate(names)},
                                           root, allow_outside, notes, needed=False)
            linked |= too
    if linked:
        once_each(read, notes)
    notes += copies(read, parts)
    test = next((part for part in ("test", "val") if part in read), "train")
    if not len(read[test]):
        loose, own = loose_images(parts[test]), class_folders(parts[test])
        raise ConfigError(f"{shown(str(parts[test]))}: holds " + (
            f"{count_of(loose, 'image', 'images')} but {'none in its' if own else 'no'} class folders; images belong "
            f"into {parts[test].name}/CLASS/*" if loose else "no image"))
    return read, list(names)


def split_folders(root: Path) -> dict[str, Path]:
    """{"train", "val" or "test": its folder} for the split folders in `root`. Raises ConfigError if two folders could
    be the same split."""
    found: dict[str, Path] = {}
    for name in folders_in(root):
        part = SPLIT_NAMES.get(name.lower())
        if part in found:
            raise ConfigError(f"{DATA_DIR}: {shown(str(root))} has {found[part].name}/ and {name}/, and only one can "
                              f"be the {part} split; rename or remove one")
        if part is not None:
            found[part] = root / name
    return found


def folders_in(root: Path) -> list[str]:
    """The names of the folders in `root`, sorted. Raises ConfigError if `root` can't be read, or has a broken link,
    which would silently drop a class or split."""
    try:
        with os.scandir(root) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        refuse_folder(error)
    for entry in entries:
        if entry.is_symlink() and not is_system(entry.name):
            refuse_dangling(entry.path)
    return [entry.name for entry in entries if entry.is_dir()]


def refuse_dangling(path: str) -> None:
    """Raises ConfigError if `path` is a broken link."""
    if not os.path.exists(path):
        raise ConfigError(f"{shown(path)}: a link to {shown(os.readlink(path))}, which isn't there; remove it")


def class_folders(root: Path) -> dict[str, list[str]]:
    """{class: the folders in `root` with that name, in any Unicode form}, classes in alphabetical order."""
    found: dict[str, list[str]] = {}
    for name in folders_in(root):
        if not is_system(name):
            found.setdefault(class_key(name), []).append(name)
    return {name: found[name] for name in sorted(found)}


def note_rest(root: Path, known: set[Path], notes: list[str]) -> None:
    """Append to `notes` what is left out beside the split folders `known`: images, and other folders that hold some."""
    loose = loose_images(root)
    if loose:
        notes.append(left_out(root, f"{count_of(loose, 'image', 'images')} beside the folders of splits"))
    for name in folders_in(root):
        if root / name in known or is_system(name):
            continue
        count = sum(is_photo(file) for _, _, files in os.walk(root / name) for file in files)
        if count:
            notes.append(left_out(root / name, f"{count_of(count, 'image', 'images')} in no split"))


def loose_images(folder: Path) -> int:
    """The number of images directly in a folder, including formats that must be converted first."""
    with os.scandir(folder) as entries:
        return sum(entry.is_file() and is_photo(entry.name) for entry in entries)


def is_photo(name: str) -> bool:
    """Whether a file of this name is a photo, even one in a format (HEIC) that must be converted first."""
    return is_image(name) or (not is_system(name) and os.path.splitext(name)[1].lower() in HEIC)


def left_out(folder: Path | str, what: str) -> str:
    """A warning that `what` in `folder` isn't used."""
    return f"warning: {shown(str(folder))}: left out: {what}"


def not_images(names: Iterable[str]) -> str:
    """A description of files that aren't read, by extension. It names HEIC, in which phones save photos, because their
    absence might go unnoticed until after training."""
    endings = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in names)
    listed = ", ".join(f"{shown(ending)} {count:,}" for ending, count in endings.most_common(5))
    more = ", ..." if len(endings) > 5 else ""
    heic = "; convert HEIC to JPEG or PNG" if endings.keys() & HEIC else ""
    return f"{count_of(endings.total(), 'file', 'files')} not named as images are ({listed}{more}){heic}"


def read_classes(folder: Path, names: dict[str, list[str]], root: Path, allow_outside: bool, notes: list[str],
                 needed: bool) -> tuple[ImageSet, bool]:
    """(all images below each class's folders, whether any was reached through a link).

    names: {class: its folders in `folder`}; root: the data set's folder. notes: gets lines about files left out.
    needed: raise ConfigError for a class without images. Also raises it for broken links, and for links that lead
    outside `root` unless `allow_outside`.
    """
    paths, labels, other, linked = [], [], [], False
    bare: dict[str, set[str]] = {}      # the folders in class folders that have no images of their own
    real_root = os.path.realpath(root)
    for label, (name, places) in enumerate(names.items()):
        own, rest = [], []
        for place in places:
            top = os.path.join(folder, place)
            for where, real, folders, files in walk(top):
                if leads_up(where, real, real_root):
                    if where == top:
                        raise ConfigError(f"{shown(where)}: a link to a folder above it; remove it")
                    notes.append(left_out(where, "a link to a folder above it"))
                    folders.clear()
                    continue
                if files and not allow_outside:
                    check_inside(where, real_root, DATA_DIR, where, root)
                if where == top and not any(map(is_image, files)):
                    bare[name] = set(folders)
                linked |= real != os.path.normpath(os.path.join(real_root, os.path.relpath(where, root)))
                for file in files:
                    path = os.path.join(where, file)
                    if os.path.islink(path):
                        refuse_dangling(path)
                        linked = True
                        if not allow_outside and is_image(file):
                            check_inside(path, real_root, DATA_DIR, path, root)
                    if is_image(file):
                        own.append(path)
                    else:
                        rest.append(file)
        if needed and not own:
            there = f", only {not_images(rest)}" if rest else ""
            raise ConfigError(f"{shown(os.path.join(folder, places[0]))}: holds no image "
                              f"({', '.join(sorted(EXTENSIONS))}){there}; add some or remove the folder")
        other += rest
        paths += own
        labels += [label] * len(own)
    if needed:
        notes += nested_splits(bare, shown(str(folder)))
    if other:
        notes.append(left_out(folder, not_images(other)))
    loose = loose_images(folder)
    if loose:
        notes.append(left_out(folder, f"{count_of(loose, 'image', 'images')} beside the class folders"))
    return ImageSet(np.array(labels, dtype=np.int64), paths=paths), linked


def once_each(read: dict[str, ImageSet], notes: list[str]) -> None:
    """Remove images that occur twice in one split through links, in place, and note these and images that occur in two
    splits. Raises ConfigError if one photo has two classes."""
    for part, images in read.items():
        again = repeats(images.paths, links=True)
        for at, before in again.items():
            if images.targets[at] != images.targets[before]:
                raise ConfigError(f"{shown(images.paths[at])} is {shown(images.paths[before])}, which has another "
                                  "class; remove one of these links")
        if again:
            notes.append(f"warning: {part}: {count_of(len(again), 'image', 'images')} that links show again left out")
            read[part] = images.subset(np.delete(np.arange(len(images)), list(again)))
    for part in [part for part in read if part != "train"]:
        both = len(same_files(read["train"].paths, read[part].paths, links=True))
        if both:
            notes.append(f"warning: {count_of(both, 'image is', 'images are')} in train and, through links, in {part}")


def leads_up(where: str, real: str, real_root: str) -> bool:
    """Whether folder `where` (resolved: `real`) is a link to a folder above it, which has other classes' photos too."""
    return any(os.path.join(below, "").startswith(os.path.join(real, ""))
               for below in (os.path.realpath(os.path.dirname(where)), real_root))
