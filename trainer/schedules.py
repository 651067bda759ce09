"""Optimizers and learning-rate schedules by name: torch's own, and RIDE's and BatchFormer's."""
from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import lr_scheduler as torch_schedulers

from logger.log import get_logger
from utils.config.build import build
from utils.config.schema import TRAINER, defaults
from utils.errors import ConfigError

log = get_logger()


def custom_lr(step1: int, step2: int, gamma: float = 0.1, warmup_epoch: int = 0) -> Callable[[int], float]:
    """RIDE's schedule as a factor of the base rate, by epoch e = 0, 1, ...

    1, then gamma from `step1`, gamma squared from `step2`; during the first `warmup_epoch` epochs also
    times (e + 1) / warmup_epoch.
    """
    def factor(epoch: int) -> float:
        value = gamma ** ((epoch >= step1) + (epoch >= step2))
        return value * (epoch + 1) / warmup_epoch if epoch < warmup_epoch else value
    return factor


def cos_lr(epochs: int, warmup_epoch: int = 0) -> Callable[[int], float]:
    """Linear warm-up, then a cosine from 1 at epoch `warmup_epoch` towards 0 at epoch `epochs` (e = 0, 1, ...).

    BatchFormer's CosLR multiplies by the rate twice and leaves its warm-up out; this is what its name promises.
    """
    def factor(epoch: int) -> float:
        if epoch < warmup_epoch:
            return (epoch + 1) / warmup_epoch
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - warmup_epoch) / max(1, epochs - warmup_epoch))))
    return factor


def iteration_lr(milestones: list[int], gamma: float = 0.1, warmup_iters: int = 500,
                 warmup_factor: float = 1 / 3) -> Callable[[int], float]:
    """Detection's schedule as a factor of the base rate, by optimizer step t = 0, 1, ...

    From `warmup_factor` up to 1 in a line over the first `warmup_iters` steps (Goyal 2017); times gamma from each
    milestone on.
    """
    def factor(step: int) -> float:
        value = gamma ** sum(step >= milestone for milestone in milestones)
        if step < warmup_iters:
            value *= warmup_factor + (1 - warmup_factor) * step / warmup_iters
        return value
    return factor


#: Schedules of our own: config name -> factor of the base rate; the program gives `epochs`.
SCHEDULES = {"CustomLR": custom_lr, "CosLR": cos_lr, "IterationLR": iteration_lr}


def build_scheduler(spec: dict[str, Any] | None, optimizer: torch.optim.Optimizer, epochs: int,
                    path: str = "lr_scheduler") -> torch_schedulers.LRScheduler | None:
    """The schedule a config names, stepped once an epoch; None where the config has none.

    Args:
        spec: {"type": CustomLR | CosLR | IterationLR | any name in torch.optim.lr_scheduler, "args": {...}}.
        epochs: the run's length, for CosLR.
    Raises:
        ConfigError: unknown type or arguments.
    """
    if not spec or not spec.get("type"):
        return None
    args = dict(spec.get("args") or {})
    if spec["type"] in ("CustomLR", "CosLR") and args.get("warmup_epoch") == 1 and args.get("by", "epoch") == "epoch":
        log.warning("%s.args.warmup_epoch: 1 is no warm-up: its first epoch, as in RIDE, has (0 + 1) / 1 of the rate; "
                    "give 2 or more", path)
    if spec["type"] == "CustomLR":
        for key in ("step1", "step2"):
            if key not in args:
                raise ConfigError(f"{path}.args.{key}: missing; CustomLR needs the epochs step1 and step2")
        return torch_schedulers.LambdaLR(optimizer, custom_lr(**args))
    if spec["type"] == "CosLR":
        # Old configs carry CustomLR's steps along; the cosine has no use for them.
        return torch_schedulers.LambdaLR(optimizer, cos_lr(epochs, args.get("warmup_epoch", 0)))
    if spec["type"] == "IterationLR":
        schedule = torch_schedulers.LambdaLR(optimizer, iteration_lr(**args))
        schedule.by_iteration = True  # the trainer steps it after each optimizer step, not after each epoch
        return schedule
    try:
        schedule = build(torch_schedulers, spec, path, optimizer)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}.args: {error}") from None
    if getattr(schedule, "total_steps", epochs) < epochs:  # OneCycleLR fails beyond its end
        raise ConfigError(f"{path}.args: {spec['type']} ends after {schedule.total_steps} epochs, and trainer.epochs "
                          f"is {epochs}; give total_steps: {epochs}")
    return schedule


def param_groups(model: torch.nn.Module, optimizer_args: dict[str, Any], classifier_prefixes: Iterable[str] = (),
                 classifier_lr: float | None = None, no_decay_scale: bool = False) -> list[dict[str, Any]]:
    """The trainable parameters, in the model's order, split only where a config asks for it.

    Args:
        classifier_lr: a rate of its own for the parameters under `classifier_prefixes` (Places-LT, Kang 2020).
        no_decay_scale: no weight decay on NBN's learned scales (`scale_factor`).
    """
    prefixes = tuple(classifier_prefixes)
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_scale = no_decay_scale and name.endswith("scale_factor")
        is_classifier = classifier_lr is not None and bool(prefixes) and name.startswith(prefixes)
        group = groups.setdefault((is_scale, is_classifier), {"params": []})
        group["params"].append(parameter)
        if is_scale:
            group["weight_decay"] = 0.0
        if is_classifier:
            group["lr"] = classifier_lr
    if not groups:
        raise ConfigError("optimizer: nothing to train, every parameter is frozen")
    return list(groups.values())


def build_optimizer(spec: dict[str, Any], model: torch.nn.Module, trainer_config: dict[str, Any] | None = None,
                    path: str = "optimizer") -> torch.optim.Optimizer:
    """The optimizer a config names, over the model's trainable parameters.

    Torch's fused step is used where the optimizer has one and the config doesn't choose: one kernel for all
    parameters instead of a few per parameter.
    """
    options = defaults(TRAINER, trainer_config or {})
    args = dict(spec.get("args") or {})
    prefixes = model.classifier_prefixes() if hasattr(model, "classifier_prefixes") else ()
    groups = param_groups(model, args, prefixes, options["classifier_lr"], options["no_decay_scale"])
    kind = getattr(torch.optim, str(spec.get("type")), None)
    known = inspect.signature(kind).parameters if inspect.isclass(kind) else {}
    chosen = {"fused", "foreach", "differentiable"} & set(args)
    # Where fp16's scaler skips the very first step, the fused SGD leaves its momentum uninitialised.
    if "fused" in known and not chosen and options["amp"] != "fp16":
        args["fused"] = True
    try:
        return build(torch.optim, {"type": spec.get("type"), "args": args}, path, groups)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path}.args: {error}") from None
