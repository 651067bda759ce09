"""Labels that are more than one class per image: those of mixed images, and those of a batch processed in parts."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MixedLabels:
    """A batch's labels after mixup or CutMix: its loss is weight * L(first) + (1 - weight) * L(second).

    first, second: labels [N] long. weight: the share of `first`, 0 to 1: [N], a 0-d tensor, or a number.
    """

    first: torch.Tensor
    second: torch.Tensor
    weight: torch.Tensor | float

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: slice | torch.Tensor) -> MixedLabels:
        """The mixed labels of the images that `index` selects."""
        each = isinstance(self.weight, torch.Tensor) and self.weight.dim() > 0
        return MixedLabels(self.first[index], self.second[index], self.weight[index] if each else self.weight)

    def to(self, *place: object, **how: object) -> MixedLabels:
        """Move or convert the tensors, as `Tensor.to` does."""
        weight = self.weight.to(*place, **how) if isinstance(self.weight, torch.Tensor) else self.weight
        return MixedLabels(self.first.to(*place, **how), self.second.to(*place, **how), weight)

    @property
    def heavier(self) -> torch.Tensor:
        """The label with the larger weight in each image, [N]; training accuracy is measured against it."""
        if isinstance(self.weight, torch.Tensor):
            return torch.where(self.weight >= 0.5, self.first, self.second)
        return self.first if self.weight >= 0.5 else self.second


@dataclass(frozen=True)
class WholeBatch:
    """The whole batch of a step, for a loss that sees only a part of it: this rank's share, or one of several
    accumulated batches.

    labels: of all of this rank's images in the whole batch. own: their number; 0 if the rank only borrows an image (see
    `BaseDataLoader.share`). here: number of this rank's images in the part. everywhere: number of images in the whole
    batch, over all ranks.
    """

    labels: torch.Tensor | MixedLabels
    own: int
    here: int
    everywhere: int


def join_labels(parts: Sequence[torch.Tensor | MixedLabels]) -> torch.Tensor | MixedLabels:
    """The labels of a batch's parts, concatenated. Mixed labels of several parts lose their weights (all become 1)."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], list):  # a detector's, one entry per image
        return [label for part in parts for label in part]
    if not any(isinstance(part, MixedLabels) for part in parts):
        return torch.cat(list(parts))
    pairs = [part if isinstance(part, MixedLabels) else MixedLabels(part, part, 1.0) for part in parts]
    return MixedLabels(torch.cat([p.first for p in pairs]), torch.cat([p.second for p in pairs]), 1.0)


def plain_labels(labels: torch.Tensor | MixedLabels) -> torch.Tensor:
    """Labels [N]; of mixed labels those with the larger weight."""
    return labels.heavier if isinstance(labels, MixedLabels) else labels
