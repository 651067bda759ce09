"""A norm, the residual addition and the ReLU after it, as one step of a residual block."""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from model.native.build import keeps_up
from model.native.passes import Passes, compiled
from model.norm.kernels import same_format
from model.norm.mabn import MABN2d
from model.norm.nbn import NormalizedBatchNorm2d
from model.norm.running import next_average_factor

Tensor = torch.Tensor


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual): x, residual [N, C, H, W] -> the same shape. norm: any norm of maps, or nn.Identity.

    Training on a CPU, a norm marked by `compile_norms` needs two passes over memory forward and two backward instead
    of three to five each, and rounds bfloat16 once instead of after each step. It then has no second derivative.
    """
    if norm.__dict__.get("compiled") and _fits(norm, x, residual):
        x = same_format(x, like=x)
        residual = None if residual is None else same_format(residual, like=x)
        return _TRAIN[type(norm)](norm, x, residual, compiled())
    out = norm(x)
    if residual is not None:
        out += residual
    # In place is safe after a norm or an addition: neither needs its own output in the backward pass.
    return F.relu(out, inplace=True)


def compile_norms(model: nn.Module) -> int:
    """Mark the batch norms, NBN and MABN layers of `model` for `norm_relu`, in place; returns how many there are.

    Compiles the C++ passes first, which takes a few seconds once per process. Raises ConfigError without a C++
    compiler.
    """
    compiled()
    layers = [layer for layer in model.modules() if type(layer) in _TRAIN]
    for layer in layers:
        layer.compiled = True
    return len(layers)


def _fits(norm: nn.Module, x: Tensor, residual: Tensor | None) -> bool:
    if not (norm.training and type(norm) in _TRAIN and Passes.take(x)) or torch.compiler.is_compiling():
        return False
    if not keeps_up():
        return False
    if x.numel() <= x.shape[1]:          # empty, or one value per channel: leave the error to torch
        return False
    if norm.weight is None or norm.weight.dtype != torch.float32 or getattr(norm, "normalization_batch_size", None):
        return False
    if residual is not None and not (Passes.take(residual) and residual.dtype == x.dtype and residual.shape == x.shape):
        return False
    watched = (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
               or nn.modules.module._has_any_global_hook())
    return not watched and torch._C._functorch.peek_interpreter_stack() is None


def _batch_norm(norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, passes: Passes) -> Tensor:
    affine = norm.effective_affine() if isinstance(norm, NormalizedBatchNorm2d) else (norm.weight, norm.bias)
    running = (norm.running_mean, norm.running_var) if norm.track_running_stats else None
    return _BatchNorm.apply(x, *affine, residual, running, next_average_factor(norm), norm.eps, passes)


class _BatchNorm(torch.autograd.Function):
    """relu(batch_norm(x) + residual)."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, running, momentum, eps, passes):
        y, known = passes.batch_forward(x, residual, weight.contiguous(), bias.contiguous(), running, momentum, eps)
        ctx.passes = passes
        ctx.save_for_backward(x, None if residual is None else y, known)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, y, known = ctx.saved_tensors
        gradients = ctx.passes.batch_backward(same_format(dy, like=x), x, y, known)
        return *gradients, None, None, None, None


def _moving_average(norm: MABN2d, x: Tensor, residual: Tensor | None, passes: Passes) -> Tensor:
    with torch.no_grad():
        mean, var = passes.moments(x)
        call = norm.statistics(torch.addcmul(var, mean, mean))
    return _MovingAverage.apply(x, norm.weight, norm.bias, residual, call, norm, passes)


class _MovingAverage(torch.autograd.Function):
    """relu(MABN(x) + residual), `call` being MABN's statistics of this forward."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, call, norm, passes):
        scale, shift = weight * call.per_x, bias.contiguous()
        y = passes.apply(x, scale, shift, residual)
        ctx.call, ctx.norm, ctx.passes = call, norm, passes
        ctx.save_for_backward(x, None if residual is None else y, scale, shift)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, y, scale, shift = ctx.saved_tensors
        dot, total, g = ctx.passes.sums(same_format(dy, like=x), x, scale, shift, y)
        slope = ctx.norm.slope(scale * dot * (x.shape[1] / x.numel()), ctx.call)
        dx = ctx.passes.input_gradient(g, x, scale, shift if y is None else None, slope)
        return dx, dot * ctx.call.per_x, total, None if y is None else g, None, None, None


_TRAIN: dict[type, Callable[..., Tensor]] = {
    nn.BatchNorm2d: _batch_norm, NormalizedBatchNorm2d: _batch_norm, MABN2d: _moving_average}
