"""Metrics of a whole split: functions of all its images at once, where the mean over batches would be another figure.

Each public function here takes (probs [N, C], labels [N]) and returns a number or a 0-d tensor, NaN where there is
nothing to say. The order of the images must not matter. A config's `metrics` and `trainer.monitor` name them.
"""
from __future__ import annotations

import torch
from torch import Tensor

#: Values that are ranked at once.
_AT_ONCE = 2 ** 24


def auc(probs: Tensor, labels: Tensor) -> Tensor:
    """Area under the ROC curve of each class against the rest, mean over the classes that have images of both kinds.

    The Mann-Whitney form, equal values counting half (Hanley and McNeil, Radiology 1982): the share of pairs of an
    image of the class and another where the first has the larger probability. -> 0-d float64, 0 to 1.
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
        ranks = ((below + up_to).double() / 2 * own).sum(1)                        # each is the mean rank, less 1/2
        pairs = positive * (images - positive)
        area = (ranks - positive * positive / 2) / pairs.clamp(min=1)
        total += (area * (pairs > 0)).sum()
        counted += (pairs > 0).sum()
    return total / counted
