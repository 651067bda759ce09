"""Weights for the detector: from ImageNet classifiers, with whatever norms they have, and from whole detectors."""
from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from utils.checkpoint.store import find_weights, strip_module
from utils.errors import ConfigError

#: What MABN's norms gather in training. A new run gathers its own: old ones need not fit its batch size.
GATHERED = re.compile(r"\.(iters|buffer_x2|buffer_gz|num_batches_tracked|sta_matrix|pre_x2|pre_gz)$")
RESNET = re.compile(r"^(conv1|bn1|layer[1-4])\.")


def tensors_of(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state_dict inside a checkpoint, without the prefixes that wrappers put before its keys."""
    found = find_weights(checkpoint)
    weights = found[1] if found and isinstance(found[1], dict) else {}
    return {strip_module(key): value for key, value in weights.items() if isinstance(value, torch.Tensor)}


def is_detector(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the keys are a whole detector's (this project's or torchvision's)."""
    return any(key.startswith(("roi_heads.", "rpn.")) for key in tensors)


def resnet_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An ImageNet classifier's ResNet under torchvision's names.

    torchvision's and MABN's files have these names already; this project's stand under `backbone.`, and of several
    experts' last stages (`layer3s.0.`, `layer4s.0.`) the first is taken.
    """
    found = {}
    for key, value in tensors.items():
        key = re.sub(r"^(layer\d)s\.0\.", r"\1.", key.removeprefix("backbone."))
        if RESNET.match(key):
            found[key] = value
    return found


def fit_weights(model: nn.Module, checkpoint: dict[str, Any], name: str, other_classes: bool = False) -> str:
    """Copy what fits from `checkpoint` into `model`, a detector; a line for the log.

    A whole detector's file must fit but for what depends on the classes, which is left new where their number differs
    and where they are others (`other_classes`). Of a classifier's file every convolution and norm of the ResNet must be
    there; the norms' own statistics are taken where they mean the same.
    Raises ConfigError, naming the file `name`.
    """
    tensors = tensors_of(checkpoint)
    whole = is_detector(tensors)
    part, source = (model, tensors) if whole else (model.backbone.body, resnet_of(tensors))
    if not source:
        raise ConfigError(f"{name}: holds neither a ResNet-50 (conv1.weight, layer1.0.conv1.weight, ...) nor a "
                          "Mask R-CNN (backbone.body.*, rpn.*, roi_heads.*)")
    if not whole:
        source = _second_moments(part, source)
    target = part.state_dict()
    may_differ = tuple(model.classifier_prefixes()) if whole else ()
    fitted, left, wrong = {}, [], []
    for key, value in target.items():
        given = None if other_classes and key.startswith(may_differ) else source.get(key)
        if given is not None and given.numel() == value.numel() and _same_shape(given, value):
            if whole or not GATHERED.search(key):
                fitted[key] = given.reshape(value.shape)
        elif key.startswith(may_differ):
            left.append(key)
        elif not (GATHERED.search(key) or key.endswith(("running_mean", "running_var", "scale_factor"))):
            wrong.append((key, given))
    if wrong:
        key, given = wrong[0]
        shape = "is missing" if given is None else f"has the shape {list(given.shape)}"
        raise ConfigError(f"{name}: doesn't fit the model: {key} {shape}, needed is {list(target[key].shape)}"
                          + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""))
    part.load_state_dict(fitted, strict=False)
    if whole:
        rest = f"; new for these classes: {', '.join(left)}" if left else ""
        return f"starts from the detector in {name}: {len(fitted)} tensors{rest}"
    return f"starts from the ImageNet weights in {name}: {len(fitted)} tensors of the ResNet"


def _same_shape(given: torch.Tensor, value: torch.Tensor) -> bool:
    # MABN keeps running_var as [1, C, 1, 1], the others as [C].
    return [n for n in given.shape if n > 1] == [n for n in value.shape if n > 1]


def _second_moments(part: nn.Module, source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """MABN divides by the root of the mean square: of norms with a mean that is running_var + running_mean ** 2."""
    wanted = {name for name, module in part.named_modules() if hasattr(module, "buffer_x2")}
    return {key: value + source[f"{name}.running_mean"] ** 2
            if (name := key.removesuffix(".running_var")) in wanted and f"{name}.running_mean" in source else value
            for key, value in source.items()}
