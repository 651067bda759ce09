"""The table of compared runs, written four ways: for a terminal, as Markdown, CSV and HTML."""
from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

#: A run, a mean or a published figure: the columns' keys, `kind` ("run", "mean" or "published"), of means also `sd`.
Row = dict[str, Any]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def clock(seconds: float) -> str:
    """8 s, 4:05 min, 2:07 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60) if seconds >= 3600 else seconds // 60
    return f"{minutes // 60}:{minutes % 60:02d} h" if seconds >= 3600 else f"{minutes:.0f}:{seconds % 60:02.0f} min"


@dataclass(frozen=True)
class Column:
    """One column: its key (for --sort and CSV), its head, how a number is written, and whether more is better."""

    key: str
    head: str
    write: Callable[[Any], str] = str
    best: int = 0           # 1: the largest is best, -1: the smallest
    spread: bool = False    # means of it show a standard deviation

    @property
    def numeric(self) -> bool:
        return self.write is not str


COLUMNS = (
    Column("run", "run"), Column("method", "method"), Column("data", "data"), Column("model", "model"),
    Column("experts", "experts", lambda n: f"{n:d}"), Column("epochs", "epochs", lambda n: f"{n:g}"),
    *(Column(key, head, percent, 1, True) for key, head in (("all", "all %"), ("many", "many"), ("medium", "medium"),
                                                           ("few", "few"))),
    Column("ece", "ECE %", percent, -1, True),
    Column("parameters", "params M", lambda n: f"{n / 1e6:.2f}"),
    Column("gflops", "GFLOPs", lambda n: f"{n:.3g}"),
    Column("images_per_s", "images/s", lambda n: f"{n:,.0f}"),
    Column("seconds", "time", clock), Column("seed", "seed"), Column("note", "note"),
)
#: The rows' accuracies and the like -> their names in test_metrics.json.
FIGURES = {"all": "accuracy", "many": "many_shot_acc", "medium": "medium_shot_acc", "few": "few_shot_acc", "ece": "ece",
           "class_mean": "class_mean_acc", "macro_f1": "macro_f1"}


def cell(row: Row, column: Column) -> str:
    """A row's entry as text; "-" for what isn't known."""
    value = row.get(column.key)
    if value is None:
        return "-"
    spread = row.get("sd", {}).get(column.key) if column.spread else None
    return column.write(value) + (f" ± {column.write(spread)}" if spread is not None else "")


def text_table(rows: Sequence[Row]) -> str:
    """Aligned columns for a terminal; columns without any entry are left out."""
    shown = _shown(rows)
    table = [[column.head for column in shown], *([cell(row, column) for column in shown] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(shown))]
    lines = ["  ".join(text.rjust(width) if column.numeric else text.ljust(width)
                       for text, width, column in zip(line, widths, shown)).rstrip() for line in table]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _shown(rows: Sequence[Row]) -> list[Column]:
    return [column for column in COLUMNS if any(row.get(column.key) not in (None, "") for row in rows)]


def markdown(columns: Sequence[Column], table: Sequence[Sequence[str]]) -> str:
    """Lines of texts as a Markdown table under the columns' heads."""
    lines = [[column.head for column in columns], ["---:" if column.numeric else "---" for column in columns],
             *([text.replace("|", "\\|") for text in line] for line in table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_table(rows: Sequence[Row]) -> str:
    """A Markdown table; means are bold, published rows in italics."""
    shown, table = _shown(rows), []
    for row in rows:
        mark = {"mean": "**", "published": "*"}.get(row["kind"], "")
        texts = [cell(row, column) for column in shown]
        table.append([f"{mark}{text}{mark}" if text.strip() else "" for text in texts])
    sources = sorted({row["source"] for row in rows if row.get("source")})
    return markdown(shown, table) + "\n" + ("\n" + "".join(f"- {source}\n" for source in sources) if sources else "")


def csv_table(rows: Sequence[Row]) -> str:
    """CSV for programs: numbers as they are (accuracies as fractions), empty where unknown, `_sd` beside the means."""
    keys = [*(column.key for column in COLUMNS), "class_mean", "macro_f1", "kind", "source"]
    spreads = [f"{key}_sd" for key in FIGURES]
    text = io.StringIO()
    writer = csv.DictWriter(text, keys + spreads, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        sd = {f"{key}_sd": value for key, value in row.get("sd", {}).items()}
        writer.writerow({key: "" if value is None else value for key, value in {**row, **sd}.items()})
    return text.getvalue()


def html_table(rows: Sequence[Row], title: str) -> str:
    """A page of its own with the table; the best of each data set is marked."""
    from tools.page import escape, page
    shown = _shown(rows)
    best = {(data, column.key): _best([row for row in rows if row["data"] == data and row["kind"] != "published"],
                                      column) for data in {row["data"] for row in rows} for column in shown}
    lines = []
    for row in rows:
        cells = []
        for column in shown:
            marks = ["num"] * column.numeric
            if column.best and row.get(column.key) is not None and row["kind"] != "published" \
                    and row[column.key] == best[row["data"], column.key]:
                marks.append("best")
            cells.append(f'<td class="{" ".join(marks)}">{escape(cell(row, column))}</td>')
        lines.append(f'<tr class="{row["kind"]}">{"".join(cells)}</tr>')
    heads = "".join(f'<th class="{"num" if column.numeric else ""}">{escape(column.head)}</th>' for column in shown)
    sources = sorted({row["source"] for row in rows if row.get("source")})
    notes = ("<p class='note'>Published rows are quoted: " + escape("; ".join(sources)) + ".</p>") if sources else ""
    count = sum(row["kind"] == "run" for row in rows)
    runs = "1 run" if count == 1 else f"{count} runs"
    body = (f"<header><h1>{escape(title)}</h1><p class='lead'>{runs}. Accuracies are percentages of the test "
            "images; many, medium and few are the means over classes with many, some and few training images. The best "
            "of each data set is marked.</p></header>"
            f"<div class='scroll'><table class='runs'><thead><tr>{heads}</tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table></div>{notes}")
    return page(title, body, wide=True)


def _best(rows: Sequence[Row], column: Column) -> Any:
    values = [row[column.key] for row in rows if row.get(column.key) is not None]
    return (max if column.best > 0 else min)(values) if column.best and values else None
