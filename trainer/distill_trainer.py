"""Training with a teacher's logits beside the model's own (RIDE's distillation, Wang 2021)."""
from __future__ import annotations

from typing import Any

from torch import nn

from trainer.trainer import Trainer
from utils.errors import ConfigError


class DistillTrainer(Trainer):
    """A Trainer whose outputs carry `teacher` [N, C]: the mean logits of a frozen model with more experts.

    Args:
        teacher: in evaluation mode for good and without gradients.
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
