"""Writes to TensorBoard which classes' images attend to which others' inside BatchFormer."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trainer.hooks.base import Hook, Run
from utils.class_counts import GROUPS, group_limits, shot_group
from utils.errors import ConfigError

MOST_ROWS = 240     # of the attention matrix; with more classes, neighbours in frequency share a row


class AttentionByClass:
    """Sums, on the device, of the attention that images of one class pay to those of another, most
    frequent class first.

    With more than MOST_ROWS classes, neighbours within a group share a row. counts: training images per class, [C].
    groups: the config's `groups`, the limits of many and few.
    """

    def __init__(self, counts: Sequence[int], groups: dict[str, float], device: torch.device):
        self.group_of = [shot_group(count, **group_limits(groups)) for count in counts]
        order = sorted(range(len(counts)), key=lambda c: (GROUPS.index(self.group_of[c]), -counts[c]))
        together = -(-len(counts) // MOST_ROWS)
        self.rows: list[list[int]] = []                     # the classes of each row
        for group in GROUPS:
            members = [c for c in order if self.group_of[c] == group]
            self.rows += [members[i:i + together] for i in range(0, len(members), together)]
        row_of = torch.empty(len(counts), dtype=torch.long)
        for row, members in enumerate(self.rows):
            row_of[members] = row
        self.row_of = row_of.to(device)
        self.sums, self.pairs = torch.zeros(2, len(self.rows), len(self.rows), device=device)
        self.images = torch.zeros(len(self.rows), device=device)

    def add(self, weights: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch. weights: [N, N], row i is how much image i attends to each image; labels: [N]."""
        rows = torch.nn.functional.one_hot(self.row_of[labels], len(self.rows)).to(self.sums.dtype)
        images = rows.sum(0)
        self.sums += rows.T @ weights.to(self.sums.dtype) @ rows
        self.pairs += torch.outer(images, images)
        self.images += images

    def clear(self) -> None:
        """Set all sums to 0."""
        for counter in (self.sums, self.pairs, self.images):
            counter.zero_()

    def relative(self) -> np.ndarray:
        """Mean attention of an image of one row to an image of another, relative to the mean over all pairs (1:
        uniform): [R, R], NaN for rows that never shared a batch."""
        even = self.sums.sum() / self.pairs.sum()
        return (self.sums / self.pairs / even).cpu().numpy()

    def shares(self) -> np.ndarray:
        """The share (0 to 1) of its attention that an image of one group pays to each group, on average: [3, 3], one
        row per paying group; 0 for a group without images."""
        member = np.array([[self.group_of[row[0]] == group for row in self.rows] for group in GROUPS], dtype=float)
        images = member @ self.images.cpu().numpy()
        return member @ self.sums.cpu().numpy() @ member.T / np.maximum(images, 1)[:, None]

    def labels(self, names: Sequence[str] | None) -> tuple[list[str], list[str]]:
        """Each row's name (its first class's name, or number if `names` is None) and group."""
        return ([str(names[row[0]] if names else row[0]) for row in self.rows],
                [self.group_of[row[0]] for row in self.rows])


class BatchAttention(Hook):
    """`trainer.log_batch_attention`: each epoch, the shares between groups and a class-by-class picture.

    Raises ConfigError if the model has no BatchFormer.
    """

    def __init__(self, run: Run):
        super().__init__(run)
        self.block = run.model.batchformer
        if self.block is None:
            raise ConfigError("trainer.log_batch_attention: the model has no BatchFormer; set arch.args.add_bt 1")
        self.block.record = True
        self.attention = AttentionByClass(run.data_facts["cls_num_list"], run.config.get("groups") or {}, run.device)

    @classmethod
    def wanted(cls, options: dict[str, Any]) -> bool:
        return options["log_batch_attention"]

    def step_taken(self, outputs: dict[str, Any], labels: torch.Tensor | None, gradient_norm: torch.Tensor) -> None:
        weights = self.block.last_attention if self.run.writer else None
        if weights is not None and weights.shape[0] == len(labels):  # other ranks' labels aren't known here
            self.attention.add(weights, labels)

    def epoch_ended(self, epoch: int, figures: dict[str, float | None]) -> None:
        from logger.figures.matrices import attention
        from logger.figures.style import to_array
        writer = self.run.writer
        if not writer:
            return
        shares = self.attention.shares()
        for i, row in enumerate(GROUPS):
            for j, column in enumerate(GROUPS):
                writer.add_scalar(f"attention_{row}_to_{column}/train", float(shares[i, j]), epoch)
        names = self.run.data_facts["class_names"]
        figure = attention(self.attention.relative(), *self.attention.labels(names))
        writer.add_image("attention_by_class", to_array(figure), epoch, dataformats="HWC")
        self.attention.clear()
