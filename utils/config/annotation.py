"""What a type annotation says about a JSON value: `int`, `float | None`, `list[int]`, `Literal["exp", "step"]`, ..."""
from __future__ import annotations

import inspect
import json
import math
import os
import types
import typing
from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_SAID = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "none": "null",
         "any": "any value", "foreign": "a Python object"}
_ATOMS = {int: "int", float: "float", bool: "bool", str: "str", type(None): "none", object: "any",
          Any: "any", inspect.Parameter.empty: "any", Path: "str", os.PathLike: "str"}
_LISTS = (list, abc.Sequence, abc.MutableSequence, abc.Collection, abc.Iterable)
_DICTS = (dict, abc.Mapping, abc.MutableMapping)


@dataclass(frozen=True)
class Type:
    """A kind (`int float bool str none any foreign list tuple dict union literal`) and what it is made of.

    `foreign` is anything JSON can't hold: a tensor, a module, a function.
    """

    kind: str
    items: tuple = ()

    @property
    def jsonable(self) -> bool:
        """Whether a JSON value can be of this type."""
        if self.kind == "union":
            return any(item.jsonable for item in self.items)
        if self.kind in ("list", "tuple", "dict"):
            return all(item.jsonable for item in self.items)
        return self.kind != "foreign"

    def describe(self) -> str:
        """In words: "a whole number", "a number or null", "one of 'exp', 'step'"."""
        if self.kind == "union":
            said = dict.fromkeys(item.describe() for item in self.items if item.jsonable)
            return " or ".join(said) or _SAID["foreign"]
        if self.kind == "literal":
            words = ", ".join(json.dumps(item) for item in self.items)
            return f"one of {words}" if len(self.items) > 1 else words
        if self.kind == "tuple" and self.items:
            return f"a list of {len(self.items)} values ({', '.join(item.describe() for item in self.items)})"
        if self.kind in ("list", "tuple"):
            plain = self.items and self.items[0].kind in ("int", "float", "str")
            return {"int": "a list of whole numbers", "float": "a list of numbers",
                    "str": "a list of texts"}[self.items[0].kind] if plain else "a list"
        return "an object {...}" if self.kind == "dict" else _SAID[self.kind]


ANY = Type("any")
FOREIGN = Type("foreign")


def parse(annotation: Any, names: Mapping[str, Any] | None = None) -> Type:
    """The Type of an annotation, which may be a string; `names` are those that the string may use.

    A missing one is `any`; one whose names can't be resolved, such as imports under TYPE_CHECKING, is `foreign`.
    """
    if isinstance(annotation, str):
        holder = SimpleNamespace(__annotations__={"it": annotation.strip()})
        try:
            annotation = typing.get_type_hints(holder, {**vars(typing), **(names or {})})["it"]
        except Exception:  # whatever evaluating it raises
            return FOREIGN
    origin, items = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin is typing.Annotated:
        return parse(items[0], names)
    if origin in (typing.Union, types.UnionType):
        return _union([parse(item, names) for item in items])
    if origin is typing.Literal:
        return Type("literal", items)
    if not isinstance(origin, type):
        return Type("none") if origin is None else FOREIGN
    if origin in _ATOMS:
        return Type(_ATOMS[origin])
    if origin in _DICTS:
        return Type("dict", tuple(parse(item, names) for item in items[-1:]))
    if origin is tuple and items[-1:] != (...,):
        return Type("tuple", tuple(parse(item, names) for item in items))
    if origin is tuple or origin in _LISTS:
        return Type("list", tuple(parse(item, names) for item in items[:1]))
    return FOREIGN


def _union(members: list[Type]) -> Type:
    flat = [item for kind in members for item in (kind.items if kind.kind == "union" else (kind,))]
    return Type("union", tuple(dict.fromkeys(flat)))


def of_default(value: Any) -> Type:
    """The Type of an unannotated parameter by its default: a number for 0 or 0.1, a bool for True, else anything."""
    if isinstance(value, bool):
        return Type("bool")
    if isinstance(value, int | float):
        return Type("float")
    return ANY


class Mismatch(Exception):
    """A value isn't of the expected type; `where` is the place inside it, such as `[2]`."""

    def __init__(self, where: str, expected: Type, value: Any):
        super().__init__(where, expected, value)
        self.where, self.expected, self.value = where, expected, value


def convert(value: Any, kind: Type, where: str = "") -> Any:
    """`value` converted to `kind`: 0 and 1 become false and true for a bool, 1 becomes 1.0 for a float.

    Neither a bool nor 1.0 passes for an int; numbers must be finite. Raises Mismatch.
    """
    if kind.kind == "any":
        return value
    if kind.kind == "union":
        return _convert_union(value, kind, where)
    if kind.kind == "literal":
        for item in kind.items:
            if type(item) is type(value) and item == value:
                return item
    elif kind.kind in ("list", "tuple") and isinstance(value, list | tuple):
        return _convert_list(value, kind, where)
    elif kind.kind == "dict" and isinstance(value, Mapping):
        inner = kind.items[0] if kind.items else ANY
        return {key: convert(item, inner, f"{where}.{key}") for key, item in value.items()}
    elif kind.kind in _SIMPLE:
        fits, as_kind = _SIMPLE[kind.kind]
        if fits(value):
            return as_kind(value)
    raise Mismatch(where, kind, value)


def _convert_list(value: Any, kind: Type, where: str) -> list:
    if kind.kind == "tuple" and kind.items:
        if len(value) != len(kind.items):
            raise Mismatch(where, kind, value)
        return [convert(item, inner, f"{where}[{i}]") for i, (item, inner) in enumerate(zip(value, kind.items))]
    inner = kind.items[0] if kind.items else ANY
    return [convert(item, inner, f"{where}[{i}]") for i, item in enumerate(value)]


def _convert_union(value: Any, kind: Type, where: str) -> Any:
    """The member of the value's own Python type is tried first: 1 stays 1 in `bool | int`, true stays true."""
    own = {bool: "bool", int: "int", float: "float", str: "str", type(None): "none"}.get(type(value))
    members = sorted((item for item in kind.items if item.jsonable), key=lambda item: item.kind not in (own, "literal"))
    inside = None
    for item in members:
        try:
            return convert(value, item, where)
        except Mismatch as mismatch:
            # For a list with one wrong element, report that element, not the whole union.
            inside = mismatch if mismatch.where != where else inside
    raise inside or Mismatch(where, kind, value)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


_SIMPLE = {
    "none": (lambda value: value is None, lambda value: value),
    "bool": (lambda value: isinstance(value, bool) or (type(value) is int and value in (0, 1)), bool),
    "int": (lambda value: isinstance(value, int) and not isinstance(value, bool), int),
    "float": (_is_number, float),
    "str": (lambda value: isinstance(value, str), str),
}


def shown(value: Any, limit: int = 60) -> str:
    """A value as JSON for messages, cut to `limit` characters."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        text = repr(type(value).__name__)
    return text if len(text) <= limit else text[:limit - 3] + "..."
