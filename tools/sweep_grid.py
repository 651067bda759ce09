"""The grid of a sweep: reads and checks its file, orders its runs, and gives the commands of each."""
from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from base.run_paths import RunPaths, new_run
from logger.metrics_csv import read_table
from tools.cli import value_of
from tools.compare import cosmetic
from tools.fallback import as_begun
from utils.config.load import Override, check_config, load_config
from utils.config.outside import outside_flags, outside_names
from utils.config.read import flat, read_json
from utils.errors import ConfigError, unknown

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("name", "save_dir", "base", "methods", "seeds", "set")
METHOD_KEYS = ("config", "set", "start")
#: A method's name in braces, `{ce}`; a range of shards, `{00..19}`, doesn't match.
PLACE = re.compile(r"\{(?!\d+\.\.\d+\})(\w[\w.-]*)\}")
#: Config keys that the grid sets for each run -> where in its file to give them.
OF_THE_GRID = {"seed": '"seeds"', "name": '"name"', "trainer.save_dir": '"save_dir"',
               "resume_state_dict_only": 'a method\'s "start"'}


@dataclass
class Job:
    """One run of the grid: a method with a seed."""

    method: str
    seed: int
    config: str                                   # the config file
    settings: dict[str, Any]                      # dotted key -> value; `{method}` not yet replaced
    paths: RunPaths
    start: str | None = None                      # the method whose checkpoint is given as -r
    needs: tuple[str, ...] = ()                   # methods that must be done before, with the same seed
    state: str = "waiting"                        # then: running, done, failed
    problem: str = ""
    seconds: float | None = None                  # None where nothing had to be done
    effective: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def title(self) -> str:
        """The job's name in messages: "ride seed 0"."""
        return f"{self.method} seed {self.seed}"

    @property
    def last(self) -> Path | None:
        """The newest epoch's checkpoint, where there is one."""
        found = self.paths.checkpoints()
        return found[-1] if found else None

    def folder_of(self, method: str) -> Path:
        """The folder of checkpoints of another method's run with the same seed."""
        name = self.paths.models.parent.name.removesuffix(self.method) + method
        return self.paths.models.parent.with_name(name) / self.paths.models.name

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return bool(self.paths.saved())

    @property
    def trained(self) -> bool:
        """Trained to the end: to the last epoch, or stopped early."""
        if self.last is None:
            return False
        options, rows = self.effective["trainer"], read_table(self.paths.log / "metrics.csv")
        done = int(rows[-1].get("epoch") or 0) if rows else RunPaths.epoch_of(self.last)
        return done >= options["epochs"] or self._ended_early(options)

    def _ended_early(self, options: dict[str, Any]) -> bool:
        """Whether the last checkpoint is of the end of an epoch at which `early_stop` or `iterations` ended the run."""
        limits = {key: options.get(name) for key, name in (("not_improved", "early_stop"),
                                                           ("global_step", "iterations")) if options.get(name)}
        if not limits:
            return False
        from utils.checkpoint.store import load_checkpoint
        try:
            last = load_checkpoint(self.last)
        except ConfigError:     # the file is truncated
            return False
        return last.get("batch") is None and any((last.get(key) or 0) >= limit for key, limit in limits.items())

    @property
    def finished(self) -> bool:
        """Trained to the end and tested since then (a run that was stopped may have been tested before its end)."""
        tested = self.paths.models / "test_metrics.json"
        return self.trained and tested.is_file() and tested.stat().st_mtime >= self.last.stat().st_mtime


# ---------------------------------------------------------------------- the file

