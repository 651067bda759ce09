"""Keeps a finished run as one small folder beside the code: the figures to quote, and weights to check them with.

    python -m tools.keep saved/models/<name>/<run_id> results/
    python -m tools.keep saved/models/<name>/<run_id> results/ --name cifar100_lt_ride_s0
    python -m tools.keep saved/models/<name>/<run_id> results/trials --no_weights

Writes results/<name>/ with config.json, metrics.csv, timing.csv, test_metrics.json and weights.pth: a checkpoint
without the optimizer's state, its matrices and filters in float16 (`--float32`: as they are), for
`python test.py -r results/<name>/weights.pth --data_dir data`. `--no_weights` leaves out weights.pth. Paths of
this machine are removed: images are looked for in `data`.
"""
from __future__ import annotations

import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base.run_paths import RunPaths, run_of
from tools.cli import Parser, add_set
from tools.report import choose_checkpoint
from tools.runs import evaluation_flags, other_evaluation
from utils.cli import run_main
from utils.config.outside import outside_flags
from utils.config.read import read_json
from utils.errors import ConfigError
from utils.files import check_folder_name

COPIED = ("metrics.csv", "timing.csv")
#: Dotted keys of the config and of the figures whose values are paths on this machine -> what a reader of the folder
#: gets instead.
PLACES = {"data_loader.args.data_dir": "data", "data_dir": "data", "trainer.save_dir": "saved/"}


def without_places(config: Any, path: str = "") -> Any:
    """A config, or facts of the data, whose absolute paths are replaced (PLACES) or cut to their last part."""
    if isinstance(config, dict):     # a class may be named /m/01g317: that is no path
        return {key: value if key == "class_names" else without_places(value, f"{path}.{key}".lstrip("."))
                for key, value in config.items()}
    if isinstance(config, list):
        return [without_places(value, path) for value in config]
    if isinstance(config, str) and os.path.isabs(config):
        return PLACES.get(path, os.path.basename(config.rstrip("/")))
    return config


def halved(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights with matrices and filters as float16, if their values fit; statistics, biases and norms as they are."""
    def half(name: str, value: Any) -> Any:
        if not name.endswith("weight") or value.dim() < 2 or not value.is_floating_point():
            return value
        small = value.half()
        return small if bool(small.isfinite().all()) else value
    return {name: half(name, value) for name, value in weights.items()}


def check_figures(file: Path, figures: dict[str, Any], checkpoint: Path) -> None:
    """Raise ConfigError unless the figures of `file` are of `checkpoint`, evaluated as it is and since it was written.

    Figures name their checkpoint; those that name none were written at the end of a training, for its last one.
    """
    epochs = RunPaths(checkpoint.parent, checkpoint.parent).checkpoints()
    tested = figures.get("checkpoint") or (epochs[-1].name if epochs else checkpoint.name)
    other, how = other_evaluation(figures), ""
    if other:
        how = f"are of another evaluation than the checkpoint's own ({', '.join(other)})"
    elif tested != checkpoint.name:
        how = f"are of {tested}"
    elif file.stat().st_mtime < checkpoint.stat().st_mtime:
        how = "are older than the checkpoint"
    if how:
        raise ConfigError(f"{file}: its figures {how}; first: python test.py -r {checkpoint}")


def keep(checkpoint: Path, top: Path, name: str | None = None, half: bool = True, weights: bool = True,
         overrides: Sequence[Any] = ()) -> Path:
    """Write the folder of `checkpoint`'s run under `top`, whole or not at all; returns it.

    name: the folder's (default: the config's name and the seed). half: see `halved`. weights: whether they are kept.
    overrides: values of the config, repeated to allow its classes from outside; they can't change any.

    Raises ConfigError: no test figures, or those of other weights, no config, overrides that change it, a folder of
    that name is there, or it can't be written.
    """
    from tools.fallback import value_at
    from tools.session import config_of
    from utils.checkpoint.store import load_checkpoint, recover_config, save_checkpoint
    from utils.files import write_json
    paths = run_of(checkpoint)
    figures = paths.models / "test_metrics.json"
    if not figures.is_file():
        raise ConfigError(f"{figures}: isn't there; first: python test.py -r {checkpoint}")
    quoted = read_json(figures, "figures")
    check_figures(figures, quoted, checkpoint)
    loaded = load_checkpoint(checkpoint)
    config = config_of(loaded, checkpoint, overrides)
    said = recover_config(loaded) or read_json(paths.config, "config")
    for item in overrides:
        if value_at(said, item.path) != item.value:
            raise ConfigError(f"{item.flag} {item.path}: would change what the run's config says, which is kept as it "
                              "is; leave it out")
    config = without_places(config)
    target = top / (name or f"{config['name']}_s{config.get('seed', 0)}")
    if target.exists():
        raise ConfigError(f"--name: {target} is there already; delete it or choose another name")
    try:
        top.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".keep-", dir=top))
    except OSError as error:
        raise ConfigError(f"{top}: can't be written: {error.strerror}") from None
    try:
        write_json(unfinished / "config.json", config)
        write_json(unfinished / figures.name, without_places(quoted))
        for file in (paths.log / name for name in COPIED):
            if file.is_file():
                shutil.copyfile(file, unfinished / file.name)
        if weights:
            save_checkpoint(unfinished / "weights.pth", {
                "arch": loaded.get("arch", config["arch"]["type"]), "epoch": loaded.get("epoch"), "config": config,
                "state_dict": (halved if half else dict)(loaded["state_dict"]),
                "data": without_places(loaded.get("data"))})
        os.chmod(unfinished, 0o755)  # mkdtemp makes private folders
        unfinished.rename(target)
    except OSError as error:
        raise ConfigError(f"{target}: can't be written: {error.strerror}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


# ---------------------------------------------------------------------- the command

def parse(argv: Sequence[str] | None) -> Namespace:
    """The flags, with `path`, the checkpoint. Raises ConfigError."""
    parser = Parser(prog="python -m tools.keep", description="Keep a finished run as one small folder.",
                    allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="the run's folder, <save_dir>/models/<name>/<run_id>")
    parser.add_argument("top", metavar="DIR", help="where the folder goes, e.g. results/")
    parser.add_argument("--name", metavar="NAME", help="the folder's name (default: the config's name and the seed)")
    parser.add_argument("--checkpoint", metavar="WHICH", default="last", help="last (default), best, or a file's name")
    parser.add_argument("--float32", action="store_true", help="keep weights as they are, where halves cost accuracy")
    parser.add_argument("--no_weights", action="store_true", help="keep the figures and the curve alone")
    add_set(parser)
    args = parser.parse_args(argv)
    if not Path(args.run).is_dir():
        raise ConfigError(f"{args.run}: no such folder; give a run's, <save_dir>/models/<name>/<run_id>")
    if args.name is not None:
        check_folder_name(args.name, "--name")
    args.path = choose_checkpoint(Path(args.run), args.checkpoint)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises ConfigError."""
    args = parse(argv)
    target = keep(args.path, Path(args.top), args.name, not args.float32, not args.no_weights, args.overrides)
    size = sum(path.stat().st_size for path in target.iterdir())
    check = f"train.py -c {target / 'config.json'}" if args.no_weights else f"test.py -r {target / 'weights.pth'}"
    more = outside_flags(read_json(target / "config.json"))
    more += "" if args.no_weights else evaluation_flags(read_json(target / "test_metrics.json"))
    print(f"written to {target} ({size / 2**20:.1f} MiB)\ncheck it with: python {check} --data_dir data{more}")


if __name__ == "__main__":
    run_main(main)
