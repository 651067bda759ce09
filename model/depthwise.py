"""Depthwise convolutions in mixed precision on a CPU."""
from __future__ import annotations

from types import MethodType

import torch
from torch import nn


def steady_depthwise(module: nn.Module) -> None:
    """Have `module`'s depthwise convolutions train in float32 under a CPU's autocast; what comes in and goes out keeps
    its type, all else its precision, and evaluation is as before.

    oneDNN has fast bfloat16 kernels for their forward pass only: the gradients of 5x5 filters on small maps take four
    times as long as in float32, so that in bfloat16 a network of them trains more slowly than in float32
    (`python -m benchmarks.depthwise`).
    """
    for conv in module.modules():
        # The class stays: folding and exchanging norms ask for it.
        if isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels > 1:
            conv.forward = MethodType(_forward, conv)


def _forward(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    plain = type(conv).forward
    if not (conv.training and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
        return plain(conv, x)
    with torch.autocast("cpu", enabled=False):
        return plain(conv, x.float()).to(x.dtype)