def read_sweep(path: str) -> tuple[list[Job], Path]:
    """(the jobs of a sweep file, each after what it needs; its save_dir).

    Raises ConfigError for anything wrong in it or in one of its configs, before anything runs.
    """
    sweep = read_json(path, "the sweep file")
    for key in sweep:
        if key not in KEYS:
            raise unknown(path, key, KEYS, "key")
    name = _expect(path, sweep, "name", str, Path(path).stem)
    save_dir = _expect(path, sweep, "save_dir", str, "saved/")
    methods = _expect(path, sweep, "methods", dict, {})
    seeds = _expect(path, sweep, "seeds", list, [0])
    shared = _expect(path, sweep, "set", dict, {})
    if not methods:
        raise ConfigError(f"{path}: methods: give at least one, e.g. {{\"ce\": {{\"config\": \"configs/x.json\"}}}}")
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{path}: seeds: must be different whole numbers from 0, such as [0, 1, 2]")
    jobs = [_job(path, sweep, save_dir, name, method, spec, shared, seed)
            for method, spec in methods.items() for seed in seeds]
    return _in_order(path, jobs), Path(save_dir)


def _expect(path: str, table: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = table.get(key, default)
    if not isinstance(value, kind):
        names = {str: "text", dict: "an object", list: "a list"}
        raise ConfigError(f"{path}: {key}: must be {names[kind]}, not {value!r}")
    return value


def _job(path: str, sweep: dict[str, Any], save_dir: str, name: str, method: str, spec: Any, shared: dict[str, Any],
         seed: int) -> Job:
    where = f"{path}: methods.{method}"
    if not isinstance(spec, dict):
        raise ConfigError(f"{where}: must be an object such as {{\"config\": \"configs/x.json\"}}, not {spec!r}")
    for key in spec:
        if key not in METHOD_KEYS:
            raise unknown(where, key, METHOD_KEYS, "key")
    config = spec.get("config", sweep.get("base"))
    if not isinstance(config, str):
        raise ConfigError(f"{where}: has no config, and the sweep no base")
    settings = {**shared, **_expect(path, spec, "set", dict, {})}
    for key in settings.keys() & OF_THE_GRID.keys():
        raise ConfigError(f"{where}: set: {key} is the sweep's own; give {OF_THE_GRID[key]} beside it")
    start = _expect(path, spec, "start", str, "") or None
    used = [match for value in settings.values() if isinstance(value, str) for match in PLACE.findall(value)]
    needs = tuple(dict.fromkeys([*used, *([start] if start else [])]))
    for needed in needs:
        if needed not in sweep["methods"]:
            raise unknown(where, needed, sweep["methods"], "method")
    job = Job(method, seed, config, settings, new_run(save_dir, f"{name}_{method}", f"seed{seed}"), start, needs)
    # Checked now: a mistake in the last method shouldn't show only after a night of training. Values that stand for
    # checkpoints of other runs are left out, as these may not exist yet.
    known = [Override(key, value, f"{where}: {key}") for key, value in settings.items()
             if not (isinstance(value, str) and PLACE.search(value))]
    overrides = [*known, *_identity(job)]
    job.effective = load_config(config, overrides, flag=f"{where}: config")
    if job.paths.config.is_file():
        job.effective = as_begun(job.effective, read_json(job.paths.config, "config"), overrides, config)
    return job


def _identity(job: Job) -> list[Override]:
    """The overrides that make a run this job's."""
    # A start from another run's checkpoint is a new run; without this key it would resume in the other's folder.
    starts = [Override("resume_state_dict_only", True, "start")] if job.start else []
    return [Override("seed", job.seed, "seeds"), Override("name", job.paths.models.parent.name, "name"),
            Override("trainer.save_dir", str(job.paths.models.parent.parent.parent), "save_dir"), *starts]


def _in_order(path: str, jobs: list[Job]) -> list[Job]:
    """The jobs, each after those that it needs. Raises ConfigError where one needs itself."""
    ordered: list[Job] = []
    while len(ordered) < len(jobs):
        done = {(job.method, job.seed) for job in ordered}
        ready = [job for job in jobs if job not in ordered and all((need, job.seed) in done for need in job.needs)]
        if not ready:
            stuck = next(job for job in jobs if job not in ordered)
            raise ConfigError(f"{path}: methods.{stuck.method}: needs itself, through {', '.join(stuck.needs)}")
        ordered += ready
    return ordered


def check_unchanged(job: Job) -> None:
    """Raise ConfigError, naming the key, where the job's folder has a run of another config, or one that began from
    another run's checkpoint, than it now asks for."""
    if not job.paths.config.is_file():
        return
    before = check_config(read_json(job.paths.config, "config"), allowed=[name for _, name, _ in
                                                                          outside_names(job.effective)])
    for key, old, new in _changes(job, before):
        raise ConfigError(f"{job.paths.models}: was run with {key} {old!r}, the sweep now says {new!r}; delete the "
                          "folder or give the sweep another name")


def _changes(job: Job, before: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, what the run in the job's folder was run with, what the sweep now says), where these differ. before: the
    run's config."""
    places = {key: PLACE.search(value) for key, value in job.settings.items() if isinstance(value, str)}
    begins = {key: match[1] for key, match in places.items() if match}      # key -> a method
    left_out = {"n_gpu", "arch.args.num_classes", "distill_arch.args.num_classes", *begins,
                *(f"trainer.{key}" for key in cosmetic(job.effective))}
    old, new = (flat(config) for config in (before, job.effective))
    for key in sorted(old.keys() | new.keys()):
        if key not in left_out and old.get(key) != new.get(key) != "auto":  # a run's config has what "auto" became
            yield key, old.get(key), new.get(key)
    if job.paths.origin.is_file():      # older runs have none
        old["start"] = read_json(job.paths.origin, "origin").get("checkpoint")
        begins["start"] = job.start
    for key, method in begins.items():      # compared by the run's name and seed, as save_dir may have been moved
        if method is None or Path(str(old.get(key))).parent.parts[-2:] != job.folder_of(method).parts[-2:]:
            yield key, old.get(key), job.settings.get(key, method)


def check_origins(jobs: Sequence[Job]) -> None:
    """Raise ConfigError where a run has begun from another that has yet to be trained, perhaps again because its folder
    was deleted after a change of its config: what began from the old weights would no longer be this sweep's method."""
    by_name = {(job.method, job.seed): job for job in jobs}
    for job in jobs:
        for need in (by_name[name, job.seed] for name in job.needs if job.begun):
            if not need.trained:
                raise ConfigError(f"{job.paths.models}: began from {need.title}, which has to be trained (again) now; "
                                  "delete this folder too or give the sweep another name")


# ---------------------------------------------------------------------- commands

def train_command(job: Job, jobs: Sequence[Job], device: str | None) -> list[str]:
    """The train.py call that starts the job's run or resumes it."""
    checkpoints = {other.method: str(other.last or other.paths.models / "checkpoint-epochN.pth") for other in jobs
                   if other.seed == job.seed}
    command = [sys.executable, str(ROOT / "train.py"), "-c", job.config, "--run_id", job.paths.models.name]
    resume = "auto" if job.begun or not job.start else checkpoints[job.start]
    command += ["-r", resume]
    settings = {key: PLACE.sub(lambda match: checkpoints[match[1]], value) if isinstance(value, str) else value
                for key, value in job.settings.items()}
    for key, value in [*settings.items(), *((item.path, item.value) for item in _identity(job))]:   # the later one wins
        command += ["--set", f"{key}={written(value)}"]
    return command + (["-d", device] if device is not None else [])


def written(value: Any) -> str:
    """A value as `--set` reads it back: JSON, or plain text where that can't be mistaken for JSON."""
    return value if isinstance(value, str) and value_of(value) == value else json.dumps(value)


def evaluation_command(job: Job, device: str | None) -> list[str]:
    """The test.py call for the job's last checkpoint."""
    return [sys.executable, str(ROOT / "test.py"), "-r", str(job.last), *shlex.split(outside_flags(job.effective)),
            *(["-d", device] if device is not None else [])]
