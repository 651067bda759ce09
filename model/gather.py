"""Features of all processes of a run, as if one process had them."""
from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from utils import dist


def all_gather_with_grad(features: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Concatenate every rank's `features` [n_r, ...] along dim 0, letting gradients flow back to their rank.

    Ranks may hold different n_r; all must call it. Returns (all [sum n_r, ...], offset of this rank's rows).
    """
    if not dist.initialised():
        return features, 0
    sizes = torch.zeros(dist.world_size(), dtype=torch.long, device=features.device)
    sizes[dist.rank()] = features.shape[0]
    sizes = dist.all_reduce_sum(sizes).tolist()
    # all_gather wants equal shapes: pad to the largest, cut afterwards.
    padding = features.new_zeros((max(sizes) - features.shape[0], *features.shape[1:]))
    gathered = _Gather.apply(torch.cat([features, padding]))
    return torch.cat([part[:n] for part, n in zip(gathered, sizes, strict=True)]), sum(sizes[:dist.rank()])


class _Gather(torch.autograd.Function):
    """Every rank's tensor [n, ...], stacked: [R, n, ...]. torch's own versions with gradients are deprecated in favour
    of one that older torch doesn't have."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.world_size())]
        torch.distributed.all_gather(parts, own)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        # Each rank's loss depends on everyone's features.
        return dist.all_reduce_sum(grad.contiguous().clone())[dist.rank()]
