"""Finding the stages of third-party networks, and the modules of which each expert can have a copy."""
from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

#: Names of modules whose children are a network's stages; and names of stages that are siblings.
CONTAINERS = ("stages", "blocks", "layers", "features", "transformers", "network")
NUMBERED = re.compile(r"(layer|stage|level|block|s)_?\d+")
LEAST_SHARE = 0.02     # the least share of the body's parameters that an expert's own stage must have

Features = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def find_stages(body: nn.Module) -> dict[str, int]:
    """{name: stage} of each part of a body. Stage 0 is the stem; a part that is no stage belongs to the one before it.

    The parts are modules and parameters that together cover the body exactly once. Stages are recognised by name; if
    that finds only one, by timm's own layer groups (`group_matcher`), which are finer.
    """
    named = _by_names(body)
    return named if max(named.values(), default=0) > 1 else _by_groups(body) or named


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _by_names(body: nn.Module) -> dict[str, int]:
    places: dict[str, int] = {}
    number, half = 0, _size(body) / 2

    def holds_stages(module: nn.Module) -> bool:
        return any(name in CONTAINERS or NUMBERED.fullmatch(name) or holds_stages(child)
                   for name, child in module.named_children() if 2 * _size(child) > half)

    def visit(module: nn.Module, prefix: str, row: bool) -> None:
        nonlocal number
        places.update((prefix + name, number) for name, _ in module.named_parameters(recurse=False))
        several = row and any(_layers(child) > 1 for child in module.children())
        for name, child in module.named_children():
            if name in CONTAINERS and not row:
                visit(child, f"{prefix}{name}.", True)
            elif not row and not NUMBERED.fullmatch(name) and _size(child) > half and holds_stages(child):
                visit(child, f"{prefix}{name}.", False)
            elif _size(child):
                # A single convolution among blocks is no stage but a stem, a head, or a transition between stages.
                number += _layers(child) > 1 or not several if row else NUMBERED.fullmatch(name) is not None
                places[prefix + name] = number
    visit(body, "", False)
    return places


def _layers(module: nn.Module) -> int:
    """How many of a module's parameter tensors are matrices or filters."""
    return sum(p.dim() > 1 for p in module.parameters())


def _by_groups(body: nn.Module) -> dict[str, int]:
    """The stages by timm's groups, each given as the largest modules inside one group; {} if the network has none."""
    if not hasattr(body, "group_matcher"):
        return {}
    from timm.models import group_parameters
    groups = group_parameters(body, body.group_matcher(coarse=True))
    group_of = {name: number for number, key in enumerate(sorted(groups)) for name in groups[key]}
    places: dict[str, int] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        places.update((prefix + name, group_of[prefix + name])
                      for name, _ in module.named_parameters(recurse=False) if prefix + name in group_of)
        for name, child in module.named_children():
            inside = {group_of[full] for part, _ in child.named_parameters()
                      if (full := f"{prefix}{name}.{part}") in group_of}     # a shared layer counts only once
            if len(inside) > 1:
                visit(child, f"{prefix}{name}.")
            elif inside:
                places[prefix + name] = inside.pop()
    visit(body, "")
    return places


def parents_of(places: dict[str, int]) -> set[str]:
    """The names of all modules that contain parts, including the body's own, ""."""
    return {"", *(".".join(name.split(".")[:depth]) for name in places for depth in range(1, name.count(".") + 1))}


def tail_of(body: nn.Module, features: Features, size: int, places: dict[str, int]) -> list[str]:
    """The names of the modules from the last stage to the end of `features`, a body's first half, in call order.

    Found by one pass on torch's meta device, with images of `size` pixels: each module must be called once, with one
    tensor that is the output of the module before it, and the last one's output must be that of `features`. Returns []
    otherwise, and also if the tail would be the whole body.
    """
    trial = copy.deepcopy(body).to("meta").eval()
    parents, least = parents_of(places), LEAST_SHARE * _size(body)
    starts = {next(name for name in places if places[name] == n) for n in range(1, max(places.values(), default=0) + 1)}
    names = {name: module for name, module in trial.named_modules()
             if name and name.rpartition(".")[0] in parents and name not in parents}
    calls: list[tuple[str, Any, Any]] = []
    for name, module in names.items():
        module.register_forward_hook(
            lambda _, args, kwargs, out, name=name: calls.append(
                (name, args[0] if len(args) == 1 and not kwargs else None, out)), with_kwargs=True)
    try:
        with torch.no_grad():
            wanted = features(trial, torch.empty(2, 3, size, size, device="meta"))
    except Exception:  # third-party networks may raise anything for a tensor on the meta device
        return []
    called = [name for name, _, _ in calls]
    tail: list[str] = []
    for name, given, out in reversed(calls):
        if out is not wanted or given is None or called.count(name) > 1:
            return []
        tail.insert(0, name)
        if name in starts and _size(names[name]) >= least:
            return tail if len(tail) < len(called) else []
        wanted = given
    return []
