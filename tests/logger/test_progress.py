import logging
import sys

import pytest

from logger.log import setup_logging, shows
from logger.progress import progress_bar
from utils import dist


@pytest.mark.parametrize(("terminal", "main", "wanted"), [
    (True, True, True), (False, True, True), (True, False, True), (True, True, False)])
def test_a_bar_is_shown_on_the_first_ranks_terminal_if_wanted(monkeypatch, capsys, terminal, main, wanted):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(dist, "is_main", lambda: main)
    with progress_bar(4, wanted, desc="class means", initial=1) as bar:
        assert bar.disable is not (terminal and main and wanted)
        bar.update(3)
    assert ("class means" in capsys.readouterr().err) is (terminal and main and wanted)


@pytest.mark.parametrize(("verbosity", "shown"), [(0, [logging.WARNING]), (1, [logging.INFO, logging.WARNING])])
def test_verbosity_decides_which_levels_are_shown(verbosity, shown):
    setup_logging(verbosity)
    assert [level for level in (logging.DEBUG, logging.INFO, logging.WARNING) if shows(level)] == shown
