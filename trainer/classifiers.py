"""Classifiers that test.py puts on a trained model without training: tau-normalised heads and NCM (Kang 2020)."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from model import posthoc
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


def sweep_tau(model: nn.Module, loader: Any, taus: list[float]) -> tuple[float, list[float]]:
    """The tau that is best on `loader`'s split by overall accuracy (the smaller of equals), and each one's accuracy."""
    heads = posthoc.TauHeads(posthoc.model_heads(model))
    right = torch.zeros(len(taus) + 1, dtype=torch.long, device=next(model.parameters()).device)
    for feats, labels in features(model, loader):
        right[:-1] += heads.correct(feats, labels, taus)
        right[-1] += len(labels)
    *counts, total = dist.all_reduce_sum(right).tolist()
    accuracies = [count / max(1, total) for count in counts]
    return posthoc.best_tau(taus, accuracies), accuracies


def ncm_head(model: nn.Module, train_loader: Any, num_classes: int, feat_type: str) -> Head:
    """Nearest class mean over the training images' features."""
    classifier = posthoc.fit_nearest_class_mean(lambda: features(model, train_loader), num_classes, feat_type,
                                                merge=dist.all_reduce_sum)
    return lambda outputs: classifier.logits(outputs["feat"])
