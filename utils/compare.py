"""Every run under a folder in one table.

    python -m utils.compare saved/
    python -m utils.compare saved/ --sort few --markdown table.md --csv table.csv --html table.html

Runs that differ only in their seed are followed by their mean and standard deviation. A run that test.py hasn't
evaluated shows its last validation figures, and says so. Figures that papers publish for the same data stand between
the runs, marked as such.
"""
from __future__ import annotations

import csv
import io
import json
import math
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from utils.cli import Parser, run_main
from utils.errors import ConfigError, unknown
from utils.files import write_text
from utils.published import PUBLISHED, SOURCES
from utils.runs import RunRecord, data_of, experts_of, find_runs, model_of

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
FIGURES = {"all": "accuracy", "many": "many_shot_acc", "medium": "medium_shot_acc", "few": "few_shot_acc", "ece": "ece",
           "class_mean": "class_mean_acc", "macro_f1": "macro_f1"}
#: Config values that change what is written or shown, not what is learned.
COSMETIC = ("save_dir", "save_period", "keep_last", "verbosity", "tensorboard", "log_step", "progress", "image_grid",
            "histograms", "profile", "record_statistics", "statistics_layer", "log_batch_attention", "monitor")


# ---------------------------------------------------------------------- rows

def row_of(run: RunRecord, costs: bool = True) -> Row:
    """A run as a row: the columns' keys, None for what isn't known."""
    asked = run.config["trainer"].get("epochs")
    cost = cost_of(json.dumps({key: run.config[key] for key in ("arch", "data_loader")}, sort_keys=True)) if costs \
        else (None, None)
    notes = [{"test": "", "val": "validation figures"}.get(run.split, "no figures yet")]
    if run.split != "test" and asked and run.epochs_done < asked:
        notes.append(f"{run.epochs_done} of {asked} epochs")
    return {"run": run.name, "method": run.method, "data": data_of(run.config), "model": model_of(run.config),
            "experts": experts_of(run.config), "epochs": run.epochs_done or None, "parameters": cost[0],
            "gflops": cost[1], "images_per_s": run.images_per_second, "seconds": run.seconds,
            "seed": str(run.config.get("seed", 0)), "note": ", ".join(filter(None, notes)), "kind": "run",
            "same": _sameness(run), **{key: finite(run.figures.get(name)) for key, name in FIGURES.items()}}


def finite(value: Any) -> float | None:
    """A number that can be compared; None for anything else."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _sameness(run: RunRecord) -> str:
    """Equal for runs that differ only in their seed (and in names, places and what is logged)."""
    config = {key: value for key, value in run.config.items() if key not in ("seed", "name", "n_gpu")}
    config["trainer"] = {key: value for key, value in config["trainer"].items() if key not in COSMETIC}
    for start in ("pretrained", "load_crt", "distill_checkpoint"):  # each seed has a stage 1 of its own
        config[start] = bool(config.get(start))
    how = {key: run.figures.get(key) for key in ("classifier", "tau", "feat_type")}
    return json.dumps([config, how, run.split, run.epochs_done], sort_keys=True, default=str)


@lru_cache(maxsize=None)
def cost_of(described: str) -> tuple[int | None, float | None]:
    """(parameters, GFLOPs of one image) of a config's arch, given as JSON with its data_loader; None if unknown."""
    config = json.loads(described)
    try:
        from utils.gflops import gflops_of
        cost = gflops_of(config)
        return cost["parameters"], cost["gflops"]
    except Exception:  # a run of another version, or a model that can't be built here, still has a row
        return None, None


def mean_row(rows: Sequence[Row]) -> Row:
    """The mean of runs that differ only in seed, with their standard deviations under `sd`."""
    row = {**rows[0], "kind": "mean", "run": f"mean of {len(rows)} seeds", "sd": {},
           "seed": ", ".join(row["seed"] for row in rows),
           "note": "± is the standard deviation"}
    for key in (*FIGURES, "images_per_s", "seconds"):
        values = [row[key] for row in rows if row[key] is not None]
        row[key] = statistics.fmean(values) if len(values) == len(rows) else None
        if key in FIGURES and row[key] is not None:
            row["sd"][key] = statistics.stdev(values)
    return row


def published_rows(data: Iterable[str] | None) -> list[Row]:
    """Published figures as rows, of the named data sets or of all (None)."""
    rows = []
    for entry in PUBLISHED:
        if data is None or entry.data in data:
            row: Row = dict.fromkeys([*(column.key for column in COLUMNS), *FIGURES])
            figures = {key: getattr(entry, key) for key in ("all", "many", "medium", "few")}
            row |= {key: None if value is None else round(value / 100, 6) for key, value in figures.items()}
            row |= {key: getattr(entry, key) for key in ("method", "data", "model", "experts", "epochs")}
            row |= {"run": f"published [{entry.source}]", "seed": "", "note": "quoted, not run here",
                    "kind": "published", "source": SOURCES[entry.source]}
            rows.append(row)
    return rows


