"""What happens around steps and epochs: one table, and the hooks of a user's own."""
from __future__ import annotations

from typing import Any

from trainer.hooks.attention import BatchAttention
from trainer.hooks.averages import EpochAverage, WeightAverage
from trainer.hooks.base import Hook, Run
from trainer.hooks.curves import Curves, Figures, Statistics
from trainer.hooks.profiler import Profiler
from utils.config.build import build

#: In the order in which they are called. A config names those of `trainer.hooks` by this name or as "module:Class".
HOOKS: dict[str, type[Hook]] = {hook.__name__: hook for hook in (
    WeightAverage, EpochAverage, Curves, BatchAttention, Statistics, Profiler, Figures)}


def make_hooks(run: Run, options: dict[str, Any], table: dict[str, type[Hook]] = HOOKS) -> list[Hook]:
    """The hooks of `table` that the config's `trainer` asks for, then those listed in `trainer.hooks`."""
    hooks = [kind(run) for kind in table.values() if kind.wanted(options)]
    return hooks + [build(table, spec, f"trainer.hooks[{i}]", run) for i, spec in enumerate(options["hooks"])]
