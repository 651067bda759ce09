"""The arguments that constructors take, read with `inspect.signature`."""
from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from utils.config.annotation import Type, of_default, parse

#: Base classes that take no arguments: `**kwargs` that are passed on to them accept no unknown names.
_PLAIN_BASES = {"object", "Module", "ABC", "Sampler", "Dataset", "Generic", "Protocol"}


@dataclass(frozen=True)
class Parameter:
    """One argument: its type, and whether a call must give it."""

    name: str
    type: Type
    required: bool


@dataclass(frozen=True)
class Signature:
    """A constructor's arguments by name. `open`: it also accepts any other name (`**kwargs` that can't be followed)."""

    name: str
    parameters: dict[str, Parameter]
    open: bool = False

    def without(self, *names: str) -> Signature:
        """A copy that lacks the named arguments."""
        kept = {key: value for key, value in self.parameters.items() if key not in names}
        return Signature(self.name, kept, self.open)


def of_callable(target: Callable, name: str | None = None) -> Signature:
    """The arguments of a class or function; `**kwargs` are followed to base classes. name: its name in messages."""
    name = name or getattr(target, "__name__", type(target).__name__)
    chain: list[Callable] = [target]
    if inspect.isclass(target):
        owners = [kind for kind in target.__mro__ if "__init__" in vars(kind) and kind is not object]
        chain = [kind.__init__ for kind in owners]
    parameters: dict[str, Parameter] = {}
    is_open = False
    for link in chain:
        try:
            found = list(inspect.signature(link).parameters.values())[inspect.isclass(target):]  # less self
        except (TypeError, ValueError):  # compiled code that has no signature
            return Signature(name, parameters, True)
        names = getattr(inspect.unwrap(link), "__globals__", {})
        for item in found:
            if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD):
                parameters.setdefault(item.name, _parameter(item, names))
        is_open = any(item.kind is item.VAR_KEYWORD for item in found)
        if not is_open:
            break
    if inspect.isclass(target) and chain and owners[-1].__name__ in _PLAIN_BASES:
        is_open = False
    return Signature(name, parameters, is_open)


def _parameter(item: inspect.Parameter, names: dict[str, Any]) -> Parameter:
    kind = of_default(item.default) if item.annotation is item.empty else parse(item.annotation, names)
    return Parameter(item.name, kind, item.default is item.empty)