def arrange(rows: Sequence[Row], sort: str | None = None, only_means: bool = False) -> list[Row]:
    """The rows in order, runs that differ only in seed together and followed by their mean.

    Without `sort`: by data set, then the best first. With it, by that column, the best (else the smallest) first.
    """
    together: dict[str, list[Row]] = {}
    for index, row in enumerate(rows):
        together.setdefault(row.get("same", str(index)), []).append(row)
    blocks = []
    for group in together.values():
        newest = {row["seed"]: row for row in group}  # the same seed twice is no second sample
        group = sorted(group, key=lambda row: (int(row["seed"] or 0), row["run"]))
        mean = [mean_row([newest[seed] for seed in sorted(newest, key=int)])] if len(newest) > 1 else []
        blocks.append(mean if mean and only_means else group + mean)
    column = next((c for c in COLUMNS if c.key == (sort or "all")), None)

    def order(block: list[Row]) -> tuple:
        value = block[-1][column.key]
        missing = value is None
        value = 0 if missing and column.numeric else value or ""
        rank = -value if column.best > 0 and not missing else value
        return ("" if sort else block[-1]["data"], missing, rank, block[-1]["run"])
    return [row for block in sorted(blocks, key=order) for row in block]


# ---------------------------------------------------------------------- the table, four ways

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


def markdown_table(rows: Sequence[Row]) -> str:
    """A Markdown table; means are bold, published rows in italics."""
    shown = _shown(rows)
    lines = ["| " + " | ".join(column.head for column in shown) + " |",
             "| " + " | ".join("---:" if column.numeric else "---" for column in shown) + " |"]
    for row in rows:
        mark = {"mean": "**", "published": "*"}.get(row["kind"], "")
        texts = [cell(row, column).replace("|", "\\|") for column in shown]
        lines.append("| " + " | ".join(f"{mark}{text}{mark}" if text.strip() else "" for text in texts) + " |")
    sources = sorted({row["source"] for row in rows if row.get("source")})
    return "\n".join([*lines, *([""] + [f"- {source}" for source in sources] if sources else [])]) + "\n"


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
    from utils.page import escape, page
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
    body = (f"<header><h1>{escape(title)}</h1><p class='lead'>{count} runs. Accuracies are percentages of the test "
            "images; many, medium and few are the means over classes with many, some and few training images. The best "
            "of each data set is marked.</p></header>"
            f"<div class='scroll'><table class='runs'><thead><tr>{heads}</tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table></div>{notes}")
    return page(title, body, wide=True)


def _best(rows: Sequence[Row], column: Column) -> Any:
    values = [row[column.key] for row in rows if row.get(column.key) is not None]
    return (max if column.best > 0 else min)(values) if column.best and values else None


# ---------------------------------------------------------------------- the command

def compare(folder: Path, *, sort: str | None = None, published: str = "same", only_means: bool = False,
            costs: bool = True) -> tuple[list[Row], list[str]]:
    """(the arranged rows of every run under `folder`, a line for each folder that was skipped).

    published: "same" adds published rows for the data sets that occur, "all" every one, "none" none.
    """
    runs, skipped = find_runs(folder)
    rows = [row_of(run, costs) for run in runs]
    if published != "none":
        rows += published_rows(None if published == "all" else {row["data"] for row in rows})
    return arrange(rows, sort, only_means), skipped


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(prog="python -m utils.compare", description="All runs under a folder in one table.",
                    allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", help="where the runs are, e.g. saved/")
    parser.add_argument("--sort", metavar="KEY", help=f"one of {', '.join(column.key for column in COLUMNS)}; "
                        "default: by data set, the best first")
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV (accuracies as fractions)")
    parser.add_argument("--markdown", metavar="FILE", help="write it as Markdown; - prints that instead")
    parser.add_argument("--html", metavar="FILE", help="write it as a page")
    parser.add_argument("--published", nargs="?", const="all", default="same", choices=("same", "all", "none"),
                        help="published rows to add: of the same data sets (default), all, none")
    parser.add_argument("--only_means", action="store_true", help="leave out the single runs of several seeds")
    parser.add_argument("--no_costs", action="store_true", help="leave out parameters and GFLOPs (faster)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    keys = [column.key for column in COLUMNS]
    if args.sort is not None and args.sort not in keys:
        raise unknown("--sort", args.sort, keys, "column")
    folder = Path(args.folder)
    if not folder.is_dir():
        raise ConfigError(f"{args.folder}: no such folder; give the one that holds the runs, e.g. saved/")
    rows, skipped = compare(folder, sort=args.sort, published=args.published, only_means=args.only_means,
                            costs=not args.no_costs)
    for line in skipped:
        print(f"skipped {line}")
    if not any(row["kind"] in ("run", "mean") for row in rows):
        raise ConfigError(f"{args.folder}: holds no runs (models/<name>/<run_id> with a config.json)")
    print(markdown_table(rows) if args.markdown == "-" else text_table(rows))
    for path, write in ((args.csv, lambda: csv_table(rows)), (args.html, lambda: html_table(rows, "Runs compared")),
                        (args.markdown if args.markdown != "-" else None, lambda: markdown_table(rows))):
        if path:
            write_file(path, write())


def write_file(path: str, text: str) -> None:
    """Write and say so; ConfigError where that isn't possible."""
    try:
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from None
    print(f"written to {path}")


if __name__ == "__main__":
    run_main(main)
