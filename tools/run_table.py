"""The table of compared runs, a pandas frame, written four ways: for a terminal, as Markdown, CSV and HTML."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logger.metrics_csv import csv_text
from logger.text import duration, percent

if TYPE_CHECKING:  # a second to import: only where a table is made
    from pandas import DataFrame

#: A run, a mean or published figures: the columns' keys, `kind` ("run", "mean" or "published"), a mean's `<key>_sd`.
Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: its key (for --sort and CSV), its head, how a number is written, and whether more is better."""

    key: str
    head: str
    write: Callable[[Any], str] = str
    best: int = 0           # 1: the largest is best, -1: the smallest
    spread: bool = False    # means show a standard deviation

    @property
    def numeric(self) -> bool:
        """Whether it holds numbers, which are right-aligned."""
        return self.write is not str


COLUMNS = (
    Column("run", "run"), Column("method", "method"), Column("data", "data"), Column("model", "model"),
    Column("experts", "experts", lambda n: f"{n:d}"), Column("epochs", "epochs", lambda n: f"{n:g}"),
    *(Column(key, head, percent, 1, True) for key, head in (("all", "all %"), ("many", "many"), ("medium", "medium"),
                                                           ("few", "few"))),
    Column("ece", "ECE %", percent, -1, True),
    *(Column(key, head, percent, 1, True) for key, head in (
        ("ap", "box AP %"), ("ap50", "AP50"), ("ap75", "AP75"), ("ap_many", "AP many"), ("ap_medium", "AP medium"),
        ("ap_few", "AP few"), ("mask_ap", "mask AP %"))),
    Column("parameters", "params M", lambda n: f"{n / 1e6:.2f}"),
    Column("gflops", "GFLOPs", lambda n: f"{n:.3g}"),
    Column("images_per_s", "images/s", lambda n: f"{n:,.0f}"),
    Column("seconds", "time", duration), Column("seed", "seed"), Column("note", "note"),
)
#: A row's key -> the figure's name in test_metrics.json.
FIGURES = {"all": "accuracy", "many": "many_shot_acc", "medium": "medium_shot_acc", "few": "few_shot_acc", "ece": "ece",
           "class_mean": "class_mean_acc", "macro_f1": "macro_f1"}
#: The same of a detector's figures; tables have these columns where a run has any.
DETECTED = {"ap": "bbox_AP", "ap50": "bbox_AP50", "ap75": "bbox_AP75", "ap_many": "bbox_AP_many",
            "ap_medium": "bbox_AP_medium", "ap_few": "bbox_AP_few", "mask_ap": "segm_AP"}
FIGURES |= DETECTED

#: A row's keys beside the columns: MORE and SPREADS are in the CSV only, HIDDEN in no output.
MORE = ("class_mean", "macro_f1", "kind", "source")
SPREADS = tuple(f"{key}_sd" for key in FIGURES)
HIDDEN = ("seconds_least", "seconds_most", "same", "origin", "trained_first", "config")


def frame(rows: Iterable[Row]) -> DataFrame:
    """Rows as a frame with a column for every key; None for what isn't known."""
    import pandas as pd
    columns = [*(column.key for column in COLUMNS), *MORE, *SPREADS, *HIDDEN]
    table = pd.DataFrame(list(rows), columns=columns, dtype=object)
    return table.where(table.notna(), None)


def cell(row: Mapping[str, Any], column: Column) -> str:
    """A row's entry as text; "-" for what isn't known."""
    value = row.get(column.key)
    if value is None:
        return "-"
    spread = row.get(f"{column.key}_sd") if column.spread else None
    return column.write(value) + (f" ± {column.write(spread)}" if spread is not None else "")


def shown(table: DataFrame) -> tuple[list[Column], list[Row], list[list[str]]]:
    """(the columns that have any entry, the rows as dicts, their cells' texts)."""
    columns = [column for column in COLUMNS if not table[column.key].isin([None, ""]).all()]
    rows = table.to_dict("records")
    return columns, rows, [[cell(row, column) for column in columns] for row in rows]


def sources(table: DataFrame) -> list[str]:
    """Where published rows are quoted from."""
    return sorted(table["source"].dropna().unique())


def text_table(table: DataFrame) -> str:
    """Aligned columns for a terminal."""
    columns, _, texts = shown(table)
    lines = [[column.head for column in columns], *texts]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    aligned = ["  ".join(text.rjust(width) if column.numeric else text.ljust(width)
                         for text, width, column in zip(line, widths, columns)).rstrip() for line in lines]
    return "\n".join([aligned[0], "  ".join("-" * width for width in widths), *aligned[1:]])


def markdown(columns: Sequence[Column], texts: Sequence[Sequence[str]]) -> str:
    """A Markdown table of lines of cells under the columns' heads."""
    lines = [[column.head for column in columns], ["---:" if column.numeric else "---" for column in columns],
             *([text.replace("|", "\\|") for text in line] for line in texts)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_table(table: DataFrame) -> str:
    """A Markdown table; means are bold, published rows in italics."""
    columns, rows, texts = shown(table)
    marks = [{"mean": "**", "published": "*"}.get(row["kind"], "") for row in rows]
    quoted = "".join(f"- {source}\n" for source in sources(table))
    return markdown(columns, [[f"{mark}{text}{mark}" if text.strip() else "" for text in line]
                              for mark, line in zip(marks, texts)]) + "\n" + (f"\n{quoted}" if quoted else "")


def csv_table(table: DataFrame) -> str:
    """CSV for programs: numbers as they are (accuracies as fractions), empty where unknown, `_sd` beside the means."""
    left = {*HIDDEN} if table["ap"].notna().any() else {*HIDDEN, *DETECTED, *(f"{key}_sd" for key in DETECTED)}
    return csv_text([key for key in table if key not in left], table.to_dict("records"))


def html_table(table: DataFrame, title: str) -> str:
    """An HTML page with the table; the best of each data set is marked."""
    from tools.page import render
    columns, rows, texts = shown(table)
    own = table[table["kind"] != "published"]
    best = {column.key: own.groupby("data")[column.key].agg(
        lambda values, largest=column.best > 0: (max if largest else min)(values.dropna(), default=None)).to_dict()
        for column in columns if column.best}

    def marks(row: Row, column: Column) -> str:
        is_best = column.best and row["kind"] != "published" and row[column.key] is not None \
            and row[column.key] == best[column.key][row["data"]]
        return " ".join(["num"] * column.numeric + ["best"] * bool(is_best))
    lines = [(row["kind"], [(text, marks(row, column)) for text, column in zip(line, columns)])
             for row, line in zip(rows, texts)]
    return render("compare.html", title=title, columns=columns, lines=lines, sources=sources(table),
                  count=sum(row["kind"] == "run" for row in rows))
