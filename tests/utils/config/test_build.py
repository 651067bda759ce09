"""Building by name: the same checks as for a config file, for those who call Python."""

import types

import pytest
import torch

from utils.config.build import build, check_args, lookup
from utils.config.signature import of_callable
from utils.errors import ConfigError


class Plain:
    def __init__(self, size: int, rate: float = 0.5, names: list[str] | None = None, *,
                 betas: tuple[float, float] = (0.9, 0.99)):
        if rate > 1:
            raise ValueError("rate is over 1")
        self.size, self.rate, self.names, self.betas = size, rate, names, betas


class Child(Plain):
    def __init__(self, seed: int = 0, **more):
        super().__init__(**more)
        self.seed = seed


TABLE = {"Plain": Plain, "Child": Child}


def test_builds_with_converted_arguments():
    made = build(TABLE, {"type": "Plain", "args": {"size": 3, "rate": 1, "betas": [0, 1]}}, "thing")
    assert (made.size, made.rate, made.betas) == (3, 1.0, (0.0, 1.0)) and isinstance(made.rate, float)
    assert build(TABLE, {"type": "Plain"}, "thing", 4).size == 4
    assert build(TABLE, {"type": "Plain", "args": None}, "thing", size=5).size == 5


def test_extra_arguments_go_only_where_they_are_taken_and_win():
    spec = {"type": "Plain", "args": {"size": 3}}
    assert build(TABLE, spec, "thing", size=7, device="cpu", rank=0).size == 7
    made = build(TABLE, {"type": "Child", "args": {"size": 1}}, "thing", seed=9, world_size=2)
    assert (made.seed, made.size) == (9, 1)
    assert spec == {"type": "Plain", "args": {"size": 3}}


@pytest.mark.parametrize("spec, said", [
    ({"type": "Plan", "args": {}}, "thing.type: unknown name 'Plan'; did you mean 'Plain'"),
    ({"type": "Plain", "args": {"sise": 3}}, "thing.args.sise: unknown argument of Plain 'sise'; did you mean 'size'"),
    ({"type": "Child", "args": {"siz": 3}}, "thing.args.siz: unknown argument of Child 'siz'; did you mean 'size'"),
    ({"type": "Plain", "args": {}}, "thing.args.size: missing; Plain needs it (a whole number)"),
    ({"type": "Plain", "args": {"size": "3"}}, 'thing.args.size: must be a whole number, not "3"'),
    ({"type": "Plain", "args": {"size": 3, "names": ["a", 2]}}, "thing.args.names[1]: must be text, not 2"),
    ({"type": "Plain", "args": {"size": 3, "rate": 2}}, "thing.args: Plain: rate is over 1"),
    ({"args": {}}, "thing: must be an object"),
    ([], "thing: must be an object"),
])
def test_mistakes_are_named(spec, said):
    with pytest.raises(ConfigError) as caught:
        build(TABLE, spec, "thing")
    assert str(caught.value).startswith(said), caught.value


def test_what_the_program_gives_by_place_cannot_be_given_twice():
    with pytest.raises(ConfigError, match=r"thing\.args\.size: the program gives"):
        build(TABLE, {"type": "Plain", "args": {"size": 1}}, "thing", 4)


def test_lookup_in_a_module_sees_public_classes_only():
    module = types.ModuleType("m")
    module.Plain, module._Hidden, module.number, module.torch = Plain, Child, 3, torch
    assert lookup(module, "Plain", "x") is Plain
    for name in ("_Hidden", "number", "torch", "__name__", 5, None, ["Plain"]):
        with pytest.raises(ConfigError):
            lookup(module, name, "x")


def test_torch_optimizer_through_the_same_door():
    weight = torch.nn.Parameter(torch.zeros(2))
    spec = {"type": "AdamW", "args": {"lr": 1, "betas": [0.8, 0.9]}}
    made = build(torch.optim, spec, "optimizer", [weight])
    assert made.defaults["lr"] == 1.0 and made.defaults["betas"] == (0.8, 0.9)
    with pytest.raises(ConfigError, match=r"optimizer\.args\.momentm: .*did you mean 'momentum'"):
        build(torch.optim, {"type": "SGD", "args": {"momentm": 0.9}}, "optimizer", [weight])
    with pytest.raises(ConfigError, match=r"optimizer\.args: SGD: Nesterov"):
        build(torch.optim, {"type": "SGD", "args": {"lr": 0.1, "nesterov": True}}, "optimizer", [weight])


def test_text_typed_on_the_command_line_stays_text_where_text_is_wanted():
    signature = of_callable(lambda folder="x", size=3: None)
    assert check_args(signature, {"folder": 7, "size": 4}, "a", texts={"a.folder": "007", "a.size": "4"})["size"] == 4.0

    def typed(folder: str, size: int = 3):
        return folder

    found = check_args(of_callable(typed), {"folder": 7}, "a", texts={"a.folder": "007"})
    assert found == {"folder": "007"}
    with pytest.raises(ConfigError, match=r"a\.size: must be a whole number"):
        check_args(of_callable(typed), {"folder": "x", "size": "x"}, "a", texts={"a.size": "x"})
