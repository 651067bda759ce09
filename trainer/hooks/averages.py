"""Averages of the weights over the steps (EMA) and over the last epochs (SWA)."""
from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from logger.log import get_logger
from trainer.hooks.base import Hook, Run
from utils import dist
from utils.config.build import check_args
from utils.config.signature import of_callable
from utils.errors import ConfigError

log = get_logger()


def averaged_tensors(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(parameters and floating-point buffers, which are averaged; integer buffers, which are copied)."""
    buffers = list(model.buffers())
    return ([*model.parameters(), *(b for b in buffers if b.is_floating_point())],
            [b for b in buffers if not b.is_floating_point()])


class WeightAverage(Hook):
    """An exponential moving average of the weights and norm statistics, which is what is validated, saved and used.

    After step t = 1, 2, ...: average = d · average + (1 - d) · weights, d = min(decay, (1 + t) / (10 + t)) with
    `warmup`, else `decay` (Polyak and Juditsky, 1992; the warm-up as in TensorFlow's ExponentialMovingAverage).

    `trainer.ema`: {"decay": 0.999, "warmup": true, "every": 1}. With `every` k the average is updated only after every
    k-th step, with d^k in place of d. Raises ConfigError for values out of range.
    """

    key = "ema"

    def __init__(self, run: Run):
        super().__init__(run)
        if run.options["ema"] is None:
            raise ConfigError("trainer.hooks: WeightAverage is what trainer.ema switches on; give that instead")
        self.decay, self.warmup, self.every = ema_options(**check_args(of_callable(ema_options), run.options["ema"],
                                                                       "trainer.ema"))
        self.steps = 0
        self.average = copy.deepcopy(run.model).requires_grad_(False).eval()
        self._pairs = averaged_tensors(self.average), averaged_tensors(run.model)

    @classmethod
    def wanted(cls, options: dict[str, Any]) -> bool:
        return options["ema"] is not None

    @property
    def judged(self) -> nn.Module:
        return self.average

    @torch.no_grad()
    def step_taken(self, outputs: dict[str, Any], labels: torch.Tensor | None, gradient_norm: torch.Tensor) -> None:
        self.steps += 1
        if self.steps % self.every:
            return
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.warmup else self.decay
        (averaged, copies), (weights, counts) = self._pairs
        torch._foreach_lerp_(averaged, weights, 1 - decay ** self.every)
        if copies:
            torch._foreach_copy_(copies, counts)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}   # the average itself is the checkpoint's `state_dict`

    def load_state_dict(self, state: dict[str, Any], checkpoint: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.average.load_state_dict(checkpoint["state_dict"])


def ema_options(decay: float = 0.999, warmup: bool = True, every: int = 1) -> tuple[float, bool, int]:
    """The options of `trainer.ema`, checked. Raises ConfigError for values out of range."""
    if not 0 <= decay < 1:
        raise ConfigError(f"trainer.ema.decay: must be 0 or more and under 1, not {decay}")
    if every < 1:
        raise ConfigError(f"trainer.ema.every: must be 1 or more, not {every}")
    return decay, warmup, every


class EpochAverage(Hook):
    """Stochastic weight averaging (Izmailov et al., UAI 2018): the mean of the weights at the ends of the last `epochs`
    epochs, with batch norm statistics from one pass over the training images. Written as `model_swa.pth`.

    `trainer.swa`: {"epochs": 5}. Frozen norms keep their statistics. Raises ConfigError for norms whose statistics
    can't be recomputed this way, and for detectors.
    """

    key = "swa"

    def __init__(self, run: Run):
        super().__init__(run)
        if run.options["swa"] is None:
            raise ConfigError("trainer.hooks: EpochAverage is what trainer.swa switches on; give that instead")
        self.count = swa_epochs(**check_args(of_callable(swa_epochs), run.options["swa"], "trainer.swa"))
        tracked = [m for m in run.model.modules() if dict(m.named_buffers(recurse=False)).keys() & {"running_var"}]
        odd = [type(m).__name__ for m in tracked if not isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if run.train_loader.task != "classification":
            raise ConfigError("trainer.swa: is for classifiers; use trainer.ema")
        if odd:
            raise ConfigError(f"trainer.swa: makes the statistics of batch norm anew, not those of {odd[0]}; use "
                              "trainer.ema, which averages them")
        self.average = torch.optim.swa_utils.AveragedModel(run.model)
        self.first: int | None = None      # the first epoch that is in the average

    @classmethod
    def wanted(cls, options: dict[str, Any]) -> bool:
        return options["swa"] is not None

    def epoch_trained(self, epoch: int) -> None:
        # A run stopped during an epoch's validation gets here again for that epoch, which the mean already contains.
        done = 0 if self.first is None else self.first + int(self.average.n_averaged) - 1
        if epoch > max(done, self.run.epochs - self.count):
            self.first = epoch if self.first is None else self.first
            self.average.update_parameters(self.run.model)

    def run_ended(self, result: dict[str, Any]) -> None:
        if not int(self.average.n_averaged):
            log.warning("trainer.swa: the run ended before its last %d epochs; there is no mean of them", self.count)
            return
        self.make_statistics()
        path = self.run.paths.models / "model_swa.pth"
        self.run.save_weights(path, self.average.module)
        log.info("the mean of the last %d epochs' weights is in %s", int(self.average.n_averaged), path)

    @torch.no_grad()
    def make_statistics(self) -> None:
        """Recompute the statistics of the norms that were trained, as plain means over one epoch's batches. (torch's
        `update_bn` would reset frozen norms too.)"""
        model = self.average.module
        for averaged, trained in zip(model.parameters(), self.run.model.parameters()):
            averaged.requires_grad_(trained.requires_grad)      # parts may have been thawed since the copy was made
        model.train()
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        if norms:
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
            self.run.train_loader.set_epoch(self.run.epochs + 1)
            for images, _ in self.run.train_loader:
                model(images.contiguous(memory_format=self.run.memory_format))
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum
                for statistic in (norm.running_mean, norm.running_var):
                    dist.all_reduce_sum(statistic).div_(dist.world_size())
        model.eval()

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.state_dict(), "first": self.first} if int(self.average.n_averaged) else {}

    def load_state_dict(self, state: dict[str, Any], checkpoint: dict[str, Any]) -> None:
        if "average" not in state:
            return
        done = checkpoint["epoch"] - (checkpoint.get("batch") is not None)
        first = state.get("first") or done + 1 - int(state["average"]["n_averaged"])
        if first <= self.run.epochs - self.count:   # those epochs were the last ones of a shorter run
            log.info("trainer.swa: the checkpoint's mean begins with epoch %d, which isn't one of the last %d of %d: "
                     "it is left out", first, self.count, self.run.epochs)
            return
        self.first = first
        self.average.load_state_dict(state["average"])


def swa_epochs(epochs: int) -> int:
    """The option of `trainer.swa`, checked. Raises ConfigError for less than 1."""
    if epochs < 1:
        raise ConfigError(f"trainer.swa.epochs: must be 1 or more, not {epochs}")
    return epochs
