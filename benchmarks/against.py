"""Tells whether anything got slower: runs a benchmark as it is here and as it was at another commit, in turns.

    python -m benchmarks.against [--rounds N] [--json FILE] COMMIT BENCHMARK [ITS OWN FLAGS]
    python -m benchmarks.against --rounds 5 HEAD~10 inference --cpu-time --rounds 3

Each round runs the benchmark once on either side, in random order, with this Python and its packages. Figures that both
report in seconds or milliseconds, per second or as a ratio of times are compared. Those that are slower here by more
than 3 %, by the median over the rounds, are marked, and the exit status is then 1; it's 2 where nothing could be
compared.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.timing import Timing, finish, machine, spread
from utils.cli import run_main
from utils.errors import ConfigError

LIMIT = 1.03
ROOT = Path(__file__).resolve().parent.parent


def times(results: Any, name: str = "", slow: bool | None = None) -> Iterator[tuple[str, float]]:
    """Name and value of each figure in a benchmark's JSON that says how long something takes: lower is faster.

    Rates are inverted; speed-ups and everything else are left out. A row of a list is named by its texts and shapes,
    else by its place.
    """
    if isinstance(results, dict):
        for key, value in results.items():
            if key in ("speed_up", "limit", "target", "low", "high"):
                continue
            known = slow
            if "per_second" in key:
                known = False
            elif key == "ratio" or key.endswith(("_s", "_ms", "seconds")):
                known = True
            yield from times(value, f"{name} {key}".strip(), known)
    elif isinstance(results, list):
        for index, row in enumerate(results):
            values = row.values() if isinstance(row, dict) else []
            words = [str(value) for value in values if isinstance(value, str | list)] or [str(index)]
            yield from times(row, " ".join([name, *words]).strip(), slow)
    elif isinstance(results, int | float) and slow is not None and results > 0:
        yield name, float(results) if slow else 1 / results


@contextlib.contextmanager
def checkout(commit: str, repository: Path = ROOT) -> Iterator[Path]:
    """A folder with the repository's files at `commit`, removed afterwards. Raises ConfigError: unknown commit."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "then")
        made = subprocess.run(["git", "worktree", "add", "--detach", place, commit], cwd=repository,
                              capture_output=True, text=True)
        if made.returncode:
            raise ConfigError(f"no files of commit {commit!r}: {made.stderr.strip().splitlines()[-1]}")
        try:
            yield place
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", place], cwd=repository, check=True)


def run(place: Path, benchmark: str, flags: list[str]) -> dict[str, float]:
    """One run's times, by name. Raises ConfigError where the benchmark fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "results.json")
        ended = subprocess.run([sys.executable, "-m", f"benchmarks.{benchmark}", *flags, "--json", file], cwd=place,
                               capture_output=True, text=True)
        if not file.is_file():
            said = (ended.stderr.strip() or ended.stdout.strip() or "nothing").splitlines()[-1]
            raise ConfigError(f"benchmarks.{benchmark} in {place} ended with status {ended.returncode}: {said}")
        return dict(times(json.loads(file.read_text())["results"]))


def compare(sides: dict[str, Path], benchmark: str, flags: list[str], rounds: int) -> dict[str, Timing]:
    """The times of every figure that all runs of both sides have. Raises ConfigError where there is none."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    order = random.Random(0)
    for _ in range(rounds):
        for side in order.sample(list(sides), len(sides)):
            runs[side].append(run(sides[side], benchmark, flags))
    every = [found for found_by_side in runs.values() for found in found_by_side]
    shared = [name for name in every[0] if all(name in found for found in every)]
    if not shared:
        raise ConfigError(f"benchmarks.{benchmark}: no figure of time that both sides' runs have")
    for name in sorted(set().union(*every) - set(shared)):
        print(f"{name}: not on both sides")
    return {name: Timing({side: [found[name] for found in runs[side]] for side in sides}) for name in shared}


def main() -> int:
    """The command; returns 1 where anything is slower, else 0. Raises ConfigError."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--rounds", type=int, default=3, help="runs at either commit (default: %(default)s)")
    flags.add_argument("--json", metavar="FILE", help="also write the ratios there")
    flags.add_argument("commit", help="what to compare with: a hash, a tag, a branch")
    flags.add_argument("benchmark", help="a module of benchmarks/, such as inference")
    flags.set_defaults(threads=None)
    flags.add_argument("flags", nargs=argparse.REMAINDER, help="the benchmark's own flags")
    args = flags.parse_args()
    with checkout(args.commit) as then:
        print(machine(), flush=True)
        found = compare({"then": then, "now": ROOT}, args.benchmark, args.flags, args.rounds)
    ratios = {name: timing.ratio("now", "then") for name, timing in found.items()}
    slower = [name for name, ratio in ratios.items() if ratio["median"] > LIMIT]
    for name, ratio in ratios.items():
        print(f"{name:70} time {spread(ratio)}{'   slower' if name in slower else ''}")
    print(f"{len(slower)} of {len(ratios)} figures are slower than at {args.commit} by more than {LIMIT - 1:.0%}")
    finish("against", {"commit": args.commit, "benchmark": args.benchmark, "ratios": ratios}, args)
    return 1 if slower else 0


if __name__ == "__main__":
    run_main(main)
