"""The project's learning-rate schedules, as factors of the base rate over time: RIDE's, BatchFormer's, detection's."""
from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import Literal

By = Literal["epoch", "step"]


def warm_up(t: float, warmup_epoch: float, unit: float, start: float = 0.0) -> float:
    """The factor at time t (in epochs) of a linear warm-up over `warmup_epoch` epochs. unit: how long a
    rate lasts, in epochs.

    It rises linearly from `start` before the first unit to 1 in the last: RIDE's (e + 1) / warmup_epoch if
    the unit is an epoch.
    """
    return start + (1 - start) * min(1.0, (t + unit) / warmup_epoch) if t < warmup_epoch else 1.0


def custom_lr(step1: int, step2: int, gamma: float = 0.1, warmup_epoch: float = 0, warmup_start: float = 0.0,
              by: By = "epoch", unit: float = 1.0) -> Callable[[float], float]:
    """RIDE's schedule as a factor of the base rate, by time t in epochs (t = e = 0, 1, ... with `by` epoch).

    1, then gamma from `step1` on, gamma² from `step2` on; multiplied by `warm_up` during the first
    `warmup_epoch` epochs.
    """
    return lambda t: gamma ** ((t >= step1) + (t >= step2)) * warm_up(t, warmup_epoch, unit, warmup_start)


def cos_lr(run_epochs: int, warmup_epoch: float = 0, warmup_start: float = 0.0, by: By = "epoch",
           unit: float = 1.0, restart: int | list[int] = ()) -> Callable[[float], float]:
    """Warm-up, then a cosine from 1 at time `warmup_epoch` towards 0 at `run_epochs`; see `cycles` for `restart`.

    (BatchFormer's own CosLR multiplies by the rate twice and ignores its warm-up; this one does what the name says.)
    """
    return cycles(lambda share: 0.5 * (1 + math.cos(math.pi * share)), run_epochs, warmup_epoch, warmup_start, unit,
                  restart)


def linear_lr0(run_epochs: int, warmup_epoch: float = 0, warmup_start: float = 0.0, by: By = "epoch",
               unit: float = 1.0, restart: int | list[int] = ()) -> Callable[[float], float]:
    """Warm-up, then a line from 1 at time `warmup_epoch` to 0 at `run_epochs`; see `cycles` for `restart`."""
    return cycles(lambda share: 1 - share, run_epochs, warmup_epoch, warmup_start, unit, restart)


def cycles(fall: Callable[[float], float], run_epochs: int, warmup_epoch: float, warmup_start: float, unit: float,
           restart: int | list[int]) -> Callable[[float], float]:
    """Warm-up, then `fall`, the factor as a function of the share (0 to 1) of the remaining time; both start anew after
    each epoch in `restart` (Loshchilov and Hutter, SGDR, ICLR 2017). A cycle lasts until the next one starts, the last
    one until the run's end. Epochs that the run doesn't reach are ignored."""
    starts = [0, *(epoch for epoch in ([restart] if isinstance(restart, int) else restart) if epoch < run_epochs)]
    ends = [*starts[1:], run_epochs]

    def factor(t: float) -> float:
        cycle = bisect.bisect_right(starts, t) - 1
        t, epochs = t - starts[cycle], ends[cycle] - starts[cycle]
        if t < warmup_epoch:
            return warm_up(t, warmup_epoch, unit, warmup_start)
        return fall(min(1.0, (t - warmup_epoch) / max(unit, epochs - warmup_epoch)))
    return factor


def iteration_lr(milestones: list[int], gamma: float = 0.1, warmup_iters: int = 500,
                 warmup_factor: float = 1 / 3) -> Callable[[int], float]:
    """Detection's schedule as a factor of the base rate, by optimizer step t = 0, 1, ...

    Rises linearly from `warmup_factor` to 1 over the first `warmup_iters` steps (Goyal et al., 2017); multiplied by
    gamma at each milestone.
    """
    def factor(step: int) -> float:
        value = gamma ** sum(step >= milestone for milestone in milestones)
        if step < warmup_iters:
            value *= warmup_factor + (1 - warmup_factor) * step / warmup_iters
        return value
    return factor


#: The project's own schedules: config name -> factor of the base rate. The program sets `run_epochs` and `unit`.
SCHEDULES = {"CustomLR": custom_lr, "CosLR": cos_lr, "LinearLR0": linear_lr0, "IterationLR": iteration_lr}
