"""Norms from other papers that NBN and MABN are compared with, made to work for every map size and device."""
from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from model.norm.kernels import wide_type
from model.norm.running import update_running
from utils.errors import ConfigError


def group_count(channels: int, num_groups: int | None = None) -> int:
    """GroupNorm's number of groups for `channels`: the greatest common divisor of `num_groups` and `channels`.

    None means 32 (Wu & He, ECCV 2018), or less in narrow layers so that a group has at least two channels: with one,
    group norm would be instance norm. Raises ConfigError if num_groups is below 1.
    """
    if num_groups is not None:
        if num_groups < 1:
            raise ConfigError(f"GroupNorm: num_groups {num_groups} must be at least 1")
        return math.gcd(num_groups, channels)
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < 2:
        groups //= 2
    return groups


class GroupNorm2d(nn.GroupNorm):
    """Group norm of maps [N, C, H, W]; `num_groups` is reduced to a divisor of C, see `group_count`."""

    def __init__(self, num_channels: int, num_groups: int | None = None, eps: float = 1e-5, affine: bool = True):
        super().__init__(group_count(num_channels, num_groups), num_channels, eps=eps, affine=affine)


class LayerNorm2d(nn.GroupNorm):
    """Layer norm of maps as norm papers define it: mean and variance over C, H, W of each image, affine per channel.

    x: [N, C, H, W] -> the same shape. Equal to group norm with one group.
    """

    def __init__(self, num_channels: int, eps: float = 1e-5, affine: bool = True):
        super().__init__(1, num_channels, eps=eps, affine=affine)


class InstanceNorm2d(nn.InstanceNorm2d):
    """Instance norm (Ulyanov 2016) of maps [N, C, H, W]: affine, without running statistics.

    On 1x1 maps, which torch refuses, each value is its own mean, so the output is the bias.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True):
        super().__init__(num_features, eps=eps, affine=affine, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 4 and x.shape[2] * x.shape[3] == 1:
            zero = x - x
            return zero if self.weight is None else zero * self._column(self.weight) + self._column(self.bias)
        return super().forward(x)

    @staticmethod
    def _column(p: torch.Tensor) -> torch.Tensor:
        return p[:, None, None]


class SyncBatchNorm(nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` that also works in CPU processes (gloo); torch has a GPU kernel only.

    x: [N, C, ...] -> the same shape, normalised by the mean and variance over all ranks' batches, whose sizes may
    differ. Without a process group it is plain batch norm.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not shared or x.device.type != "cpu":
            return super().forward(x)
        dims = [0, *range(2, x.dim())]
        wide = x.to(wide_type(x.dtype))
        count = wide.new_tensor([x.numel() / x.shape[1]])
        total = _SumOverRanks.apply(torch.cat([wide.sum(dims), count]))
        mean = total[:-1] / total[-1].detach()
        column = (-1, *[1] * (x.dim() - 2))
        centred = wide - mean.view(column)
        count = total[-1].detach()
        var = _SumOverRanks.apply(centred.square().sum(dims)) / count
        update_running(self, mean.detach()[None], var.detach()[None], int(count))
        scale = (var + self.eps).rsqrt()
        out = centred * (scale if self.weight is None else scale * self.weight).view(column)
        return (out if self.bias is None else out + self.bias.view(column)).to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce sum that is differentiable: every rank's gradient reaches every rank's tensor."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total
