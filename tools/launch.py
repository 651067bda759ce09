"""Several training processes from one plain command, by torch's elastic launcher (what torchrun is made of)."""
from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from base.stop import STOPS
from utils.dist import LAUNCHED_HERE
from utils.errors import RunError

#: Seconds that workers have, after a SIGTERM or SIGINT, to finish their step and save.
PATIENCE_S = 120
#: Signals whose handlers torch's launcher or this module replaces; the launcher doesn't restore them.
CAUGHT = tuple({*STOPS, *(getattr(signal, name) for name in ("SIGHUP", "SIGQUIT") if hasattr(signal, name))})


def run_workers(workers: int, command: list[str]) -> int:
    """Run `python *command` in `workers` processes that train together; returns one exit status for all.

    Only the workers print, errors included; the launcher itself stays silent. A stop by SIGTERM, SIGINT or SIGUSR1 is
    passed on to them. Raises RunError for a worker that was killed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    logging.disable(logging.CRITICAL)
    handlers = {number: signal.getsignal(number) for number in CAUGHT}
    for number in set(STOPS) - {signal.SIGTERM, signal.SIGINT}:  # unknown to torch's launcher: becomes a SIGTERM
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGTERM))
    wished = {"shutdown_timeout": PATIENCE_S}  # newer torch has it; older ones wait 30 s
    known = {entry.name for entry in dataclasses.fields(LaunchConfig)}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=workers, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", max_restarts=0,
                          **{name: value for name, value in wished.items() if name in known})
    with tempfile.TemporaryDirectory() as notes:
        os.environ[LAUNCHED_HERE] = notes
        try:
            elastic_launch(config, sys.executable)("-u", *command)
        except ChildFailedError as error:
            # The first failure matters: ranks that lost another end with 1, or by the launcher's own SIGTERM.
            failures = {failure.exitcode: rank for rank, failure in error.failures.items()}
            killed = [status for status in failures if status < 0 and status != -signal.SIGTERM]
            if killed and 2 not in failures:
                raise RunError(f"rank {failures[killed[0]]} was killed by {signal.Signals(-killed[0]).name}; go on "
                               "with -r and the run's newest checkpoint") from None
            return 2 if 2 in failures else 1
        except SignalException:
            return 0 if stopped_note(notes).exists() else 1
        finally:
            del os.environ[LAUNCHED_HERE]
            logging.disable(logging.NOTSET)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0


def note_stop() -> None:
    """Tell the launcher, where there is one, that the run was stopped on request and saved."""
    folder = os.environ.get(LAUNCHED_HERE)
    if folder and Path(folder).is_dir():
        stopped_note(folder).touch()


def stopped_note(folder: str) -> Path:
    """The file in the launcher's folder that says that the run was stopped."""
    return Path(folder) / "stopped"
