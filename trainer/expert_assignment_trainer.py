"""RIDE's second stage: train the gates that decide how many experts an image needs (Wang et al., ICLR 2021)."""
from __future__ import annotations

from typing import Any

import torch

from trainer.trainer import Trainer


class ExpertAssignmentTrainer(Trainer):
    """A Trainer whose loss comes from the model (binary cross-entropy of the gates).

    Validation also reports the share of the images that used 1, 2, ... experts.
    """

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        return self.step_model(images, target=labels)

    def shown(self, result: dict[str, Any]) -> dict[str, float | None]:
        shares = result.get("expert_share", {}).get("all") or []
        return {**super().shown(result), **{f"share_{i}_experts": value for i, value in enumerate(shares, 1)}}
