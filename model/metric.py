"""Metrics on predictions: overall, per-class and many/medium/few-shot accuracy, macro-F1, calibration, open set.

The functions that a config's `metrics` may name take (output [N, C], target [N]) and return a 0-d tensor on the device,
so that nothing waits for the GPU. `EvalState` accumulates everything for `test_metrics.json` in per-class counters.
The other functions take arrays, tensors or lists.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.class_counts import FEW, GROUPS, MANY, shot_group
from utils.dist import all_reduce_sum

ECE_BINS = 15


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of images whose largest output is the target's. output: [N, C]; target: [N]. -> 0-d float tensor."""
    return (output.argmax(1) == target).float().mean()


def top_k_acc(output: Tensor, target: Tensor, k: int = 5) -> Tensor:
    """Share of images whose target is among the k largest outputs; k is limited to C. -> 0-d float tensor."""
    top = output.topk(min(k, output.shape[1]), dim=1).indices
    return (top == target[:, None]).any(1).float().mean()


def _disagreement(preds: Tensor) -> Tensor:
    """Share of expert pairs whose predictions differ, for each image. preds: [N, E] -> [N] float."""
    experts = preds.shape[1]
    differ = (preds[:, :, None] != preds[:, None, :]).float().sum((1, 2))  # each pair counted twice
    return differ / max(experts * (experts - 1), 1)


def as_array(values: Any) -> np.ndarray:
    """A tensor on any device, an array or a list, as a numpy array."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def class_tally(preds: Any, labels: Any, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(correct predictions, images) per class, both [C] int64. Labels outside 0..C-1 (open set: -1) are ignored."""
    preds, labels = as_array(preds).astype(np.int64).ravel(), as_array(labels).astype(np.int64).ravel()
    known = (labels >= 0) & (labels < num_classes)
    right = np.bincount(labels[known & (preds == labels)], minlength=num_classes)
    return right, np.bincount(labels[known], minlength=num_classes)


def per_class_acc(preds: Any, labels: Any, num_classes: int) -> list[float | None]:
    """Each class's accuracy, [C]; None for a class without test images."""
    return _ratios(*class_tally(preds, labels, num_classes))


