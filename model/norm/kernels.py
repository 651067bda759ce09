"""Per-channel sums and affine maps of [N, C, H, W] tensors, one pass over memory each.

torch's batch norm kernels already are the fast passes wanted here, vectorised for both memory formats and for mixed
types. With mean 0 and standard deviation 1 put in, evaluation-mode batch norm is y = x * scale + shift, and the
parameter gradients of its backward are sum(a * b) and sum(a).
"""
from __future__ import annotations

import contextlib
import functools

import torch

_native = torch.ops.aten.native_batch_norm.default
_native_backward = torch.ops.aten.native_batch_norm_backward.default


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type statistics of `dtype` values are kept in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def same_format(a: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`a` in the memory format of `like`, so that one kernel walks both in the same order."""
    if like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
        return a.contiguous(memory_format=torch.channels_last)
    return a.contiguous()


def dot_and_sum(a: torch.Tensor, b: torch.Tensor, per_sample: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """sum(a * b) and sum(a) of a, b [N, C, H, W] alike in type and format: [C] each, or [N, C] for each sample."""
    wide = wide_type(a.dtype)
    if per_sample and not a.is_contiguous():
        return torch.mul(a.to(wide), b).sum((2, 3)), a.sum((2, 3), dtype=wide)
    if per_sample:                                   # the samples' planes as channels of one sample
        n, c = a.shape[:2]
        sums = dot_and_sum(a.view(1, n * c, *a.shape[2:]), b.view(1, n * c, *b.shape[2:]))
        return sums[0].view(n, c), sums[1].view(n, c)
    zero, one = _zeros_ones(a, a.shape[1])
    _, dot, total = _native_backward(a, b, one, zero, one, None, None, False, 0.0, [False, True, True])
    return dot, total


def affine(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """x * scale + shift in x's type and memory format; x [N, C, H, W]; scale and shift [C] or [N, C] each."""
    if scale.dim() == 1:
        zero, one = _zeros_ones(x, x.shape[1])
        return _native(x, scale, shift, zero, one, False, 0.0, 0.0)[0]
    if x.is_contiguous():
        planes = affine(x.view(1, -1, *x.shape[2:]), scale.reshape(-1), shift.reshape(-1))
        return torch.ops.aten._unsafe_view(planes, x.shape)      # its own storage: callers may write into it
    return torch.addcmul(_column(shift), x, _column(scale)).to(x.dtype)


def difference(a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
    """a * a_scale - b * b_scale in a's type and format; a, b [N, C, H, W]; the scales [C] or [N, C]."""
    return torch.mul(a, _column(a_scale)).addcmul_(b, _column(b_scale), value=-1).to(a.dtype)


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
