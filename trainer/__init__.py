"""Training and evaluation."""
from __future__ import annotations

import importlib

from utils.config.build import lookup

#: `trainer.type` -> the module that defines the class of that name (imported when asked for).
TRAINERS = {
    "Trainer": "trainer.trainer",
    "DistillTrainer": "trainer.distill_trainer",
    "ExpertAssignmentTrainer": "trainer.expert_assignment_trainer",
    "DetectionTrainer": "trainer.detection.trainer",
}


def trainer_class(name: str) -> type:
    """The trainer a config names; ConfigError where there is no such."""
    return getattr(importlib.import_module(lookup(TRAINERS, name, "trainer.type")), name)
