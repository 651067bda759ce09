"""What happens around steps and epochs: one table, and the hooks of a user's own."""
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

#: In the order in which they are called. A config names those of `trainer.hooks` by this name or as "module:Class".
HOOKS: dict[str, type[Hook]] = {hook.__name__: hook for hook in (
    WeightAverage, EpochAverage, Curves, BatchAttention, Statistics, Profiler, Figures)}


def make_hooks(run: Run, options: dict[str, Any], table: dict[str, type[Hook]] = HOOKS) -> list[Hook]:
    """The hooks of `table` that the config's `trainer` asks for, then those listed in `trainer.hooks`. Of several with
    one key the second's state is kept as "KEY-2", and so on. Raises ConfigError for one that is there already."""
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
