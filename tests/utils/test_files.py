"""Files are written whole, and what isn't a plain file stays what it is."""
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from utils.files import atomic_write, write_text

REPO = Path(__file__).resolve().parents[2]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "table.csv", tmp_path / "table.csv"
    link.symlink_to(target)         # nothing is there yet
    for text in ("a\n", "b\n"):
        write_text(link, text)
        assert link.is_symlink() and target.read_text() == text
    assert os.listdir(tmp_path / "there") == ["table.csv"]


def test_a_pipe_and_a_device_are_written_to(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    write_text(pipe, "a,b\n")
    reader.join(10)
    assert got == ["a,b\n"] and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
    (tmp_path / "null").symlink_to(os.devnull)
    write_text(tmp_path / "null", "x")
    assert (tmp_path / "null").is_char_device()


def test_a_file_that_the_shell_appends_to_keeps_its_lines(tmp_path):
    file = tmp_path / "all.csv"
    file.write_text("earlier\n")
    script = "from utils.files import write_text\nfor i in range(2): write_text('/dev/stdout', f'{i}\\n')"
    with file.open("a") as handle:
        subprocess.run([sys.executable, "-c", script], stdout=handle, check=True, cwd=REPO)
    assert file.read_text() == "earlier\n0\n1\n" and os.listdir(tmp_path) == ["all.csv"]


def test_half_a_file_is_never_left(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("before")
    with pytest.raises(KeyError), atomic_write(file) as handle:
        handle.write(b"half")
        raise KeyError
    assert file.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]
