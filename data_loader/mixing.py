"""Mixing a batch's images in pairs: mixup and CutMix."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from base.base_data_loader import MIX
from base.labels import MixedLabels
from utils.config.build import check_args
from utils.config.signature import of_callable
from utils.errors import ConfigError, unknown
from utils.seed import generator, numpy_rng

PATH = "data_loader.args.mix"
KINDS = ("mixup", "cutmix", "either")


@dataclass(frozen=True)
class Mixing:
    """How batches are mixed. Raises ConfigError, naming the key, for values out of range.

    type: `mixup`: weight * image + (1 - weight) * partner (Zhang et al., ICLR 2018); `cutmix`: a rectangle comes from
        the partner, and the weight is the share of the image that remains (Yun et al., ICCV 2019); `either`: one of
        the two for each batch, with equal chance.
    alpha: above 0; the weight is drawn from Beta(alpha, alpha), once per batch.
    prob: the probability that a batch is mixed, 0 to 1.
    off_epochs: the number of epochs at the end of training without mixing.
    """

    type: str
    alpha: float = 0.4
    prob: float = 1.0
    off_epochs: int = 0

    def __post_init__(self) -> None:
        if self.type not in KINDS:
            raise unknown(f"{PATH}.type", self.type, KINDS)
        for name, right, wanted in (("alpha", 0 < self.alpha < math.inf, "a number over 0"),
                                    ("prob", 0 <= self.prob <= 1, "0 to 1"),
                                    ("off_epochs", self.off_epochs >= 0, "a whole number, 0 or more")):
            if not right:
                raise ConfigError(f"{PATH}.{name}: must be {wanted}, not {getattr(self, name)!r}")

    def note(self, epochs: int | None) -> str:
        """A line for the log before a training of `epochs` epochs."""
        if epochs is not None and self.off_epochs >= epochs:
            return f"no image is mixed: {PATH}.off_epochs is {self.off_epochs}, and trainer.epochs {epochs}"
        return "images are mixed: the training accuracy counts the label that makes up more of each"

    @classmethod
    def of(cls, spec: Mapping[str, Any] | None) -> Mixing | None:
        """The Mixing for a config's object, or None for None. Raises ConfigError for anything that isn't valid."""
        if spec is None:
            return None
        if not isinstance(spec, Mapping) or "type" not in spec:
            raise ConfigError(f"{PATH}: must be an object like {{\"type\": \"mixup\", \"alpha\": 0.4}}, not {spec!r}")
        return cls(**check_args(of_callable(cls), spec, PATH))

    def mix(self, images: Tensor, labels: Tensor, seed: int, epoch: int, position: int,
            rank: int = 0) -> tuple[Tensor, MixedLabels]:
        """Mix a batch: images [n, 3, H, W], labels [n] -> (images of the same shape, their labels and weight).

        The weight and the rectangle are functions of (seed, epoch, position) alone, so that they are the same on every
        rank; the partners also depend on `rank`. position: where the batch begins in the epoch. A batch that isn't
        mixed has weight 1.
        """
        rng = numpy_rng(seed, epoch, MIX, position)
        chance, which, weight = rng.random(), rng.random(), float(rng.beta(self.alpha, self.alpha))
        centre = rng.random(2)
        if chance >= self.prob:
            return images, MixedLabels(labels, labels, 1.0)
        partner = torch.randperm(len(images), generator=generator(seed, epoch, MIX, position, rank))
        partner = partner.to(images.device, non_blocking=True)
        if self.type == "cutmix" or (self.type == "either" and which < 0.5):
            top, bottom, left, right = _box(images.shape[2:], weight, centre)
            images = images.clone()
            images[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
            weight = 1 - (bottom - top) * (right - left) / images[0, 0].numel()
        else:
            images = torch.lerp(images[partner], images, weight)
        return images, MixedLabels(labels, labels[partner], weight)


def _box(sides: tuple[int, int], weight: float, centre: Any) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) in pixels of a rectangle with 1 - weight of the area, clipped to the image.

    centre: of the rectangle, as two fractions (0 to 1) of the height and width.
    """
    edges = []
    for side, middle in zip(sides, centre):
        length, middle = int(side * math.sqrt(1 - weight)), int(middle * side)
        edges += [max(middle - length // 2, 0), min(middle - length // 2 + length, side)]
    return tuple(edges)
