"""What a run's data ask for: how its model is scored and how the figures read. Decided once, from the loader's task."""
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
    """evaluate: (model, loader, groups=, amp=, keep=, max_batches=, ...) -> figures. format_result: (figures, title) ->
    text. write_extras: (path of the figures' file, figures) -> paths of what is written beside that file and named
    after it, whose part it takes out of the figures. keeps: test.py always asks for what evaluate(keep=True) gives.
    classifies: each image has one class, so there are classifiers to choose, images to predict and a model to export.
    """

    name: str
    evaluate: Callable[..., dict[str, Any]]
    format_result: Callable[[dict[str, Any], str], str]
    write_extras: Callable[[Path, dict[str, Any]], list[Path]]
    keeps: bool
    classifies: bool


#: A loader's `task` -> the module that holds its TASK; imported when it is asked for.
MODULES = {"classification": "trainer.evaluate", "detection": "trainer.detection.evaluate"}


def task_of(loader: Any) -> Task:
    """The task of a loader's data."""
    return import_module(MODULES[loader.task]).TASK


def write_figures(task: Task, target: Path, figures: dict[str, Any]) -> list[Path]:
    """Write a split's figures to `target`, such as test_metrics.json, and the task's extras beside it, by rank 0.

    What is known by image is left out, and taken out of `figures`. Returns the paths of the extras. Raises ConfigError
    where they can't be written.
    """
    for key in BY_IMAGE:
        figures.pop(key, None)
    try:
        extras = task.write_extras(target, figures)
        write_json(target, figures)
    except OSError as error:
        raise ConfigError(f"{target}: can't be written: {error.strerror}") from None
    return extras
