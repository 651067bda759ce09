"""Splitting norms that timm fuses with an activation, so that the norm alone can be converted or folded."""
from __future__ import annotations

import torch
from torch import nn


class NormAct(nn.Module):
    """A norm followed by the dropout (nearly always an identity) and activation that timm fused with it."""

    def __init__(self, norm: nn.Module, drop: nn.Module, act: nn.Module):
        super().__init__()
        self.norm, self.drop, self.act = norm, drop, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(self.norm(x)))


def is_fused(layer: nn.Module) -> bool:
    """Whether `layer` is a norm that also activates (timm's BatchNormAct2d, GroupNormAct, ...)."""
    return isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)) and all(
        isinstance(layer._modules.get(name), nn.Module) for name in ("drop", "act"))


def with_activation(norm: nn.Module, fused: nn.Module) -> nn.Module:
    """`norm` followed by the dropout and activation of `fused`, as a `NormAct`."""
    return NormAct(norm, fused.drop, fused.act).train(fused.training)
