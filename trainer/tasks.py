"""What depends on a run's task: how its model is scored and how figures are shown. The loader's `task` decides it."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from logger.figures.facts import BY_IMAGE
from utils.errors import ConfigError
from utils.files import write_json


@dataclass(frozen=True)
class Task:
    """The functions of one task, such as classification.

    evaluate: (model, loader, groups=, amp=, keep=, max_batches=, ...) -> figures.
    format_result: (figures, title) -> text.
    write_extras: (path of the figures' file, figures) -> paths of the files that it wrote beside that file, named after
    it; it removes their content from the figures.
    keeps: whether test.py always calls evaluate with keep=True.
    classifies: whether each image has one class, so that classifiers can be chosen, images predicted
    and models exported.
    """

    name: str
    evaluate: Callable[..., dict[str, Any]]
    format_result: Callable[[dict[str, Any], str], str]
    write_extras: Callable[[Path, dict[str, Any]], list[Path]]
    keeps: bool
    classifies: bool


#: A loader's `task` -> the module that holds its TASK; imported on first use.
MODULES = {"classification": "trainer.evaluate", "detection": "trainer.detection.evaluate"}


def task_of(loader: Any) -> Task:
    """The task of a loader's data."""
    return import_module(MODULES[loader.task]).TASK


def write_figures(task: Task, target: Path, figures: dict[str, Any]) -> list[Path]:
    """Write a split's figures to `target`, such as test_metrics.json, and the task's extras beside it; for rank 0 only.

    Per-image figures aren't written, and are removed from `figures`. Returns the paths of the extras. Raises
    ConfigError if a file can't be written.
    """
    for key in BY_IMAGE:
        figures.pop(key, None)
    try:
        extras = task.write_extras(target, figures)
        write_json(target, figures)
    except OSError as error:
        raise ConfigError(f"{target}: can't be written: {error.strerror}") from None
    return extras
