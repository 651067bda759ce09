"""Every run under a folder in one table.

    python -m tools.compare saved/
    python -m tools.compare saved/ --sort few --markdown table.md --csv table.csv --html table.html
    python -m tools.compare results/ --readme
    python -m tools.compare results/ --curves docs/curves.png

Runs that differ only in their seed are followed by their mean and standard deviation; second stages only if their first
stages are of one method, as far as these can be read. A run that test.py hasn't
evaluated shows its last validation figures, and says so. Figures that papers publish for the same data are listed among
the runs, marked as such.
"""
from __future__ import annotations

import json
import math
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.settings import COSMETIC
from tools.cli import Parser
from tools.published import PUBLISHED, SOURCES
from tools.results import draw_curves, is_aside, readme_table
from tools.run_table import COLUMNS, FIGURES, Row, csv_table, frame, html_table, markdown_table, text_table
from tools.runs import DATA, REWRITTEN, RunRecord, data_of, experts_of, find_runs, model_of, other_evaluation
from utils.class_counts import group_limits
from utils.cli import run_main
from utils.config.outside import refuse_outside
from utils.errors import ConfigError, unknown
from utils.files import write_text

if TYPE_CHECKING:  # a second to import: only where a table is made
    from pandas import DataFrame

#: Data sets with validation images of their own, which "validation": "test" takes.
VALIDATED = ("ImageNetLT", "PlacesLT")
#: Flag -> (the table) -> the text that it asks for.
FORMS = {"csv": csv_table, "markdown": markdown_table, "html": lambda table: html_table(table, "Runs compared")}


# ---------------------------------------------------------------------- rows

def row_of(run: RunRecord, costs: bool = True) -> Row:
    """A run as a row: the columns' keys, None for what isn't known. costs: with parameters and GFLOPs (slower)."""
    asked = run.config["trainer"].get("epochs")
    described = json.dumps({key: run.config[key] for key in ("arch", "data_loader")}, sort_keys=True)
    shares = (run.figures.get("expert_share") or {}).get("all")
    cost = cost_of(described, tuple(shares) if shares else None) if costs else (None, None)
    notes = [{"test": "", "val": "validation figures"}.get(run.split, "no figures yet")]
    notes.append(which_weights(run.config, run.figures))
    if run.split != "test" and asked and run.epochs_done < asked:
        notes.append(f"{run.epochs_done} of {asked} epochs")
    limits = group_limits(run.config.get("groups"))
    if limits != group_limits():
        notes.append(f"many over {limits['many']:g}, few under {limits['few']:g}")
    return {"run": run.name, "method": run.method, "data": data_of(run.config), "model": model_of(run.config),
            "experts": experts_of(run.config), "epochs": run.epochs_done, "parameters": cost[0],
            "gflops": cost[1], "images_per_s": run.images_per_second, "seconds": run.seconds,
            "seed": str(run.config.get("seed", 0)), "note": ", ".join(filter(None, notes)), "kind": "run",
            "same": sameness(run), "origin": run.origin, "trained_first": run.trained_first,
            "config": str(run.paths.config),
            **{key: finite(run.figures.get(name)) for key, name in FIGURES.items()}}


def cosmetic(config: dict[str, Any]) -> set[str]:
    """COSMETIC, with `monitor` unless it decides when a run ends or how its learning rate falls."""
    schedule = (config.get("lr_scheduler") or {}).get("type")
    heeded = config["trainer"].get("early_stop") or schedule == "ReduceLROnPlateau"
    return {*COSMETIC} if heeded else {*COSMETIC, "monitor"}


def which_weights(config: dict[str, Any], figures: dict[str, Any]) -> str:
    """Which weights test.py's figures are of and, for the best epoch's, whether it was picked on the test images; ""
    for those of an epoch's end."""
    which = REWRITTEN.get(str(figures.get("checkpoint")), "")
    validation = (config["data_loader"].get("args") or {}).get("validation", "test")
    if which != "best epoch" or validation != "test":
        return which
    kind = config["data_loader"]["type"].removesuffix("DataLoader")
    unless = "" if kind in DATA else " unless there are validation images"
    return which if kind in VALIDATED else f"{which}, picked on the test images{unless}"


