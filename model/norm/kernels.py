"""Per-channel sums and affine maps of [N, C, H, W] tensors, each in one pass over memory.

torch's batch norm kernels already are the fast passes needed here, vectorised for both memory formats and for mixed
types. With mean 0 and standard deviation 1, evaluation-mode batch norm is y = x * scale + shift, and its backward
pass gives sum(a * b) and sum(a) as the parameters' gradients.
"""
from __future__ import annotations

import contextlib
import functools
import math

import torch
import torch.nn.functional as F

_native = torch.ops.aten.native_batch_norm.default
_native_out = torch.ops.aten.native_batch_norm.out
_native_backward = torch.ops.aten.native_batch_norm_backward.default
_native_moments = torch.ops.aten.batch_norm_update_stats.default
_ENOUGH_ROWS = 16      # from this many contiguous images on, it is faster to treat each image as a row


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of `dtype` values are kept: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def same_format(a: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`a` in the memory format of `like`, so that one kernel walks both in the same order."""
    if like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
        return a.contiguous(memory_format=torch.channels_last)
    return a.contiguous()


def dot_and_sum(a: torch.Tensor, b: torch.Tensor, per_sample: bool = False,
                centre: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """sum(a * (b - centre)) and sum(a) over N, H, W: [C] each; with `per_sample` over H, W: [N, C] each.

    a, b: [N, C, H, W] of the same dtype and memory format. centre: shaped like the results; None means 0.
    """
    wide = wide_type(a.dtype)
    if per_sample and not a.is_contiguous():
        b = b if centre is None else b - _column(centre)
        return torch.mul(a.to(wide), b).sum((2, 3)), a.sum((2, 3), dtype=wide)
    if per_sample:                                   # the samples' planes as channels of one sample
        n, c = a.shape[:2]
        planes = (1, n * c, *a.shape[2:])
        sums = dot_and_sum(a.view(planes), b.view(planes), centre=None if centre is None else centre.reshape(-1))
        return sums[0].view(n, c), sums[1].view(n, c)
    positions = 1 if a.is_contiguous() or not _runs_kernels(a) else _positions_a_row(a)
    if positions > 1:
        a, b = _long_rows(a, positions), _long_rows(b, positions)
        centre = None if centre is None else centre.repeat(positions)
    zero, one = _zeros_ones(a, a.shape[1])
    mean = zero if centre is None else centre
    # As running and as saved statistics: CPU kernels read the former, CUDA's the latter (and refuse None).
    _, dot, total = _native_backward(a, b, one, mean, one, mean, one, False, 0.0, [False, True, True])
    if positions > 1:
        dot, total = dot.view(positions, -1).sum(0), total.view(positions, -1).sum(0)
    return dot, total


def _positions_a_row(x: torch.Tensor) -> int:
    """How many positions of channels_last x to merge into one row, as if they were channels: with few channels a row,
    the loop's overhead costs more than the memory access."""
    return math.gcd(x.numel() // x.shape[1], 8) if x.shape[1] < 32 else 1


def _long_rows(x: torch.Tensor, positions: int) -> torch.Tensor:
    """channels_last x [N, C, H, W] seen as [N * H * W / positions, positions * C]."""
    length = positions * x.shape[1]
    return x.as_strided((x.numel() // length, length), (length, 1))


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance over N, H, W of x [N, C, H, W]: [C] each, in float32 at least.

    In two passes as in torch's batch norm, the second with the mean known, so that no large numbers cancel. Not
    differentiable.
    """
    x = x.detach().to(wide_type(x.dtype))
    if not _runs_kernels(x):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return mean, var
    if not x.is_contiguous() or len(x) < _ENOUGH_ROWS:
        return _native_moments(x, None, None, 0.0)
    # The kernel for innermost channels is several times as fast. Contiguous images are such rows if every value of an
    # image counts as a "channel" of its own; a real channel's moments then follow from those of its values.
    means, variances = (part.view(x.shape[1], -1) for part in _native_moments(x.view(len(x), -1), None, None, 0.0))
    mean = means.mean(1, keepdim=True)
    return mean.flatten(), torch.addcmul(variances, means - mean, means - mean).mean(1)


def normalise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, var: torch.Tensor,
              eps: float) -> torch.Tensor:
    """Training-mode batch norm, given `mean, var = moments(x)`; the gradient flows through these moments too.

    x [N, C, H, W] -> the same shape, dtype and memory format; weight, bias, mean, var: [C].
    """
    if not _runs_kernels(x):
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    return _ByOwnMoments.apply(x, weight.to(mean.dtype), bias.to(mean.dtype), mean, (var + eps).rsqrt_())


class _ByOwnMoments(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, mean, inv_std):
        scale = weight * inv_std
        return affine(x, scale, torch.addcmul(bias, mean, scale, value=-1))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, mean, inv_std = inputs
        ctx.save_for_backward(x, weight, mean, inv_std)

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, inv_std = ctx.saved_tensors
        return *_native_backward(same_format(dy, like=x), x, weight, None, None, mean, inv_std, True, 0.0,
                                 [True, True, True]), None, None


def _runs_kernels(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def affine(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """x * scale + shift in x's dtype and memory format. x [N, C, H, W]; scale and shift both [C] or both [N, C]."""
    if scale.dim() == 1:
        positions = 1 if x.is_contiguous() or not _runs_kernels(x) else _positions_a_row(x)
        zero, one = _zeros_ones(x, positions * x.shape[1])
        if positions == 1:
            return _native(x, scale, shift, zero, one, False, 0.0, 0.0)[0]
        y = torch.empty_like(x)                                      # not a view: callers may write into it in place
        _native_out(_long_rows(x, positions), scale.repeat(positions), shift.repeat(positions), zero, one, False, 0.0,
                    0.0, out=_long_rows(y, positions), save_mean=zero.new_empty(0), save_invstd=zero.new_empty(0))
        return y
    if x.is_contiguous():
        planes = affine(x.view(1, -1, *x.shape[2:]), scale.reshape(-1), shift.reshape(-1))
        return torch.ops.aten._unsafe_view(planes, x.shape)      # no view to autograd: callers may write into it
    return torch.addcmul(_column(shift), x, _column(scale)).to(x.dtype)


def weighted_sum(a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
    """a * a_scale + b * b_scale in a's dtype and memory format; a, b [N, C, H, W]; the scales [C] or [N, C]."""
    if a.dtype != a_scale.dtype and a_scale.dim() == 1:      # half precision: avoids a pass over float32 copies
        nothing = torch.zeros_like(a_scale)
        return affine(a, a_scale, nothing).add_(affine(b, b_scale, nothing))
    return torch.mul(a, _column(a_scale)).addcmul_(b, _column(b_scale)).to(a.dtype)


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """A context with autocast off on x's device, so that statistics keep their dtype; a null context if it is off."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _column(per_channel: torch.Tensor) -> torch.Tensor:
    return per_channel[..., None, None]


def _zeros_ones(x: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    key = (channels, wide_type(x.dtype), x.device)
    return _constants(*key) if type(x) is torch.Tensor else _constants.__wrapped__(*key)    # no fake tensor is kept


@functools.lru_cache(maxsize=512)
def _constants(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros and ones, [channels] each, never written to. Cached because making them takes as long as a small layer."""
    with torch.inference_mode(False):
        return torch.zeros(channels, dtype=dtype, device=device), torch.ones(channels, dtype=dtype, device=device)
