"""Classifiers made from a trained model without training: tau-normalised heads, nearest class mean.

All work on pooled features `feat` [N, E, D], expert by expert, and give [N, C]: the mean over the experts, as a
model's `output` is. Work is cut into pieces of rows; nothing of size N x C x D is ever made.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.metric import EvalState
from utils.errors import ConfigError, unknown

FEAT_TYPES = ("un", "l2n", "cl2n")
DISTANCES = ("euclidean", "cosine")
CHUNK = 2**24  # logits [n, E, C] held at once


def _in_chunks(function: Callable[[Tensor], Tensor], feats: Tensor, classes: int) -> Tensor:
    """`function` of rows of feats [N, E, D] -> [N, C], in pieces of at most CHUNK logits."""
    rows = max(1, CHUNK // max(feats.shape[1] * classes, 1))
    return torch.cat([function(piece) for piece in feats.split(rows)]) if len(feats) > rows else function(feats)


# ---- tau-normalisation ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class LinearHead:
    """A head without its bias. weight: [C, D]; scale: None, or s of a cosine head, which takes unit features."""

    weight: Tensor
    scale: float | None = None


def linear_head(head: nn.Module) -> LinearHead:
    """What is linear in a classifier head: `nn.Linear` [C, D] or a cosine head with `s` and weight [D, C].

    The factors that LWS (`scales`) or a batch norm on the logits (`bn`) give each class are part of its weight.
    """
    if not isinstance(head, nn.Linear) and not (hasattr(head, "weight") and hasattr(head, "s")):
        raise ConfigError(f"--classifier tau: {type(head).__name__} isn't linear in a `weight` (nn.Linear's [C, D], or "
                          "[D, C] beside a scale `s`); use --classifier ncm or la")
    weight = head.weight.detach()
    if not isinstance(head, nn.Linear):
        return LinearHead(weight.t().contiguous(), float(head.s))
    if hasattr(head, "scales"):
        weight = weight * head.scales.detach()[:, None]
    if hasattr(head, "bn"):
        norm = head.bn
        factor = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.detach())
        weight = weight * factor[:, None]
    return LinearHead(weight)


def model_heads(model: nn.Module) -> list[LinearHead]:
    """The linear heads of the experts that a model uses in evaluation, in the order of its `feat`."""
    return [linear_head(head) for head in model.used_heads()]


def used_experts(model: nn.Module) -> list[int]:
    """The experts that a model uses in evaluation, by number, in the order of its `feat`."""
    heads = [id(head) for head in model.heads()]
    return [heads.index(id(head)) for head in model.used_heads()]


def _norm_factor(weight: Tensor, tau: float) -> Tensor:
    return weight.norm(dim=1).clamp_min(1e-12).pow(-tau)  # a zero weight stays zero


class TauHeads:
    """Tau-normalised classifiers of one or several experts: w_j / |w_j|^tau, bias dropped (Kang et al., ICLR 2020). tau
    0 leaves the weights, 1 makes them unit length.

    A cosine head keeps unit features and its scale, so tau = 1 is that head itself.
    """

    def __init__(self, heads: Sequence[LinearHead]):
        self.heads = list(heads)
        self.num_classes = len(self.heads[0].weight)

    def _raw(self, feats: Tensor) -> Tensor:
        """Logits before the norms come in: [n, E, D] -> [n, E, C]."""
        if feats.shape[1] != len(self.heads):
            raise ValueError(f"features of {feats.shape[1]} experts for {len(self.heads)} heads")
        logits = []
        for expert, head in enumerate(self.heads):
            x = feats[:, expert].to(head.weight.dtype)
            logits.append(x @ head.weight.t() if head.scale is None
                          else head.scale * (F.normalize(x, dim=1) @ head.weight.t()))
        return torch.stack(logits, 1)

    def factors(self, tau: float) -> Tensor:
        """|w_j|^(-tau) per expert and class, [E, C]."""
        return torch.stack([_norm_factor(head.weight, tau) for head in self.heads])

    @torch.no_grad()
    def logits(self, feats: Tensor, tau: float) -> Tensor:
        """feats: [N, E, D] -> the mean of the experts' logits, [N, C]."""
        factors = self.factors(tau)
        return _in_chunks(lambda piece: (self._raw(piece) * factors).mean(1), feats, self.num_classes)

    @torch.no_grad()
    def count(self, feats: Tensor, labels: Tensor, taus: Sequence[float], states: Sequence[EvalState]) -> None:
        """Count in `states`, one for each tau, what it makes of the images. feats: [N, E, D]; labels: [N].

        The products of features and weights are made once for all taus.
        """
        factors = [self.factors(tau) for tau in taus]
        rows = max(1, CHUNK // (feats.shape[1] * self.num_classes))
        for piece, truth in zip(feats.split(rows), labels.split(rows), strict=True):
            raw = self._raw(piece)
            for state, factor in zip(states, factors, strict=True):
                state.update(torch.einsum("nec,ec->nc", raw, factor) / len(self.heads), truth)


def best_tau(taus: Sequence[float], values: Sequence[float]) -> float:
    """The tau with the largest value; the smaller of equals."""
    return min(zip(taus, values, strict=True), key=lambda pair: (-float(pair[1]), pair[0]))[0]


# ---- nearest class mean --------------------------------------------------------------------------------------------

class ClassMeans:
    """Means of features per class, gathered batch by batch: memory is E · C · D, whatever the number of images."""

    def __init__(self, num_classes: int, transform: Callable[[Tensor], Tensor] = lambda feats: feats):
        self.num_classes, self.transform = num_classes, transform
        self.sums: Tensor | None = None  # [C, E, D]
        self.counts: Tensor | None = None  # [C]

    @torch.no_grad()
    def update(self, feats: Tensor, labels: Tensor) -> None:
        """feats: [N, E, D]; labels: [N] in 0..C-1."""
        feats = self.transform(feats.float() if feats.dtype != torch.float64 else feats)
        if self.sums is None:
            self.sums = feats.new_zeros((self.num_classes, *feats.shape[1:]))
            self.counts = torch.zeros(self.num_classes, dtype=torch.int64, device=feats.device)
        self.sums.index_add_(0, labels, feats)
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.int64))

    def means(self) -> Tensor:
        """[C, E, D]; zeros for a class without images."""
        return self.sums / self.counts.clamp_min(1)[:, None, None].to(self.sums)

    def overall(self) -> Tensor:
        """The mean over all images, [E, D]."""
        return (self.sums.double().sum(0) / self.counts.sum().clamp_min(1)).to(self.sums)


