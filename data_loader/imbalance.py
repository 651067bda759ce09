"""Long-tailed subsets of a balanced data set, identical to those of LDAM-DRW (Cao et al., NeurIPS 2019)."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils.errors import ConfigError, unknown

IMBALANCE_TYPES = ("exp", "step", "none")


def img_num_per_cls(img_max: int, cls_num: int, imb_type: str | None, imb_factor: float) -> list[int]:
    """Training images per class, largest class first, [cls_num].

    imb_type: `exp`: int(img_max · imb_factor^(j / (C - 1))); `step`: the first C // 2 classes keep img_max, the others
    get int(img_max · imb_factor); None or `none`: all img_max. imb_factor: size of the smallest class relative to the
    largest, in (0, 1]. A class's number can be 0.

    Raises ConfigError for an unknown type, a factor outside (0, 1], or sizes under 1.
    """
    kind = "none" if imb_type is None else imb_type
    if kind not in IMBALANCE_TYPES:
        raise unknown("data_loader.args.imb_type", imb_type, IMBALANCE_TYPES, "type")
    if img_max < 1 or cls_num < 1:
        raise ConfigError(f"img_num_per_cls: img_max and cls_num must be 1 or more, not {img_max} and {cls_num}")
    if kind == "none":
        return [int(img_max)] * cls_num
    if not 0 < imb_factor <= 1:
        raise ConfigError(f"data_loader.args.imb_factor: must be over 0 and at most 1, not {imb_factor}")
    if kind == "step":
        head = cls_num // 2
        return [int(img_max)] * head + [int(img_max * imb_factor)] * (cls_num - head)
    # j / (C - 1.0) is computed before the power, as in the original: another order rounds some classes differently.
    return [int(img_max * imb_factor ** (j / max(cls_num - 1.0, 1.0))) for j in range(cls_num)]


def sorted_by_class(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order [N], starts [C], counts [C]) of labels `targets` [N], N >= 1: the images of the j-th class that occurs are
    order[starts[j] : starts[j] + counts[j]], ascending."""
    smallest, largest = int(targets.min()), int(targets.max())
    if largest - smallest < 2**16:  # numpy sorts 16-bit integers by radix, ten times as fast
        targets = (targets - smallest).astype(np.uint16)
    order = np.argsort(targets, kind="stable")
    in_order = targets[order]
    starts = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1]]))
    return order, starts, np.diff(np.append(starts, len(targets)))


def indices_by_class(targets: np.ndarray) -> list[np.ndarray]:
    """The indices of each class that occurs in `targets` [N], ascending, in the order of labels. Linear in N, where a
    comparison with each label would take N x C."""
    if not len(targets):
        return []
    order, starts, _ = sorted_by_class(targets)
    return np.split(order, starts[1:])


def long_tail_indices(targets: Sequence[int] | np.ndarray, counts: Sequence[int], seed: int = 0) -> np.ndarray:
    """The indices, class by class in label order, of a subset with counts[j] images of class j.

    One legacy generator `RandomState(seed)` shuffles each class's indices in turn, and the first counts[j] are taken;
    seed 0 gives LDAM-DRW's CIFAR subsets. NumPy's global generator isn't used.

    targets: [N] labels; counts: [C], one for each class that occurs in targets. Returns [sum counts] int64.
    Raises ConfigError if the numbers of classes differ or a class has fewer images than requested.
    """
    targets = np.asarray(targets)
    classes = indices_by_class(targets)
    if len(classes) != len(counts):
        raise ConfigError(f"long_tail_indices: counts has {len(counts)} classes, targets {len(classes)}")
    rng = np.random.RandomState(seed)
    chosen = []
    for indices, count in zip(classes, counts, strict=True):
        if not 0 <= count <= len(indices):
            raise ConfigError(f"long_tail_indices: class {targets[indices[0]]} has {len(indices)} images, {count} were "
                              "asked for")
        rng.shuffle(indices)
        chosen.append(indices[:count])
    return np.concatenate(chosen).astype(np.int64)
