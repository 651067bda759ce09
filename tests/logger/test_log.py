"""stdout and info.log: every module of the project is heard in both, each line once."""

import io
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from logger.log import get_logger, log_to_file, set_verbosity, setup_logging


@pytest.fixture(autouse=True)
def afterwards():
    root = logging.getLogger("ltr")
    before = list(root.handlers), root.level, root.propagate
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level, root.propagate = before


def test_no_module_logs_beside_the_project(sources):
    """A logger named after its module has no handler of ours: what it says never comes to info.log."""
    assert len(sources) > 50
    for path in sources:
        if "benchmarks" not in path.parts:
            for name in re.findall(r"getLogger\(([^)]*)\)", path.read_text(encoding="utf-8")):
                assert name.lstrip("f").startswith('"ltr') or name == "noisy", f"{path}: getLogger({name})"


def test_info_log_begins_with_what_was_said_before_it_was_there(tmp_path, capsys):
    setup_logging()
    logging.getLogger("ltr.checkpoint").warning("checkpoint-epoch3.pth is cut short")
    set_verbosity(0)
    get_logger().info("ten classes")
    log_to_file(tmp_path / "log")
    get_logger().info("epoch 1")
    log_to_file(tmp_path / "other")
    lines = (tmp_path / "log" / "info.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "WARNING checkpoint-epoch3.pth is cut short", "INFO ten classes", "INFO epoch 1"]
    assert (tmp_path / "other" / "info.log").read_text() == ""  # another run's words aren't repeated
    assert capsys.readouterr().out == "warning: checkpoint-epoch3.pth is cut short\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_one_warning(tmp_path, capsys):
    setup_logging()
    for line in ("one", "two"):
        get_logger().info(line)
    (tmp_path / "info.log").symlink_to("/dev/full")
    log_to_file(tmp_path)
    get_logger().info("three")
    said = capsys.readouterr().out.splitlines()
    assert said == ["one", "two", f"warning: {tmp_path / 'info.log'} can't be written: No space left on device",
                    "three"]


@pytest.mark.parametrize(("terminal", "settings", "coloured"), [
    (True, {}, True), (False, {}, False), (True, {"NO_COLOR": ""}, False), (True, {"TERM": "dumb"}, False)])
def test_warnings_are_coloured_on_a_terminal_only(monkeypatch, capsys, terminal, settings, coloured):
    for name, value in {"NO_COLOR": None, "TERM": "xterm", **settings}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    setup_logging()
    get_logger().info("plain")
    get_logger().warning("odd")
    plain, odd = capsys.readouterr().out.splitlines()
    assert plain == "plain" and "warning: odd" in odd and ("\033[" in odd) is coloured


@pytest.mark.parametrize("bar", [False, True])
def test_a_reader_that_goes_away_stops_no_run(tmp_path, monkeypatch, capsys, bar):
    """`python train.py ... | head`: no tracebacks, and info.log has the rest; beside a progress bar too."""
    def gone(text):
        raise BrokenPipeError
    log = setup_logging()
    log_to_file(tmp_path)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=gone, flush=lambda: None))
    with tqdm(total=2, file=io.StringIO(), disable=not bar):
        log.info("one")
        log.info("two")
    assert capsys.readouterr().err == "" and (tmp_path / "info.log").read_text().count("INFO") == 2
