"""Imports flow one way: utils <- logger <- base <- model | data_loader <- trainer <- entry points."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "utils": set(),
    "logger": {"utils"},
    "base": {"utils", "logger"},
    "model": {"base", "utils"},
    "data_loader": {"base", "utils"},
    "trainer": {"base", "model", "logger", "utils"},
}
#: Entry points: commands of their own (`python -m utils.x`), and what only they use. They may import every room.
TOOLS = {"session", "predict", "report", "compare", "export", "gflops", "sweep", "convert_checkpoint"}


def imports(path):
    """(room, line) of everything of ours that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            if name.split(".")[0] in ALLOWED:
                yield name, node.lineno


def is_tool(path):
    """A tool, or a part of the report that only tools import."""
    if path.parent.name != "utils" or path.stem in TOOLS:
        return path.parent.name == "utils"
    return bool(tool_parts() & {path.stem})


@cache
def tool_parts():
    """Files of utils/ that no room imports: they belong to the tools."""
    used = set()
    for room in ALLOWED:
        for file in (ROOT / room).rglob("*.py"):
            if room == "utils" and file.stem in TOOLS:
                continue
            used |= {name.split(".")[1] for name, _ in imports(file) if name.startswith("utils.")}
    return {file.stem for file in (ROOT / "utils").glob("*.py")} - used


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_flow_one_way(room):
    wrong = []
    for file in sorted((ROOT / room).rglob("*.py")):
        if is_tool(file):
            continue
        for name, line in imports(file):
            other = name.split(".")[0]
            if other != room and other not in ALLOWED[room]:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_models_and_data_meet_only_in_entry_points():
    for room, other in (("model", "data_loader"), ("data_loader", "model")):
        for file in (ROOT / room).rglob("*.py"):
            assert not any(name.split(".")[0] == other for name, _ in imports(file)), file
