"""README's table and training curves of the runs kept in results/ (see tools.keep)."""
from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from logger.text import percent
from tools.published import PUBLISHED, SOURCES, Published
from tools.run_table import Column, Row, cell, markdown
from tools.runs import RunRecord
from utils.config.read import read_json
from utils.errors import ConfigError

COLUMNS = (Column("run", "run"), Column("method", "method"), Column("data", "data"), Column("model", "backbone"),
           Column("parameters", "params M", lambda n: f"{n / 1e6:.2f}"), Column("epochs", "epochs", lambda n: f"{n:g}"),
           Column("minutes", "minutes", lambda text: text),     # already text, but right-aligned like numbers
           *(Column(key, head, percent, 1, True) for key, head in (
               ("all", "all %"), ("many", "many"), ("medium", "medium"), ("few", "few"), ("ece", "ECE %"))),
           Column("published", "published", lambda value: f"{value:.1f}"), Column("command", "command"))

#: Folders of results/ that README's table leaves out: unfinished runs, and trials by which settings were chosen.
ASIDE = frozenset({"unfinished", "trials"})


def stem(folder: str) -> str:
    """A kept run's name without its seed: cifar100_lt_ride of cifar100_lt_ride_s0."""
    return re.sub(r"_s\d+$", "", folder)


def is_kept(run: RunRecord) -> bool:
    """Whether a run is one folder, as tools.keep writes it."""
    return run.paths.models == run.paths.log


def is_aside(run: RunRecord, top: str | Path) -> bool:
    """Whether README's table leaves out a kept run under `top` (see ASIDE)."""
    return is_kept(run) and not ASIDE.isdisjoint(Path(os.path.relpath(run.paths.models, top)).parts)


def is_ablation(name: str) -> bool:
    """Whether a kept run is an ablation, which shows what is lost without something."""
    return "minus_" in name


def _continues(run: RunRecord) -> bool:
    """Whether a run began with a network that was trained before: a second stage, or pretrained weights."""
    return bool(re.search(r" \+ (cRT|LWS|EA|frozen backbone|fine-tuning)\b", run.method))


def _plain(method: str) -> str:
    return re.sub(r" \+ EA| \(teacher\)|, \d+ experts", "", method)


def published_for(row: Row) -> Published | None:
    """The published figures to compare a row with: same data, backbone, method (with or without expert assignment) and
    number of experts; of several, those with the most similar number of epochs. None where there are none."""
    alike = [entry for entry in PUBLISHED if (entry.data, entry.model, entry.experts) == (
        row["data"], row["model"], row["experts"]) and _plain(entry.method) == _plain(row["method"])]
    return min(alike, key=lambda entry: abs((entry.epochs or 0) - (row["epochs"] or 0)), default=None)


def starts_from(row: Row, rows: Sequence[Row]) -> str:
    """The flag that names the kept weights which a second stage starts from: those that its config names, else those of
    the method that it is a second stage of. "" where it needs none or none are kept."""
    before = re.sub(r" \+ (cRT|LWS|EA)\b", "", row["method"])
    if before == row["method"]:
        return ""
    named = Path(read_json(Path(row["config"])).get("load_crt") or "").parent.name
    first = next((other for other in rows if stem(Path(other["config"]).parent.name) == stem(named)), None) or next(
        (other for other in rows if (other["method"], other["data"], other["model"]) == (
            before, row["data"], row["model"])), None)
    if first is None:
        return ""
    weights = shlex.quote((Path(first["config"]).parent / "weights.pth").as_posix())
    return f" {'-r' if ' + EA' in row['method'] else '--load_crt'} {weights}"


def minutes(row: Row) -> str | None:
    """The minutes that a run took, or "least to most" of several seeds where these differ by over 20 %; or None."""
    if row["seconds"] is None:
        return None
    least, most = (row.get(key) or row["seconds"] for key in ("seconds_least", "seconds_most"))
    shown = (least, most) if most > 1.2 * least else (row["seconds"],)
    return " to ".join(f"{seconds / 60:.3g}" for seconds in shown)


def readme_table(rows: Sequence[Row]) -> str:
    """Markdown: a row a method (seeds as mean ± standard deviation), ablations last, quoted figures explained below.

    rows: as `tools.compare.arrange` gives them with only_means, without those of ASIDE. Raises ConfigError for a run
    without test figures.
    """
    table, notes = [], {}
    for row in rows:
        if row.get("ap") is not None:
            raise ConfigError(f"{row['config']}: that run is a detector's, and README's table holds accuracies; move "
                              "the run out of the folder, or leave out --readme")
        if row["all"] is None or row["note"].startswith("validation"):
            raise ConfigError(f"{row['config']}: that run has no test figures; run test.py on it first")
        folder, entry = Path(row["config"]).parent.name, published_for(row)
        name, seeds = stem(folder), row["seed"].split(", ")
        if is_ablation(name):
            entry = None
        command = f"python train.py -c {shlex.quote(row['config'])}{starts_from(row, rows)}"
        command = f"`{command} --seed {seeds[0]}`, then {', '.join(seeds[1:])}" if seeds[1:] else f"`{command}`"
        lacks = name.partition("minus_")[2].replace("_", " ")
        method = row["method"] + (f", without {lacks}" if is_ablation(name) else "")
        table.append({**row, "run": name, "method": method, "command": command, "minutes": minutes(row),
                      "published": entry and entry.all})
        if entry:
            notes[f"{entry.all:.1f}: {entry.method}" + (f", {entry.epochs} epochs" if entry.epochs else "")
                  + f"; {SOURCES[entry.source]}."] = None
    table.sort(key=lambda row: is_ablation(row["run"]))
    shown = [column for column in COLUMNS if any(cell(row, column) != "-" for row in table)
             and (column.key not in ("data", "model") or len({row[column.key] for row in table}) > 1)]
    return "\n".join([markdown(shown, [[cell(row, column) for column in shown] for row in table]),
                      *([""] + [f"- published {note}" for note in notes] if notes else [])])


def draw_curves(runs: Sequence[RunRecord], folder: str, path: str) -> None:
    """Draw the training curves of the runs as the PNG `path`: no ablations and, where any run trains a network from
    scratch, only such runs. Raises ConfigError: nothing to draw, or the file can't be written."""
    from logger.figures.style import to_png
    from logger.figures.training import compared
    drawn = [run for run in runs
             if run.history and not is_ablation(run.paths.models.name) and not is_aside(run, folder)]
    together: dict[str, list] = {}
    for run in [run for run in drawn if not _continues(run)] or drawn:
        # Kept runs are one folder each, named by method and seed; those in saved/ are <name>/<run_id>.
        name = stem(run.paths.models.name) if is_kept(run) else run.name
        together.setdefault(name, []).append(run.history)
    if not together:
        raise ConfigError(f"{folder}: holds no runs with a metrics.csv to draw")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        to_png(compared(together), Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--curves: {path}: can't be written: {getattr(error, 'strerror', None) or error}") from None
    print(f"written to {path}")
