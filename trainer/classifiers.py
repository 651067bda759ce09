"""Classifiers that test.py puts on a trained model without training: tau-normalised heads and NCM (Kang 2020)."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from model import posthoc
from model.metric import EvalState
from utils import dist

Head = Callable[[dict[str, Any]], torch.Tensor]


@torch.no_grad()
def features(model: nn.Module, loader: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's pooled features of a split, batch by batch: (feats [n, E, D], labels [n])."""
    model.eval()
    for batch, (images, labels) in enumerate(loader):
        n, _ = loader.share(batch)
        if n:
            images = images[:n].contiguous(memory_format=torch.channels_last)
            yield model(images)["feat"], labels[:n]


def tau_head(model: nn.Module, tau: float) -> Head:
    """The model's classifier with weights w_j / |w_j|^tau and no bias."""
    heads = posthoc.TauHeads(posthoc.model_heads(model))
    return lambda outputs: heads.logits(outputs["feat"], tau)


def sweep_tau(model: nn.Module, loader: Any, taus: list[float],
              metric: str = "class_mean_acc") -> tuple[float, list[float]]:
    """The tau with the largest `metric` on `loader`'s split (the smaller of equals), and each one's value.

    metric: `class_mean_acc`, `accuracy` or `macro_f1`, as `model.metric.EvalState` computes them.
    """
    heads = posthoc.TauHeads(posthoc.model_heads(model))
    states = [EvalState(heads.num_classes, next(model.parameters()).device) for _ in taus]
    for feats, labels in features(model, loader):
        heads.count(feats, labels, taus, states)
    for state in states:
        for counter in state.tensors():
            dist.all_reduce_sum(counter)
    values = [state.compute()[metric] for state in states]
    return posthoc.best_tau(taus, values), values


def ncm_head(model: nn.Module, train_loader: Any, num_classes: int, feat_type: str) -> Head:
    """Nearest class mean over the training images' features."""
    classifier = posthoc.fit_nearest_class_mean(lambda: features(model, train_loader), num_classes, feat_type,
                                                merge=dist.all_reduce_sum)
    return lambda outputs: classifier.logits(outputs["feat"])
