"""A grid of methods and seeds, run to the end and compared.

    python -m tools.sweep sweep.json
    python -m tools.sweep sweep.json --dry_run
    python -m tools.sweep sweep.json --gpus 0,1

    {"name": "digits", "save_dir": "saved/", "base": "configs/digits_lt_ce.json", "seeds": [0, 1, 2],
     "set": {"trainer.epochs": 20},
     "methods": {"ce": {},
                 "ride": {"config": "configs/digits_lt_ride.json"},
                 "crt": {"config": "configs/digits_lt_crt.json", "set": {"load_crt": "{ce}"}},
                 "ride_ea": {"config": "configs/digits_lt_ride_ea.json", "start": "ride"}}}

`set` holds config values under dotted keys, for all methods and then for one. `{ce}` in a value stands for the last
checkpoint of method "ce" with the same seed; `start` is a method whose checkpoint is given as `-r`. Each run is
`<save_dir>/models/<name>_<method>/seed<N>`. Call it again after a stop: finished runs are skipped, others resumed.
"""
from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base.stop import STOPS
from logger.text import in_percent
from tools.cli import Parser, check_device
from tools.sweep_grid import Job, check_origins, check_unchanged, evaluation_command, read_sweep, train_command
from utils.cli import run_main
from utils.errors import ConfigError, RunError


class Runner:
    """Runs jobs one after another on each device; a job waits for those that it needs. logs: their logs' folder."""

    def __init__(self, jobs: Sequence[Job], devices: Sequence[str | None], logs: Path):
        self.jobs, self.devices, self.logs = jobs, devices, logs
        self.changed = threading.Condition()
        self.children: set[subprocess.Popen] = set()
        self.stopping = False

    def run(self) -> None:
        """Run until no job is left, or until a signal of STOPS, which has running jobs save and end."""
        before = {number: signal.signal(number, self._stop) for number in STOPS}
        workers = [threading.Thread(target=self._work, args=(device,)) for device in self.devices]
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():  # joined in slices, so that signals are handled
                worker.join(0.2)
        for number, handler in before.items():
            signal.signal(number, handler)

    def _stop(self, *_: Any) -> None:
        self.stopping = True
        for child in list(self.children):
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)

    def _next(self) -> Job | None:
        """A job whose needs are done; waits for one. None when there is nothing more to do."""
        with self.changed:
            while not self.stopping:
                state = {(job.method, job.seed): job.state for job in self.jobs}
                waiting = [job for job in self.jobs if job.state == "waiting"]
                for job in waiting:
                    needed = [state[need, job.seed] for need in job.needs]
                    if "failed" in needed:
                        job.state, job.problem = "failed", f"needs {' and '.join(job.needs)}, which failed"
                        self.changed.notify_all()
                        break
                    if all(one == "done" for one in needed):
                        job.state = "running"
                        return job
                else:
                    if not waiting:
                        return None
                    self.changed.wait(0.5)
            return None

    def _work(self, device: str | None) -> None:
        while (job := self._next()) is not None:
            began, before = time.monotonic(), False
            try:
                before = job.finished
                problem = "" if before else self._run(job, device)
            except OSError as error:
                problem = f"{error.filename or self._log(job)}: {error.strerror or error}"
            except Exception as error:  # if this thread died, others would wait for its job forever
                problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
            with self.changed:
                job.seconds = None if before else time.monotonic() - began
                job.problem, job.state = problem, "failed" if problem else "done"
                if self.stopping:
                    job.state = "waiting"
                self.changed.notify_all()
                self._say(job)

    def _run(self, job: Job, device: str | None) -> str:
        """Train and test; "" or what went wrong."""
        log = self._log(job)
        self._print(job, f"{'goes on' if job.begun else 'trains'}, log in {log}")
        for what, command in (("train.py", lambda: train_command(job, self.jobs, device)),
                              ("test.py", lambda: evaluation_command(job, device))):
            if self.stopping:
                return "stopped"
            status, last = self._call(command(), log)
            if status:
                return f"{what} ended with status {status}: {last}"
            if job.last is None:
                return "train.py left no checkpoint"
        return ""

    def _log(self, job: Job) -> Path:
        return self.logs / f"{job.method}_seed{job.seed}.log"

    def _call(self, command: list[str], log: Path) -> tuple[int, str]:
        """(exit status, last line of the log)."""
        with open(log, "ab") as out:
            out.write(f"$ {shlex.join(command)}\n".encode())
            out.flush()
            # A session of its own: Ctrl-C reaches the runs once, through us.
            child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                     start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
            self.children.add(child)
            if self.stopping:
                child.send_signal(signal.SIGTERM)
            status = child.wait()
            self.children.discard(child)
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return status, lines[-1] if lines else ""

    def _say(self, job: Job) -> None:
        from logger.text import duration
        if self.stopping:
            self._print(job, "stopped")
        elif job.state == "failed":
            self._print(job, f"failed: {job.problem}")
        else:
            figures = _accuracy(job)
            took = ", was finished before" if job.seconds is None else f", {duration(job.seconds)}"
            self._print(job, f"done{figures}{took}")

    def _print(self, job: Job, text: str) -> None:
        with contextlib.suppress(OSError):  # the runs go on even if nobody reads this
            print(f"[{self.jobs.index(job) + 1}/{len(self.jobs)}] {job.title}: {text}", flush=True)


