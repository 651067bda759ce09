"""Initial weights for the detector, from ImageNet classifiers with any norms or from whole detectors."""
from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from model.norm.mabn import MABN2d
from utils.checkpoint.store import find_weights, strip_module
from utils.errors import ConfigError

#: Training-time buffers of MABN's norms. A new run collects its own, as old ones may not fit its batch size.
GATHERED = re.compile(r"\.(iters|buffer_x2|buffer_gz|num_batches_tracked|sta_matrix|pre_x2|pre_gz)$")
RESNET = re.compile(r"^(conv1|bn1|layer[1-4])\.")


def tensors_of(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state_dict inside a checkpoint, without wrappers' key prefixes; {} if there is none."""
    found = find_weights(checkpoint)
    weights = found[1] if found and isinstance(found[1], dict) else {}
    return {strip_module(key): value for key, value in weights.items() if isinstance(value, torch.Tensor)}


def is_detector(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether these are the weights of a whole detector (this project's or torchvision's), judged by the keys."""
    return any(key.startswith(("roi_heads.", "rpn.")) for key in tensors)


def resnet_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The ResNet of an ImageNet classifier under torchvision's names.

    torchvision's and MABN's files have these names already; this project's keys have the prefix `backbone.`, and with
    several experts the first one's stages are used (`layer3s.0.`, `layer4s.0.`).
    """
    found = {}
    for key, value in tensors.items():
        key = re.sub(r"^(layer\d)s\.0\.", r"\1.", key.removeprefix("backbone."))
        if RESNET.match(key):
            found[key] = value
    return found


def fit_weights(model: nn.Module, checkpoint: dict[str, Any], name: str, other_classes: bool = False) -> str:
    """Copy the weights in `checkpoint` into `model`, a detector; returns a line for the log.

    A whole detector's file must fit, except the parts that depend on the classes, which keep their initialisation if
    the number of classes differs or `other_classes` is true. A classifier's file must have every convolution and norm
    of the ResNet; batch norm's statistics become MABN's second moments.
    Raises ConfigError, naming the file `name`, if something is missing or of another shape.
    """
    tensors = tensors_of(checkpoint)
    whole = is_detector(tensors)
    part, source = (model, tensors) if whole else (model.backbone.body, resnet_of(tensors))
    if not source:
        raise ConfigError(f"{name}: holds neither a ResNet-50 (conv1.weight, layer1.0.conv1.weight, ...) nor a "
                          "Mask R-CNN (backbone.body.*, rpn.*, roi_heads.*)")
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
    # MABN divides by the root mean square: its norms make second moments of batch norm's variances and means.
    means = [f"{norm}.running_mean" for norm, module in part.named_modules() if isinstance(module, MABN2d)]
    part.load_state_dict({**fitted, **{key: source[key] for key in means if key in source}}, strict=False)
    if whole:
        rest = f"; new for these classes: {', '.join(left)}" if left else ""
        return f"starts from the detector in {name}: {len(fitted)} tensors{rest}"
    return f"starts from the ImageNet weights in {name}: {len(fitted)} tensors of the ResNet"


def _same_shape(given: torch.Tensor, value: torch.Tensor) -> bool:
    # MABN's running_var is [1, C, 1, 1], other norms' is [C].
    return [n for n in given.shape if n > 1] == [n for n in value.shape if n > 1]