def finite(value: Any) -> float | None:
    """A number that can be compared; None for anything else."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def sameness(run: RunRecord) -> str:
    """A text that is equal for runs that differ only in their seed (and in names, folders, GPUs, logging, compilation,
    the number of data workers, and whether bf16 was asked for or left to "auto")."""
    config = {key: value for key, value in run.config.items() if key not in ("seed", "name", "n_gpu")}
    weights = which_weights(config, run.figures)
    left_out = cosmetic(config) - ({"monitor"} if weights else set())       # it decides which epoch is the best
    config["trainer"] = {key: value for key, value in config["trainer"].items() if key not in left_out}
    if config["trainer"].get("amp") == "bf16":      # what "auto" means on a processor that has it
        config["trainer"]["amp"] = "auto"
    loader = config["data_loader"]
    config["data_loader"] = {**loader, "args": {key: value for key, value in (loader.get("args") or {}).items()
                                                if key != "num_workers"}}
    for start in ("pretrained", "load_crt", "distill_checkpoint"):  # each seed has its own stage 1
        config[start] = bool(config.get(start))
    how = {key: run.figures.get(key) for key in ("tau", "feat_type", "prior", "expert_weights")}
    how["other"], how["weights"] = other_evaluation(run.figures), weights
    how["classifier"] = run.figures.get("classifier", "joint")     # the figures that train.py writes don't name one
    return json.dumps([config, how, run.split, run.epochs_done], sort_keys=True, default=str)


@cache
def cost_of(described: str, shares: tuple[float, ...] | None = None) -> tuple[int | None, float | None]:
    """(parameters, GFLOPs of one image) of a config's arch, given as JSON with its data_loader; None if unknown.

    shares: of an expert-assignment model, the share of test images that used 1, 2, ... experts.
    """
    config = json.loads(described)
    try:
        from tools.gflops import gflops_of
        refuse_outside(config, ())    # a run's config alone doesn't decide what code is run
        cost = gflops_of(config, shares)
        return cost["parameters"], cost["gflops"]
    except Exception:  # a run of another version, or a model that can't be built here, still has a row
        return None, None


def mean_row(table: DataFrame) -> Row:
    """The mean of runs that differ only in seed, with standard deviations as `<key>_sd`, and the least and the most
    `seconds` that one of them took."""
    numbers = table[[*FIGURES, "images_per_s", "seconds", "gflops"]].astype(float)
    means, spreads = numbers.mean(skipna=False), numbers[list(FIGURES)].std(skipna=False)
    return {**table.iloc[0], **means, **{f"{key}_sd": value for key, value in spreads.items()}, "kind": "mean",
            "seconds_least": numbers["seconds"].min(), "seconds_most": numbers["seconds"].max(),
            "run": f"mean of {len(table)} seeds", "seed": ", ".join(table["seed"]),
            "note": ", ".join(filter(None, [table.iloc[0].get("note"), "± is the sample standard deviation"]))}


def published_rows(data: Iterable[str] | None) -> list[Row]:
    """Published figures as rows, of the named data sets or of all (None)."""
    rows = []
    for entry in PUBLISHED:
        if data is None or entry.data in data:
            figures = {key: getattr(entry, key) for key in ("all", "many", "medium", "few")}
            row = {key: None if value is None else round(value / 100, 6) for key, value in figures.items()}
            row |= {key: getattr(entry, key) for key in ("method", "data", "model", "experts", "epochs")}
            row |= {"run": f"published [{entry.source}]", "seed": "", "note": "quoted, not run here",
                    "kind": "published", "source": SOURCES[entry.source]}
            rows.append(row)
    return rows


def arrange(rows: Iterable[Row], sort: str | None = None, only_means: bool = False) -> DataFrame:
    """The rows in order. Runs that differ only in seed stand together, followed (only_means: replaced) by their mean.
    If they are known to have begun from several methods' checkpoints, each method's stand together, with a note.

    Without `sort`: by data set, the most accurate (a detector's box AP) first. With it, by that column, the highest
    first where more is better, else the smallest.
    """
    import pandas as pd
    table, blocks = frame(rows), []
    same = table["same"].where(table["same"].notna(), table.index.astype(str))
    first = table["trained_first"].fillna("")
    several = table.groupby(same)["trained_first"].transform("nunique") > 1
    others = table.groupby([same, "origin"])["trained_first"].transform("nunique") > 1      # of one method
    said = "began from " + table["origin"].fillna("") + others.map({True: " with other settings", False: ""})
    table["note"] = [", ".join(filter(None, [note, text if known else ""]))
                     for note, text, known in zip(table["note"], said, several & (first != ""))]
    for _, group in table.groupby(same + first.where(several, "")):
        newest = group.drop_duplicates("seed", keep="last")  # the same seed twice is no second sample
        if len(newest) > 1:
            number = newest["seed"].astype(int)
            mean = frame([mean_row(newest.loc[number.sort_values().index])])
            group = group.iloc[group["seed"].astype(int).argsort(kind="stable")]
            group = mean if only_means else pd.concat([group, mean])
        blocks.append(group)
    column = next(c for c in COLUMNS if c.key == (sort or "all"))

    def order(block: DataFrame) -> tuple:
        last = block.iloc[-1]
        value = last["ap"] if sort is None and last[column.key] is None else last[column.key]      # a detector's
        rank = 0 if value is None else -value if column.best > 0 else value
        return "" if sort else last["data"], value is None, rank, last["run"]
    return frame(row for block in sorted(blocks, key=order) for row in block.to_dict("records"))


# ---------------------------------------------------------------------- the command

def compare(folder: Path, *, sort: str | None = None, published: str = "same", only_means: bool = False,
            costs: bool = True, aside: bool = True) -> tuple[DataFrame, list[str]]:
    """(the table of every run under `folder`, a line for each folder that was skipped).

    published: "same" adds published rows for the data sets that occur, "all" every one, "none" none.
    only_means, costs: see `arrange` and `row_of`. aside: with the kept runs that README leaves out
    (tools.results.ASIDE).
    """
    runs, skipped = find_runs(folder)
    rows = [row_of(run, costs) for run in runs if aside or not is_aside(run, folder)]
    if published != "none":
        rows += published_rows(None if published == "all" else {row["data"] for row in rows})
    return arrange(rows, sort, only_means), skipped


def parse(argv: Sequence[str] | None) -> Namespace:
    """The flags. Raises ConfigError."""
    parser = Parser(prog="python -m tools.compare", description="All runs under a folder in one table.",
                    allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", help="where the runs are, e.g. saved/")
    parser.add_argument("--sort", metavar="KEY", help=f"one of {', '.join(column.key for column in COLUMNS)}; "
                        "default: by data set, the best first")
    for form, what in (("csv", "the table as CSV (accuracies as fractions)"), ("markdown", "it as Markdown"),
                       ("html", "it as a page")):
        parser.add_argument(f"--{form}", metavar="FILE", nargs="?", const="-",
                            help=f"write {what}; without a file or with - print that instead")
    parser.add_argument("--readme", action="store_true", help="print README's table instead: a row a method, with the "
                        "published figure and the command (see tools.keep)")
    parser.add_argument("--curves", metavar="PNG", help="draw each method's accuracy over epochs instead")
    parser.add_argument("--published", nargs="?", const="all", default="same", choices=("same", "all", "none"),
                        help="published rows to add: of the same data sets (default), all, none")
    parser.add_argument("--only_means", action="store_true", help="leave out the single runs of several seeds")
    parser.add_argument("--no_costs", action="store_true", help="leave out parameters and GFLOPs (faster)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises ConfigError."""
    args = parse(argv)
    keys = [column.key for column in COLUMNS]
    if args.sort is not None and args.sort not in keys:
        raise unknown("--sort", args.sort, keys, "column")
    written = next((form for form in FORMS if getattr(args, form)), None)
    if written and (args.readme or args.curves):
        raise ConfigError(f"--{written}: is of the whole table, which {'--readme' if args.readme else '--curves'} "
                          "leaves out; run it without")
    asked = {form: getattr(args, form) for form in FORMS if getattr(args, form)}
    printed = next((form for form, path in asked.items() if path == "-"), None)
    if len({path if path == "-" else os.path.realpath(path) for path in asked.values()}) < len(asked):
        raise ConfigError("--csv, --markdown, --html: need a file each; only one of them can be printed")
    folder = Path(args.folder)
    if not folder.is_dir():
        raise ConfigError(f"{args.folder}: no such folder; give the one that holds the runs, e.g. saved/")
    if args.curves:
        draw_curves(find_runs(folder)[0], args.folder, args.curves)
        if not args.readme:
            return
    table, skipped = compare(folder, sort=args.sort, published="none" if args.readme else args.published,
                             only_means=args.only_means or args.readme, costs=not args.no_costs, aside=not args.readme)
    for line in skipped:    # on stderr where stdout holds nothing but the table
        print(f"skipped {line}", file=sys.stderr if args.readme or printed else sys.stdout)
    if not table["kind"].isin(["run", "mean"]).any():
        raise ConfigError(f"{args.folder}: holds no runs (models/<name>/<run_id> with a config.json)")
    if args.readme:
        print(readme_table(table.to_dict("records")))
        return
    print((FORMS[printed] if printed else text_table)(table).rstrip("\n"))
    for form, path in asked.items():
        if form != printed:
            write_file(path, FORMS[form](table), sys.stderr if printed else sys.stdout)


def write_file(path: str, text: str, told: Any) -> None:
    """Write a file and say so on the stream `told`. Raises ConfigError where that isn't possible."""
    try:
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from None
    print(f"written to {path}", file=told)


if __name__ == "__main__":
    run_main(main)
