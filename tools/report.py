"""A run as one HTML page that explains itself to someone who didn't run it.

    python -m tools.report saved/models/<name>/<run_id>
    python -m tools.report saved/models/<name>/<run_id> --checkpoint best

Writes report.html, one file that needs no network, and the figures as PNGs in report/, both in the run's folder. The
folder may also be one that tools.keep wrote.
"""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base.run_paths import RunPaths, run_of
from tools.cli import Parser, add_set, check_device, check_file
from utils.cli import run_main
from utils.config.load import Override
from utils.errors import ConfigError


def write_report(run: Any, result: dict[str, Any] | None = None, loader: Any = None, split: str = "test") -> Path:
    """Write a run's report.html (see `report_name`) and the PNGs beside its checkpoint; returns the page's path.

    Args:
        run: see tools.opened.open_run.
        result: what `trainer.evaluate.evaluate` returned on `loader` with keep=True. Without it, or if it is of the
            model's own classifier but lacks the single predictions, the split is evaluated here.
        loader: the split's (default: made here).
        split: the one that is shown, "test" or "val".
    Raises:
        ConfigError: the run's folder can't be written.
    """
    from logger.figures.drawings import drawings
    from logger.figures.style import to_png
    from tools.report_page import report_name, report_page
    from utils.files import write_text
    loader = loader or run.loader(split)
    paths = run_of(run.path)
    facts = gather(run, result, loader, paths, split)
    shown = [(drawing, drawing.draw()) for drawing in drawings(facts)]
    html = report_page(facts, run, paths, shown, loader)
    pictures = paths.models / report_name(split, run)
    target = paths.models / f"{pictures.name}.html"
    try:
        pictures.mkdir(exist_ok=True)
        for drawing, figure in shown:
            to_png(figure, pictures / f"{drawing.key}.png")
        write_text(target, html)
    except OSError as error:
        raise ConfigError(f"{paths.models}: the report can't be written there: {error.strerror}") from None
    return target


def gather(run: Any, result: dict[str, Any] | None, loader: Any, paths: RunPaths, split: str) -> Any:
    """The RunFacts that a report shows; evaluates, in float32 as test.py does, where `result` doesn't suffice."""
    from logger.figures.facts import BY_IMAGE, RunFacts
    from logger.figures.norms import norm_facts
    from logger.metrics_csv import read_table
    from tools.words import refuse_nonfinite
    from trainer.evaluate import with_all_experts
    from trainer.precision import in_float32
    from trainer.tasks import task_of
    task = task_of(loader)
    known = result or {}
    lacks = task.classifies and "predictions" not in known and known.get("classifier", "joint") == "joint"
    if result is None or lacks:
        how = {"groups": run.config.get("groups"), "keep": task.classifies, "amp": "off"}
        with in_float32():
            found = task.evaluate(run.model, loader, **how)
            found = with_all_experts(run.model, loader, found, **how) if task.classifies else found
        result = {**known, **found}
    if task.classifies:
        refuse_nonfinite(result, run.path)
    if len(result.get("labels", ())) != loader.n_samples:  # one rank's share: of which images isn't known
        result = {key: value for key, value in result.items() if key not in BY_IMAGE}
    data = run.data
    return RunFacts(run.config, result, list(data.get("cls_num_list") or []), data.get("class_names"),
                    read_table(paths.log / "metrics.csv"), norm_facts(run.model), split)


# ---------------------------------------------------------------------- the command

def choose_checkpoint(folder: Path, which: str, kept: bool = False) -> Path:
    """The checkpoint in `folder` that `which` names: `last` (the newest epoch's), `best`, or a file's name.

    kept: the folder may be one that tools.keep wrote, with weights.pth alone. Raises ConfigError where it isn't there.
    """
    weights = folder / "weights.pth"
    there = [*([weights] if kept and weights.is_file() else []), *RunPaths(folder, folder).saved()]
    if which == "last":
        if not there:
            raise ConfigError(f"{folder}: holds no checkpoint; give a run's folder, <save_dir>/models/<name>/<run_id>")
        return there[-1]
    name = "model_best.pth" if which in ("best", "model_best") else which
    inside = [path for path in (folder / name, Path(which))
              if path.is_file() and path.parent.resolve() == folder.resolve()]
    if not inside:
        known = ", ".join(p.name for p in there)
        raise ConfigError(f"--checkpoint: {folder} has no {name}; there is {known or 'no checkpoint'}")
    return inside[0]


def parse(argv: Sequence[str] | None) -> Namespace:
    """The flags, with `path`, the checkpoint. Raises ConfigError."""
    parser = Parser(prog="python -m tools.report", allow_abbrev=False,
                    description="Write a run's report: one HTML page in its folder.")
    parser.add_argument("run", metavar="RUN",
                        help="the run's folder, <save_dir>/models/<name>/<run_id>, or one checkpoint")
    parser.add_argument("--checkpoint", metavar="WHICH", help="last (default), best, or a file's name")
    parser.add_argument("-c", "--config", metavar="JSON", help="a config in place of the checkpoint's own")
    parser.add_argument("--data_dir", metavar="DIR", help="where the images are, if not where the config says")
    parser.add_argument("-d", "--device", metavar="D", help="cpu, or a GPU's number")
    add_set(parser)
    args = parser.parse_args(argv)
    if args.device is not None:
        check_device(args.device)
    if args.config is not None:
        check_file(args.config, "-c")
    folder = Path(args.run)
    if folder.is_file():
        if args.checkpoint is not None:
            raise ConfigError(f"--checkpoint: chooses in a run's folder; {args.run} is a checkpoint already, leave one "
                              "of them out")
        args.path = folder
    elif not folder.is_dir():
        raise ConfigError(f"{args.run}: no such folder; give a run's, <save_dir>/models/<name>/<run_id>")
    else:
        args.path = choose_checkpoint(folder, args.checkpoint or "last", kept=True)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises ConfigError."""
    args = parse(argv)
    from logger.log import setup_logging
    from tools.opened import open_run
    from trainer.precision import set_determinism
    from utils.device import pick_device
    from utils.seed import seed_everything
    setup_logging(1)
    moved = [Override("data_loader.args.data_dir", args.data_dir, "--data_dir", args.data_dir)] if args.data_dir else []
    run = open_run(args.path, args.config, [*args.overrides, *moved], pick_device(args.device))
    set_determinism(run.config, run.device)
    seed_everything(run.config["seed"])
    print(f"report     {write_report(run)}")


if __name__ == "__main__":
    run_main(main)
