"""What every test shares: one thread, the command line with and without a process, and one short run to look at."""

import contextlib
import gc
import importlib
import io
import json
import os
import subprocess
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest

# Before torch is imported anywhere: on a small machine many threads make short tests slower, and sums differ with
# their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from filelock import FileLock  # torch needs it
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("suite")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def sources() -> list[Path]:
    """The project's Python files, tests apart; a virtual environment in the checkout, of whatever name, isn't ours."""
    folders = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")
               and folder.name not in ("tests", "build", "dist") and not (folder / "pyvenv.cfg").exists()]
    return sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])


def run_python(args, *, cwd=ROOT, env=None, timeout=900, check=False) -> subprocess.CompletedProcess:
    """Run `python *args` and capture its text output.

    `check` fails the test with both streams shown; without it, look at `returncode`, `stdout` and `stderr`.
    `env` adds to the environment. stdin is closed, as it is in a batch job.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in (env or {}).items()}}
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=environment, timeout=timeout,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        command = " ".join(map(str, args))
        pytest.fail(f"python {command}\nexit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done


def call_python(args, *, cwd=ROOT, check=False) -> subprocess.CompletedProcess:
    """What `run_python(["train.py" or "test.py" or "-m", "tools.X", ...])` gives, by that command's `main` in this
    process: some seconds sooner, as nothing is imported anew. What is about a process itself needs `run_python`."""
    from utils.cli import run_main
    words = list(map(str, args))
    name, words = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
    main, out, err, before = importlib.import_module(name).main, io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            run_main(lambda: main(words))
    finally:
        os.chdir(before)
    done = subprocess.CompletedProcess(args, ended.value.code, out.getvalue(), err.getvalue())
    if check and done.returncode:
        command = " ".join([name, *words])
        pytest.fail(f"{command}\nexit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def run_cli():
    """`run_cli(["train.py", "-c", ...], check=True)`, `run_cli(["-m", "tools.report", ...])`: see `run_python`."""
    return run_python


@pytest.fixture(scope="session")
def call_cli():
    """The same of `call_python`: for what isn't about a process of its own."""
    return call_python


@pytest.fixture(scope="module")
def shallow_resnet32():
    """Four blocks for ResNet-32's fifteen, in this process: what isn't about the network is the same in a third of the
    time. One stage has a block that follows another, the others only their first."""
    from model.model import FAMILIES
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES["ResNet32"], "depths", (1, 2, 1))
        yield


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    models: Path  # config.json and checkpoints
    log: Path  # info.log, metrics.csv, TensorBoard events
    checkpoint: Path  # the last epoch's
    stdout: str


def train_digits(save_dir: Path, run_id: str, *more, config="digits_lt_ride", epochs=2, check=True,
                 figures=False, command=call_python) -> Run:
    """Train a digits config for a few epochs into `save_dir`; `figures` draws the report's to TensorBoard (3 s)."""
    more = more if figures else (*more, "--set", "trainer.figures=false")
    done = command(["train.py", "-c", f"configs/{config}.json", "-d", "cpu", "--epochs", epochs, "--seed", 0,
                       "--name", "digits", "--run_id", run_id, "--save_dir", save_dir, *more], check=check)
    models, log = (Path(save_dir) / part / "digits" / run_id for part in ("models", "log"))
    return Run(models, log, models / f"checkpoint-epoch{epochs}.pth", done.stdout)


@pytest.fixture(scope="session")
def digits_trainer():
    """`digits_trainer(save_dir, run_id, *flags, config="digits_lt_ride", epochs=2) -> Run`: a run of one's own."""
    return train_digits


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory, worker_id) -> Run:
    """Two epochs of RIDE with 3 experts on digits-LT, trained once for all tests. Read from it; don't write to it.

    Of several processes that test, one trains it, in the folder above theirs, and the others wait.
    """
    if worker_id == "master":
        return train_digits(tmp_path_factory.mktemp("digits_run"), "run", figures=True, command=run_python)
    top = tmp_path_factory.getbasetemp().parent / "digits_run"
    with FileLock(f"{top}.lock"):
        trained = top.with_suffix(".json")
        if not trained.exists():
            run = train_digits(top, "run", figures=True, command=run_python)
            trained.write_text(json.dumps([str(value) for value in astuple(run)]))
        models, log, checkpoint, stdout = json.loads(trained.read_text())
        return Run(Path(models), Path(log), Path(checkpoint), stdout)


def pytest_collection_finish(session):
    """What is there once torch and the tests are imported is never garbage: no collection need look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """What needs an optional package is skipped where it isn't installed."""
    try:
        return (yield)
    except Exception as error:
        if type(error).__name__ != "MissingPackage":
            raise
        pytest.skip(str(error))
