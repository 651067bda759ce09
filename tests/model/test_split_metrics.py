"""Metrics of a whole split, against scikit-learn."""
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from model import split_metrics
from model.split_metrics import auc


def split(images=300, classes=7, levels=0):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator) + 2 * torch.nn.functional.one_hot(labels, classes)
    probs = logits.softmax(1)
    return (probs if not levels else (probs * levels).round() / levels), labels


@pytest.mark.parametrize("levels", [0, 5], ids=["all different", "many equal"])
@pytest.mark.parametrize("at_once", [2 ** 24, 700])
def test_auc_is_scikit_learns(monkeypatch, levels, at_once):
    monkeypatch.setattr(split_metrics, "_AT_ONCE", at_once)
    probs, labels = split(levels=levels)
    each = [roc_auc_score(labels.numpy() == c, probs[:, c].numpy()) for c in range(probs.shape[1])]
    assert float(auc(probs, labels)) == pytest.approx(np.mean(each), abs=1e-12)
    shuffled = torch.randperm(len(labels))
    assert torch.equal(auc(probs[shuffled], labels[shuffled]), auc(probs, labels))


def test_classes_without_images_of_both_kinds_dont_count():
    probs, labels = split()
    there = labels < 4
    each = [roc_auc_score(labels[there].numpy() == c, probs[there, c].numpy()) for c in range(4)]
    assert float(auc(probs[there], labels[there])) == pytest.approx(np.mean(each), abs=1e-12)
    assert torch.isnan(auc(probs[labels == 2], labels[labels == 2]))
