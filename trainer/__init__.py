"""Training and evaluation."""
from __future__ import annotations

from utils.config.build import lookup

#: `trainer.type` -> its class, imported when it is asked for.
TRAINERS = {
    "Trainer": "trainer.trainer:Trainer",
    "DistillTrainer": "trainer.distill_trainer:DistillTrainer",
    "ExpertAssignmentTrainer": "trainer.expert_assignment_trainer:ExpertAssignmentTrainer",
    "DetectionTrainer": "trainer.detection.trainer:DetectionTrainer",
}


def trainer_class(name: str) -> type:
    """The trainer a config names; ConfigError where there is no such."""
    return lookup(TRAINERS, name, "trainer.type", "trainer")
