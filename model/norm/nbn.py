"""Normalised batch norm: batch norm whose affine vectors have unit length, times one learned scale."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.norm.running import next_average_factor

_TINY = 1e-6   # the authors' guard against a zero vector


class NormalizedBatchNorm2d(nn.BatchNorm2d):
    """NBN (Bao et al., "Normalizing Batch Normalization for Long-Tailed Recognition", TIP 2024).

    x: [N, C, H, W] -> [N, C, H, W]. With w, b [C] the layer's parameters and a its scale, batch norm is computed with
    w' = w / (|w|_2 + 1e-6) * a and b' = b / (|b|_2 + 1e-6) * a in place of w and b.

    All NBN layers of an expert share one a, which is therefore not the layer's own parameter: `share_scale(owner, e)`
    makes the layer read `owner.scale_factor[e]`, registered once, on the owner. Without it a = 1.
    Constructor arguments, buffers and errors are those of `torch.nn.BatchNorm2d`.
    """

    # (module that owns `scale_factor`, index), in a tuple so that the owner isn't registered as a child of its own
    # layer. The owner and not the parameter, so that a parameter replaced there (loading with assign=True,
    # torch.func.functional_call, export) is seen here.
    shared_scale: tuple[nn.Module, int] | None = None

    def share_scale(self, owner: nn.Module, index: int = 0) -> None:
        """Take the scale from `owner.scale_factor[index]` from now on."""
        self.shared_scale = (owner, int(index))

    @property
    def scale(self) -> torch.Tensor | float:
        """The scale a: a differentiable tensor of one element if shared, else 1.0."""
        if self.shared_scale is None:
            return 1.0
        owner, index = self.shared_scale
        scales = owner.scale_factor
        return scales if len(scales) == 1 else scales[index]      # a single one needs no indexing, nor its backward

    def effective_affine(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(w', b'), each [C]; (None, None) for a layer built with affine=False."""
        if self.weight is None:
            return None, None
        both = torch.stack((self.weight, self.bias))      # [2, C]: half as many operations, faster for narrow layers
        length = torch.linalg.vector_norm(both, dim=1, keepdim=True)
        return (both * (self.scale / (length + _TINY))).unbind()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(x)
        weight, bias = self.effective_affine()
        factor = next_average_factor(self)
        tracked = not self.training or self.track_running_stats
        return F.batch_norm(x, self.running_mean if tracked else None, self.running_var if tracked else None,
                            weight, bias, self.training or self.running_mean is None, factor, self.eps)
