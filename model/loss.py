"""The losses of long-tailed recognition by name; see `criteria`."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from base.labels import MixedLabels, WholeBatch  # noqa: F401  public names of this module, like all below
from criteria.base import (
    LongTailLoss,
    cross_entropies,  # noqa: F401
    effective_number_weights,  # noqa: F401
    finite,  # noqa: F401
    ldam_margins,  # noqa: F401
    not_negative,  # noqa: F401
    temperature_factors,  # noqa: F401
)
from criteria.experts import (
    BalPoELoss,
    PerExpert,  # noqa: F401
    RIDEBalancedSoftmaxLoss,
    RIDELoss,
    RIDELossWithDistill,
    SADELoss,
)
from criteria.plain import (
    BalancedSoftmaxLoss,
    CrossEntropyLoss,
    FocalLoss,
    GCLLoss,
    HCMLoss,
    LabelAwareSmoothingLoss,
    LabelSmoothingLoss,
    LDAMLoss,
    LogitAdjustmentLoss,
    VSLoss,
)
from utils.config.build import build
from utils.errors import ConfigError

LOSSES: dict[str, type[LongTailLoss]] = {loss.__name__: loss for loss in (
    CrossEntropyLoss, FocalLoss, LDAMLoss, RIDELoss, RIDELossWithDistill, BalancedSoftmaxLoss, RIDEBalancedSoftmaxLoss,
    HCMLoss, LogitAdjustmentLoss, LabelSmoothingLoss, BalPoELoss, SADELoss, VSLoss, GCLLoss, LabelAwareSmoothingLoss)}


def build_loss(spec: Mapping[str, Any], cls_num_list: list | None = None, path: str = "loss",
               **extra: Any) -> LongTailLoss:
    """Build the loss given by a config's `{"type": NAME, "args": {...}}`.

    cls_num_list: training images per class, [C]; overridden by the spec's own, if any. extra: further arguments, passed
    on if the constructor accepts them.

    Raises ConfigError, with `path`, for an unknown type or argument, a value out of range or a loss of torch's.
    """
    if cls_num_list is not None and "cls_num_list" not in (spec.get("args") or {}):
        extra["cls_num_list"] = list(cls_num_list)
    criterion = build(LOSSES, spec, path, **extra)
    if type(criterion).__module__.startswith("torch."):
        raise ConfigError(f"{path}.type: {spec['type']} takes logits, and a loss here the model's dict; use "
                          "CrossEntropyLoss, or derive one from model.loss.LongTailLoss")
    return criterion
