"""Dividing images by class: held-out shares, balanced left-overs, and the lines that describe a split."""
from __future__ import annotations

import numpy as np

MANY, FEW = 100, 20
TOO_FEW_TO_TELL = 10   # test images a class, under which a class's accuracy says little


def take_share(targets: np.ndarray, share: float, seed: int, keep_rare: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Part a split by class: (indices kept, indices taken), both ascending.

    Of each class round(share · n) images are taken, at least one where it has `keep_rare` or more, and never its last.
    """
    rng = np.random.RandomState(seed)
    taken = []
    for label in np.unique(targets):
        own = rng.permutation(np.flatnonzero(targets == label))
        count = max(round(share * len(own)), int(len(own) >= keep_rare))
        taken.append(own[:min(count, len(own) - 1)])
    taken = np.sort(np.concatenate(taken)) if taken else np.empty(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(targets)), taken), taken


def holdout_of_spare(targets: np.ndarray, num_classes: int, cap: int | None, seed: int) -> tuple[np.ndarray, int]:
    """A validation split out of images that no split uses: (indices, number of classes without any).

    Balanced: every class that has images left gives as many as the poorest of them, or, where that would be a handful
    only (under 10), up to `cap` each.
    """
    rng = np.random.RandomState(seed)
    counts = np.bincount(targets, minlength=num_classes)
    poorest = int(counts[counts > 0].min())
    count = min(poorest, cap or poorest) if poorest >= 10 or cap is None else cap
    chosen = [rng.permutation(np.flatnonzero(targets == label))[:count] for label in range(num_classes)]
    return np.concatenate(chosen), int((counts == 0).sum())


def summary(train: list[int], test: np.ndarray, names: list[str] | None, notes: list[str]) -> list[str]:
    """Lines for the log: classes, counts, imbalance, groups, and what to be careful about."""
    counts = np.asarray(train)
    filled = counts[counts > 0]
    named = [str(label) for label in range(len(counts))] if names is None else names
    lines = []
    if len(filled):
        big, small = int(counts.argmax()), int(np.where(counts > 0, counts, counts.max() + 1).argmin())
        lines = [f"classes: {len(counts)}, training images: {counts.sum():,}, test images: {int(test.sum()):,}",
                 f"training images a class: {filled.max():,} ({named[big]}) to {filled.min():,} ({named[small]}), "
                 f"imbalance {filled.max() / filled.min():.4g} : 1",
                 f"groups: {(counts > MANY).sum()} many-shot (over {MANY}), "
                 f"{((counts <= MANY) & (counts >= FEW)).sum()} medium-shot, "
                 f"{(counts < FEW).sum()} few-shot (under {FEW})"]

    def listed(labels: np.ndarray) -> str:
        some = ", ".join(named[label] for label in labels[:5])
        return some + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")

    untrained, untested = np.flatnonzero(counts == 0), np.flatnonzero(test == 0)
    small = np.flatnonzero((test > 0) & (test < TOO_FEW_TO_TELL))
    if len(filled) and len(untrained):
        lines.append(f"warning: {len(untrained)} classes have no training image: {listed(untrained)}")
    if len(untested):
        lines.append(f"warning: {len(untested)} classes have no test image, their accuracy isn't measured: "
                     f"{listed(untested)}")
    if len(small):
        lines.append(f"warning: the test split is small: {len(small)} classes have under {TOO_FEW_TO_TELL} test "
                     f"images, {listed(small)}; their accuracy is a rough guess")
    return lines + notes
