"""What constructors take, read from the source without running it.

A config error must answer in well under a second, and importing torch alone takes longer. So the checker parses
the files that define models, losses and loaders (`ast`), and torch's own optimizers and schedules, and knows each
constructor's parameters from there. The constructors stay the single source of truth: a class added to
`model/loss.py` is known at once.
"""
from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from utils.config.annotation import Type, of_default, parse

ROOT = Path(__file__).resolve().parents[2]
#: Base classes that take no arguments of their own; `**kwargs` that reach them stay closed.
_PLAIN_BASES = {"object", "Module", "ABC", "Sampler", "Dataset", "Generic", "Protocol"}


@dataclass(frozen=True)
class Parameter:
    """One argument: its type, and whether a call must give it. `default` is `...` where it isn't a plain value."""

    name: str
    type: Type
    required: bool
    default: Any = ...


@dataclass(frozen=True)
class Signature:
    """A constructor's arguments by name. `open` where it takes names that can't be known (`**kwargs` to nowhere)."""

    name: str
    parameters: dict[str, Parameter]
    open: bool = False
    doc: str = field(default="", compare=False)

    def without(self, *names: str) -> Signature:
        kept = {key: value for key, value in self.parameters.items() if key not in names}
        return Signature(self.name, kept, self.open, self.doc)


class Source:
    """One parsed file: its classes, functions, imports and simple assignments, by name."""

    def __init__(self, path: Path, root: Path):
        self.path, self.root = path, root
        self.classes: dict[str, ast.ClassDef] = {}
        self.functions: dict[str, ast.FunctionDef] = {}
        self.imports: dict[str, tuple[str, str | None]] = {}
        self.assigned: dict[str, ast.expr] = {}
        self._collect(ast.parse(path.read_bytes()).body)

    def _collect(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.FunctionDef):
                self.functions[node.name] = node
            elif isinstance(node, ast.ImportFrom):
                module = self._absolute(node)
                self.imports.update({alias.asname or alias.name: (module, alias.name) for alias in node.names})
            elif isinstance(node, ast.Import):
                self.imports.update({alias.asname: (alias.name, None) for alias in node.names if alias.asname})
            elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                self.assigned[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                self.assigned[node.target.id] = node.value
            elif isinstance(node, ast.If | ast.Try):
                self._collect([*node.body, *node.orelse])

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.path.relative_to(self.root).parts[:-1]
        package = package[:len(package) - node.level + 1]
        return ".".join((*package, *([node.module] if node.module else [])))

    def find(self, name: str) -> tuple[Source, str] | None:
        """Where `name`, as this file uses it, is defined in our own tree; None if it comes from elsewhere."""
        name, seen, source = name, set(), self
        while (source.path, name) not in seen:
            seen.add((source.path, name))
            if name in source.classes or name in source.functions:
                return source, name
            target = source.assigned.get(name)
            if isinstance(target, ast.Name):
                name = target.id
                continue
            module, attribute = source.imports.get(name, (None, None))
            file = _module_file(module, self.root) if module is not None and attribute else None
            if file is None:
                return None
            source, name = read(file, self.root), attribute
        return None


@cache
def read(path: Path, root: Path = ROOT) -> Source:
    """The parsed file (kept for the life of the process). Raises OSError, SyntaxError."""
    return Source(path, root)


def _module_file(module: str, root: Path) -> Path | None:
    stem = root.joinpath(*module.split("."))
    for file in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
        if file.is_file():
            return file
    return None


@cache
def torch_root() -> Path | None:
    """The folder that holds the `torch` package (found, not imported); None where torch isn't installed."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def class_names(path: Path, root: Path = ROOT, skip: tuple[str, ...] = (), imported: str = "") -> list[str]:
    """The public classes a file offers: its own, and those whose name ends in `imported` that it imports from our
    tree."""
    source = read(path, root)
    names = [*source.classes, *source.assigned, *(name for name in source.imports if name.endswith(imported))]
    found = [(name, source.find(name)) for name in names if not name.startswith("_") and name not in skip]
    return sorted({name for name, place in found if place and place[1] in place[0].classes})


def function_names(path: Path, root: Path = ROOT) -> list[str]:
    """The public functions that a file defines."""
    return sorted(name for name in read(path, root).functions if not name.startswith("_"))


def table_of(path: Path, name: str, root: Path = ROOT) -> dict[str, ast.expr]:
    """A module-level dict display as its string keys and the syntax of their values, e.g. `HEADS = {"linear": ...}`.

    Raises KeyError where the file has no such table.
    """
    node = read(path, root).assigned[name]
    if not isinstance(node, ast.Dict):
        raise KeyError(name)
    pairs = zip(node.keys, node.values)
    return {key.value: value for key, value in pairs if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def of_name(name: str, path: Path, root: Path = ROOT) -> Signature:
    """The arguments of class or function `name` as file `path` offers it. Raises KeyError if it doesn't."""
    place = read(path, root).find(name)
    if place is None:
        raise KeyError(name)
    source, defined = place
    if defined in source.classes:
        parameters, is_open = _class_parameters(source, source.classes[defined])
        return Signature(name, parameters, is_open, ast.get_docstring(source.classes[defined]) or "")
    node = source.functions[defined]
    return Signature(name, _parameters(source, node), node.args.kwarg is not None, ast.get_docstring(node) or "")


def _class_parameters(source: Source, node: ast.ClassDef, depth: int = 0) -> tuple[dict[str, Parameter], bool]:
    """A constructor's parameters; with `**kwargs`, or without a constructor, also the base's."""
    init = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    if init is None and any(_name_of(mark) == "dataclass" for mark in node.decorator_list):
        return _field_parameters(source, node), False
    own = _parameters(source, init, skip_first=True) if init else {}
    if init is not None and init.args.kwarg is None:
        return own, False
    inherited: dict[str, Parameter] = {}
    is_open = False
    for base in node.bases:
        place = source.find(_name_of(base)) if isinstance(base, ast.Name) else None
        if place is not None and place[1] in place[0].classes and depth < 20:
            found, base_open = _class_parameters(place[0], place[0].classes[place[1]], depth + 1)
            inherited = {**found, **inherited}
            is_open |= base_open
        elif init is not None and _name_of(base) not in _PLAIN_BASES:
            is_open = True
    if init is not None:
        inherited = _not_given(init, inherited)
    return {**own, **{key: value for key, value in inherited.items() if key not in own}}, is_open


def _not_given(init: ast.FunctionDef, inherited: dict[str, Parameter]) -> dict[str, Parameter]:
    """The base's parameters less those that `super().__init__(...)` is given by name or place."""
    for call in ast.walk(init):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "__init__"):
            continue
        given = {keyword.arg for keyword in call.keywords}
        by_place = list(inherited)[:sum(not isinstance(arg, ast.Starred) for arg in call.args)]
        return {key: value for key, value in inherited.items() if key not in given and key not in by_place}
    return inherited


