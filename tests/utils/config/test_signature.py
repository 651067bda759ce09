"""What constructors take and what annotations say about JSON values."""

import os
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.config.annotation import Mismatch, convert, parse
from utils.config.signature import of_callable

if typing.TYPE_CHECKING:
    import nowhere

Spec = str | dict


class Base(nn.Module):
    def __init__(self, width: int, *, spec: "Spec" = "a", fixed: float = 1.0):
        super().__init__()


class Child(Base):
    def __init__(self, depth: int = 2, mode: "typing.Literal['exp', 'step'] | None" = None, **more):
        super().__init__(**more)


class ByPlace(Base):
    def __init__(self, width: int, *more, **named: object):
        super().__init__(width, *more, **named)


class Closed(nn.Module):
    def __init__(self, **more):
        super().__init__(**more)


class Stranger(Path):
    def __init__(self, one: int | None = None, **more):
        pass


class Old:
    def __init__(self, lr=0.1, momentum=0, nesterov=False, milestones=(), table=None, odd: "nowhere.Thing" = None):
        pass


class Bare:
    pass


def function(output, target, k: int | None = 5):
    pass


def names(target):
    return list(of_callable(target).parameters)


def test_parameters_follow_keyword_arguments_to_the_bases():
    assert names(Child) == ["depth", "mode", "width", "spec", "fixed"]
    assert names(type("GrandChild", (Child,), {})) == names(Child)
    assert names(ByPlace) == ["width", "spec", "fixed"]
    assert names(Bare) == [] and names(function) == ["output", "target", "k"]
    child = of_callable(Child).parameters
    assert child["width"].required and not child["depth"].required
    assert child["spec"].type == parse("str | dict")  # an alias of the base's module


def test_open_only_where_arguments_go_out_of_sight():
    assert of_callable(Stranger).open
    assert not of_callable(Child).open and not of_callable(ByPlace).open
    assert not of_callable(Closed).open  # torch.nn.Module takes none
    assert of_callable(dict).open        # compiled: it doesn't say


def test_unannotated_parameters_take_what_their_default_is():
    old = of_callable(Old).parameters
    assert [old[key].type.kind for key in ("lr", "momentum", "nesterov", "milestones", "table", "odd")] == [
        "float", "float", "bool", "any", "any", "foreign"]  # the last is imported for type checkers alone


ACCEPTED = [
    ("int", 3, 3), ("float", 3, 3.0), ("float", 0.5, 0.5), ("bool", 1, True), ("bool", 0, False), ("bool", True, True),
    ("str", "x", "x"), ("None", None, None), ("int | None", None, None), ("Optional[int]", 4, 4),
    ("typing.Union[int, str]", "a", "a"), ("bool | int", 1, 1), ("bool | int", True, True), ("float | Tensor", 1, 1.0),
    ("list[int]", [1, 2], [1, 2]), ("list[float]", [1], [1.0]), ("list", ["a", 1], ["a", 1]), ("Iterable[int]", [], []),
    ("tuple[float, float]", [0, 1], [0.0, 1.0]), ("tuple[int, ...]", [1, 2, 3], [1, 2, 3]),
    ("dict", {"a": 1}, {"a": 1}), ("dict[str, int]", {"a": 1}, {"a": 1}), ("Literal['a', 'b']", "b", "b"),
    ("Literal[False, 'off']", False, False), ("Any", [1], [1]), ("str | os.PathLike", "d", "d"), ("Path", "d", "d"),
    ("'int | None'", 2, 2), ("Annotated[int, 'units']", 2, 2), ("list[int] | int", 3, 3), ("float | int", 3, 3),
]
REFUSED = [
    ("int", True), ("int", 1.0), ("int", "1"), ("int", None), ("float", "1"), ("float", True), ("float", float("inf")),
    ("float", 10**400), ("bool", 2), ("bool", 1.0), ("bool", "true"), ("str", 1), ("None", 0), ("list[int]", [1, "a"]),
    ("list[int]", "12"), ("tuple[float, float]", [1.0]), ("dict", []), ("Literal['a']", "c"), ("Literal[0]", False),
    ("Tensor", 1), ("float | Tensor", "x"), ("Callable | None", "f"), ("int | None", "x"), ("not ( python", 1),
]


#: What the module of a constructor would have imported.
NAMES = {"Path": Path, "Tensor": torch.Tensor, "os": os, "typing": typing}


@pytest.mark.parametrize("annotation, value, expected", ACCEPTED)
def test_annotation_accepts(annotation, value, expected):
    found = convert(value, parse(annotation, NAMES))
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("annotation, value", REFUSED)
def test_annotation_refuses(annotation, value):
    with pytest.raises(Mismatch):
        convert(value, parse(annotation, NAMES))


def test_words_for_types():
    assert parse("int | None").describe() == "a whole number or null"
    assert parse("Literal['exp', 'step']").describe() == 'one of "exp", "step"'
    assert parse("list[float] | Tensor", NAMES).describe() == "a list of numbers"
    assert not parse("Callable[[int], float]").jsonable and not parse("Sequence[LRScheduler]").jsonable