def _accuracy(job: Job) -> str:
    from tools.runs import read_run
    try:
        value = read_run(job.paths.models).figures.get("accuracy")
    except ConfigError:
        return ""
    return "" if value is None else f", {in_percent(value)} of the test images"


# ---------------------------------------------------------------------- the command

def parse(argv: Sequence[str] | None) -> Namespace:
    """The flags. Raises ConfigError."""
    parser = Parser(prog="python -m tools.sweep", allow_abbrev=False,
                    description="Run a grid of methods and seeds, and compare them.")
    parser.add_argument("sweep", metavar="SWEEP.json", help="the grid: see the top of tools/sweep.py")
    parser.add_argument("--gpus", metavar="N,N", help="run on these GPUs, one run each at a time")
    parser.add_argument("-d", "--device", metavar="D", help="run one after another on this device: cpu, or GPU numbers")
    parser.add_argument("--dry_run", action="store_true", help="list the runs and their commands, start nothing")
    args = parser.parse_args(argv)
    for device in (args.gpus, args.device):
        if device is not None:
            check_device(device)
    if args.gpus is not None and args.device is not None:
        raise ConfigError("--gpus: says where to run; leave out -d")
    if args.gpus == "cpu":
        raise ConfigError("--gpus: takes GPU numbers such as 0,1; for the CPU write -d cpu")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 1 if a run failed, else 0. Raises ConfigError; RunError where it was stopped."""
    args = parse(argv)
    jobs, save_dir = read_sweep(args.sweep)
    for job in jobs:
        check_unchanged(job)
    check_origins(jobs)
    devices = args.gpus.split(",") if args.gpus else [args.device]
    if args.dry_run:
        for job in jobs:
            state = "finished" if job.finished else "goes on" if job.last else "to do"
            print(f"{job.title} ({state})\n  {shlex.join(train_command(job, jobs, devices[0]))}")
        print(f"{len(jobs)} runs, {sum(job.finished for job in jobs)} finished")
        return 0
    logs = save_dir / "sweeps" / Path(args.sweep).stem
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"save_dir: can't make the folder {logs}: {error.strerror}") from None
    runner = Runner(jobs, devices, logs)
    runner.run()
    if runner.stopping:
        raise RunError(f"stopped; go on with: python -m tools.sweep {args.sweep}")
    print_table(jobs, save_dir)
    failed = [job for job in jobs if job.state != "done"]
    for job in failed:
        print(f"failed: {job.title}: {job.problem or 'it was not run to its end'}", file=sys.stderr)
    return 1 if failed else 0


def print_table(jobs: Sequence[Job], save_dir: Path) -> None:
    """Print the comparison of this sweep's runs, and the command that shows it again."""
    from tools.compare import arrange, row_of
    from tools.run_table import text_table
    from tools.runs import read_run
    rows = []
    for job in jobs:
        with contextlib.suppress(ConfigError):
            rows.append(row_of(read_run(job.paths.models)))
    if rows:
        print(f"\n{text_table(arrange(rows))}\n\nonce more, or as a page: python -m tools.compare {save_dir}")


if __name__ == "__main__":
    run_main(main)
