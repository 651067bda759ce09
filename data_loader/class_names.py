"""Names of classes: reading classes.txt, and matching a data set's names with those that a checkpoint records."""
from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_loader.datasets import Splits
from data_loader.images import shown
from data_loader.list_lines import read_text_bytes
from logger.text import first_of
from utils.errors import ConfigError


def read_class_names(file: Path, num_classes: int) -> list[str]:
    """Read classes.txt: one name per line in the order of the labels, or `name label` in any order, as in Places365.

    Raises ConfigError if there are fewer names than `num_classes`, a name occurs twice, or the file can't be read.
    """
    text = read_text_bytes(file).decode("utf-8", "surrogateescape")
    names = [line.strip() for line in text.splitlines() if line.strip()]
    bare, numbers = ([name.rpartition(" ")[part].strip() for name in names] for part in (0, 2))
    if all(bare) and sorted(numbers) == sorted(map(str, range(len(names)))) and len(set(bare)) == len(bare):
        names = [name for _, name in sorted(zip(map(int, numbers), bare))]  # unless "class 0", "class 1" are the names
    if len(names) < num_classes:
        raise ConfigError(f"{shown(str(file))}: names {len(names)} classes, and the lists have {num_classes}; a line a "
                          "class, in the order of the labels")
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ConfigError(f"{shown(str(file))}: {shown(twice)} is there twice")
    return [shown(name) for name in names]


def refuse_other_names(file: Path, class_names: Sequence[str], named: Mapping[int, str]) -> None:
    """Raises ConfigError if the lists beside classes.txt contradict it: one of their names is that of another class.

    class_names: those in `file`; named: {label: name} of the lists. Names of which classes.txt has none are another
    vocabulary (WordNet's numbers, say) and accepted.
    """
    if set(map(folded, class_names)).isdisjoint(map(folded, named.values())):
        return
    for label, name in sorted(named.items()):
        if label < len(class_names) and folded(name) != folded(class_names[label]):
            raise ConfigError(f"{shown(str(file))}: class {label} is {class_names[label]} here and {name} in the "
                              "lists; correct the names or their order")


def folded(name: str) -> str:
    """A name without what spellings of it differ in: case, Unicode form, blanks around it."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def match_classes(own: Sequence[str], wanted: Sequence[str], some: bool = False) -> list[int] | None:
    """For each class of `own`, its index in `wanted`, by name: exactly, or else ignoring case and Unicode form.

    some: `own` may lack classes. None if the names don't match.
    """
    for fold in (str, folded):
        numbers = {fold(name): number for number, name in enumerate(wanted)}
        found = [numbers.get(fold(name)) for name in own]
        if len(numbers) == len(wanted) and None not in found and len(set(found)) == len(found) and (
                some or len(found) == len(wanted)):
            return found
    return None


def stranger(own: Sequence[str], wanted: Sequence[str]) -> str:
    """The first class of `own` that `wanted` lacks, or that is a duplicate, when `match_classes` returned None."""
    taken: set[int] = set()
    for name in own:
        number = match_classes([name], wanted, some=True)
        if number is None or number[0] in taken:
            return name
        taken.add(number[0])
    raise AssertionError("every class has its number")


def class_numbers(own: Sequence[str], wanted: Sequence[str], data_dir: str, some: bool) -> list[int]:
    """For each class of the data in `data_dir`, its index in the checkpoint's classes `wanted`, by name. some: the data
    may lack classes.

    Raises ConfigError if the names don't match.
    """
    if list(own) == list(wanted):       # accepted even with duplicate names
        return list(range(len(wanted)))
    numbers = match_classes(own, wanted, some)
    if numbers is None:
        raise ConfigError(f"data_loader.args.data_dir: {data_dir} has the classes {first_of(own)}, and the "
                          f"checkpoint's model knows {first_of(wanted)}; give the data it was trained for, or start a "
                          "new classifier with --pretrained")
    return numbers


def follow_classes(splits: Splits, wanted: list[str], data_dir: str, some: bool) -> None:
    """Renumber the splits' classes in the order of `wanted`, by name, in place. some: the data may lack classes.

    Raises ConfigError if the names don't match.
    """
    numbers = class_numbers(splits.class_names, wanted, data_dir, some)
    if splits.class_names != list(wanted):
        if numbers != list(range(len(wanted))):
            splits.notes.append("classes are numbered as in the checkpoint, by their names")
        table = np.array(numbers)
        for part in (splits.train, splits.val, splits.test, splits.spare):
            if part is not None:
                part.targets = np.where(part.targets >= 0, table[part.targets], part.targets)
        splits.class_names, splits.num_classes = list(wanted), len(wanted)


