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
    """The two folders of one run. Nothing is created before `create`."""

    models: Path
    log: Path

    @property
    def config(self) -> Path:
        return self.models / "config.json"

    @property
    def best(self) -> Path:
        return self.models / "model_best.pth"

    def checkpoint(self, epoch: int) -> Path:
        return self.models / f"checkpoint-epoch{epoch}.pth"

    @staticmethod
    def epoch_of(path: Path) -> int:
        """The epoch in a checkpoint's name."""
        return int(CHECKPOINT.search(path.name)[1])

    def checkpoints(self) -> list[Path]:
        """The epoch checkpoints that are there, oldest epoch first."""
        found = [p for p in self.models.glob("checkpoint-epoch*.pth") if CHECKPOINT.search(p.name)]
        return sorted(found, key=self.epoch_of)

    def saved(self) -> list[Path]:
        """All that a run can go on from: the best where it is there, then the epoch checkpoints."""
        return [*([self.best] if self.best.is_file() else []), *self.checkpoints()]

    def figures_of(self, left: Collection[Path], epoch: int) -> list[Path]:
        """test_metrics.json, where it is of one of the checkpoints `left`, or of `epoch` or a later one; else none."""
        file = self.models / "test_metrics.json"
        try:
            tested = json.loads(file.read_text(encoding="utf-8")).get("checkpoint")
        except (OSError, ValueError, AttributeError):
            return []
        number = CHECKPOINT.search(str(tested))     # a name that isn't there: a training's own end, of its last one
        of_left = bool(left) if tested is None else tested in {path.name for path in left}
        return [file] if of_left or (number and int(number[1]) >= epoch) else []

    @staticmethod
    def set_aside(files: Iterable[Path]) -> None:
        """Rename files to `superseded-...`: all of them, or none where one can't be renamed (OSError).

        Those of a course that was left before stay: the next are `superseded2-...`, and so on.
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
        """Make both folders; ConfigError where that isn't possible."""
        for folder in (self.models, self.log):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _cant_make(folder, error) from None


def _claimed(folder: Path) -> bool:
    """Make `folder`; False where it is there already. Raises ConfigError."""
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
    """A run's folders under `save_dir`; without `run_id` the date and time, made unique among existing runs.

    Nothing is made, except that without `run_id` the models folder is, to claim the name: of two runs that start in
    the same second each has its own.
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
    """`path` from the root on, without "..", before which links are followed."""
    return path.parent.resolve() / path.name if ".." in path.parts else path.absolute()


def run_of(checkpoint: Path) -> RunPaths:
    """The folders of the run that wrote `checkpoint`; beside it where the file was moved out of its run.

    A run that tools.keep wrote is one folder: what it logged lies beside its weights.
    """
    if (checkpoint.parent / "metrics.csv").is_file():
        return RunPaths(checkpoint.parent, checkpoint.parent)
    folder = absolute(checkpoint).parent
    if folder.parent.parent.name == "models":
        save_dir = folder.parent.parent.parent
        return RunPaths(folder, save_dir / "log" / folder.parent.name / folder.name)
    return RunPaths(folder, folder / "log")
