"""Adapting a trained model's logits to where it is used: to other class frequencies, to calibrated probabilities, and
by weights for the experts. No test label is needed, and only a handful of numbers is fitted.

`merge` sums a tensor over all processes in place and returns it; each process passes its own images.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.class_counts import class_counts

Merge = Callable[[Tensor], Any]
ROWS = 4096                     # images whose float64 probabilities are held at once
COLDEST, HOTTEST = 0.05, 20.0   # range of temperatures that is searched


def frequencies(cls_num_list: Sequence[float]) -> Tensor:
    """Class frequencies n_j / n, float64 [C]; a class without images counts like the rarest one that has some."""
    counts = torch.tensor(class_counts(cls_num_list), dtype=torch.float64)
    return counts / counts.sum()


def adjust_logits(logits: Tensor, cls_num_list: Sequence[float], tau: float = 1.0) -> Tensor:
    """Post-hoc logit adjustment (Menon et al., ICLR 2021): z_j - tau · log(n_j / n). logits: [..., C] -> the same.

    For models trained with plain cross-entropy; one trained with the logit-adjusted loss needs no adjustment.
    """
    return logits - (tau * frequencies(cls_num_list).log()).to(logits)


def estimate_prior(logits: Tensor, learned: Tensor, merge: Merge = lambda x: x, steps: int = 200,
                   tolerance: float = 1e-6) -> Tensor:
    """Estimate the class distribution of unlabelled images by expectation maximisation (Saerens et al., Neural
    Computation 2002): p(j | x) ~ q_j / a_j · a(j | x), then q_j = the mean of p(j | x) over the images, from q = a.

    logits: [N, C] of a model whose probabilities a(j | x) hold for the class distribution a = `learned` [C].
    Returns q, float64 [C], which maximises the likelihood. Stops after `steps` iterations, or once every q_j changes
    by less than `tolerance`.
    """
    log_learned = learned.double().log().to(logits.device)
    count = merge(torch.tensor(float(len(logits)), dtype=torch.float64, device=logits.device))
    prior = log_learned.exp()
    for _ in range(steps):
        shift = prior.log() - log_learned           # -inf for a class whose share has become 0, and stays 0
        total = torch.zeros_like(prior)
        for piece in logits.split(ROWS):
            total += (piece.double() + shift).softmax(1).sum(0)
        before, prior = prior, merge(total) / count
        if (prior - before).abs().max() < tolerance:
            break
    return prior


def fit_temperature(logits: Tensor, labels: Tensor, merge: Merge = lambda x: x) -> float:
    """The temperature T for which softmax(z / T) has the smallest cross-entropy (Guo et al., ICML 2017).

    logits: [N, C]; labels: [N]. The loss is convex in 1 / T; the root of its derivative, the mean of E_p[z] - z_y, is
    found by bisection between COLDEST and HOTTEST. If it lies outside, the nearer bound is returned. Logits of -inf
    are left out of E_p[z]; an image whose own class has the logit -inf fits at no T and is ignored.
    """
    low, high = 1 / HOTTEST, 1 / COLDEST
    for _ in range(50):
        middle = (low * high) ** 0.5
        slope = torch.zeros((), dtype=torch.float64, device=logits.device)
        for z, y in zip(logits.split(ROWS), labels.split(ROWS), strict=True):
            z = z.double()
            own, known = z.gather(1, y[:, None])[:, 0], z.masked_fill(z == -math.inf, 0)     # 0 * -inf is NaN
            slope += (((z * middle).softmax(1) * known).sum(1) - own)[own != -math.inf].sum()
        low, high = (middle, high) if float(merge(slope)) < 0 else (low, middle)
    return (low * high) ** -0.5


def learn_expert_weights(first: Tensor, second: Tensor, merge: Merge = lambda x: x, steps: int = 100,
                         lr: float = 0.1, least: float = 0.05) -> Tensor:
    """Learn weights for the experts from two augmented views of unlabelled images (SADE; Zhang et al., NeurIPS 2022):
    those for which the predictions on both views agree most. An expert that suits a distribution is stable on it.

    first, second: each view's logits [N, E, C]. The weights are w = softmax(v); Adam maximises the mean over the
    images of cos(softmax(sum w_e z_e), softmax(sum w_e z'_e)) over v, from equal weights, for `steps` steps or until
    the smallest weight is below min(least, 0.5 / E), as in SADE. Returns float64 [E], which sum to 1.
    """
    experts = first.shape[1]
    v = torch.zeros(experts, dtype=torch.float64, device=first.device, requires_grad=True)
    optimizer = torch.optim.Adam([v], lr=lr)
    count = merge(torch.tensor(float(len(first)), dtype=torch.float64, device=first.device))
    for _ in range(steps):
        weights = v.detach().softmax(0)
        if weights.min() < min(least, 0.5 / experts):
            break
        grad = torch.zeros_like(weights)
        for a, b in zip(first.split(ROWS), second.split(ROWS), strict=True):
            grad += torch.autograd.grad(-stability(v.softmax(0), a, b), v)[0]
        v.grad = merge(grad) / count
        optimizer.step()
    return v.detach().softmax(0)


def stability(weights: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Sum over the images of the cosine between the two views' predicted probabilities, 0-d.

    weights: [E]; first, second: logits [N, E, C].
    """
    one, two = (torch.einsum("nec,e->nc", z.double(), weights).softmax(1) for z in (first, second))
    return F.cosine_similarity(one, two, dim=1).sum()
