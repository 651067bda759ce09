"""Parsing list files, with lines `path label` or `path label name`. Whether the images exist isn't checked here."""
from __future__ import annotations

import codecs
import os
import re
from pathlib import Path

import numpy as np

from data_loader.images import EXTENSIONS, shown
from utils.errors import ConfigError

LABEL = r" +(?P<label>-?\d{1,18}) +"
WITH_NAME = re.compile(rf"(?P<path>.*\S){LABEL}(?P<name>\D.*)")   # path label name
#: The same if the path has an image's extension; then the name may contain numbers, if it has a letter.
IMAGE_WITH_NAME = re.compile(rf"(?P<path>.*(?:{'|'.join(map(re.escape, sorted(EXTENSIONS)))})){LABEL}"
                             r"(?P<name>.*[^\W\d_].*)", re.IGNORECASE)


def read_text_bytes(file: Path, flag: str = "") -> bytes:
    """A text file's content without its byte-order mark; UTF-16 (as PowerShell writes it) is converted to UTF-8. flag:
    prefix of the error, such as the option that named the file. Raises ConfigError if it can't be read or decoded."""
    try:
        content = file.read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16").encode("utf-8", "surrogateescape")
        return content.removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ConfigError(f"{flag}{shown(str(file))}: can't be read ({error.strerror or error})") from None
    except UnicodeError:
        raise ConfigError(f"{flag}{shown(str(file))}: begins as UTF-16 and isn't; save it as UTF-8") from None


def read_list(file: Path) -> tuple[list[str], np.ndarray, list[int], int, dict[int, str]]:
    """Parse a list file: (paths as written [N], labels np.int64 [N], line numbers [N], number of repeated lines left
    out, {label: class name}).

    A line is `path label`, with the label after the last blank, or `path label name`. Windows line ends, blank lines, a
    byte-order mark and paths that aren't UTF-8 are accepted. Raises ConfigError with file and line.
    """
    content = read_text_bytes(file)
    names: dict[str, tuple[int, int]] = {}
    repeated = 0
    classes: dict[int, str] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        text = os.fsdecode(line.strip().replace(b"\t", b" "))
        name, label, called = _parts(text)
        if called and classes.setdefault(int(label), called) != called:
            raise ConfigError(f"{shown(str(file))}, line {number}: class {label} is {shown(called)} here and "
                              f"{shown(classes[int(label)])} before")
        if not name:
            raise ConfigError(f"{shown(str(file))}, line {number}: {shown(label)[:80]!r} has no label; "
                              f"a line is `path label`{_no_table(label)}")
        if not label.isascii() or not label.removeprefix("-").isdigit() or len(label) > 18:
            raise ConfigError(f"{shown(str(file))}, line {number}: the label {shown(label)[:40]!r} is not a whole "
                              "number; a line is `path label`, labels are 0, 1, 2, ... and their names stand in "
                              "classes.txt")
        name, value = name.strip(), int(label)
        if "\0" in name:
            raise ConfigError(f"{shown(str(file))}, line {number}: a path can't hold a zero byte")
        before = names.setdefault(name, (value, number))
        if before[1] != number:
            refuse_two_labels(file, name, (value, number), before)
            repeated += 1
    if not names:
        raise ConfigError(f"{shown(str(file))}: lists no image; a line is `path label`")
    labels, lines = zip(*names.values(), strict=True)
    return list(names), np.array(labels, dtype=np.int64), list(lines), repeated, classes


def _parts(text: str) -> tuple[str, str, str]:
    """(path, label, class name) of a line; the name is "" if there is none."""
    path, _, label = text.rpartition(" ")
    named = IMAGE_WITH_NAME.fullmatch(text) if " " in path else None
    if named is None and not label.removeprefix("-").isdigit():
        named = WITH_NAME.fullmatch(text)
    return (path, label, "") if named is None else (named["path"], named["label"], named["name"].strip())


def refuse_two_labels(file: Path, name: str, here: tuple[int, int], before: tuple[int, int]) -> None:
    """Raises ConfigError if two lines give image `name` different labels. here, before: (label, line number) each."""
    if here[0] != before[0]:
        raise ConfigError(f"{shown(str(file))}, line {here[1]}: {shown(name)} has label {here[0]} here and {before[0]} "
                          f"in line {before[1]}")


def _no_table(line: str) -> str:
    """A hint for a line whose path and label are separated by a comma or semicolon, else ""."""
    mark = next((mark for mark in ",;" if re.search(rf"\{mark}\s*\"?\w+\"?$", line)), None)
    return "" if mark is None else f", a blank between them, no {'comma' if mark == ',' else 'semicolon'}"
