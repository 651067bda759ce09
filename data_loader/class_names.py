"""Names of classes: reading classes.txt, and matching a data set's names with those that a checkpoint records."""
from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_loader.datasets import Splits
from data_loader.images import shown
from data_loader.list_lines import read_text_bytes
from logger.text import first_of
from utils.errors import ConfigError

#: Names with a label before or behind them; with a blank, the second is how classes.txt may give labels.
_NUMBERED = [re.compile(r"(?P<label>\d{1,9})[\s,;:.]+(?P<name>.+)"),
             re.compile(r"(?P<name>.*[^\s,;:])[\s,;:]+(?P<label>\d{1,9})")]


def read_class_names(file: Path, num_classes: int) -> list[str]:
    """Read classes.txt: one name per line in the order of the labels, or `name label` in any order, as in Places365.

    Raises ConfigError if there are fewer names than `num_classes`, a name occurs twice, lines in another order have
    their labels in another form (`0 name`, `name,0`), or the file can't be read.
    """
    text = read_text_bytes(file).decode("utf-8", "surrogateescape")
    names = [line.strip() for line in text.splitlines() if line.strip()]
    bare, numbers = ([name.rpartition(" ")[part].strip() for name in names] for part in (0, 2))
    if all(bare) and sorted(numbers) == sorted(map(str, range(len(names)))) and len(set(bare)) == len(bare):
        names = [name for _, name in sorted(zip(map(int, numbers), bare))]  # unless "class 0", "class 1" are the names
    else:
        _refuse_numbered(file, names)
    if len(names) < num_classes:
        raise ConfigError(f"{shown(str(file))}: names {len(names)} classes, and the lists have {num_classes}; a line a "
                          "class, in the order of the labels")
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ConfigError(f"{shown(str(file))}: {shown(twice)} is there twice")
    return [shown(name) for name in names]


def _refuse_numbered(file: Path, names: Sequence[str]) -> None:
    """Raises ConfigError if all names begin or end with a number, and these are 0, 1, 2, ... but in another order: they
    are labels, not parts of the names, which otherwise would silently be those of other classes."""
    for form in _NUMBERED:
        found = [form.fullmatch(name) for name in names]
        if None in found:
            continue
        labels, bare = [int(match["label"]) for match in found], {match["name"] for match in found}
        if labels != sorted(labels) == list(range(len(names))) and len(bare) == len(names):
            raise ConfigError(f"{shown(str(file))}: its lines have labels in another order than theirs, like "
                              f"{shown(names[0])!r}; write `{shown(found[0]['name'])} {labels[0]}`, with a blank")


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


def follow_classes(splits: Splits, facts: Mapping[str, Any], data_dir: str, some: bool, elsewhere: bool) -> None:
    """Renumber the splits' classes in the order of a checkpoint's, by name, in place.

    facts: the checkpoint's `data_facts`; if it only initialises a training ("optional"), classes that don't match stay
    as they are. some: the data may lack classes. elsewhere: the data isn't where the checkpoint's was. If only one side
    has names, numbers are trusted, and a note says so. Raises ConfigError if the names don't match.
    """
    wanted, own, optional = facts.get("class_names"), splits.class_names, bool(facts.get("optional"))
    if wanted and own:
        if not optional or match_classes(own, wanted, some) is not None:
            _renumber(splits, dict(enumerate(class_numbers(own, wanted, data_dir, some))), wanted)
    elif optional or splits.test.paths is None:     # images in memory are a published set's, with its own numbers
        return
    elif wanted and splits.named:
        _follow_named(splits, wanted, data_dir)
    elif wanted:
        splits.notes.append(f"warning: {shown(data_dir)}: the classes have no names here, so they are taken to be "
                            f"numbered as in the checkpoint ({_numbered(wanted)}); give their names in classes.txt")
    elif own and (elsewhere or splits.test.where is None):
        splits.notes.append(f"warning: {shown(data_dir)}: the checkpoint's classes have no names, so they are taken to "
                            f"be numbered as here ({_numbered(own)}); if they aren't, give lists with their numbers")


def _numbered(names: Sequence[str]) -> str:
    """The first names with their numbers: 0 ant, 1 bee."""
    return first_of([f"{number} {name}" for number, name in enumerate(names)])


def _follow_named(splits: Splits, wanted: Sequence[str], data_dir: str) -> None:
    """The same for lists that name some classes only: those that occur are renumbered if all are named, and otherwise
    must have their numbers already."""
    named = splits.named
    if set(np.unique(np.concatenate([part.targets for part in splits.parts()]))) <= {-1, *named}:
        _renumber(splits, dict(zip(named, class_numbers(list(named.values()), wanted, data_dir, some=True))), wanted)
        return
    for label, name in sorted(named.items()):
        if label >= len(wanted) or folded(name) != folded(wanted[label]):
            there = wanted[label] if label < len(wanted) else "none"
            raise ConfigError(f"data_loader.args.data_dir: {shown(data_dir)}: class {label} is {name} in the lists, "
                              f"and {there} in the checkpoint's model; number the classes as the model does, or name "
                              "all of them")


def _renumber(splits: Splits, numbers: Mapping[int, int], wanted: Sequence[str]) -> None:
    """Give the classes their `numbers` in `wanted`, {label: number}, in place."""
    if splits.class_names == list(wanted):
        return
    if any(label != number for label, number in numbers.items()):
        splits.notes.append("classes are numbered as in the checkpoint, by their names")
    table = np.zeros(max(numbers) + 1, dtype=np.int64)
    table[list(numbers)] = list(numbers.values())
    for part in splits.parts():
        part.targets = np.where(part.targets >= 0, table[part.targets], part.targets)
    splits.class_names, splits.num_classes = list(wanted), len(wanted)
