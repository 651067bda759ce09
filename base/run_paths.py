"""Where a run's files go: `<save_dir>/models/<name>/<run_id>/` and `<save_dir>/log/<name>/<run_id>/`."""
from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from utils.errors import ConfigError
from utils.files import check_folder_name

CHECKPOINT = re.compile(r"checkpoint-epoch(\d+)\.pth$")


@dataclass(frozen=True)
class RunPaths:
    """The two folders of one run: `models` for checkpoints and config.json, `log` for logs and metrics. Nothing is
    created before `create`."""

    models: Path
    log: Path

    @property
    def config(self) -> Path:
        """The file of the run's config."""
        return self.models / "config.json"

    @property
    def origin(self) -> Path:
        """The file with the `checkpoint` whose weights a new run began with, given as `-r`; the config doesn't say."""
        return self.models / "origin.json"

    @property
    def best(self) -> Path:
        """The checkpoint of the best epoch."""
        return self.models / "model_best.pth"

    def checkpoint(self, epoch: int) -> Path:
        """The checkpoint of an epoch."""
        return self.models / f"checkpoint-epoch{epoch}.pth"

    @staticmethod
    def epoch_of(path: Path) -> int:
        """The epoch in a checkpoint's name."""
        return int(CHECKPOINT.search(path.name)[1])

    def checkpoints(self) -> list[Path]:
        """The epoch checkpoints that exist, oldest epoch first."""
        found = [p for p in self.models.glob("checkpoint-epoch*.pth") if CHECKPOINT.search(p.name)]
        return sorted(found, key=self.epoch_of)

    def saved(self) -> list[Path]:
        """All checkpoints that a run can resume from: the best one, if it exists, then the epoch checkpoints."""
        return [*([self.best] if self.best.is_file() else []), *self.checkpoints()]

    def figures_of(self, left: Collection[Path], epoch: int) -> list[Path]:
        """test_metrics.json, and a detector's detections beside it, if its figures are of a checkpoint in `left`, or of
        `epoch` or a later one; else []."""
        file = self.models / "test_metrics.json"
        try:
            tested = json.loads(file.read_text(encoding="utf-8")).get("checkpoint")
        except (OSError, ValueError, AttributeError):
            return []
        number = CHECKPOINT.search(str(tested))     # None: the test at training's end, of its last epoch
        of_left = bool(left) if tested is None else tested in {path.name for path in left}
        if not (of_left or (number and int(number[1]) >= epoch)):
            return []
        # A name with further dots says itself which checkpoint the detections are of.
        return [file, *sorted(path for path in self.models.glob("detections_*.json") if "." not in path.stem)]

    @staticmethod
    def set_aside(files: Iterable[Path]) -> None:
        """Rename files to `superseded-...`: all of them, or none if one can't be renamed (raises OSError).

        Files that were set aside earlier stay: the next ones become `superseded2-...`, and so on.
        """
        def free(path: Path) -> Path:
            names = (f"superseded{number}-{path.name}" for number in itertools.chain([""], itertools.count(2)))
            return next(place for place in map(path.with_name, names) if not place.exists())

        renamed = []
        try:
            for path in files:
                renamed.append((path.replace(free(path)), path))
        except OSError:
            for now, before in renamed:
                now.replace(before)
            raise

    def create(self) -> None:
        """Create both folders. Raises ConfigError if that isn't possible."""
        for folder in (self.models, self.log):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _cant_make(folder, error) from None


def _claimed(folder: Path) -> bool:
    """Create `folder`; False if it exists already. Raises ConfigError if it can't be created."""
    try:
        folder.mkdir(parents=True)
        return True
    except FileExistsError:
        if folder.is_dir():
            return False
        raise ConfigError(f"trainer.save_dir: {folder} is in the way") from None
    except OSError as error:
        raise _cant_make(folder, error) from None


def _cant_make(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"trainer.save_dir: can't make the folder {folder}: {error.strerror}; "
                       "give one that can be written, e.g. --save_dir saved")


def new_run(save_dir: str, name: str, run_id: str | None = None) -> RunPaths:
    """The folders of a new run under `save_dir`. run_id: by default the date and time, made unique among existing runs.

    Nothing is created, except that without `run_id` the models folder is, to claim the name: two runs that start in the
    same second get different ones. Raises ConfigError for an invalid name and for a folder that can't be created.
    """
    for value, key in ((name, "name"), (run_id, "--run_id")):
        if value is not None:
            check_folder_name(value, key)
    base = Path(save_dir)
    if run_id is None:
        stamp = run_id = datetime.datetime.now().strftime("%m%d_%H%M%S")
        number = 1
        while not _claimed(base / "models" / name / run_id):
            number += 1
            run_id = f"{stamp}_{number}"
    return RunPaths(base / "models" / name / run_id, base / "log" / name / run_id)


def absolute(path: Path) -> Path:
    """`path` as an absolute path without ".."; symbolic links are resolved only if it contains ".."."""
    return path.parent.resolve() / path.name if ".." in path.parts else path.absolute()


def run_of(checkpoint: Path) -> RunPaths:
    """The folders of the run that wrote `checkpoint`; for a file moved out of its run, its own folder and `log` in it.

    A run written by tools.keep is a single folder: its logs are beside its weights.
    """
    if (checkpoint.parent / "metrics.csv").is_file():
        return RunPaths(checkpoint.parent, checkpoint.parent)
    folder = absolute(checkpoint).parent
    if folder.parent.parent.name == "models":
        save_dir = folder.parent.parent.parent
        return RunPaths(folder, save_dir / "log" / folder.parent.name / folder.name)
    return RunPaths(folder, folder / "log")
