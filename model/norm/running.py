"""Running statistics, kept as torch's batch norms keep them."""
from __future__ import annotations

import torch
from torch import nn


def next_average_factor(layer: nn.modules.batchnorm._NormBase) -> float:
    """Count a training step of `layer` and return the weight of its new statistics, as torch's batch norms do:
    `momentum`, or 1 / (steps so far) where `momentum` is None; 0.0 where nothing is tracked."""
    if not (layer.training and layer.track_running_stats):
        return 0.0
    layer.num_batches_tracked.add_(1)
    return 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum


@torch.no_grad()
def update_running(layer: nn.modules.batchnorm._NormBase, mean: torch.Tensor, var: torch.Tensor, values: int) -> None:
    """One step of `layer`'s running statistics: `mean`, biased `var` [G, C] of groups of `values` values a channel.

    Like torch's batch norm, the running variance is the unbiased one.
    """
    factor = next_average_factor(layer)
    if factor:
        layer.running_mean.lerp_(mean.mean(0).to(layer.running_mean.dtype), factor)
        unbiased = var.mean(0) * (values / max(values - 1, 1))
        layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), factor)
