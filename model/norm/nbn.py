"""Normalised batch norm: batch norm whose affine parameters have unit length times one learned scale."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

_TINY = 1e-6   # the authors' guard against a zero vector


class NormalizedBatchNorm2d(nn.BatchNorm2d):
    """NBN (Bao et al., "Normalizing Batch Normalization for Long-Tailed Recognition", TIP 2024).

    x: [N, C, H, W] -> [N, C, H, W]. With w, b the layer's parameters and a its scale,
    w' = w / (|w|_2 + 1e-6) * a and b' = b / (|b|_2 + 1e-6) * a stand where batch norm has w and b.

    One a serves all NBN layers of an expert, so it isn't the layer's: `share_scale(owner, e)` makes the layer read
    `owner.scale_factor[e]`, a parameter registered once, on the owner. A layer alone has a = 1.
    Constructor arguments, buffers and errors are those of `torch.nn.BatchNorm2d`.
    """

    # (module that owns `scale_factor`, index). A plain tuple: the owner must not become a child of its own layer.
    # The owner and not the parameter, so that whatever replaces the parameter there (loading with assign=True,
    # torch.func.functional_call, export) is seen here.
    shared_scale: tuple[nn.Module, int] | None = None

    def share_scale(self, owner: nn.Module, index: int = 0) -> None:
        """Take the scale from `owner.scale_factor[index]` from now on."""
        self.shared_scale = (owner, int(index))

    @property
    def scale(self) -> torch.Tensor | float:
        """The scale a: a 0-d tensor with gradient where shared, else 1.0."""
        if self.shared_scale is None:
            return 1.0
        owner, index = self.shared_scale
        return owner.scale_factor[index]

    def effective_affine(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(w', b'), each [C]; (None, None) for a layer built with affine=False."""
        if self.weight is None:
            return None, None
        if self.shared_scale is None:
            return _UnitLength.apply(self.weight, self.bias, None, 0)
        owner, index = self.shared_scale
        return _UnitLength.apply(self.weight, self.bias, owner.scale_factor, index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(x)
        weight, bias = self.effective_affine()
        factor = next_average_factor(self)
        tracked = not self.training or self.track_running_stats
        return F.batch_norm(x, self.running_mean if tracked else None, self.running_var if tracked else None,
                            weight, bias, self.training or self.running_mean is None, factor, self.eps)


class _UnitLength(torch.autograd.Function):
    """w' and b' [C] of w and b [C], and `scales` [E] (a = scales[index]) or None (a = 1).

    One function for both, since on narrow layers a dozen small differentiable steps would cost what the whole batch
    norm costs. With n = |p|, v = p / (n + tiny): d = a / (n + tiny) * (g - v * (v . g) * (n + tiny) / n), a's is v . g.
    """

    @staticmethod
    def forward(ctx, weight, bias, scales, index):
        both = torch.stack((weight, bias))                                      # [2, C]
        norm = torch.linalg.vector_norm(both, dim=1, keepdim=True)              # [2, 1]
        inverse = (norm + _TINY).reciprocal_()
        unit = both * inverse
        ctx.index = index
        ctx.save_for_backward(unit, norm, inverse, scales)
        return (unit if scales is None else unit * scales[index]).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_weight, d_bias):
        unit, norm, inverse, scales = ctx.saved_tensors
        g = torch.stack((d_weight, d_bias))
        along = (g * unit).sum(1, keepdim=True)                                 # [2, 1]
        # A zero vector has unit = 0 and along = 0; the clamp only keeps 0 / 0 out.
        d_both = torch.addcmul(g, unit, along / (inverse * norm).clamp_(min=1e-30), value=-1).mul_(inverse)
        d_scales = None
        if scales is not None:
            d_both.mul_(scales[ctx.index])
            d_scales = torch.zeros_like(scales)
            d_scales[ctx.index] = along.sum()
        return d_both[0], d_both[1], d_scales, None


def next_average_factor(layer: nn.modules.batchnorm._NormBase) -> float:
    """Count a training step of `layer` and return the weight of its new statistics, as torch's batch norms do:
    `momentum`, or 1 / (steps so far) where `momentum` is None; 0.0 where nothing is tracked."""
    if not (layer.training and layer.track_running_stats):
        return 0.0
    layer.num_batches_tracked.add_(1)
    return 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
