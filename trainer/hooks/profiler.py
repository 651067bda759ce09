"""A trace of a few steps of a run's first epoch, for TensorBoard or Perfetto."""
from __future__ import annotations

import warnings
from typing import Any

import torch

from logger.log import get_logger
from trainer.hooks.base import Hook, Run

log = get_logger()


class Profiler(Hook):
    """`trainer.profile`: writes profile/trace.pt.trace.json into the run's log folder, by rank 0."""

    def __init__(self, run: Run):
        super().__init__(run)
        self.profiler: torch.profiler.profile | None = None
        self.done = self.written = False

    @classmethod
    def wanted(cls, options: dict[str, Any]) -> bool:
        return options["profile"]

    def epoch_begins(self, epoch: int) -> None:
        if self.done or self.run.paths is None or not self.run.is_main:
            return
        self.done = True
        target = self.run.paths.log / "profile" / "trace.pt.trace.json"

        def keep(profiler: torch.profiler.profile) -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(target))
            self.written = True
            log.info("profile written to %s (open it in https://ui.perfetto.dev)", target)

        steps = self.run.steps_per_epoch
        active = min(3, steps)
        warmup = min(2, steps - active)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.run.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with warnings.catch_warnings():     # an epoch of few steps has none to spare for the warm-up
            warnings.filterwarnings("ignore", message="Profiler won't be using warmup")
            schedule = torch.profiler.schedule(wait=min(1, steps - active - warmup), warmup=warmup, active=active,
                                               repeat=1)
        self.profiler = torch.profiler.profile(activities=activities, on_trace_ready=keep, record_shapes=True,
                                               schedule=schedule)
        self.profiler.start()

    def step_taken(self, outputs: dict[str, Any], labels: torch.Tensor | None, gradient_norm: torch.Tensor) -> None:
        if self.profiler is not None:
            self.profiler.step()

    def epoch_trained(self, epoch: int) -> None:
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None
            if not self.written:
                log.warning("trainer.profile: no trace, as the epoch went on with fewer steps than are traced")
