"""Which images of a detection data set are held out, and what the log says of a split."""
from __future__ import annotations

import numpy as np

from data_loader.detection.coco import CocoSplit
from logger.text import count_of
from utils.errors import ConfigError
from utils.seed import numpy_rng

HOLDOUT = 3  # number of the random stream that selects held-out images


def held_out(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices of the held-out images, of the kept images) of n, each ascending. Raises ConfigError if none are kept.
    """
    held = max(1, round(n * fraction))
    if held >= n:
        raise ConfigError(f"data_loader.args.holdout_fraction: {fraction} of {n} images leaves nothing to train on")
    order = numpy_rng(seed, HOLDOUT).permutation(n)
    return np.sort(order[:held]), np.sort(order[held:])


def described(split: CocoSplit, counts: list[int], few: float) -> list[str]:
    """Log lines about a split. counts: training instances of each class [C], or [] if unknown; few: classes with fewer
    are few-shot."""
    instances = sum(map(len, split.annotations))
    names = split.class_names
    lines = [f"{split.file}: {len(names)} classes, {len(split.images):,} images, {instances:,} instances"]
    if any(counts):
        most, least = max(counts), min(n for n in counts if n)
        lines.append(f"training instances a class: {most:,} ({names[counts.index(most)]}) to {least:,} "
                     f"({names[counts.index(least)]}), imbalance {most / least:.4g} : 1; few-shot "
                     f"(under {few:g}): {count_of(sum(n < few for n in counts), 'class', 'classes')}")
    untrained = [name for name, n in zip(names, counts) if not n]
    if untrained:
        lines.append(f"warning: {count_of(len(untrained), 'class has', 'classes have')} no training instance: "
                     + ', '.join(untrained[:5]) + (", ..." if len(untrained) > 5 else ""))
    return lines
