"""Batch renormalisation: batch norm whose training output is corrected towards the running statistics."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.norm.grouped import check_group_size, group_moments, normalise_groups
from model.norm.kernels import moments, normalise, same_format
from model.norm.running import update_running
from utils.errors import ConfigError


class BatchRenorm2d(nn.BatchNorm2d):
    """Batch Renormalization (Ioffe, NeurIPS 2017).

    x: [N, C, H, W] -> the same shape. In training, with batch mean m, sigma = sqrt(batch variance + eps), running mean
    mu and s = sqrt(running variance + eps),
    y = w * ((x - m) / sigma * r + d) + b, r = clip(sigma / s, 1/r_max, r_max), d = clip((m - mu) / s, -d_max, d_max);
    no gradient flows through r and d. For the first `warmup_iters` steps r = 1 and d = 0 (batch norm); from there
    the bounds grow linearly to `r_max` over `r_ramp_iters` steps and to `d_max` over `d_ramp_iters`. Defaults are the
    paper's (5k; 3 at 40k; 5 at 25k; moving average rate 0.01). Evaluation, parameters and buffers are
    `torch.nn.BatchNorm2d`'s; `num_batches_tracked` is the step counter.

    A single value per channel (one image, 1x1) has no variance: it is normalised by the running statistics, which
    aren't updated. normalization_batch_size: normalise consecutive groups of that many images separately; the last
    group may be smaller. Raises ConfigError for r_max below 1, d_max below 0, or a group size below 1.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.01, affine: bool = True,
                 r_max: float = 3.0, d_max: float = 5.0, warmup_iters: int = 5000, r_ramp_iters: int = 35000,
                 d_ramp_iters: int = 20000, normalization_batch_size: int | None = None):
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        if r_max < 1 or d_max < 0:
            raise ConfigError(f"BatchRenorm: r_max {r_max} must be at least 1 and d_max {d_max} at least 0")
        self.r_max, self.d_max = r_max, d_max
        self.warmup_iters, self.r_ramp_iters, self.d_ramp_iters = warmup_iters, r_ramp_iters, d_ramp_iters
        self.normalization_batch_size = check_group_size(normalization_batch_size)

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The current bounds (r_max, d_max) at this step: 0-d tensors on the layer's device."""
        past = (self.num_batches_tracked - self.warmup_iters).clamp(min=0).to(torch.float32)
        return (1 + (self.r_max - 1) * (past / max(self.r_ramp_iters, 1)).clamp(max=1),
                self.d_max * (past / max(self.d_ramp_iters, 1)).clamp(max=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(x)
        size = self.normalization_batch_size or len(x)
        values = min(size, len(x)) * x.shape[2] * x.shape[3]
        if not self.training or values <= 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if len(x) <= size:
            return self._whole_batch(x, values)
        mean, var = group_moments(x, size)                                  # [G, C]
        r, d = self._corrections(mean, var)
        update_running(self, mean, var, values)
        weight, bias = self._affine()
        return normalise_groups(x, weight * r, weight * d + bias, mean, var, self.eps, size)

    def _whole_batch(self, x: torch.Tensor, values: int) -> torch.Tensor:
        """r and d are constants to the gradient, so w * r and w * d + b are a plain batch norm's weight and bias."""
        x = same_format(x, like=x)
        mean, var = moments(x)                                              # [C]
        r, d = self._corrections(mean, var)
        update_running(self, mean[None], var[None], values)
        weight, bias = self._affine()
        return normalise(x, weight * r, weight * d + bias, mean, var, self.eps)

    @torch.no_grad()
    def _corrections(self, mean: torch.Tensor, var: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(r, d), shaped like `mean` and `var`, from the running statistics before this step's update."""
        r_max, d_max = (bound.to(mean.dtype) for bound in self.bounds())
        running_std = (self.running_var + self.eps).sqrt()
        r = ((var + self.eps).sqrt() / running_std).clamp(1 / r_max, r_max)
        return r, ((mean - self.running_mean) / running_std).clamp(-d_max, d_max)

    def _affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.weight is None:
            return torch.ones_like(self.running_var), torch.zeros_like(self.running_var)
        return self.weight, self.bias
