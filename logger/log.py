"""Console and info.log."""
from __future__ import annotations

import logging
import os
import sys
from collections import deque
from pathlib import Path

from utils import dist

# Verbosity, numbered as in pytorch-template: 0 warnings only, 1 one line per epoch, 2 also one per log step.
LEVELS = {0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}
COLOURS = {logging.WARNING: "\033[33m", logging.ERROR: "\033[31m"}


def colours_wanted(stream: object) -> bool:
    """Whether to use colours: only on a terminal, and never if NO_COLOR is set (https://no-color.org)."""
    return bool(getattr(stream, "isatty", lambda: False)()) and "NO_COLOR" not in os.environ \
        and os.environ.get("TERM") != "dumb"


class ConsoleFormatter(logging.Formatter):
    """Formats messages as they are; warnings and errors are prefixed with their level, in colour if `colour`."""

    def __init__(self, colour: bool):
        super().__init__("%(message)s")
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
            if self.colour and record.levelno in COLOURS:
                text = f"{COLOURS[record.levelno]}{text}\033[0m"
        return text


class _Stdout(logging.StreamHandler):
    """Writes to the current sys.stdout, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")
        if tqdm is None or not getattr(tqdm.tqdm, "_instances", None):
            self.stream = sys.stdout
            super().emit(record)
            return
        try:
            tqdm.tqdm.write(self.format(record), file=sys.stdout)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """If the reader of a pipe has exited (`| head`), print no more: the run goes on, and info.log has the rest."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            self.setLevel(logging.CRITICAL + 1)  # removing it would make the next handler miss this record
        else:
            super().handleError(record)


class _InfoLog(logging.FileHandler):
    """A log file handler that removes itself, with one warning, if its file can't be written (a full disk)."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logging.getLogger("ltr").removeHandler(self)
        logging.getLogger("ltr").warning("%s can't be written: %s", self.baseFilename, error.strerror)


class _Early(logging.Handler):
    """Keeps what is logged before the run has a folder (the last 1,000 records), to be copied to info.log later."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: deque[logging.LogRecord] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def setup_logging(verbosity: int = 2) -> logging.Logger:
    """Send the project's log to stdout (rank 0 only); returns the logger. verbosity: 0 warnings, 1 one line per epoch,
    2 also each log step."""
    root = logging.getLogger("ltr")
    root.setLevel(logging.DEBUG)
    root.propagate = False
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    console = _Stdout(sys.stdout)
    console.setLevel(_console_level(verbosity))
    console.setFormatter(ConsoleFormatter(colours_wanted(sys.stdout)))
    root.addHandler(console)
    root.addHandler(_Early())
    return root


def set_verbosity(verbosity: int) -> None:
    """Change how much of the log stdout shows, if that becomes known only after logging began (see `setup_logging`)."""
    for handler in logging.getLogger("ltr").handlers:
        if isinstance(handler, _Stdout):
            handler.setLevel(_console_level(verbosity))


def shows(level: int) -> bool:
    """Whether stdout shows log records of `level`."""
    return any(handler.level <= level for handler in logging.getLogger("ltr").handlers if isinstance(handler, _Stdout))


def _console_level(verbosity: int) -> int:
    return LEVELS.get(verbosity, logging.INFO) if dist.is_main() else logging.CRITICAL


def log_to_file(folder: Path) -> None:
    """Also log to info.log in `folder` (created if absent), including what was logged so far; rank 0 only.

    A resumed run appends to the same file. Raises OSError if it can't be opened.
    """
    if not dist.is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    handler = _InfoLog(folder / "info.log", encoding="utf-8")
    handler.setLevel(logging.DEBUG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("ltr")
    early = [kept for kept in root.handlers if isinstance(kept, _Early)]
    root.addHandler(handler)
    for kept in early:
        root.removeHandler(kept)
        for record in kept.records:
            if handler in root.handlers:  # it removes itself if its disk is full
                handler.handle(record)


def get_logger(name: str = "") -> logging.Logger:
    """The project's logger, or a child of it."""
    return logging.getLogger(f"ltr.{name}" if name else "ltr")
