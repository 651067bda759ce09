"""Classifiers made from a trained model without further training: tau-normalised heads and nearest class mean.

All take pooled features `feat` [N, E, D], expert by expert, and return logits [N, C], the mean over the experts, like
a model's `output`. They work on chunks of rows; nothing of size N x C x D is ever allocated.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.classifier import weight_by_class
from model.metric import EvalState
from utils.errors import ConfigError, unknown

FEAT_TYPES = ("un", "l2n", "cl2n")
DISTANCES = ("euclidean", "cosine")
CHUNK = 2**24  # number of logits [n, E, C] held at once


def _in_chunks(function: Callable[[Tensor], Tensor], feats: Tensor, classes: int) -> Tensor:
    """Apply `function` ([n, E, D] -> [n, C]) to feats [N, E, D] in chunks of rows with at most CHUNK logits: [N, C]."""
    rows = max(1, CHUNK // max(feats.shape[1] * classes, 1))
    return torch.cat([function(piece) for piece in feats.split(rows)]) if len(feats) > rows else function(feats)


# ---- tau-normalisation ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class LinearHead:
    """A head without its bias. weight: [C, D]; scale: s of a cosine head, which normalises its features, else None."""

    weight: Tensor
    scale: float | None = None


def linear_head(head: nn.Module, num_classes: int) -> LinearHead:
    """The linear part of a classifier head: an `nn.Linear`, or a cosine head with a `weight` and a scale `s`.

    Per-class factors of LWS (`scales`) or of a batch norm on the logits (`bn`) are multiplied into the weight. Raises
    ConfigError for other heads.
    """
    if not isinstance(head, nn.Linear) and not (hasattr(head, "weight") and hasattr(head, "s")):
        raise ConfigError(f"--classifier tau: {type(head).__name__} isn't linear in a `weight` (an nn.Linear, or a "
                          "cosine head with a scale `s`); use --classifier ncm or la")
    weight = weight_by_class(head, num_classes).detach()
    if not isinstance(head, nn.Linear):
        return LinearHead(weight.contiguous(), float(head.s))
    if hasattr(head, "scales"):
        weight = weight * head.scales.detach()[:, None]
    if hasattr(head, "bn"):
        norm = head.bn
        factor = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.detach())
        weight = weight * factor[:, None]
    return LinearHead(weight)


def model_heads(model: nn.Module) -> list[LinearHead]:
    """The linear heads of the experts that a model uses in evaluation, in the order of its `feat`. Raises ConfigError
    for heads that aren't linear."""
    return [linear_head(head, model.num_classes) for head in model.used_heads()]


def used_experts(model: nn.Module) -> list[int]:
    """The indices of the experts that a model uses in evaluation, in the order of its `feat`."""
    heads = [id(head) for head in model.heads()]
    return [heads.index(id(head)) for head in model.used_heads()]


def _norm_factor(weight: Tensor, tau: float) -> Tensor:
    return weight.norm(dim=1).clamp_min(1e-12).pow(-tau)  # a zero weight stays zero


class TauHeads:
    """Tau-normalised classifiers of one or several experts: w_j / |w_j|^tau, bias dropped (Kang et al., ICLR 2020).

    tau = 0 leaves the weights as they are, tau = 1 makes them unit length. For a cosine head features are normalised
    and its scale is kept, so that tau = 1 is the head itself.
    """

    def __init__(self, heads: Sequence[LinearHead]):
        self.heads = list(heads)
        self.num_classes = len(self.heads[0].weight)

    def _raw(self, feats: Tensor) -> Tensor:
        """Logits before dividing by |w_j|^tau: [n, E, D] -> [n, E, C]."""
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

    def at(self, tau: float) -> Callable[[Tensor], Tensor]:
        """`logits` for one tau as a function of features; for batches, as it computes them in one piece."""
        factors = self.factors(tau)
        return lambda feats: (self._raw(feats) * factors).mean(1)

    @torch.no_grad()
    def count(self, feats: Tensor, labels: Tensor, taus: Sequence[float], states: Sequence[EvalState]) -> None:
        """Update `states`, one for each tau, with that tau's logits. feats: [N, E, D]; labels: [N].

        The products of features and weights are computed once for all taus.
        """
        factors = [self.factors(tau) for tau in taus]
        rows = max(1, CHUNK // (feats.shape[1] * self.num_classes))
        for piece, truth in zip(feats.split(rows), labels.split(rows), strict=True):
            raw = self._raw(piece)
            for state, factor in zip(states, factors, strict=True):
                state.update(torch.einsum("nec,ec->nc", raw, factor) / len(self.heads), truth)


def best_tau(taus: Sequence[float], values: Sequence[float]) -> float:
    """The tau with the largest of `values`; the smallest one if several are equal."""
    return min(zip(taus, values, strict=True), key=lambda pair: (-float(pair[1]), pair[0]))[0]


# ---- nearest class mean --------------------------------------------------------------------------------------------

class ClassMeans:
    """Per-class means of features, accumulated batch by batch: memory is E · C · D, whatever the number of images.

    transform: applied to the features [N, E, D] first.
    """

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
        """The class means [C, E, D]; zeros for a class without images."""
        return self.sums / self.counts.clamp_min(1)[:, None, None].to(self.sums)

    def overall(self) -> Tensor:
        """The mean over all images, [E, D]."""
        return (self.sums.double().sum(0) / self.counts.sum().clamp_min(1)).to(self.sums)


class NearestClassMean:
    """Classify by the nearest class mean (Kang et al., ICLR 2020).

    Args:
        means: class means [C, E, D] of features transformed as `feat_type` says.
        counts: training images per class, [C]; a class without any gets the logit -inf.
        feat_type: `un` raw features, `l2n` normalised to unit length, `cl2n` centred by the training mean, then
            normalised.
        centre: the training mean [E, D], for cl2n.
        distance: `euclidean` (logits are minus the squared distance) or `cosine`.
    Raises:
        ConfigError: an unknown feat_type or distance.
    """

    def __init__(self, means: Tensor, counts: Tensor, feat_type: str = "cl2n", centre: Tensor | None = None,
                 distance: str = "euclidean"):
        if distance not in DISTANCES:
            raise unknown("distance", distance, DISTANCES)
        self.prepare = feature_transform(feat_type, centre)
        self.distance, self.empty = distance, counts == 0
        # Shifting the origin to the means' centre doesn't change distances, but their squares cancel less.
        self.origin = means.mean(0) if distance == "euclidean" else torch.zeros_like(means[0])
        self.means = (means - self.origin).transpose(0, 1).contiguous()  # [E, C, D]
        if distance == "cosine":
            self.means = F.normalize(self.means, dim=2)

    @torch.no_grad()
    def logits(self, feats: Tensor) -> Tensor:
        """feats: [N, E, D] -> logits [N, C], the mean over the experts."""
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
    """The function that transforms features [N, E, D] as `feat_type` says (see `NearestClassMean`); centre [E, D] is
    needed for cl2n. Raises ConfigError for an unknown type."""
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
    """Fit a `NearestClassMean` on training features.

    batches: called once for each pass over them (two for cl2n, else one); yields (feats [n, E, D], labels [n]).
    merge: sums a tensor over ranks in place, for data-parallel evaluation (`utils.dist.all_reduce_sum`).
    Raises ConfigError for an unknown feat_type or distance, ValueError if there are no features.
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
