"""The code keeps to the oldest Python that pyproject.toml admits: neither syntax nor library calls of a newer one."""
from __future__ import annotations

import ast
import re

import pytest

# What came after 3.10 and is easily written by mistake: modules, names and keywords of calls.
MODULES = {"tomllib"}
NAMES = {"datetime.UTC", "contextlib.chdir", "enum.StrEnum", "hashlib.file_digest", "itertools.batched",
         "typing.Self", "typing.assert_never", "typing.override"}
KEYWORDS = {("catch_warnings", "action"), ("rmtree", "onexc"), ("rglob", "case_sensitive"), ("glob", "case_sensitive")}


def newer(source: str, python: tuple[int, int]) -> list[str]:
    """Each use of something that `python` lacks, as "line: what"."""
    found = []
    for node in ast.walk(ast.parse(source, feature_version=python)):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: {a.name}" for a in node.names if a.name in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names]
            found += [f"{node.lineno}: {name}" for name in names if name in NAMES or node.module in MODULES]
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            found += [f"{node.lineno}: {name}"] * (name in NAMES)
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func).rpartition(".")[2]
            found += [f"{node.lineno}: {function}({k.arg}=)" for k in node.keywords if (function, k.arg) in KEYWORDS]
    return found


def test_sources(root, sources):
    oldest = re.search(r'requires-python = ">=(\d+)\.(\d+)"', (root / "pyproject.toml").read_text(encoding="utf-8"))
    assert oldest.groups() == ("3", "10")  # or MODULES, NAMES and KEYWORDS are out of date
    python = tuple(map(int, oldest.groups()))
    files = [*sources, *(root / "tests").rglob("*.py")]
    found = {str(path): uses for path in files if (uses := newer(path.read_text(encoding="utf-8"), python))}
    assert not found


@pytest.mark.parametrize("line", [
    "import tomllib", "from tomllib import loads", "from typing import Self", "datetime.UTC",
    "warnings.catch_warnings(action='ignore')"])
def test_what_is_newer(line):
    assert newer(line, (3, 10))
    assert not newer("warnings.catch_warnings(record=True)\nimport json", (3, 10))


def test_newer_syntax():
    with pytest.raises(SyntaxError):
        newer("try:\n    pass\nexcept* ValueError:\n    pass", (3, 10))