class NearestClassMean:
    """Classify by the nearest class mean (Kang et al., ICLR 2020).

    feat_type: `un` raw features, `l2n` unit features, `cl2n` features minus the training mean, then unit. distance:
    `euclidean` (logits are minus the squared distance) or `cosine`. A class without training images gets -inf.

    means: [C, E, D] of such features; counts: [C]; centre: [E, D], for cl2n.
    """

    def __init__(self, means: Tensor, counts: Tensor, feat_type: str = "cl2n", centre: Tensor | None = None,
                 distance: str = "euclidean"):
        if distance not in DISTANCES:
            raise unknown("distance", distance, DISTANCES)
        self.prepare = feature_transform(feat_type, centre)
        self.distance, self.empty = distance, counts == 0
        # Distances are the same seen from the means' own centre, and their squares cancel less there.
        self.origin = means.mean(0) if distance == "euclidean" else torch.zeros_like(means[0])
        self.means = (means - self.origin).transpose(0, 1).contiguous()  # [E, C, D]
        if distance == "cosine":
            self.means = F.normalize(self.means, dim=2)

    @torch.no_grad()
    def logits(self, feats: Tensor) -> Tensor:
        """feats: [N, E, D] -> [N, C], the mean over the experts."""
        return _in_chunks(self._logits, feats.to(self.means.dtype), self.means.shape[1])

    def _logits(self, feats: Tensor) -> Tensor:
        x = (self.prepare(feats) - self.origin).transpose(0, 1)  # [E, n, D]
        if self.distance == "cosine":
            logits = F.normalize(x, dim=2) @ self.means.transpose(1, 2)
        else:
            squares = x.square().sum(2)[:, :, None] + self.means.square().sum(2)[:, None, :]
            logits = -torch.baddbmm(squares, x, self.means.transpose(1, 2), alpha=-2).clamp_min(0)
        return logits.mean(0).masked_fill(self.empty, -math.inf)


def feature_transform(feat_type: str, centre: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """What `feat_type` does to features [N, E, D]; centre [E, D] is for cl2n."""
    if feat_type not in FEAT_TYPES:
        raise unknown("feat_type", feat_type, FEAT_TYPES)
    if feat_type == "un":
        return lambda feats: feats
    if feat_type == "l2n":
        return lambda feats: F.normalize(feats, dim=2)
    assert centre is not None
    return lambda feats: F.normalize(feats - centre, dim=2)


def fit_nearest_class_mean(batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], num_classes: int,
                           feat_type: str = "cl2n", distance: str = "euclidean",
                           merge: Callable[[Tensor], Any] | None = None) -> NearestClassMean:
    """Fit on training features.

    batches: called for each pass over them (two for cl2n, else one), gives (feats [n, E, D], labels [n]).
    merge: sums a tensor over ranks in place, for data-parallel evaluation (`utils.dist.all_reduce_sum`).
    """
    def one_pass(transform: Callable[[Tensor], Tensor]) -> ClassMeans:
        gathered = ClassMeans(num_classes, transform)
        for feats, labels in batches():
            gathered.update(feats, labels)
        if gathered.sums is None:
            raise ValueError("no training features to take class means of")
        if merge is not None:
            merge(gathered.sums)
            merge(gathered.counts)
        return gathered

    centre = one_pass(feature_transform("un")).overall() if feat_type == "cl2n" else None
    gathered = one_pass(feature_transform(feat_type, centre))
    return NearestClassMean(gathered.means(), gathered.counts, feat_type, centre, distance)
