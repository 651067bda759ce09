"""Batch norm over small groups of a large batch: the statistics of a small one at the speed of the large."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.norm.running import update_running
from utils.errors import ConfigError


def check_group_size(size: int | None) -> int | None:
    """`size` itself, if it can be a normalisation batch; else ConfigError."""
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError(f"normalization_batch_size: {size!r} isn't a number of images; use an integer from 1 up")
    return size


def group_mean(per_sample: torch.Tensor, size: int) -> torch.Tensor:
    """Means over groups of `size` consecutive rows: [N, C] -> [G, C], G = ceil(N / size).

    A last group that is short is the mean of the rows it has.
    """
    n = len(per_sample)
    short = -n % size
    sums = F.pad(per_sample, (0, 0, 0, short)).unflatten(0, (-1, size)).sum(1)      # [G, C]
    if not short:
        return sums / size
    counts = torch.full((len(sums), 1), float(size), dtype=sums.dtype, device=sums.device)
    counts[-1] = size - short
    return sums / counts


def group_expand(per_group: torch.Tensor, size: int, n: int) -> torch.Tensor:
    """Each sample's group's row: [G, C] -> [N, C], `n` = N."""
    return per_group.repeat_interleave(size, dim=0)[:n]


def group_moments(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance, each [G, C], of consecutive groups of `size` samples of x [N, C, H, W].

    A group's variance is the mean of its samples' variances plus the variance of their means: no difference of
    large numbers. float32 at least, whatever x's type.
    """
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(2, 3), correction=0)
    grouped = group_mean(mean, size)
    apart = mean - group_expand(grouped, size, len(mean))
    return grouped, group_mean(var + apart * apart, size)


def affine_per_sample(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """x [N, C, H, W] * scale [N, C] + shift [N, C], in x's type and memory format."""
    return torch.addcmul(shift[:, :, None, None].to(x.dtype), x, scale[:, :, None, None].to(x.dtype))


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that normalises each `normalization_batch_size` images of a training batch by themselves.

    The study of small batches in Yan et al. (ICLR 2020): SGD keeps its large batch, the norm sees a small one. Groups
    are taken in order; a last group that is short is normalised by the images it has, and one single value (one image,
    1x1) becomes 0 before the affine. The running statistics are updated once a step, by the mean over the groups.
    x: [N, C, H, W] -> the same. Evaluation, parameters and buffers are `torch.nn.BatchNorm2d`'s.
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
        scale = (var + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        shift = -mean * scale
        if self.affine:
            shift = shift + self.bias
        return affine_per_sample(x, group_expand(scale, size, len(x)), group_expand(shift, size, len(x)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, normalization_batch_size={self.normalization_batch_size}"
