"""Hooks, called around steps and epochs: the table of built-in ones, and how a run's hooks are created."""
from __future__ import annotations

from collections import Counter
from typing import Any

from trainer.hooks.attention import BatchAttention
from trainer.hooks.averages import EpochAverage, WeightAverage
from trainer.hooks.base import Hook, Run
from trainer.hooks.curves import Curves, Figures, Statistics
from trainer.hooks.profiler import Profiler
from utils.config.build import build
from utils.errors import ConfigError

#: In the order in which they are called. `trainer.hooks` names hooks by these names or as "module:Class".
HOOKS: dict[str, type[Hook]] = {hook.__name__: hook for hook in (
    WeightAverage, EpochAverage, Curves, BatchAttention, Statistics, Profiler, Figures)}


def make_hooks(run: Run, options: dict[str, Any], table: dict[str, type[Hook]] = HOOKS) -> list[Hook]:
    """The hooks of `table` that the config's `trainer` (`options`) asks for, then those listed in `trainer.hooks`. If
    several have the same key, the second one's state is saved as "KEY-2", and so on. Raises ConfigError if
    `trainer.hooks` lists one that a key of `trainer` already switches on."""
    hooks = [kind(run) for kind in table.values() if kind.wanted(options)]
    for i, spec in enumerate(options["hooks"]):
        if spec["type"] in table and table[spec["type"]].wanted(options):
            raise ConfigError(f"trainer.hooks[{i}]: {spec['type']} is there already, by a key of `trainer` of its own; "
                              "leave it out")
        hooks.append(build(table, spec, f"trainer.hooks[{i}]", run))
    keys: Counter[str] = Counter()
    for hook in hooks:
        keys[hook.key] += 1
        if hook.key and keys[hook.key] > 1:
            hook.key = f"{hook.key}-{keys[hook.key]}"
    return hooks
