"""Which images of a detection data set are held out, which boxes are trained on, and what the log says of a split."""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from data_loader.detection.coco import CocoSplit
from data_loader.detection.dataset import resized
from data_loader.detection.lvis import is_federated
from logger.text import count_of, first_of
from utils.errors import ConfigError
from utils.seed import numpy_rng

HOLDOUT = 3  # number of the random stream that selects held-out images
#: Sides, in pixels of a training image, below which a box is left out: in float32 its corners may coincide, which
#: torchvision refuses in the middle of an epoch.
LEAST_SIDE = 0.01


def held_out(n: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices of the held-out images, of the kept images) of n, each ascending. Raises ConfigError if none are kept.
    """
    held = max(1, round(n * fraction))
    if held >= n:
        raise ConfigError(f"data_loader.args.holdout_fraction: {fraction} of {n} images leaves nothing to train on")
    order = numpy_rng(seed, HOLDOUT).permutation(n)
    return np.sort(order[:held]), np.sort(order[held:])


def without_specks(split: CocoSplit, min_size: int, max_size: int) -> CocoSplit:
    """The split without boxes that have a side under LEAST_SIDE where its images are resized to the shorter side
    `min_size`, or less if the longer one would exceed `max_size`; a note has their number. Crowds stay."""
    left: list[int] = []
    annotations = []
    for image, found in zip(split.images, split.annotations):
        width, height = resized(image["width"], image["height"], min_size, max_size)
        sides = width / image["width"], height / image["height"]
        specks = {a["id"] for a in found if not a["iscrowd"]
                  and min(a["bbox"][2] * sides[0], a["bbox"][3] * sides[1]) < LEAST_SIDE}
        left += sorted(specks)
        annotations.append([a for a in found if a["id"] not in specks] if specks else found)
    if not left:
        return split
    note = (f"{split.file.name}: {count_of(len(left), 'box', 'boxes')} under {LEAST_SIDE:g} pixels wide or high in "
            f"training images left out (annotation {first_of([str(n) for n in left])})")
    return replace(split, annotations=annotations, notes=[*split.notes, note])


def described(split: CocoSplit, counts: list[int], few: float) -> list[str]:
    """Log lines about a split. counts: training instances of each class (see `CocoSplit.counts`) [C], or [] if unknown;
    few: classes with fewer are few-shot."""
    unit = "image" if is_federated(split.images) else "instance"
    instances = sum(map(len, split.annotations))
    names = split.class_names
    lines = [f"{split.file}: {len(names)} classes, {len(split.images):,} images, {instances:,} instances"]
    if any(counts):
        most, least = max(counts), min(n for n in counts if n)
        lines.append(f"training {unit}s a class: {most:,} ({names[counts.index(most)]}) to {least:,} "
                     f"({names[counts.index(least)]}), imbalance {most / least:.4g} : 1; few-shot "
                     f"(under {few:g}): {count_of(sum(n < few for n in counts), 'class', 'classes')}")
    untrained = [name for name, n in zip(names, counts) if not n]
    if untrained:
        lines.append(f"warning: {count_of(len(untrained), 'class has', 'classes have')} no training {unit}: "
                     + ', '.join(untrained[:5]) + (", ..." if len(untrained) > 5 else ""))
    return lines
