"""Batch norm over small groups of a large batch: the statistics of small batches at the speed of a large one."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from model.norm.kernels import affine, dot_and_sum, same_format, wide_type, without_autocast
from model.norm.running import update_running
from utils.errors import ConfigError


def check_group_size(size: int | None) -> int | None:
    """Returns `size` if it is a valid number of images per group, or None; raises ConfigError otherwise."""
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError(f"normalization_batch_size: {size!r} isn't a number of images; use an integer from 1 up")
    return size


def group_mean(per_sample: torch.Tensor, size: int) -> torch.Tensor:
    """Means over groups of `size` consecutive rows: [N, C] -> [G, C], G = ceil(N / size).

    The last group may be smaller; its mean is over the rows that it has.
    """
    n = len(per_sample)
    short = -n % size
    sums = F.pad(per_sample, (0, 0, 0, short)).unflatten(0, (-1, size)).sum(1)      # [G, C]
    return sums / (group_sizes(n, size, sums) if short else size)


def group_sizes(n: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """How many of n samples are in each group of `size`: [G, 1], with `like`'s dtype and device."""
    sizes = like.new_full((-(-n // size), 1), size)
    sizes[-1] -= -n % size
    return sizes


def group_expand(per_group: torch.Tensor, size: int, n: int) -> torch.Tensor:
    """Repeat each group's row for all its samples: [G, C] -> [N, C], n = N."""
    return per_group.repeat_interleave(size, dim=0)[:n]


@torch.no_grad()
def group_moments(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance, each [G, C], of consecutive groups of `size` samples of x [N, C, H, W].

    A group's variance is the mean of its samples' variances plus the variance of their means, so that no large numbers
    cancel. float32 at least, whatever x's dtype. Not differentiable: see `normalise_groups`.
    """
    # torch.var_mean takes ten times as long on a CPU.
    mean = x.mean((2, 3), dtype=wide_type(x.dtype))
    var = (x - mean[:, :, None, None]).square_().mean((2, 3))
    grouped = group_mean(mean, size)
    apart = mean - group_expand(grouped, size, len(mean))
    return grouped, group_mean(var + apart * apart, size)


def normalise_groups(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, var: torch.Tensor,
                     eps: float, size: int) -> torch.Tensor:
    """Training-mode batch norm of each group of `size` samples separately, given `mean, var = group_moments(x, size)`;
    the gradient flows through these moments too.

    x [N, C, H, W] -> the same shape, dtype and memory format; weight, bias: [C] or [G, C]; mean, var: [G, C].
    """
    return _NormaliseGroups.apply(same_format(x, like=x), weight.expand_as(mean), bias.expand_as(mean), mean,
                                  (var + eps).rsqrt_(), size)


class _NormaliseGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mean, inv_std, size):
        ctx.size = size
        ctx.save_for_backward(x, weight, mean, inv_std)
        with without_autocast(x):
            scale = weight * inv_std
            return affine(x, *(group_expand(part, size, len(x)) for part in (scale, bias - mean * scale)))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, inv_std = ctx.saved_tensors
        n, values = len(x), x.shape[2] * x.shape[3]
        with without_autocast(x):
            dy = same_format(dy, like=x)
            dot, total = dot_and_sum(dy, x, per_sample=True, centre=group_expand(mean, ctx.size, n))       # [N, C]
            mean_dot, mean_dy = (group_mean(part, ctx.size) / values for part in (dot, total))              # [G, C]
            scale = weight * inv_std
            along = scale * inv_std * inv_std * mean_dot
            shift = along * mean - scale * mean_dy
            scale, along, shift = (group_expand(part, ctx.size, n) for part in (scale, along, shift))
            dx = affine(x, -along, shift).addcmul_(dy, scale[:, :, None, None])
            images = group_sizes(n, ctx.size, dot) * values
        return dx, mean_dot * inv_std * images, mean_dy * images, None, None, None


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that normalises consecutive groups of `normalization_batch_size` training images separately.

    This simulates small batches as in Yan et al. (ICLR 2020): SGD keeps its large batch while the norm sees small ones.
    The last group may be smaller; a group with a single value per channel (one image, 1x1) becomes 0 before the affine
    map. The running statistics are updated once a step, by the mean over the groups.
    x: [N, C, H, W] -> the same shape. Evaluation, parameters and buffers are `torch.nn.BatchNorm2d`'s. Raises
    ConfigError for a group size below 1.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
                 normalization_batch_size: int = 2):
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        self.normalization_batch_size = check_group_size(normalization_batch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(x)
        if not self.training or len(x) == 0:
            return super().forward(x)
        size = self.normalization_batch_size
        mean, var = group_moments(x, size)                                  # [G, C]
        update_running(self, mean, var, values=min(size, len(x)) * x[0, 0].numel())
        weight = self.weight if self.affine else mean.new_ones(())
        return normalise_groups(x, weight, self.bias if self.affine else mean.new_zeros(()), mean, var, self.eps, size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, normalization_batch_size={self.normalization_batch_size}"
