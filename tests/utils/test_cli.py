"""What an entry point does with a mistake: one line, and the exit codes."""

import io
import os
import subprocess
import sys

import pytest

from utils import cli, dist
from utils.errors import ConfigError, RunError


def fails_with(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, status, said", [
    (ConfigError("loss.type: unknown"), 2, "loss.type: unknown\n"),
    (ConfigError("Caught ConfigError in DataLoader worker process 0. Original Traceback (most recent call last): "
                 "x utils.errors.ConfigError: a/b.png: unreadable"), 2, "a/b.png: unreadable\n"),
    (RunError("loss is nan"), 1, "loss is nan\n"), (KeyboardInterrupt(), 1, "interrupted\n"),
    (OSError(28, "No space left on device", "saved/x"), 1, "saved/x: No space left on device\n"),
])
def test_run_main_says_one_line(error, status, said, capsys):
    with pytest.raises(SystemExit) as done:
        cli.run_main(fails_with(error))
    assert done.value.code == status and capsys.readouterr().err == said


def test_a_name_that_stdouts_encoding_lacks_is_spelt_out(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1251")
    monkeypatch.setattr("sys.stdout", out)
    with pytest.raises(SystemExit) as done:
        cli.run_main(lambda: print("\u00e9.png \u0436.png"))
    assert done.value.code == 0 and out.buffer.getvalue() == b"\\xe9.png \xe6.png\n"


def test_run_main_other_outcomes(capsys):
    for main, status in ((lambda: None, 0), (lambda: 3, 3), (fails_with(KeyError("x")), 1), (fails_with(OSError()), 1)):
        with pytest.raises(SystemExit) as done:
            cli.run_main(main)
        assert done.value.code == status
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("number, told", [(28, False), (2, True)])
def test_only_a_threads_full_disk_is_left_for_later(number, told, run_cli):
    code = (f"import threading; from utils.cli import run_main\ndef dies():\n    raise OSError({number}, 'x')\n"
            "def main():\n    thread = threading.Thread(target=dies); thread.start(); thread.join()\nrun_main(main)")
    assert ("Traceback" in run_cli(["-c", code], check=True).stderr) is told


def test_a_reader_that_went_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    code = "from utils.cli import run_main; run_main(lambda: [print('x' * 10000) for _ in range(9)] and None)"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_other_ranks_fail_silently_before_they_have_joined(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as done:
        cli.run_main(fails_with(ConfigError("x")))
    assert done.value.code == 2 and capsys.readouterr().err == ""


def test_warnings_stay_off_stderr(run_cli):
    code = ("import logging, warnings; from utils.cli import run_main; from utils.errors import ConfigError\n"
            "def main():\n    warnings.warn('old'); logging.getLogger('ltr').warning('early')\n"
            "    raise ConfigError('key: wrong')\nrun_main(main)")
    done = run_cli(["-c", code])
    assert done.returncode == 2 and done.stderr == "key: wrong\n"
    assert "warning: old" in done.stdout and "early" in done.stdout


def test_a_program_that_several_machines_run_is_named_with_how_they_meet(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", dist.LAUNCHED_HERE):
        monkeypatch.delenv(name, raising=False)
    assert dist.command("train.py") == "python train.py"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert dist.command("train.py") == "torchrun --nproc_per_node 8 train.py"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "node0")
    assert dist.command("train.py") == ("torchrun --nnodes 2 --rdzv_backend c10d --rdzv_id first --rdzv_endpoint "
                                        "node0:29500 --nproc_per_node 8 train.py")