def _ratios(part: Sequence[float], whole: Sequence[float]) -> list[float | None]:
    return [float(p) / float(w) if w else None for p, w in zip(part, whole, strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that aren't None; None if there are none."""
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


def group_means(class_acc: Sequence[float | None], train_cls_num: Sequence[float], many: float = MANY,
                few: float = FEW) -> dict[str, float | None]:
    """Mean class accuracy of the many-, medium- and few-shot classes, by training count; None for an empty group.

    class_acc: [C], None for a class without test images, which is left out of its group's mean. train_cls_num: [C]
    training images per class. many, few: the groups' limits, see `shot_accuracy`.
    """
    groups = [shot_group(count, many, few) for count in train_cls_num]
    return {name: _mean([acc for acc, group in zip(class_acc, groups, strict=True) if group == name])
            for name in GROUPS}


def shot_accuracy(preds: Any, labels: Any, train_cls_num: Any, many: float = MANY,
                  few: float = FEW) -> dict[str, float | None]:
    """Accuracies by training frequency: `many`, `medium`, `few` and `all`, fractions from 0 to 1.

    A group's value is the mean of its classes' accuracies (many: more than `many` training images, few: fewer than
    `few`, medium: the rest), or None if it has no class with test images. `all` is the share of correct images, None
    without any.

    preds, labels: [N] class indices; train_cls_num: [C] training images per class. Arrays, tensors or lists.
    """
    counts = as_array(train_cls_num).tolist()
    preds, labels = as_array(preds).ravel(), as_array(labels).ravel()
    groups = group_means(per_class_acc(preds, labels, len(counts)), counts, many, few)
    return {**groups, "all": float((preds == labels).mean()) if len(labels) else None}


def f1_from_tally(right: Any, predicted: Any, labelled: Any) -> float | None:
    """Macro-F1, 0 to 1: the mean of 2 right / (predicted + labelled) over the classes where that is defined, or None.

    right, predicted, labelled: [C] numbers of images that are correct, predicted as, and labelled as each class.
    """
    return _mean(_ratios(2 * as_array(right).astype(np.float64), as_array(predicted) + as_array(labelled)))


def open_set_f_measure(preds: Any, labels: Any, probs: Any, threshold: float = 0.1) -> float:
    """Open-set F-measure, for known and unknown classes mixed (OLTR, Liu et al., CVPR 2019), 0 to 1.

    Images of unknown classes are labelled -1; a prediction with a probability below `threshold` counts as -1
    ("unknown"). F = 2PR / (P + R) with P = right / (known images taken as known), R = right / (right + unknown images
    taken as known), where right counts known images predicted correctly; 0 if there are none.

    preds, labels: [N]; probs: [N] probability of each prediction, or [N, C], whose row maximum is taken.
    """
    preds, labels, probs = as_array(preds).ravel(), as_array(labels).ravel(), as_array(probs)
    probs = probs.max(1) if probs.ndim == 2 else probs
    taken_as_known = (probs >= threshold) & (preds != -1)
    known = labels != -1
    right = int((taken_as_known & known & (preds == labels)).sum())
    if not right:
        return 0.0
    precision = right / int((taken_as_known & known).sum())
    recall = right / (right + int((taken_as_known & ~known).sum()))
    return 2 * precision * recall / (precision + recall)


class EvalState:
    """Counters of one evaluation, on the device: call `update` for each batch (it doesn't wait for the device) and
    `compute` at the end.

    Memory is proportional to C (times E for `used`), not C². Each rank has its own counters, which are plain sums;
    `merge` adds them up. num_experts: E, if `update` is to count experts' logits and the number of experts used; else
    0.
    """

    def __init__(self, num_classes: int, device: str | torch.device = "cpu", num_experts: int = 0):
        self.num_classes, self.num_experts = num_classes, num_experts
        count = {"dtype": torch.int64, "device": device}
        real = {"dtype": torch.float64, "device": device}
        self.right, self.predicted, self.labelled = (torch.zeros(num_classes, **count) for _ in range(3))
        self.bin_right = torch.zeros(ECE_BINS, **real)
        self.bin_confidence = torch.zeros(ECE_BINS, **real)
        self.loss_sum = torch.zeros((), **real)
        self.expert_right = torch.zeros(num_experts, **count)
        self.disagreement = torch.zeros((), **real)
        self.expert_images = torch.zeros((), **count)
        self.used = torch.zeros((num_classes, num_experts), **count)

    def tensors(self) -> list[Tensor]:
        """All counters; summed over ranks they are the counters of the whole split."""
        return [self.right, self.predicted, self.labelled, self.bin_right, self.bin_confidence, self.loss_sum,
                self.expert_right, self.disagreement, self.expert_images, self.used]

    def merge(self) -> None:
        """Sum the counters over all ranks, in place. All ranks must call it, once, before `compute`."""
        for tensor in self.tensors():
            all_reduce_sum(tensor)

    @torch.no_grad()
    def update(self, output: Tensor, labels: Tensor, expert_logits: Tensor | None = None,
               sample_num_experts: Tensor | None = None) -> None:
        """Count one batch. Images with a label outside 0..C-1 (open set: -1) are ignored.

        output: [N, C] logits; labels: [N]; expert_logits: [N, E, C]; sample_num_experts: [N] from 1 to E.
        """
        counted = (labels >= 0) & (labels < self.num_classes)
        ones, labels = counted.long(), labels.clamp(0, self.num_classes - 1)
        log_probs = F.log_softmax(output.float(), dim=1)
        confidence, preds = log_probs.max(1)
        hits = counted & (preds == labels)
        # index_add_ instead of bincount, which waits for the GPU to find the largest index.
        self.labelled.index_add_(0, labels, ones)
        self.predicted.index_add_(0, preds, ones)
        self.right.index_add_(0, labels, hits.long())
        losses = -log_probs.gather(1, labels[:, None])[:, 0]
        self.loss_sum += torch.where(counted, losses, 0).to(self.loss_sum.dtype).sum()
        confidence = confidence.exp().nan_to_num(0)
        bins = ((confidence * ECE_BINS).ceil().long() - 1).clamp(0, ECE_BINS - 1)
        real = self.bin_right.dtype
        self.bin_right.index_add_(0, bins, hits.to(real))
        self.bin_confidence.index_add_(0, bins, torch.where(counted, confidence, 0).to(real))
        if expert_logits is not None and self.num_experts:
            expert_preds = expert_logits.argmax(2)
            self.expert_right += ((expert_preds == labels[:, None]) & counted[:, None]).sum(0)
            self.disagreement += (_disagreement(expert_preds) * ones).to(real).sum()
            self.expert_images += ones.sum()
        if sample_num_experts is not None and self.num_experts:
            place = labels * self.num_experts + sample_num_experts.long().clamp(1, self.num_experts) - 1
            self.used.view(-1).index_add_(0, place, ones)

    def compute(self, train_cls_num: Any = None, many: float = MANY, few: float = FEW) -> dict[str, Any]:
        """The figures of `test_metrics.json` as plain numbers, fractions from 0 to 1, None if undefined.

        train_cls_num: [C] training images per class; without it the groups' accuracies are None and their sizes 0.
        many, few: the groups' limits. Includes `expert_acc` (list) and `expert_disagreement` if experts' logits were
        counted, and `expert_share` if the numbers of experts used were. `loss` is None if it isn't finite.
        """
        right, labelled = self.right.cpu().numpy(), self.labelled.cpu().numpy()
        n_samples = int(labelled.sum())
        class_acc = _ratios(right, labelled)
        counts = [] if train_cls_num is None else as_array(train_cls_num).tolist()
        groups = [shot_group(count, many, few) for count in counts]
        shots = group_means(class_acc, counts, many, few) if counts else dict.fromkeys(GROUPS)
        loss = float(self.loss_sum) / n_samples if n_samples else math.nan
        ece = float((self.bin_confidence - self.bin_right).abs().sum()) / n_samples if n_samples else None
        result: dict[str, Any] = {"accuracy": int(right.sum()) / n_samples if n_samples else None,
                                  "class_mean_acc": _mean(class_acc)}
        result |= {f"{name}_shot_acc": shots[name] for name in GROUPS}
        result |= {f"{name}_class_num": groups.count(name) for name in GROUPS}
        result |= {"macro_f1": f1_from_tally(right, self.predicted, labelled), "ece": ece,
                   "loss": loss if math.isfinite(loss) else None, "n_samples": n_samples, "per_class_acc": class_acc}
        if int(self.expert_images):
            images = int(self.expert_images)
            result |= {"expert_acc": [int(n) / images for n in self.expert_right],
                       "expert_disagreement": float(self.disagreement) / images}
        used = self.used.cpu().numpy()
        if used.sum():
            members = {"all": np.ones(self.num_classes, bool)}
            members |= {name: np.array([group == name for group in groups] or [False] * self.num_classes)
                        for name in GROUPS}
            result["expert_share"] = {name: shares(used[rows].sum(0)) for name, rows in members.items()}
        return result


def shares(counts: np.ndarray) -> list[float] | None:
    """counts [E] divided by their sum, or None if that is 0."""
    total = int(counts.sum())
    return [int(count) / total for count in counts] if total else None
