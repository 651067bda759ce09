"""Depthwise convolutions in mixed-precision training on a CPU."""
from __future__ import annotations

from types import MethodType

import torch
from torch import nn


def steady_depthwise(module: nn.Module) -> None:
    """Make `module`'s depthwise convolutions compute in float32 when trained under CPU autocast, in place.

    Outputs keep the input's dtype; other layers and evaluation aren't affected. oneDNN has fast bfloat16 kernels for
    the forward pass only: gradients of 5x5 filters on small maps take four times as long as in float32, so that a
    network of such layers would train more slowly in bfloat16 than in float32 (`python -m benchmarks.depthwise`).
    """
    for conv in module.modules():
        # Replace the method, not the class: norm folding and conversion look for nn.Conv2d itself.
        if isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels > 1:
            conv.forward = MethodType(_forward, conv)


def _forward(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    plain = type(conv).forward
    if not (conv.training and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
        return plain(conv, x)
    with torch.autocast("cpu", enabled=False):
        return plain(conv, x.float()).to(x.dtype)
