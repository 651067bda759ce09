"""What norm layers of all types have in common, read from one layer and written into another."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from model.norm.mabn import MABN2d
from model.norm.nbn import NormalizedBatchNorm2d
from model.norm.renorm import BatchRenorm2d

_PUBLISHED_MOMENTUM = {MABN2d: 0.98, BatchRenorm2d: 0.01}      # else torch's 0.1


@dataclass
class Facts:
    """A norm layer's parameters and statistics, whatever its type: [C] tensors, or None if the layer has none.

    steps: 0-d `num_batches_tracked`.
    """
    channels: int
    eps: float
    momentum: float | None            # weight of the new value, torch's convention; None: cumulative average
    momentum_chosen: bool             # False where it is just the default of the layer's type
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: torch.Tensor | None
    var: torch.Tensor | None
    steps: torch.Tensor | None


def is_frozen_batch_norm(layer: nn.Module) -> bool:
    """True for torchvision's FrozenBatchNorm2d and its namesakes in other detection code: buffers only, no training."""
    return type(layer).__name__.startswith("FrozenBatchNorm") and "running_mean" in layer._buffers


def is_norm(layer: nn.Module) -> bool:
    """True for norms of [N, C, H, W] maps that can be converted; not for 1-d norms or torch.nn.LayerNorm."""
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm, MABN2d)
    lazy = isinstance(layer, nn.modules.lazy.LazyModuleMixin)
    return (isinstance(layer, kinds) and not lazy) or is_frozen_batch_norm(layer)


def is_batch_norm(layer: nn.Module) -> bool:
    """True for norms as in `is_norm` that normalise over the batch, so that others can take over their statistics."""
    return is_norm(layer) and not isinstance(layer, (nn.GroupNorm, nn.InstanceNorm2d))


def read_facts(layer: nn.Module) -> Facts:
    """Read the facts of `layer`, for which `is_norm` must hold. NBN gives its effective affine parameters, MABN a mean
    of 0 and its second moment as the variance."""
    momentum = getattr(layer, "momentum", None)
    default = next((m for kind, m in _PUBLISHED_MOMENTUM.items() if isinstance(layer, kind)), 0.1)
    tracks = hasattr(layer, "momentum") and not isinstance(layer, nn.InstanceNorm2d)
    weight, bias = layer.weight, layer.bias
    if isinstance(layer, NormalizedBatchNorm2d):
        weight, bias = layer.effective_affine()
    mean, var = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
    if isinstance(layer, MABN2d):
        var = var.view(-1)
        mean, momentum = torch.zeros_like(var), 1 - layer.momentum
    channels = next(getattr(layer, name) for name in ("num_features", "num_channels", "weight") if hasattr(layer, name))
    return Facts(channels=channels if isinstance(channels, int) else len(channels), eps=layer.eps, momentum=momentum,
                 momentum_chosen=tracks and getattr(layer, "momentum", default) != default,
                 weight=weight, bias=bias, mean=mean, var=var, steps=getattr(layer, "num_batches_tracked", None))


@torch.no_grad()
def write_facts(facts: Facts, layer: nn.Module) -> None:
    """Copy the parameters and running statistics in `facts` into `layer`, as far as it has them.

    MABN's running_var becomes the second moment, variance + mean^2.
    """
    for name, known in (("weight", facts.weight), ("bias", facts.bias)):
        place = getattr(layer, name, None)
        if place is not None and known is not None:
            place.copy_(known)
            if isinstance(place, nn.Parameter):
                # A frozen norm's buffers become trainable parameters; others keep their requires_grad.
                place.requires_grad_(known.requires_grad or not known.is_leaf or not isinstance(known, nn.Parameter))
    if facts.var is None or getattr(layer, "running_var", None) is None:
        return
    if isinstance(layer, MABN2d):
        layer.running_var.copy_((facts.var + facts.mean ** 2).view_as(layer.running_var))
        return
    if getattr(layer, "running_mean", None) is not None:
        layer.running_mean.copy_(facts.mean)
    layer.running_var.copy_(facts.var)
    if facts.steps is not None and getattr(layer, "num_batches_tracked", None) is not None:
        layer.num_batches_tracked.copy_(facts.steps)
