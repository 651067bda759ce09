"""Imports flow one way: utils <- logger <- base <- criteria <- model | data_loader <- trainer <- tools <- train.py."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Room -> the rooms that it may import.
ALLOWED = {
    "utils": set(),
    "logger": {"utils"},
    "base": {"utils", "logger"},
    "criteria": {"base", "utils"},
    "model": {"criteria", "base", "logger", "utils"},
    "data_loader": {"base", "logger", "utils"},
    "trainer": {"criteria", "model", "data_loader", "base", "logger", "utils"},
    "tools": {"trainer", "criteria", "model", "data_loader", "base", "logger", "utils"},
}


def imports(path):
    """(module, line) of everything of ours that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in ALLOWED:
                yield name, node.lineno


def files(room):
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_flow_one_way(room):
    wrong = []
    for file in files(room):
        for name, line in imports(file):
            other = name.split(".")[0]
            if other != room and other not in ALLOWED[room]:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_nothing_reaches_through_a_models_backbone():
    """What is asked of a model stands in `BaseModel`; only `model` knows how one is made inside."""
    reaching = [f"{file.relative_to(ROOT)}:{node.lineno}" for room in ALLOWED if room != "model" for file in files(room)
                for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                if isinstance(node, ast.Attribute) and node.attr == "backbone"]
    assert not reaching, reaching


def test_no_circle_of_files():
    """An import inside a function counts: it only puts the circle off."""
    home = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
            for room in ALLOWED for file in files(room)}
    needs = {module: {name for name, _ in imports(file) if name in home and name != module and not is_face(home[name])}
             for module, file in home.items()}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module):], module])
        if module in done:
            return
        path.append(module)
        for other in sorted(needs[module]):
            visit(other)
        done.add(path.pop())

    for module in sorted(home):
        visit(module)


def is_face(file):
    """A package's face that defines nothing and only hands names on."""
    return file.name == "__init__.py" and not any(
        isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.parse(file.read_text(encoding="utf-8")).body)


def test_no_room_is_an_attic():
    """No room holds over a quarter of the lines; a file over 300 lines says why at its head."""
    lines = {room: sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files(room)) for room in ALLOWED}
    total = sum(lines.values())
    assert all(count <= total / 4 for count in lines.values()), lines
    assert lines["utils"] < 2500, lines["utils"]
    for room in ALLOWED:
        for file in files(room):
            text = file.read_text(encoding="utf-8")
            if len(text.splitlines()) > 300:
                reason = ast.get_docstring(ast.parse(text)) or ""
                assert "one file" in reason.lower(), f"{file.relative_to(ROOT)}: {len(text.splitlines())} lines"


WITHOUT_POSIX = """
import importlib, os, signal, sys
import PIL.Image, matplotlib.figure, pandas, sklearn.datasets, torch, torchvision, torch.utils.tensorboard
for name in ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGKILL"):
    delattr(signal, name)
for name in ("pread", "sched_getaffinity", "fork", "getuid"):
    delattr(os, name)
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="takes away what this system never had")
def test_every_file_imports_where_there_is_no_posix():
    """On Windows, that is: what it lacks is taken away here from Python, but not from the libraries."""
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
               for room in [*ALLOWED, "benchmarks"] for file in files(room)]
    done = subprocess.run([sys.executable, "-c", WITHOUT_POSIX, *modules, "train", "test"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
