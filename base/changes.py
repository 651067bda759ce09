"""How the config of a run that resumes differs from its checkpoint's, and which differences rule out resuming."""
from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from base.freezing import freeze_plan
from base.settings import ANY_TIME
from logger.log import get_logger
from utils.config.schema import TOP, TRAINER, defaults
from utils.errors import ConfigError

log = get_logger()

#: The keys of the config's `trainer` that decide which parameters are trained and how they are grouped.
GROUPING = ("freeze", "no_decay", "no_decay_scale", "layer_decay", "classifier_lr")


def config_changes(before: dict[str, Any], now: dict[str, Any], path: str = "") -> Iterator[str]:
    """Each key whose value differs between a checkpoint's config, `before`, and the present one, `now`, as a text:
    "optimizer.args.lr 0.05 -> 0.001".

    Left out: the run's name, folder and verbosity, and keys that are absent in one and have their default in the other.
    path: prefix of the keys, for the recursion.
    """
    rows = {"": TOP, "trainer.": TRAINER}.get(path, ())
    before, now = defaults(rows, before), defaults(rows, now)
    for key in sorted(before.keys() | now.keys()):
        here = f"{path}{key}"
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from config_changes(old, new, f"{here}.")
        elif old != new and here not in ("trainer.save_dir", "trainer.verbosity", "name"):
            yield f"{here} {json.dumps(old, default=str)} -> {json.dumps(new, default=str)}"


def tell_changes(before: dict[str, Any], now: dict[str, Any], to_train: bool) -> None:
    """Log what the config of a run that resumes, `now`, changes in its checkpoint's, `before`. Raises ConfigError if
    no epoch is left to train (`to_train` false), so that the run would be recorded with settings it never had."""
    changes = list(config_changes(before, now))
    idle = [] if to_train or not before else [change for change in changes if change.split()[0] not in ANY_TIME]
    if idle:
        raise ConfigError(f"{'; '.join(idle)}: the run is complete, and nothing is left to train with that; train "
                          "longer with --epochs N, or leave it as it was")
    if changes:
        log.info("changed from what the checkpoint had, and in force from here: %s", "; ".join(changes))


def regrouped(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys of `trainer` whose change puts parameters into other optimizer groups than before. For learning rates
    only whether one is given matters, not its value."""
    def meant(options: dict[str, Any], key: str) -> Any:
        if key == "freeze" and isinstance(options[key], dict):    # `until` may change
            return ("for now", *freeze_plan(options[key])._replace(until=None))
        return options[key] is not None if key in ("layer_decay", "classifier_lr") else options[key]
    before, now = defaults(TRAINER, before), defaults(TRAINER, now)
    return [f"trainer.{key}" for key in GROUPING if meant(before, key) != meant(now, key)]


def optimizer_kinds(spec: dict[str, Any]) -> str | None:
    """An optimizer's type with the types of the optimizers inside it: "SGD", "SAM(AdamW)", "Muon(SGD)"."""
    kind, args = spec.get("type"), spec.get("args") or {}
    others = {"others": {"type": "SGD"}} if kind == "Muon" else {}      # the default of `build_optimizer`
    inner = [optimizer_kinds(part) for key in ("base", "others")
             if isinstance(part := args.get(key) or others.get(key), dict)]
    return f"{kind}({', '.join(map(str, inner))})" if kind and inner else kind


def place_steps(optimizer: torch.optim.Optimizer) -> None:
    """Move each parameter's count of steps (Adam's and others') to where the present settings want it.

    `load_state_dict` puts it where the saved settings did: on the parameter's device for fused kernels, which refuse a
    count elsewhere, and on the CPU for the others, which would wait for the device at each parameter.
    """
    for own in _chain(optimizer):
        for group in own.param_groups:
            for p in group["params"]:
                step = own.state.get(p, {}).get("step")
                if isinstance(step, torch.Tensor):
                    there = p.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
                    own.state[p]["step"] = step.to(there)


def _chain(optimizer: Any) -> Iterator[Any]:
    """An optimizer, and the one inside it (SAM's base, Muon's others), and so on."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "base", None) or getattr(optimizer, "others", None)


def missing_memory(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the per-parameter state that a step with the present settings needs and the loaded state lacks (after
    `amsgrad` was switched on: AdamW's largest second moment). Found by letting a twin optimizer step on one number."""
    own = next((each for each in _chain(optimizer) if type(each).__module__.startswith("torch.optim")), None)
    for group in own.param_groups if own is not None else ():
        p = next((p for p in group["params"] if own.state.get(p)), None)
        if p is None:
            continue
        number = nn.Parameter(torch.zeros([1] * p.dim()))
        number.grad = torch.zeros_like(number)
        known = inspect.signature(type(own)).parameters.keys() - {"params"}
        on_gpu = {"capturable": False, "fused": False}      # the number is on the CPU
        twin = type(own)([number], **{key: value for key, value in {**group, **on_gpu}.items() if key in known})
        twin.step()
        missing = twin.state[number].keys() - own.state[p].keys()
        if missing and type(own) is not torch.optim.SGD:   # SGD creates missing momentum itself
            return sorted(missing)
    return []
