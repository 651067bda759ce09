"""What an entry point does with a mistake: one line, and the exit codes."""

import pytest

from utils import cli
from utils.errors import ConfigError, RunError


def fails_with(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, status, said", [
    (ConfigError("loss.type: unknown"), 2, "loss.type: unknown\n"),
    (ConfigError("Caught ConfigError in DataLoader worker process 0. Original Traceback (most recent call last): "
                 "x utils.errors.ConfigError: a/b.png: unreadable"), 2, "a/b.png: unreadable\n"),
    (RunError("loss is nan"), 1, "loss is nan\n"), (KeyboardInterrupt(), 130, "interrupted\n"),
    (OSError(28, "No space left on device", "saved/x"), 1, "saved/x: No space left on device\n"),
])
def test_run_main_says_one_line(error, status, said, capsys):
    with pytest.raises(SystemExit) as done:
        cli.run_main(fails_with(error))
    assert done.value.code == status and capsys.readouterr().err == said


def test_run_main_other_outcomes(capsys):
    for main, status in ((lambda: None, 0), (lambda: 3, 3), (fails_with(KeyError("x")), 1), (fails_with(OSError()), 1)):
        with pytest.raises(SystemExit) as done:
            cli.run_main(main)
        assert done.value.code == status
    assert "Traceback" in capsys.readouterr().err


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
