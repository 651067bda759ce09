"""Training with a teacher's logits beside the model's own (RIDE's distillation; Wang et al., ICLR 2021)."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trainer.trainer import Trainer
from utils.errors import ConfigError


class Renormalised(nn.Module):
    """Wraps a model trained on images normalised with `theirs`, so that it takes x [N, 3, H, W] normalised with `ours`.

    ours, theirs: dicts with `mean` and `std`, three numbers each.
    """

    def __init__(self, model: nn.Module, ours: Mapping[str, Any], theirs: Mapping[str, Any]):
        super().__init__()
        self.model, self.num_classes = model, model.num_classes
        mean, std, their_mean, their_std = (torch.tensor(facts[key], dtype=torch.float64).view(3, 1, 1)
                                            for facts in (ours, theirs) for key in ("mean", "std"))
        self.register_buffer("scale", (std / their_std).float())
        self.register_buffer("shift", ((mean - their_mean) / their_std).float())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.model(x * self.scale + self.shift)


class DistillTrainer(Trainer):
    """A Trainer whose outputs carry `teacher` [N, C]: the mean logits of a frozen model, usually with more experts.

    Args:
        teacher: put in evaluation mode, without gradients, for the whole run.
    Raises:
        ConfigError: no teacher, or one with other classes.
    """

    def __init__(self, model: nn.Module, *args: Any, teacher: nn.Module | None = None, **kwargs: Any):
        if teacher is None:
            raise ConfigError("distill: needs a teacher; give distill_arch and distill_checkpoint")
        if teacher.num_classes != model.num_classes:
            raise ConfigError(f"distill_arch.args.num_classes: the teacher knows {teacher.num_classes} classes, "
                              f"the student {model.num_classes}; both must be the data's")
        super().__init__(model, *args, teacher=teacher.eval().requires_grad_(False), **kwargs)
        self.teacher.to(memory_format=self.memory_format)
