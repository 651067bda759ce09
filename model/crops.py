"""Evaluating a model on several crops of each image and averaging its outputs."""
from __future__ import annotations

from typing import Any

import torch

from utils.errors import ConfigError


def forward_crops(model: Any, images: torch.Tensor,
                  memory_format: torch.memory_format = torch.channels_last) -> dict[str, Any]:
    """The model's output dict for images [N, 3, S, S]; for crops [N, K, 3, S, S] the mean of the K dicts.

    The mean covers floating-point tensors only, in float32. Inputs of fewer dimensions (features) are passed on as
    they are. The K crops run one after the other, so that they need no more memory than N images. Raises ConfigError
    for crops with an expert-assignment model, whose gates would choose experts for each crop separately.
    """
    if images.ndim == 4:
        return model(images.contiguous(memory_format=memory_format))
    if images.ndim < 4:
        return model(images)
    if getattr(model, "routed", False) and getattr(model, "route", False):
        raise ConfigError("crops: each image's experts are chosen once; leave crops out for an expert-assignment model")
    sums: dict[str, torch.Tensor] = {}
    for crop in images.unbind(1):
        for key, value in model(crop.contiguous(memory_format=memory_format)).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                sums[key] = value.float() + sums[key] if key in sums else value.float()
    return {key: value / images.shape[1] for key, value in sums.items()}
