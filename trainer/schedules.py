"""Optimizers and learning-rate schedules by name: torch's own, RIDE's and BatchFormer's, and ours."""
from __future__ import annotations

import inspect
import warnings
from functools import partial
from typing import Any

import torch
from torch.optim import lr_scheduler as torch_schedulers

from logger.log import get_logger
from trainer.optim.groups import check_some_trained, is_hidden_matrix, param_groups
from trainer.optim.muon import Muon
from trainer.optim.sam import SAM
from trainer.rates import SCHEDULES, iteration_lr
from utils.config.build import build, lookup
from utils.config.check import monitored
from utils.config.outside import is_outside
from utils.config.schema import TRAINER, defaults
from utils.errors import ConfigError

log = get_logger()
#: torch's schedules by how they are called: after each epoch, after each optimizer step, or with a figure.
BY_EPOCH = ("StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR", "CosineAnnealingLR",
            "CosineAnnealingWarmRestarts")
BY_STEP = ("OneCycleLR", "CyclicLR")
BY_FIGURE = ("ReduceLROnPlateau",)
#: The project's own optimizers; they take precedence over torch's of the same name.
OPTIMIZERS = {"Muon": Muon, "SAM": SAM}


def build_scheduler(spec: dict[str, Any] | None, optimizer: torch.optim.Optimizer, epochs: int,
                    steps_per_epoch: int = 1, path: str = "lr_scheduler",
                    monitor: str = "off") -> torch_schedulers.LRScheduler | None:
    """The schedule a config names; None if the config has none.

    Its attribute `unit` says when to call `step()`: after each "epoch", after each optimizer "step", or after each
    epoch with a "figure".

    Args:
        spec: {"type": CustomLR | CosLR | LinearLR0 | IterationLR | a name in torch.optim.lr_scheduler, "args": {...}}.
        epochs, steps_per_epoch: the run's length; a class from outside gets those that it takes.
        monitor: `trainer.monitor`, whose direction (min or max) ReduceLROnPlateau follows.
    Raises:
        ConfigError: unknown type or arguments, or a schedule whose `step()` must be called in a way that
            training doesn't support.
    """
    if not spec or not spec.get("type"):
        return None
    # Training has the right order, but torch sees only this process's steps: none where a run goes on at the end of an
    # epoch, or where fp16's scaler skips the first.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    kind, args = spec["type"], dict(spec.get("args") or {})
    if kind in SCHEDULES:
        return _own(kind, args, optimizer, epochs, steps_per_epoch, path)
    if kind in BY_STEP:
        args, unit = _by_step(kind, args, epochs, steps_per_epoch, path)
        args = _in_proportion(_with_peak(args, optimizer, path) if kind == "OneCycleLR" else args, optimizer)
    elif kind in BY_FIGURE:
        args, unit = _by_figure(args, monitor, path), "figure"
        for group in optimizer.param_groups:   # torch's plateau doesn't keep the initial rate; resuming needs it
            group.setdefault("initial_lr", group["lr"])
    else:
        unit = "epoch"
        if hasattr(torch_schedulers, kind) and kind not in BY_EPOCH:
            raise ConfigError(f"{path}.type: {kind} is called in a way that training doesn't know; use one of "
                              f"{', '.join((*SCHEDULES, *BY_EPOCH, *BY_STEP, *BY_FIGURE))}")
    length = {"epochs": epochs, "steps_per_epoch": steps_per_epoch} if is_outside(kind) else {}
    more = {key: value for key, value in length.items() if key not in args}
    try:
        schedule = build(torch_schedulers, {"type": kind, "args": args}, path, optimizer, **more)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}.args: {error}") from None
    except ZeroDivisionError:
        zeros = [key for key, value in args.items() if value == 0 and type(value) is not bool]
        raise ConfigError(f"{path}.args.{(zeros or [kind])[0]}: must not be 0, {kind} divides by it") from None
    schedule.unit = getattr(schedule, "unit", unit)     # a class from outside may say
    if schedule.unit not in ("epoch", "step", "figure"):
        raise ConfigError(f"{path}.type: {kind}'s unit must be \"epoch\", \"step\" or \"figure\", not "
                          f"{schedule.unit!r}")
    return schedule


