"""Constructors read from source: what is found must be what Python itself would say."""

import inspect

import pytest

from utils.config import signature
from utils.config.annotation import Mismatch, convert, parse

FILES = {
    "parts/__init__.py": "from parts.base import Base as Exported\n",
    "parts/base.py": """
from torch import nn
Spec = str | dict

class Base(nn.Module):
    def __init__(self, width: int, *, spec: Spec = "a", fixed: float = 1.0):
        super().__init__()

class Closed(nn.Module):
    def __init__(self, **more):
        super().__init__(**more)
""",
    "top.py": """
from __future__ import annotations
from typing import Literal, Optional, Union
import elsewhere
from parts import Exported as _Base
from parts.base import Base, Closed
from elsewhere import Thing, AnotherModel

class Child(_Base):
    def __init__(self, depth: int = 2, mode: Literal["exp", "step"] | None = None, **more):
        super().__init__(fixed=2.0, **more)

class GrandChild(Child):
    pass

class ByPlace(Base):
    def __init__(self, width: int, *more, **named: object):
        super().__init__(width, *more, **named)

class Stranger(elsewhere.Thing):
    def __init__(self, one: Optional[int] = None, **more):
        super().__init__(**more)

class Bare:
    pass

class Old(Base):
    def __init__(self, lr=0.1, momentum=0, nesterov=False, milestones=(), table=None):
        pass

class _Private(Base):
    pass

Alias = Child
TABLE = {"one": Child, "two": (Base, 3)}

def function(output, target, k: Union[int, None] = 5):
    pass
""",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


def names(tree, name):
    return list(signature.of_name(name, tree / "top.py", tree).parameters)


def test_parameters_follow_keyword_arguments_to_the_bases(tree):
    assert names(tree, "Child") == ["depth", "mode", "width", "spec"]  # `fixed` is the child's to give
    assert names(tree, "GrandChild") == names(tree, "Child")
    assert names(tree, "ByPlace") == ["width", "spec", "fixed"]
    assert names(tree, "Alias") == names(tree, "Child")
    assert names(tree, "Bare") == []
    child = signature.of_name("Child", tree / "top.py", tree).parameters
    assert child["width"].required and not child["depth"].required and child["depth"].default == 2
    assert child["spec"].type == parse("str | dict")  # an alias of the base's file


def test_open_only_where_arguments_go_out_of_sight(tree):
    assert signature.of_name("Stranger", tree / "top.py", tree).open
    assert not signature.of_name("Child", tree / "top.py", tree).open
    assert not signature.of_name("Closed", tree / "top.py", tree).open  # torch.nn.Module takes none


def test_unannotated_parameters_take_what_their_default_is(tree):
    old = signature.of_name("Old", tree / "top.py", tree).parameters
    assert [old[key].type.kind for key in ("lr", "momentum", "nesterov", "milestones", "table")] == [
        "float", "float", "bool", "any", "any"]


def test_names_of_classes_functions_and_tables(tree):
    top = tree / "top.py"
    own = ["Alias", "Bare", "ByPlace", "Child", "GrandChild", "Old", "Stranger"]
    assert signature.class_names(top, tree, imported="nothing") == own
    assert signature.class_names(top, tree, ("Bare",)) == sorted({*own, "Base", "Closed"} - {"Bare"})
    assert signature.function_names(top, tree) == ["function"]
    assert names(tree, "function") == ["output", "target", "k"]
    assert list(signature.table_of(top, "TABLE", tree)) == ["one", "two"]
    for missing in ("Nowhere", "Thing"):
        with pytest.raises(KeyError):
            signature.of_name(missing, top, tree)


def test_new_class_is_known_at_once(tmp_path):
    file = tmp_path / "loss.py"
    file.write_text("class ALoss:\n    def __init__(self, gamma: float = 1.0):\n        pass\n")
    assert signature.class_names(file, tmp_path) == ["ALoss"]
    signature.read.cache_clear()
    file.write_text(file.read_text() + "\n\nclass BLoss(ALoss):\n    pass\n")
    assert signature.class_names(file, tmp_path) == ["ALoss", "BLoss"]
    assert list(signature.of_name("BLoss", file, tmp_path).parameters) == ["gamma"]


SECTION_FILES = [("model.model", "model/model.py"), ("model.loss", "model/loss.py"),
                 ("data_loader.data_loaders", "data_loader/data_loaders.py")]


@pytest.mark.parametrize("module, file", SECTION_FILES)
def test_read_signatures_equal_the_imported_ones(module, file):
    """The static reader and `inspect` see the same names, and the same types for each."""
    imported = __import__(module, fromlist=["x"])
    path = signature.ROOT / file
    for name in signature.class_names(path, imported="Model" if "model.py" in file else "DataLoader"):
        still, live = signature.of_name(name, path), signature.of_callable(getattr(imported, name))
        assert set(still.parameters) <= set(live.parameters), name
        for key, item in still.parameters.items():
            assert item.type == live.parameters[key].type, (name, key)
            assert item.required == live.parameters[key].required, (name, key)


def test_torch_optimizers_and_schedules_are_read_as_they_are():
    import torch
    root = signature.torch_root()
    for file, module in (("torch/optim/__init__.py", torch.optim),
                         ("torch/optim/lr_scheduler.py", torch.optim.lr_scheduler)):
        for name in signature.class_names(root / file, root):
            if name in ("Tensor", "Optimizer"):
                continue
            still = signature.of_name(name, root / file, root)
            assert set(still.parameters) == set(inspect.signature(getattr(module, name)).parameters), name


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


@pytest.mark.parametrize("annotation, value, expected", ACCEPTED)
def test_annotation_accepts(annotation, value, expected):
    found = convert(value, parse(annotation))
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("annotation, value", REFUSED)
def test_annotation_refuses(annotation, value):
    with pytest.raises(Mismatch):
        convert(value, parse(annotation))


def test_words_for_types():
    assert parse("int | None").describe() == "a whole number or null"
    assert parse("Literal['exp', 'step']").describe() == 'one of "exp", "step"'
    assert parse("list[float] | Tensor").describe() == "a list of numbers"
    assert not parse("Callable[[int], float]").jsonable and not parse("Sequence[LRScheduler]").jsonable
