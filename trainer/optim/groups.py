"""Parameter groups of the optimizer: weight decay, separate learning rates, layer-wise decay of the learning rate."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from utils.errors import ConfigError


def param_groups(model: nn.Module, options: dict[str, Any], base_lr: float | None = None,
                 wanted: Callable[[str, nn.Parameter], bool] = lambda name, parameter: True) -> list[dict[str, Any]]:
    """The optimizer's parameter groups: the trainable parameters that `wanted` accepts, in the model's order, split
    only where `options` asks for it. A group is a dict with `params` and, if they differ from the defaults, `lr`
    and `weight_decay`.

    Parameters that are to be thawed later are included, in groups of their own: a group's parameters take their
    first step together.

    options (the config's `trainer`):
        classifier_lr: a separate learning rate for the classifier (Places-LT; Kang et al., ICLR 2020).
        no_decay_scale: no weight decay on NBN's learned scales (`scale_factor`).
        no_decay: "norm_bias": no weight decay on vectors (norms' weights, biases, scales, also [C, 1, 1]).
        layer_decay: the learning rate is multiplied by it once for each stage from a parameter's own to the last before
            the classifier, as is usual in fine-tuning (Clark et al., ELECTRA, ICLR 2020).
    base_lr: the optimizer's learning rate, which layer_decay needs.
    """
    prefixes = tuple(classifier_prefixes(model))
    classifier_lr, layer_decay = options["classifier_lr"], options["layer_decay"]
    stages = model.stage_prefixes() if layer_decay is not None else []
    groups: dict[tuple, dict[str, Any]] = {}
    waiting = frozenset(getattr(model, "waiting", ()))
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad or name in waiting) or not wanted(name, parameter):
            continue
        undecayed = (bool(options["no_decay_scale"]) and name.endswith("scale_factor")) or (
            options["no_decay"] == "norm_bias" and is_vector(parameter))
        is_classifier = bool(prefixes) and name.startswith(prefixes)
        lr = classifier_lr if is_classifier else None
        if stages:
            lr = (base_lr if lr is None else lr) * layer_decay ** (len(stages) - stage_of(name, stages))
        group = groups.setdefault((undecayed, lr, name in waiting), {"params": []})
        group["params"].append(parameter)
        if undecayed:
            group["weight_decay"] = 0.0
        if lr is not None:
            group["lr"] = lr
    return list(groups.values())


def stage_of(name: str, stages: list[tuple[str, ...]]) -> int:
    """The number of the stage that a parameter belongs to, from 0 at the input; len(stages) if it is in
    none (classifiers)."""
    return next((number for number, prefixes in enumerate(stages) if name.startswith(prefixes)), len(stages))


def classifier_prefixes(model: nn.Module) -> list[str]:
    """What `model.classifier_prefixes()` returns; [] for a module that isn't a BaseModel."""
    return model.classifier_prefixes() if hasattr(model, "classifier_prefixes") else []


def is_hidden_matrix(model: nn.Module) -> Callable[[str, nn.Parameter], bool]:
    """A function (name, parameter) -> whether that is a matrix or a convolution's filters inside the network: not in
    the stem, which sees pixels, nor in the classifier, whose rows are classes."""
    stages = model.stage_prefixes() if hasattr(model, "stage_prefixes") else []
    stem = stages[0] if len(stages) > 1 else ()     # with one stage the stem can't be told apart
    outside = (*classifier_prefixes(model), *stem)

    def hidden(name: str, parameter: nn.Parameter) -> bool:
        table = name.endswith("bias_table")     # of Swin's attention: a number for each place and head
        return not is_vector(parameter) and not table and not (outside and name.startswith(outside))
    return hidden


def is_vector(parameter: nn.Parameter) -> bool:
    """Whether at most one of its dimensions is larger than 1, as ConvNeXt's scales [C, 1, 1]."""
    return sum(side > 1 for side in parameter.shape) <= 1


def check_some_trained(groups: list[dict[str, Any]]) -> None:
    """Raises ConfigError if there are no groups, hence nothing to train."""
    if not groups:
        raise ConfigError("optimizer: nothing to train, every parameter is frozen")