def _own(kind: str, args: dict[str, Any], optimizer: torch.optim.Optimizer, epochs: int, steps: int,
         path: str) -> torch_schedulers.LRScheduler:
    for key in {"CustomLR": ("step1", "step2"), "IterationLR": ("milestones",)}.get(kind, ()):
        if key not in args:
            raise ConfigError(f"{path}.args.{key}: missing; {kind} needs it")
    if kind == "IterationLR":
        schedule = torch_schedulers.LambdaLR(optimizer, iteration_lr(**args))
        schedule.unit = "step"
        return schedule
    by = args.get("by", "epoch")
    if by not in ("epoch", "step"):
        raise ConfigError(f"{path}.args.by: must be \"epoch\" or \"step\", not {by!r}")
    # Old configs give CustomLR's steps to other schedules too, which don't use them.
    known = inspect.signature(SCHEDULES[kind]).parameters
    args = {key: value for key, value in {**args, "run_epochs": epochs}.items() if key in known}
    if 0 < args.get("warmup_epoch", 0) <= 1 and by == "epoch":
        log.warning("%s.args.warmup_epoch: %g is no warm-up: a rate holds for an epoch, and the first one's is the "
                    "whole; use 2 or more, or \"by\": \"step\"", path, args["warmup_epoch"])
    for key, so in (("step1", "the rate never falls"), ("warmup_epoch", "the rate is never the whole one")):
        if args.get(key, 0) >= epochs:
            log.warning("%s.args.%s: %g, but trainer.epochs is %d, so that %s", path, key, args[key], epochs, so)
    restart = args.get("restart", [])
    epochs_given = [restart] if type(restart) is int else restart
    if not isinstance(epochs_given, list) or any(type(epoch) is not int or epoch < 1 for epoch in epochs_given) or (
            epochs_given != sorted(set(epochs_given))):
        raise ConfigError(f"{path}.args.restart: must be the last epoch before a new cycle, like 30, or a list of them "
                          f"in order, not {restart!r}")
    unit = 1 / steps if by == "step" else 1.0
    factor = SCHEDULES[kind](**args, unit=unit)
    # k / steps rather than k * unit: exact at the boundaries of epochs.
    schedule = torch_schedulers.LambdaLR(optimizer, (lambda k: factor(k / steps)) if by == "step" else factor)
    schedule.unit = by
    return schedule


