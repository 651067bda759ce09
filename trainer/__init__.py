"""Training and evaluation."""
from __future__ import annotations

from utils.config.build import lookup

#: `trainer.type` -> its class, imported on first use.
TRAINERS = {
    "Trainer": "trainer.trainer:Trainer",
    "DistillTrainer": "trainer.distill_trainer:DistillTrainer",
    "ExpertAssignmentTrainer": "trainer.expert_assignment_trainer:ExpertAssignmentTrainer",
    "DetectionTrainer": "trainer.detection.trainer:DetectionTrainer",
}


def trainer_class(name: str) -> type:
    """The trainer class that a config names. Raises ConfigError for an unknown name."""
    return lookup(TRAINERS, name, "trainer.type", "trainer")
