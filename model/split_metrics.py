"""Metrics of a whole split, which need all its images at once: a mean over batches would be a different figure.

Each public function here takes (probs [N, C], labels [N]) and returns a number or a 0-d tensor, NaN if undefined.
The order of the images must not matter. A config's `metrics` and `trainer.monitor` refer to them by name.
"""
from __future__ import annotations

import torch
from torch import Tensor

#: Values ranked at once, which limits memory.
_AT_ONCE = 2 ** 24


def auc(probs: Tensor, labels: Tensor) -> Tensor:
    """Area under the ROC curve, one class against the rest, averaged over the classes with images on both sides.

    The Mann-Whitney form (Hanley and McNeil, Radiology 1982): the share of (image of the class, other image) pairs in
    which the first has the larger probability, ties counting half. Returns 0-d float64, 0 to 1; NaN without such a
    class. probs: [N, C]; labels: [N].
    """
    images, classes = probs.shape
    total, counted = (torch.zeros((), dtype=torch.float64, device=probs.device) for _ in range(2))
    step = max(1, _AT_ONCE // max(images, 1))
    for first in range(0, classes, step):
        values = probs[:, first:first + step].T.contiguous()                       # [c, N]
        ordered = values.sort(dim=1).values
        below = torch.searchsorted(ordered, values)
        up_to = torch.searchsorted(ordered, values, right=True)
        own = labels == torch.arange(first, first + len(values), device=labels.device)[:, None]
        positive = own.sum(1).double()
        ranks = ((below + up_to).double() / 2 * own).sum(1)                        # sums of (mean rank - 1/2)
        pairs = positive * (images - positive)
        area = (ranks - positive * positive / 2) / pairs.clamp(min=1)
        total += (area * (pairs > 0)).sum()
        counted += (pairs > 0).sum()
    return total / counted
