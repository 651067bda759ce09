"""Per-channel sums and affine maps of [N, C, H, W] tensors, one pass over memory each.

torch's batch norm kernels already are the fast passes wanted here, vectorised for both memory formats and for mixed
types. With mean 0 and standard deviation 1 put in, evaluation-mode batch norm is y = x * scale + shift, and the
parameter gradients of its backward are sum(a * b) and sum(a).
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
_ENOUGH_ROWS = 16      # contiguous images from which on they are faster taken as rows


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type statistics of `dtype` values are kept in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def same_format(a: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`a` in the memory format of `like`, so that one kernel walks both in the same order."""
    if like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
        return a.contiguous(memory_format=torch.channels_last)
    return a.contiguous()


def dot_and_sum(a: torch.Tensor, b: torch.Tensor, per_sample: bool = False,
                centre: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """sum(a * (b - centre)) and sum(a) of a, b [N, C, H, W] alike in type and format: [C] each, or [N, C] for each
    sample, and centre (0 where it is None) like them."""
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
    _, dot, total = _native_backward(a, b, one, zero if centre is None else centre, one, None, None, False, 0.0,
                                     [False, True, True])
    if positions > 1:
        dot, total = dot.view(positions, -1).sum(0), total.view(positions, -1).sum(0)
    return dot, total


def _positions_a_row(x: torch.Tensor) -> int:
    """How many positions of channels_last x are best taken as one row, as if they were channels: over rows of few
    channels the loop costs more than the memory."""
    return math.gcd(x.numel() // x.shape[1], 8) if x.shape[1] < 32 else 1


def _long_rows(x: torch.Tensor, positions: int) -> torch.Tensor:
    """channels_last x [N, C, H, W] seen as [N * H * W / positions, positions * C]."""
    length = positions * x.shape[1]
    return x.as_strided((x.numel() // length, length), (length, 1))


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance over N, H, W of x [N, C, H, W]: [C] each, in float32 at least.

    In two passes, the second with the mean, as batch norm's own: no difference of large numbers. Not for gradients.
    """
    x = x.detach().to(wide_type(x.dtype))
    if not _runs_kernels(x):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return mean, var
    if not x.is_contiguous() or len(x) < _ENOUGH_ROWS:
        return _native_moments(x, None, None, 0.0)
    # The kernel for channels innermost is several times as fast. Contiguous images are such rows, every value of an
    # image a "channel" of its own, and a channel's moments are put together from its values' moments.
    means, variances = (part.view(x.shape[1], -1) for part in _native_moments(x.view(len(x), -1), None, None, 0.0))
    mean = means.mean(1, keepdim=True)
    return mean.flatten(), torch.addcmul(variances, means - mean, means - mean).mean(1)


def normalise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, var: torch.Tensor,
              eps: float) -> torch.Tensor:
    """Batch norm in training, where `moments(x)` are known: the gradient flows through them as well.

    x [N, C, H, W] -> the same type and format; weight, bias, mean, var: [C].
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
    """x * scale + shift in x's type and memory format; x [N, C, H, W]; scale and shift [C] or [N, C] each."""
    if scale.dim() == 1:
        positions = 1 if x.is_contiguous() or not _runs_kernels(x) else _positions_a_row(x)
        zero, one = _zeros_ones(x, positions * x.shape[1])
        if positions == 1:
            return _native(x, scale, shift, zero, one, False, 0.0, 0.0)[0]
        y = torch.empty_like(x)                                      # whole, not a view: callers may write into it
        _native_out(_long_rows(x, positions), scale.repeat(positions), shift.repeat(positions), zero, one, False, 0.0,
                    0.0, out=_long_rows(y, positions), save_mean=zero.new_empty(0), save_invstd=zero.new_empty(0))
        return y
    if x.is_contiguous():
        planes = affine(x.view(1, -1, *x.shape[2:]), scale.reshape(-1), shift.reshape(-1))
        return torch.ops.aten._unsafe_view(planes, x.shape)      # its own storage: callers may write into it
    return torch.addcmul(_column(shift), x, _column(scale)).to(x.dtype)


def weighted_sum(a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
    """a * a_scale + b * b_scale in a's type and format; a, b [N, C, H, W]; the scales [C] or [N, C]."""
    if a.dtype != a_scale.dtype and a_scale.dim() == 1:      # half types: no pass over wide ones
        nothing = torch.zeros_like(a_scale)
        return affine(a, a_scale, nothing).add_(affine(b, b_scale, nothing))
    return torch.mul(a, _column(a_scale)).addcmul_(b, _column(b_scale)).to(a.dtype)


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Autocast off for x's device; statistics keep their types. Nothing is entered where it is off already."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _column(per_channel: torch.Tensor) -> torch.Tensor:
    return per_channel[..., None, None]


def _zeros_ones(x: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    key = (channels, wide_type(x.dtype), x.device)
    return _constants(*key) if type(x) is torch.Tensor else _constants.__wrapped__(*key)    # no fake tensor is kept


@functools.lru_cache(maxsize=512)
def _constants(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros and ones [channels] that are only ever read: made once, as making them costs what a small layer costs."""
    with torch.inference_mode(False):
        return torch.zeros(channels, dtype=dtype, device=device), torch.ones(channels, dtype=dtype, device=device)
