"""What tools.predict writes: predictions as CSV, JSON or lines for a terminal, each batch as soon as it is there.

Only the batch at hand is in memory, however many images there are. Files appear whole, at the end.
"""
from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from logger.metrics_csv import csv_text
from tools.classify import Prediction, class_name
from utils.errors import ConfigError
from utils.files import atomic_write

#: Names that mean standard output.
STDOUT = ("-", "/dev/stdout")
BASIC = ("path", "class", "probability")
BOX = ("left", "top", "right", "bottom")


def rows(found: Sequence[Any], names: Sequence[str] | None) -> list[dict[str, Any]]:
    """One dict per image (detectors: per instance) with keys as the CSV's columns; None for what isn't known."""
    from data_loader.images import shown
    table = []
    for one in found:
        if isinstance(one, Prediction):
            row = {"path": shown(one.path), "class": class_name(names, one.classes[0]),
                   "probability": one.probabilities[0], "experts": one.experts, "agreement": one.agreement}
            for k, (label, probability) in enumerate(zip(one.classes[1:], one.probabilities[1:]), 2):
                row |= {f"class_{k}": class_name(names, label), f"probability_{k}": probability}
            table.append(row)
        else:
            path, seen = one
            boxes = zip(seen["labels"].tolist(), seen["scores"].tolist(), seen["boxes"].tolist())
            table += [{"path": shown(path), "class": class_name(names, label - 1), "probability": score,
                       **dict(zip(BOX, box))} for label, score, box in boxes] or [
                           {"path": shown(path), "class": None, "probability": None}]
    return table


class CsvWriter:
    """Rows as CSV with a header line; probabilities with six digits."""

    def __init__(self, handle: TextIO):
        self.handle, self.columns = handle, ()

    def add(self, table: list[dict[str, Any]]) -> None:
        """Write a batch's rows."""
        if table and not self.columns:
            self.columns = tuple(table[0]) if "experts" in table[0] else BASIC + BOX
            self.handle.write(csv_text(self.columns, ()))
        cells = ({key: f"{value:.6f}" if isinstance(value, float) else value for key, value in row.items()}
                 for row in table)
        self.handle.write(csv_text(self.columns, cells, header=False))

    def end(self, unreadable: Sequence[tuple[str, str]]) -> None:
        """Write the header where there was no row."""
        if not self.columns:
            self.handle.write(csv_text(BASIC, ()))


class JsonWriter:
    """{"predictions": the rows, "unreadable": [{"path", "reason"}]}, as utils.files.write_json lays it out."""

    def __init__(self, handle: TextIO):
        self.handle, self.before = handle, '{\n  "predictions": ['

    def add(self, table: list[dict[str, Any]]) -> None:
        """Write a batch's rows."""
        for row in table:
            text = textwrap.indent(json.dumps(row, indent=2, allow_nan=False), "    ")
            self.handle.write(f"{self.before}\n{text}")
            self.before = ","

    def end(self, unreadable: Sequence[tuple[str, str]]) -> None:
        """Write the files that couldn't be read."""
        rest = json.dumps({"unreadable": [{"path": path, "reason": reason} for path, reason in unreadable]}, indent=2)
        self.handle.write(("\n  ]," if self.before == "," else f"{self.before}],") + rest[1:] + "\n")


class LineWriter:
    """Rows for a terminal. width: of the paths; num_experts: of the model."""

    def __init__(self, handle: TextIO, width: int, num_experts: int):
        self.handle, self.width, self.num_experts = handle, width, num_experts

    def add(self, table: list[dict[str, Any]]) -> None:
        """Write a batch's rows."""
        self.handle.write("".join(f"{as_line(row, self.width, self.num_experts)}\n" for row in table))

    def end(self, unreadable: Sequence[tuple[str, str]]) -> None:
        """Nothing is left to be written."""


def as_line(row: dict[str, Any], width: int, num_experts: int) -> str:
    """A row for the terminal: path, then each class with its probability in percent."""
    if row["class"] is None:
        return f"{row['path']:<{width}}  nothing found"
    guesses = [("class", "probability")] + [(key, f"probability_{key[6:]}") for key in row if key.startswith("class_")
                                            and row[f"probability_{key[6:]}"] >= 0.0005]  # less is shown as 0.0%
    text = f"{row['path']:<{width}}  " + "  ".join(f"{row[c]} {100 * row[p]:.1f}%" for c, p in guesses)
    if row.get("agreement") is not None:
        text += f"  ({round(row['agreement'] * row['experts'])} of {row['experts']} experts agree)"
    elif num_experts > 1 and "experts" in row:
        text += f"  ({row['experts']} of {num_experts} experts used)"
    return text


@contextlib.contextmanager
def writer(path: str, kind: type, out: TextIO) -> Iterator[Any]:
    """A `kind` of writer to the file `path`, which appears when the block ends well, or to `out` for STDOUT. Raises
    ConfigError where it can't be written."""
    if path in STDOUT:
        yield kind(out)
        return
    with naming(path), atomic_write(path, "w", encoding="utf-8", newline="") as handle:
        yield kind(handle)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Raise ConfigError, with the file's name, where the block can't write it."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:      # of stdout, whose reader has gone
            raise
        raise ConfigError(f"{path}: can't be written: {error.strerror or error}") from None


@contextlib.contextmanager
def table_alone(wanted: bool) -> Iterator[TextIO]:
    """Yields standard output. wanted: it is for a table alone, and what else the block prints goes to stderr at its
    end; nowhere, where it ends by a ConfigError, as that is one line."""
    out = sys.stdout
    if not wanted:
        yield out
        return
    notes, last_resort = io.StringIO(), logging.lastResort
    logging.lastResort = logging.StreamHandler(notes)
    logging.lastResort.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(notes):
            yield out
    except ConfigError:
        notes = io.StringIO()
        raise
    finally:
        logging.lastResort = last_resort
        sys.stderr.write(notes.getvalue())
