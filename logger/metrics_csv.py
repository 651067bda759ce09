"""Reading and writing CSV tables. metrics.csv and timing.csv have one row per epoch; a resumed run continues them."""
from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from utils.errors import ConfigError
from utils.files import write_text


class MetricsCSV:
    """A CSV file with one row per epoch, rewritten as a whole each time, so that a crash never leaves half a row.

    Args:
        path: the file; existing rows up to `last_epoch` are kept.
        last_epoch: rows of later epochs are dropped, as a resumed run writes them again; 0 starts a new table.
    Raises:
        ConfigError: the existing file isn't a table of numbers with an epoch in each row (a spreadsheet re-saved it).
    """

    def __init__(self, path: Path, last_epoch: int = 0):
        self.path = path
        self.rows: list[dict[str, object]] = []
        if last_epoch and path.exists():
            try:
                with open(path, newline="", encoding="utf-8") as handle:
                    rows = list(csv.DictReader(handle))
                self.rows = [row for row in rows if int(row["epoch"]) <= last_epoch]
                _ = [float(cell) for row in rows for cell in row.values() if cell]
            except (KeyError, ValueError, TypeError, csv.Error):
                raise ConfigError(f"{path}: isn't a {path.name} any more; rename it, or mend it: numbers with points, "
                                  "commas between them, an epoch a row") from None

    def append(self, row: dict[str, object]) -> None:
        """Add one epoch's figures (`epoch` first); None becomes an empty field."""
        self.rows.append(row)
        # A metric that appears later (an empty group that fills) widens the table instead of breaking it.
        columns = list(dict.fromkeys(key for r in self.rows for key in r))
        write_text(self.path, csv_text(columns, self.rows))


#: What spreadsheets take for the beginning of a formula; some also accept the full-width forms.
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")


def plain_cell(value: Any) -> Any:
    """A CSV cell that no spreadsheet evaluates: a string that would be a formula gets a leading apostrophe, which makes
    it text (OWASP, "CSV Injection"). Numbers, and strings that are numbers, stay as they are.

    >>> [plain_cell(value) for value in ("=1+1", "-a.png", "-0.5", -0.5, "cat", None)]
    ["'=1+1", "'-a.png", '-0.5', -0.5, 'cat', None]
    """
    if not isinstance(value, str) or not value.startswith(_FORMULA):
        return value
    try:
        float(value)
        return value
    except ValueError:
        return f"'{value}"


def csv_text(columns: Sequence[str], rows: Iterable[dict[str, Any]], header: bool = True) -> str:
    """Rows as CSV with a header line, safe for spreadsheets (see `plain_cell`); None and missing keys are empty.
    header=False: without it, to go on with a table."""
    lines: list[str] = []
    # With "\r\n" as its terminator the writer quotes cells that contain either; the lines returned end with "\n".
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n")
    if header:
        writer.writerow(map(plain_cell, columns))
    writer.writerows([plain_cell(row.get(column)) for column in columns] for row in rows)
    return "".join(f"{line[:-2]}\n" for line in lines)


def read_table(path: Path) -> list[dict[str, float | None]]:
    """Read a CSV file of numbers, a dict per row; what isn't a number becomes None. [] if the file can't be read."""
    def number(text: str | None) -> float | None:
        try:
            return float(text)
        except (TypeError, ValueError):
            return None
    try:
        with open(path, newline="", encoding="utf-8") as handle:
            return [{key: number(value) for key, value in row.items() if key} for row in csv.DictReader(handle)]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []
