"""3x3 convolutions with a quarter of the multiplications (Lavin & Gray, CVPR 2016), for training on a CPU."""
from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from types import MethodType

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from model.native.build import Library, keeps_up
from model.norm.cenconv import CenConv2d
from utils.device import bfloat16_unit

Tensor = torch.Tensor

_TYPES = (nn.Conv2d, CenConv2d)
_SHAPE = [ctypes.c_int, *[ctypes.c_long] * 5, ctypes.c_void_p, ctypes.c_long]
_TILE = 4
_MOST_CHANNELS = 512   # with more, filters no longer fit into the caches and torch's own kernels are as fast
_FEW_TILES = 32        # with fewer tiles, transforming the filters costs more than is gained
_LEAST_USE = 1.8       # at most this many times the maps' values may be computed, as tiles extend beyond their edges
_GRAIN = 1 << 20       # multiplications (of the direct convolution) per thread that justify another thread
_validating = False


class Winograd:
    """The compiled 3x3 convolutions of `winograd.cpp`, with stride 1 and padding 1. Maps are [N, C, H, W] in
    channels_last, float32 or bfloat16; filters [K, C, 3, 3], their gradients and all sums are float32."""

    def __init__(self, library: Library):
        self.library = library
        library.declare("winograd_forward", [*_SHAPE, *[ctypes.c_void_p] * 3])
        library.declare("winograd_filter_gradient", [*_SHAPE, *[ctypes.c_void_p] * 3])

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, K, H, W]."""
        return self._convolve(x, weight.permute(2, 3, 1, 0))

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy [N, K, H, W] -> [N, C, H, W]: dy convolved with the flipped filters."""
        return self._convolve(dy, weight.flip(2, 3).permute(2, 3, 0, 1))

    def filter_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """The filters' gradient [K, C, 3, 3], from x [N, C, H, W] and dy [N, K, H, W]."""
        gradient = x.new_empty((3, 3, x.shape[1], dy.shape[1]), dtype=torch.float32)
        self._call("winograd_filter_gradient", x, dy.shape[1], x, dy, gradient)
        return gradient.permute(3, 2, 0, 1)

    def _convolve(self, x: Tensor, filters: Tensor) -> Tensor:
        n, _, height, width = x.shape
        y = torch.empty((n, filters.shape[3], height, width), dtype=x.dtype, device=x.device,
                        memory_format=torch.channels_last)
        self._call("winograd_forward", x, filters.shape[3], x, filters.contiguous(), y)
        return y

    def _call(self, name: str, x: Tensor, k: int, *tensors: Tensor) -> None:
        n, c, height, width = x.shape
        threads = self.library.threads(1 + x.numel() * k * 9 // _GRAIN)
        self.library.functions[name](x.dtype == torch.bfloat16, n, height, width, c, k, self.library.parallel, threads,
                                     *(t.data_ptr() for t in tensors))


@functools.cache
def compiled() -> Winograd:
    """The convolutions, compiled once per process (a few seconds). Raises ConfigError without a compiler."""
    return Winograd(Library("winograd.cpp", "-O3"))


def compile_convolutions(model: nn.Module) -> int:
    """Make the 3x3 convolutions of `model` train with Winograd's algorithm on a CPU, in place; returns how many.

    It is used for channels_last maps in float32, or in bfloat16 under autocast if the CPU has no AMX (which torch's
    convolutions use). Other inputs, and evaluation outside `validating`, use torch's convolutions, so that a test's
    figures don't depend on the machine.

    In float32, outputs differ from torch's by some 3e-5 of their standard deviation, filters' gradients by 1e-4. There
    are no second derivatives. Compiles the C++ source first, a few seconds once per process. Raises ConfigError without
    a C++ compiler.
    """
    compiled()
    layers = suitable(model)
    for layer in layers:
        # Replace the method, not the class, which norm folding and conversion look for; `CenConv2d` calls it as well.
        layer._conv_forward = MethodType(_conv_forward, layer)
    return len(layers)


def suitable(model: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of `model` that `compile_convolutions` would change."""
    return [layer for layer in model.modules() if _suits(layer)]


@contextlib.contextmanager
def validating(on: bool = True) -> Iterator[None]:
    """Inside, if `on`, convolutions changed by `compile_convolutions` use Winograd's algorithm in evaluation too."""
    global _validating
    before, _validating = _validating, on
    try:
        yield
    finally:
        _validating = before


def _suits(layer: nn.Module) -> bool:
    return (type(layer) in _TYPES and layer.kernel_size == (3, 3) and layer.stride == layer.dilation == (1, 1)
            and layer.padding in ((1, 1), "same") and layer.groups == 1 and layer.padding_mode == "zeros"
            and min(layer.in_channels, layer.out_channels) >= 8
            and max(layer.in_channels, layer.out_channels) <= _MOST_CHANNELS)


def _conv_forward(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not ((layer.training or _validating) and _fits(x, weight)):
        return type(layer)._conv_forward(layer, x, weight, bias)
    y = _Convolution.apply(x.to(torch.bfloat16) if torch.is_autocast_enabled("cpu") else x, weight, compiled())
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether x and the filters are supported, match each other, and are large enough to gain."""
    if not (type(x) is Tensor and x.device == weight.device and x.device.type == "cpu" and x.dim() == 4
            and weight.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)):
        return False
    if weight.shape[1:] != (x.shape[1], 3, 3) or torch.compiler.is_compiling() or x.dtype not in _types():
        return False
    n, _, height, width = x.shape
    tiles = -(-height // _TILE) * -(-width // _TILE)
    enough = n * tiles >= _FEW_TILES and tiles * _TILE * _TILE <= _LEAST_USE * height * width
    return enough and keeps_up() and torch._C._functorch.peek_interpreter_stack() is None


def _types() -> tuple[torch.dtype, ...]:
    """The dtypes of maps that are supported now: under autocast maps are cast to bfloat16, else they are float32."""
    if not torch.is_autocast_enabled("cpu"):
        return (torch.float32,)
    half = torch.get_autocast_dtype("cpu") == torch.bfloat16 and not _has_amx()
    return (torch.float32, torch.bfloat16) if half else ()


@functools.cache
def _has_amx() -> bool:
    return bfloat16_unit() == "AMX"


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, winograd):
        ctx.winograd = winograd
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return winograd.forward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = ctx.winograd.input_gradient(dy, weight) if ctx.needs_input_grad[0] else None
        return dx, ctx.winograd.filter_gradient(x, dy) if ctx.needs_input_grad[1] else None, None
