"""Training images per class, checked once here, and the many / medium / few groups that they define."""
from __future__ import annotations

import math
from collections.abc import Sequence

from utils.errors import ConfigError

MANY, FEW = 100, 20
GROUPS = ("many", "medium", "few")


def class_counts(cls_num_list: Sequence[float], path: str = "cls_num_list") -> list[float]:
    """The number of training images of each class as positive floats, [C].

    A class without training images counts as the rarest class that has some: its margin, weight and log frequency
    stay finite. It is never a target in training. The sum of the list then exceeds the number of images.

    Raises ConfigError for an empty list, a negative or non-finite count, or no image at all.
    """
    counts = [float(count) for count in cls_num_list]
    if not all(math.isfinite(count) and count >= 0 for count in counts):
        raise ConfigError(f"{path}: must be a list of training images per class, each 0 or more")
    if not any(counts):
        raise ConfigError(f"{path}: no class has a training image")
    rarest = min(count for count in counts if count > 0)
    return [count or rarest for count in counts]


def group_limits(groups: dict[str, float] | None = None) -> dict[str, float]:
    """A config's `groups`, {"many": ..., "few": ...}; the published limits, 100 and 20, for those it leaves out."""
    return {"many": MANY, "few": FEW, **(groups or {})}


def shot_group(count: float, many: float = MANY, few: float = FEW) -> str:
    """The group of a class with `count` training images: `many` (> many), `few` (< few) or `medium`.

    >>> [shot_group(n) for n in (101, 100, 20, 19)]
    ['many', 'medium', 'medium', 'few']
    """
    return "many" if count > many else "few" if count < few else "medium"