def _parameters(source: Source, node: ast.FunctionDef, skip_first: bool = False) -> dict[str, Parameter]:
    args = node.args
    placed = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(placed) - len(args.defaults)) + list(args.defaults)
    pairs = list(zip(placed, defaults))[skip_first:] + list(zip(args.kwonlyargs, args.kw_defaults))
    return {arg.arg: _parameter(source, arg.arg, arg.annotation, default) for arg, default in pairs}


def _field_parameters(source: Source, node: ast.ClassDef) -> dict[str, Parameter]:
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
    return {item.target.id: _parameter(source, item.target.id, item.annotation, item.value) for item in fields}


def _parameter(source: Source, name: str, annotation: ast.expr | None, default: ast.expr | None) -> Parameter:
    value: Any = ...
    if default is not None:
        try:
            value = ast.literal_eval(default)
        except (ValueError, TypeError):
            pass
    kind = parse(annotation, source.assigned) if annotation is not None else of_default(value)
    return Parameter(name, kind, default is None, value)


def _name_of(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    node = node.value if isinstance(node, ast.Subscript) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def of_callable(target: Callable) -> Signature:
    """The same for a class or function that is already imported; `**kwargs` are followed to the base classes."""
    chain = [target]
    if inspect.isclass(target):
        chain = [kind for kind in target.__mro__ if "__init__" in vars(kind) and kind is not object]
    parameters: dict[str, Parameter] = {}
    is_open = False
    for link in chain:
        try:
            found = inspect.signature(link)
        except (TypeError, ValueError):
            return Signature(target.__name__, parameters, True)
        for name, item in found.parameters.items():
            if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD):
                parameters.setdefault(name, _live_parameter(name, item))
        is_open = any(item.kind is item.VAR_KEYWORD for item in found.parameters.values())
        if not is_open:
            break
    if inspect.isclass(target) and chain and chain[-1].__name__ in _PLAIN_BASES:
        is_open = False
    return Signature(target.__name__, parameters, is_open)


def _live_parameter(name: str, item: inspect.Parameter) -> Parameter:
    required = item.default is item.empty
    value = ... if required else item.default
    if item.annotation is item.empty:
        return Parameter(name, of_default(value), required, value)
    annotation = item.annotation
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return Parameter(name, parse(text), required, value)
