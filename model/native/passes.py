"""The compiled passes of `passes.cpp`: norms fused with the residual addition and ReLU that follow them."""
from __future__ import annotations

import ctypes
import functools

import torch

from model.native.build import Library

_GRAIN = 1 << 15      # values per thread that justify another thread, as in torch
_TYPES = (torch.float32, torch.bfloat16)
_HEAD = [ctypes.c_int, *[ctypes.c_long] * 3, ctypes.c_void_p, ctypes.c_long]
_POINTERS = {"norm_moments": 3, "norm_apply": 5, "norm_sums": 9, "norm_input_gradient": 8, "norm_batch_forward": 8,
             "norm_batch_backward": 7}
_NUMBERS = {"norm_batch_forward": 2}


class Passes:
    """The compiled passes over maps [N, C, H, W] in float32 or bfloat16, dense in either memory format. Vectors are
    [C], contiguous, float32; None stands for zeros. Forward passes end with a ReLU."""

    def __init__(self, library: Library):
        self.library = library
        for name, pointers in _POINTERS.items():
            library.declare(name, [*_HEAD, *[ctypes.c_void_p] * pointers, *[ctypes.c_double] * _NUMBERS.get(name, 0)])

    @staticmethod
    def take(x: torch.Tensor) -> bool:
        """Whether the passes support x: a plain 4-D CPU tensor, float32 or bfloat16."""
        return type(x) is torch.Tensor and x.device.type == "cpu" and x.dtype in _TYPES and x.dim() == 4

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance of each channel: [C] each."""
        mean, var = x.new_empty((2, x.shape[1]), dtype=torch.float32).unbind()
        self._call("norm_moments", x, x, mean, var)
        return mean, var

    def apply(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor,
              residual: torch.Tensor | None) -> torch.Tensor:
        """y = relu(x * scale + shift + residual); residual has x's dtype and memory format, or is None."""
        y = torch.empty_like(x)
        self._call("norm_apply", x, x, residual, y, scale, shift)
        return y

    def sums(self, dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor,
             y: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum of g * x [C], sum of g [C], g), where g is dy where the output of `apply` was above 0, else 0.

        y: that output, needed only if there was a residual. Without y, g isn't computed; dy is returned instead.
        """
        dot, total = x.new_empty((2, x.shape[1]), dtype=torch.float32).unbind()
        g = None if y is None else torch.empty_like(x)
        self._call("norm_sums", x, dy, x, y, g, None, scale, shift, dot, total)
        return dot, total, dy if y is None else g

    def input_gradient(self, g: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None,
                       slope: torch.Tensor) -> torch.Tensor:
        """g * scale + x * slope; if `shift` is given, g counts as 0 where x * scale + shift isn't above 0."""
        dx = torch.empty_like(x)
        self._call("norm_input_gradient", x, g, x, dx, None, scale, shift, slope, None)
        return dx

    def batch_forward(self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor,
                      running: tuple[torch.Tensor, torch.Tensor] | None, momentum: float,
                      eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(relu(batch_norm(x) + residual), float32 [4, C] for `batch_backward`). running: (mean, variance), updated in
        place with weight `momentum` for the new values; None: not tracked."""
        y, known = torch.empty_like(x), x.new_empty((4, x.shape[1]), dtype=torch.float32)
        self._call("norm_batch_forward", x, x, residual, y, weight, bias, *(running or (None, None)), known,
                   numbers=(momentum, eps))
        return y, known

    def batch_backward(self, dy: torch.Tensor, x: torch.Tensor, y: torch.Tensor | None,
                       known: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of x, weight, bias and residual (None without one). y: the forward pass's output, if there was a
        residual; known: its second result."""
        dx, gradients = torch.empty_like(x), x.new_empty((2, x.shape[1]), dtype=torch.float32)
        g = None if y is None else torch.empty_like(x)
        self._call("norm_batch_backward", x, dy, x, y, g, dx, known, gradients)
        return dx, *gradients.unbind(), g

    def _call(self, name: str, x: torch.Tensor, *tensors: torch.Tensor | None, numbers: tuple = ()) -> None:
        plane = x.shape[2] * x.shape[3] if x.is_contiguous() else 0
        threads = self.library.threads(1 + x.numel() // _GRAIN)
        self.library.functions[name](x.dtype == torch.bfloat16, x.numel(), x.shape[1], plane, self.library.parallel,
                                     threads, *(None if t is None else t.data_ptr() for t in tensors), *numbers)


@functools.cache
def compiled() -> Passes:
    """The passes, compiled once per process (a few seconds). Raises ConfigError without a compiler."""
    return Passes(Library("passes.cpp", "-O2"))
