"""Classifier heads: pooled features `[N, D]` -> logits `[N, C]`, with any scale applied."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from utils.config.build import lookup
from utils.errors import ConfigError


class CosineLinear(nn.Module):
    """Cosine similarity of feature and class weight, times `s` (LDAM's classifier; Cao et al., NeurIPS 2019).

    logits = s * (x / |x|) @ (W / |W|), W `[D, C]` (not `[C, D]` as in `nn.Linear`), columns normalised. W is
    initialised uniformly in (-1, 1), then its columns are scaled to unit length. No bias.
    """

    def __init__(self, features: int, classes: int, s: float = 30.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, classes))
        self.s = s
        with torch.no_grad():
            self.weight.uniform_(-1, 1)
            self.weight /= self.weight.norm(dim=0, keepdim=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.s * (F.normalize(x, dim=1) @ F.normalize(self.weight, dim=0))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, s={self.s}"


class BatchNormLinear(nn.Linear):
    """A linear layer with batch norm on its logits: NBN's logit rectification (Bao et al., TIP 2024).

    The norm is the child `bn`, so that the layer's own keys stay `weight` and `bias`. A training batch of one image is
    normalised by the running statistics.
    """

    def __init__(self, features: int, classes: int, affine: bool = True):
        super().__init__(features, classes)
        self.bn = nn.BatchNorm1d(classes, affine=affine)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        if self.bn.training and len(logits) == 1:
            # A single image has no variance, and torch refuses it: normalise by the running statistics.
            bn = self.bn
            return F.batch_norm(logits, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        return self.bn(logits)


class ScaledLinear(nn.Linear):
    """LWS, learnable weight scaling: z_j = s_j * (w_j . x + b_j), `scales` s [C] learned from 1 (Kang et al., ICLR
    2020)."""

    def __init__(self, features: int, classes: int):
        super().__init__(features, classes)
        self.scales = nn.Parameter(torch.ones(classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scales


# What `arch.args.classifier` may name: (features D, classes C, s) -> head. Only the cosine head is scaled by s.
HEADS = {
    "linear": lambda features, classes, s: nn.Linear(features, classes),
    "cosine": CosineLinear,
    "linear_fcbn": lambda features, classes, s: BatchNormLinear(features, classes),
    "linear_fcbn_notaffine": lambda features, classes, s: BatchNormLinear(features, classes, affine=False),
    "lws": lambda features, classes, s: ScaledLinear(features, classes),
}


def weight_by_class(head: nn.Module, num_classes: int) -> torch.Tensor:
    """A head's `weight` as [C, D], sharing its memory: `nn.Linear`'s as it is, our cosine head's turned round, that of
    any other head by its shape. Raises ConfigError where the shape doesn't tell."""
    weight = head.weight
    if isinstance(head, nn.Linear | CosineLinear):
        return weight if isinstance(head, nn.Linear) else weight.t()
    if weight.dim() != 2 or num_classes not in weight.shape or weight.shape[0] == weight.shape[1]:
        raise ConfigError(f"arch.args.classifier: the shape {list(weight.shape)} of {type(head).__name__}'s weight "
                          f"doesn't tell whether each of the {num_classes} classes has a row or a column; derive "
                          "the head from nn.Linear ([C, D]) or model.classifier.CosineLinear ([D, C])")
    return weight if weight.shape[0] == num_classes else weight.t()


def make_head(kind: str, features: int, classes: int, s: float = 30.0,
              path: str = "arch.args.classifier") -> nn.Module:
    """Build the head that `kind`, a key of HEADS, names: `[N, features]` -> `[N, classes]`. Raises ConfigError for an
    unknown name."""
    return lookup(HEADS, kind, path, "classifier")(features, classes, s)
