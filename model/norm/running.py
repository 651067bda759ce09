"""Updating running statistics as torch's batch norms do."""
from __future__ import annotations

import torch
from torch import nn


def next_average_factor(layer: nn.modules.batchnorm._NormBase) -> float:
    """Count a training step of `layer` and return the weight of the new statistics in its running average: `momentum`,
    or 1 / (steps so far) if `momentum` is None; 0.0 (and no step counted) if statistics aren't tracked."""
    if not (layer.training and layer.track_running_stats):
        return 0.0
    layer.num_batches_tracked.add_(1)
    return 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum


@torch.no_grad()
def update_running(layer: nn.modules.batchnorm._NormBase, mean: torch.Tensor, var: torch.Tensor, values: int) -> None:
    """Update `layer`'s running statistics once, by the means over G groups of `values` values per channel.

    mean, var: [G, C] each, var biased. As in torch's batch norm, the running variance is the unbiased one.
    """
    factor = next_average_factor(layer)
    if factor:
        layer.running_mean.lerp_(mean.mean(0).to(layer.running_mean.dtype), factor)
        unbiased = var.mean(0) * (values / max(values - 1, 1))
        layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), factor)
