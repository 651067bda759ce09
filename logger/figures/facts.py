"""Everything a report shows of a run, gathered once; the drawing code (logger.figures.drawings) reads only this."""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from utils.class_counts import GROUPS, group_limits, shot_group

BY_IMAGE = ("predictions", "confidences", "labels", "expert_predictions")


@dataclass
class RunFacts:
    """A run's figures and, where they are known, its predictions by image.

    result: the figures of test_metrics.json, and of `BY_IMAGE` what there is (N images, E experts): predictions [N],
    confidences [N], labels [N], expert_predictions [N, E]. counts: training images of each class, [C]. norms: see
    logger.figures.norms.norm_facts. history: rows of metrics.csv. split: whose images they are, "test" or "val".
    """

    config: dict[str, Any]
    result: dict[str, Any]
    counts: list[int]
    class_names: list[str] | None = None
    history: list[dict[str, float | None]] = field(default_factory=list)
    norms: dict[str, Any] = field(default_factory=dict)
    split: str = "test"

    @property
    def split_name(self) -> str:
        """The split, in words."""
        return "test" if self.split == "test" else "validation"

    @property
    def images_name(self) -> str:
        """What the images are called in texts."""
        return f"{self.split_name} images"

    @property
    def many(self) -> int:
        """A class with more training images than this is many-shot."""
        return group_limits(self.config.get("groups"))["many"]

    @property
    def few(self) -> int:
        """A class with fewer training images than this is few-shot."""
        return group_limits(self.config.get("groups"))["few"]

    @cached_property
    def names(self) -> list[str]:
        """A name for every class; its number where it has none."""
        return list(map(str, self.class_names or range(len(self.counts))))

    @cached_property
    def groups(self) -> list[str]:
        """Each class's group, [C]."""
        return [shot_group(count, self.many, self.few) for count in self.counts]

    @property
    def classifies(self) -> bool:
        """False for detectors, whose figures are of another kind."""
        return self.result.get("accuracy") is not None

    @property
    def by_image(self) -> bool:
        """Whether per-image predictions are known."""
        return len(self.result.get("predictions", ())) > 0

    def image(self, key: str) -> np.ndarray:
        """The per-image array of that name, one of BY_IMAGE: [N], or [N, E]. Raises KeyError if it isn't known."""
        return np.asarray(self.result[key])

    @cached_property
    def right(self) -> np.ndarray:
        """Whether each prediction is right, [N] bool."""
        return self.image("predictions") == self.image("labels")

    @cached_property
    def group_number(self) -> np.ndarray:
        """The index in GROUPS of each class's group, [C]."""
        return np.array([GROUPS.index(group) for group in self.groups])

    def flow(self) -> dict[str, dict[str, float]]:
        """For each group the shares of its images that were `right`, and that were mistaken for a class of each group.
        Needs no C x C matrix."""
        labels, predicted = self.group_number[self.image("labels")], self.group_number[self.image("predictions")]
        flow = {}
        for number, group in enumerate(GROUPS):
            mine = labels == number
            if mine.any():
                wrong = np.bincount(predicted[mine & ~self.right], minlength=len(GROUPS)) / mine.sum()
                flow[group] = {"right": float(self.right[mine].mean()), **dict(zip(GROUPS, wrong.tolist()))}
        return flow

    def confusion(self) -> np.ndarray:
        """Images by (label, prediction), [C, C]: for few classes only."""
        size = len(self.counts)
        both = self.image("labels") * size + self.image("predictions")
        return np.bincount(both, minlength=size * size).reshape(size, size)

    def confused_pairs(self, most: int = 10) -> list[tuple[int, int, int, int]]:
        """(true class, predicted class, images, images of the true class), the most frequent mistakes first."""
        size, labels = len(self.counts), self.image("labels")
        pairs, images = np.unique(labels[~self.right] * size + self.image("predictions")[~self.right],
                                  return_counts=True)
        totals = np.bincount(labels, minlength=size)
        order = np.argsort(-images, kind="stable")[:most]
        return [(int(pairs[i] // size), int(pairs[i] % size), int(images[i]), int(totals[pairs[i] // size]))
                for i in order]

    def hardest(self, most: int = 24, of_a_kind: int = 4) -> list[int]:
        """Indices of the images that were wrong with the greatest confidence, at most `of_a_kind` with the same
        mistake; if none was wrong, of those with the least confidence. At most `most`."""
        confidences = self.image("confidences")
        wrong = np.flatnonzero(~self.right)
        if not len(wrong):
            return np.argsort(confidences, kind="stable")[:most].tolist()
        chosen, seen = [], Counter()
        for index in wrong[np.argsort(-confidences[wrong], kind="stable")].tolist():
            kind = (self.image("labels")[index], self.image("predictions")[index])
            seen[kind] += 1
            if seen[kind] <= of_a_kind:
                chosen.append(index)
            if len(chosen) == most:
                break
        return chosen

    def expert_accuracy(self) -> dict[str, list[float | None]]:
        """Each expert's accuracy on all images and (as a mean over classes) in each group: key -> [E]."""
        if "expert_predictions" not in self.result:
            return {"all": self.result["expert_acc"]} if self.result.get("expert_acc") else {}
        labels, size = self.image("labels"), len(self.counts)
        right = (self.image("expert_predictions") == labels[:, None]).T                               # [E, N]
        images = np.bincount(labels, minlength=size)
        by_class = np.array([np.bincount(labels, hits, size) for hits in right]) / np.maximum(images, 1)  # [E, C]
        accuracy = {"all": right.mean(1).tolist()}
        for number, group in enumerate(GROUPS):
            members = (self.group_number == number) & (images > 0)
            if members.any():
                accuracy[group] = by_class[:, members].mean(1).tolist()
        return accuracy

    def together(self) -> dict[str, float | None]:
        """The accuracy of all experts together, with `expert_accuracy`'s keys, even if the model uses
        fewer for most images."""
        if "all_experts_acc" in self.result:
            return {"all": self.result["all_experts_acc"], **(self.result.get("all_experts_shot_acc") or {})}
        return {"all": self.result.get("accuracy"), **{g: self.result.get(f"{g}_shot_acc") for g in GROUPS}}

    def disagreement(self) -> np.ndarray | None:
        """How often each two experts predict different classes, [E, E], 0 to 1; None if that isn't known."""
        if "expert_predictions" not in self.result:
            return None
        predictions = self.image("expert_predictions")
        return np.array([[float((a != b).mean()) for b in predictions.T] for a in predictions.T])
