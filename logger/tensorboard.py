"""TensorBoard, where it is installed; otherwise one warning and a writer that does nothing.

Two x axes: epoch scalars (`<metric>/train`, `<metric>/val`, ...) are drawn over epochs, everything under `step/` over
optimizer steps.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from logger.log import get_logger

STEP_PREFIX = "step/"
log = get_logger()


class NoWriter:
    """Accepts every call of a SummaryWriter and does nothing; false as a condition."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def __bool__(self) -> bool:
        return False


def prune(folder: Path, epoch: int, step: int) -> None:
    """Drop what a resumed run will write again: epoch scalars after `epoch` and step scalars after `step`.

    TensorBoard's own purge_step knows only one axis, so the event files are rewritten here.
    """
    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        return
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    kept, dropped = [], 0
    for file in files:
        for event in LegacyEventFileLoader(str(file)).Load():
            if not event.HasField("summary"):
                continue
            tags = [value.tag for value in event.summary.value]
            limit = step if tags and all(tag.startswith(STEP_PREFIX) for tag in tags) else epoch
            if event.step <= limit:
                kept.append(event)
            else:
                dropped += 1
    if not dropped:
        return
    writer = EventFileWriter(str(folder))
    for event in kept:
        writer.add_event(event)
    writer.close()
    for file in files:
        file.unlink()


def make_writer(folder: Path | None, enabled: bool = True, epoch: int = 0, step: int = 0) -> Any:
    """A SummaryWriter on `folder` that continues after (`epoch`, `step`); a NoWriter if there is no folder, if
    disabled, or if TensorBoard isn't installed."""
    if folder is None or not enabled:
        return NoWriter()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.warning("TensorBoard isn't installed: no event files are written (pip install tensorboard)")
        return NoWriter()
    prune(folder, epoch, step)  # for a new run too: it may have been killed before its first checkpoint
    return SummaryWriter(str(folder))