def _by_step(kind: str, args: dict[str, Any], epochs: int, steps: int, path: str) -> tuple[dict[str, Any], str]:
    """(arguments, unit) of torch's schedules that count steps."""
    if kind == "CyclicLR":
        if "max_lr" not in args:
            raise ConfigError(f"{path}.args.max_lr: missing; CyclicLR needs it")
        if "step_size_up" not in args:  # torch's default, 2,000, is longer than many runs
            args["step_size_up"] = max(1, min(2 * steps, epochs * steps // 2))
            log.info("%s: CyclicLR rises over %d steps, two epochs (Smith, WACV 2017); set args.step_size_up for "
                     "another number", path, args["step_size_up"])
        return args, "step"
    if args.get("total_steps") is None and args.get("epochs") is None:
        args["total_steps"] = epochs * steps
    total = args.get("total_steps")
    if total is None:
        total = args["epochs"] * args.setdefault("steps_per_epoch", steps)
    if total >= epochs * steps:
        if args.get("pct_start", 0.3) * total == 1:     # torch divides by the length of the rise, less one
            args["pct_start"] *= 1 + 1e-6
        return args, "step"
    if args.get("total_steps") is not None and total >= epochs:
        log.info("%s: OneCycleLR's total_steps (%d) counts epochs here, as the run has %d steps", path, total,
                 epochs * steps)
        return args, "epoch"
    raise ConfigError(f"{path}.args: OneCycleLR ends after {total} steps, and the run has {epochs} epochs of {steps}; "
                      "leave total_steps out")


def _with_peak(args: dict[str, Any], optimizer: torch.optim.Optimizer, path: str) -> dict[str, Any]:
    """OneCycleLR's peak is the optimizer's own rate, unless the arguments give another."""
    own, peak = optimizer.defaults["lr"], args.get("max_lr")
    if isinstance(peak, int | float) and peak != own:
        log.warning("%s.args.max_lr: %g is where the rate goes up to; the optimizer's own, %g, is without effect "
                    "(without max_lr it is the peak)", path, peak, own)
    return {"max_lr": own, **args}


def _in_proportion(args: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """torch applies a single `max_lr` or `base_lr` to every group. Here it applies to the optimizer's own rate, and
    groups with rates of their own (layer_decay, classifier_lr, Muon's others) are scaled in proportion."""
    own = optimizer.defaults["lr"]
    shares = [group["lr"] / own for group in optimizer.param_groups]
    numbers = {key: args[key] for key in ("max_lr", "base_lr") if isinstance(args.get(key), int | float)}
    return args if set(shares) == {1.0} else {**args, **{key: [value * share for share in shares]
                                                         for key, value in numbers.items()}}


def _by_figure(args: dict[str, Any], monitor: str, path: str) -> dict[str, Any]:
    """ReduceLROnPlateau follows the monitored figure, in the monitor's direction; the loss if nothing is monitored."""
    mode = "min" if monitor == "off" else monitored(monitor)[0]
    if args.get("mode", mode) != mode:
        known = f"trainer.monitor is {monitor!r}" if monitor != "off" else "nothing is monitored, so it gets the loss"
        raise ConfigError(f"{path}.args.mode: {args['mode']!r}, but {known}; use {mode!r} or monitor another figure")
    return {**args, "mode": mode}


# ---------------------------------------------------------------------- resuming

def bring_to(schedule: torch_schedulers.LRScheduler, steps: int, saved: dict[str, Any] | None) -> None:
    """Bring a newly built schedule to its state after `steps` calls of `step()`, so that its rate is what the
    present config gives.

    The calls are replayed rather than the saved state loaded, since that would override what the config has changed. A
    plateau's history can't be replayed, so its best figure and its counters are loaded from `saved`.
    """
    if isinstance(schedule, torch_schedulers.ReduceLROnPlateau):
        for key in ("best", "num_bad_epochs", "cooldown_counter", "last_epoch"):
            if saved and key in saved:
                setattr(schedule, key, saved[key])
        return
    if steps <= 0:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects an optimizer step before each call
        if isinstance(schedule, torch_schedulers.LambdaLR | torch_schedulers.OneCycleLR | torch_schedulers.CyclicLR):
            schedule.last_epoch = steps - 1  # their rate depends on the count alone
            schedule._step_count = steps
            schedule.step()
        else:
            for _ in range(steps):
                schedule.step()


# ---------------------------------------------------------------------- optimizers

def build_optimizer(spec: dict[str, Any], model: torch.nn.Module, options: dict[str, Any] | None = None,
                    path: str = "optimizer") -> torch.optim.Optimizer:
    """The optimizer a config names, over the model's trainable parameters.

    spec: {"type": Muon | SAM | any of torch.optim, "args": {...}}. options: the config's `trainer`, see
    `optim.groups.param_groups`. Torch's fused step is used if the optimizer has one and the config doesn't decide (not
    with fp16): one kernel for all parameters instead of a few per parameter. Raises ConfigError for unknown types,
    wrong arguments, or if there is nothing to train.
    """
    options = defaults(TRAINER, options or {})
    args = dict(spec.get("args") or {})
    if spec.get("type") == "SAM":
        base = args.pop("base", None)
        if not isinstance(base, dict) or base.get("type") == "SAM":
            raise ConfigError(f"{path}.args.base: SAM needs the optimizer that it works with, "
                              "{\"type\": \"SGD\", \"args\": {\"lr\": 0.1}}")
        if (rate := args.pop("lr", None)) is not None:
            base = {**base, "args": {**(base.get("args") or {}), "lr": rate}}
        base = build_optimizer(base, model, options, f"{path}.args.base")
        return build({"SAM": partial(SAM, base.param_groups, base)}, {"type": "SAM", "args": args}, path)
    if spec.get("type") == "Muon":
        return _build_muon(args, model, options, path)
    groups = param_groups(model, options, _rate(spec.get("type"), args, options, path))
    check_some_trained(groups)
    return _build_torch(spec.get("type"), args, groups, options, path)


def _build_muon(args: dict[str, Any], model: torch.nn.Module, options: dict[str, Any], path: str) -> Muon:
    others = args.pop("others", None) or {"type": "SGD", "args": {"lr": 0.1, "momentum": 0.9, "nesterov": True}}
    if not isinstance(others, dict) or others.get("type") in ("Muon", "SAM"):
        raise ConfigError(f"{path}.args.others: must name the optimizer of stem, norms, biases and classifiers, "
                          "{\"type\": \"SGD\", \"args\": {\"lr\": 0.1}}")
    hidden = is_hidden_matrix(model)
    groups = param_groups(model, options, _rate("Muon", args, options, path), hidden)
    inner = dict(others.get("args") or {})
    rate = _rate(others.get("type"), inner, options, f"{path}.args.others")
    rest = param_groups(model, options, rate, lambda name, p: not hidden(name, p))
    check_some_trained(groups or rest)
    if not groups:
        raise ConfigError(f"{path}.type: Muon finds no filter or matrix to train (everything but the classifier is "
                          f"frozen); use {others['type']}")
    second = _build_torch(others.get("type"), inner, rest, options, f"{path}.args.others") if rest else None
    return build({"Muon": partial(Muon, groups, others=second)}, {"type": "Muon", "args": args}, path)


def _found(kind: Any, path: str) -> Any:
    """The class that an optimizer's type names. Raises ConfigError."""
    return lookup(OPTIMIZERS if kind in OPTIMIZERS else torch.optim, kind, f"{path}.type", "optimizer")


def _rate(kind: Any, args: dict[str, Any], options: dict[str, Any], path: str) -> float | None:
    """The learning rate in an optimizer's arguments, or else its default; None if it has neither. Raises ConfigError if
    layer_decay needs one."""
    known = inspect.signature(_found(kind, path)).parameters
    rate = args.get("lr", known["lr"].default if "lr" in known else None)
    rate = rate if isinstance(rate, int | float) else None
    if rate is None and options["layer_decay"] is not None:
        raise ConfigError(f"{path}.args.lr: missing; trainer.layer_decay needs it, and {kind} has no rate of its own")
    return rate


def _build_torch(kind: Any, args: dict[str, Any], groups: list[dict[str, Any]], options: dict[str, Any],
                 path: str) -> torch.optim.Optimizer:
    _found(kind, path)
    if args.get("differentiable"):
        raise ConfigError(f"{path}.args.differentiable: is for gradients of training steps; leave it out")
    # Where fp16's scaler skips the very first step, the fused SGD leaves its momentum uninitialised.
    if kind == "SGD" and args.get("fused") and args.get("momentum") and options["amp"] == "fp16":
        raise ConfigError(f"{path}.args.fused: with fp16, a first step that is skipped leaves the fused SGD's momentum "
                          "uninitialised; leave it out")
    # Adagrad's fused step refuses GPUs in some versions of torch that requirements.txt admits.
    if kind in ("SGD", "Adam", "AdamW") and not {"fused", "foreach"} & set(args) and options["amp"] != "fp16":
        args = {**args, "fused": True}
    try:
        return build(OPTIMIZERS if kind in OPTIMIZERS else torch.optim, {"type": kind, "args": args}, path, groups)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path}.args: {error}") from None
