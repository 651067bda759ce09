"""Labels that are more than a class an image: mixed images, and those of a batch that is worked on in parts."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MixedLabels:
    """What mixup and CutMix make of a batch's labels: a loss is weight * L(first) + (1 - weight) * L(second).

    first, second: labels [N] long. weight: the share of `first`, 0 to 1: [N], a 0-d tensor, or a number.
    """

    first: torch.Tensor
    second: torch.Tensor
    weight: torch.Tensor | float

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: slice | torch.Tensor) -> MixedLabels:
        """The same of some of the images."""
        each = isinstance(self.weight, torch.Tensor) and self.weight.dim() > 0
        return MixedLabels(self.first[index], self.second[index], self.weight[index] if each else self.weight)

    def to(self, *place: object, **how: object) -> MixedLabels:
        weight = self.weight.to(*place, **how) if isinstance(self.weight, torch.Tensor) else self.weight
        return MixedLabels(self.first.to(*place, **how), self.second.to(*place, **how), weight)

    @property
    def heavier(self) -> torch.Tensor:
        """The label that makes up more of each image, [N]: what training accuracy is counted against."""
        if isinstance(self.weight, torch.Tensor):
            return torch.where(self.weight >= 0.5, self.first, self.second)
        return self.first if self.weight >= 0.5 else self.second


@dataclass(frozen=True)
class WholeBatch:
    """The batch that a loss sees a part of: this rank's share of it, or one of several that make one optimizer step.

    labels: of all of this rank's images in it. own: how many those are; 0 where the rank was only lent one. here:
    images in the part. everywhere: images of the whole, on all ranks.
    """

    labels: torch.Tensor | MixedLabels
    own: int
    here: int
    everywhere: int


def join_labels(parts: Sequence[torch.Tensor | MixedLabels]) -> torch.Tensor | MixedLabels:
    """The labels of several parts of a batch in one; mixed ones without their weights."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], list):  # a detector's, an image each
        return [label for part in parts for label in part]
    if not any(isinstance(part, MixedLabels) for part in parts):
        return torch.cat(list(parts))
    pairs = [part if isinstance(part, MixedLabels) else MixedLabels(part, part, 1.0) for part in parts]
    return MixedLabels(torch.cat([p.first for p in pairs]), torch.cat([p.second for p in pairs]), 1.0)


def plain_labels(labels: torch.Tensor | MixedLabels) -> torch.Tensor:
    """Labels [N], the heavier ones where they are mixed."""
    return labels.heavier if isinstance(labels, MixedLabels) else labels
