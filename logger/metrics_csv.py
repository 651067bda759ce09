"""metrics.csv and timing.csv, written and read: one row an epoch; a resumed run continues the same file."""
from __future__ import annotations

import csv
import io
from pathlib import Path

from utils.files import write_text


class MetricsCSV:
    """Rows by epoch, rewritten whole each time, so that a crash never leaves half a row.

    Args:
        path: the file; rows that are already there are kept up to `last_epoch`.
        last_epoch: rows of later epochs are dropped: a resumed run writes them again.
    """

    def __init__(self, path: Path, last_epoch: int = 0):
        self.path = path
        self.rows: list[dict[str, object]] = []
        if last_epoch and path.exists():
            with open(path, newline="", encoding="utf-8") as handle:
                self.rows = [row for row in csv.DictReader(handle) if int(row["epoch"]) <= last_epoch]

    def append(self, row: dict[str, object]) -> None:
        """Add one epoch's figures (`epoch` first); None becomes an empty field."""
        self.rows.append(row)
        # A metric that appears later (an empty group that fills) widens the table instead of breaking it.
        columns = list(dict.fromkeys(key for r in self.rows for key in r))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for r in self.rows:
            writer.writerow({k: "" if v is None else repr(v) if isinstance(v, float) else v for k, v in r.items()})
        write_text(self.path, text.getvalue())


def read_table(path: Path) -> list[dict[str, float | None]]:
    """A CSV file of numbers as a dict a row; what isn't a number is None. [] where the file isn't there."""
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
