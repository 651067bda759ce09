"""No file is ever run: the code has no reader that executes what it reads, and no way round the restricted one."""
from __future__ import annotations

import ast

import pytest

# A call of one of these on a file's content can run code in it; of MODULES every reader can, so they aren't imported.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pandas.read_pickle", "pd.read_pickle", "torch.jit.load", "torch.hub.load",
    "torch.package.PackageImporter", "Unpickler", "runpy.run_path", "os.system", "os.popen", "subprocess.getoutput"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a name or an attribute of one, else ""."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) and dotted(node.value) else ""


def is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def offences(source: str) -> list[str]:
    """Each unsafe read in a file, as "line: what"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            # Unpickler may be the base of a class that looks up names itself; calling it is an offence below.
            if [a.name for a in node.names] != ["Unpickler"] or any(a.asname for a in node.names):
                found.append(f"{node.lineno}: from {node.module}")
        elif isinstance(node, ast.ClassDef) and "Unpickler" in map(dotted, node.bases):
            if "find_class" not in {part.name for part in node.body if isinstance(part, ast.FunctionDef)}:
                found.append(f"{node.lineno}: {node.name} finds any class")
        elif isinstance(node, ast.Call):
            name, keywords = dotted(node.func), {k.arg: k.value for k in node.keywords}
            if name in FORBIDDEN or (name == "torch.load" and not is_true(keywords.get("weights_only"))):
                found.append(f"{node.lineno}: {name}")
            if name in ("np.load", "numpy.load") and "allow_pickle" in keywords:
                found.append(f"{node.lineno}: {name} with allow_pickle")
            if is_true(keywords.get("shell")):
                found.append(f"{node.lineno}: shell=True")
    return found


def test_no_unsafe_reads(sources):
    assert {"train.py", "test.py"} <= {path.name for path in sources} and len(sources) > 50
    found = {str(path): faults for path in sources if (faults := offences(path.read_text(encoding="utf-8")))}
    assert not found


@pytest.mark.parametrize("line", [
    "import pickle", "from pickle import load", "import yaml", "torch.load(path)", "torch.load(p, weights_only=False)",
    "eval(text)", "exec(text)", "np.load(path, allow_pickle=True)", "subprocess.run(text, shell=True)",
    "os.system(text)", "torch.hub.load(a, b)", "Unpickler(handle)", "from pickle import Unpickler as U",
    "class A(Unpickler):\n    pass"])
def test_the_check_sees(line):
    assert offences(line)


def test_the_check_lets_safe_reads_pass():
    safe = ["import json, pickletools", "torch.load(p, weights_only=True)", "model.eval()", "np.load(p)"]
    assert offences("\n".join(safe)) == []
