"""Losses on a single set of logits [N, C]."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from criteria.base import (
    LongTailLoss,
    cross_entropies,
    epoch_or_never,
    finite,
    ldam_margins,
    not_negative,
)
from utils.class_counts import class_counts
from utils.errors import ConfigError, unknown


class CrossEntropyLoss(LongTailLoss):
    """Cross-entropy; with `reweight_CE` weighted by the effective number of images, from the first epoch
    (Cui et al. 2019)."""

    def __init__(self, cls_num_list: list[float] | None = None, reweight_CE: bool = False):
        self.needs_counts = bool(reweight_CE)
        super().__init__(cls_num_list)
        self.reweight_CE = bool(reweight_CE)

    @property
    def weighted(self) -> bool:
        return self.reweight_CE

    def sample_loss(self, z: Tensor, target: Tensor) -> Tensor:
        return cross_entropies(z, target)


class FocalLoss(LongTailLoss):
    """Mean of (1 - p)^gamma · w_y · CE, p the target's probability (Lin et al., ICCV 2017).

    gamma: >= 0; the default 0, as in LDAM-DRW and RIDE, is plain cross-entropy. weight: a factor >= 0 per class, or
    None. Raises ConfigError for negative values, or if there aren't as many factors as classes.
    """

    def __init__(self, cls_num_list: list[float] | None = None, weight: list[float] | None = None, gamma: float = 0.0):
        super().__init__(cls_num_list)
        self.gamma = not_negative(gamma, "gamma")
        self.weight = None if weight is None else torch.tensor([not_negative(w, "weight") for w in weight],
                                                               dtype=torch.float64)

    def focal_weights(self, num_classes: int) -> Tensor:
        """The argument `weight`, float64 [C]. Raises ConfigError if its length isn't `num_classes`."""
        if len(self.weight) != num_classes:
            raise ConfigError(f"loss.args.weight: has {len(self.weight)} numbers, the data {num_classes} classes")
        return self.weight

    def learned_prior(self, seen: Tensor, num_experts: int = 1, expert_weights: Tensor | None = None) -> Tensor:
        prior = super().learned_prior(seen, num_experts, expert_weights)
        if self.weight is None:
            return prior
        # A weight of 0 counts as the smallest positive one, like a count of 0: a prior of 0 would have no logarithm.
        prior = prior * torch.tensor(class_counts(self.focal_weights(len(seen)).tolist(), "loss.args.weight"))
        return prior / prior.sum()

    def sample_loss(self, z: Tensor, target: Tensor) -> Tensor:
        loss = cross_entropies(z, target)
        # 1 - p by expm1 is exact for p near 1; the clamp keeps the gradient of its power finite at p = 1.
        loss = (-torch.expm1(-loss)).clamp_min(torch.finfo(z.dtype).eps).pow(self.gamma) * loss
        if self.weight is not None:
            loss = loss * self.table("focal_weights", z, z.shape[1])[target]
        return loss


class LDAMLoss(LongTailLoss):
    """LDAM with deferred re-weighting (Cao et al., NeurIPS 2019).

    Cross-entropy after s · m_y is subtracted from the target's logit, m_j proportional to n_j^(-1/4) with maximum
    `max_m`; weighted by the effective number of images from epoch `reweight_epoch` + 1 on (-1: never). The logits
    must already include the cosine head's scale s. Without class counts: plain cross-entropy. Raises ConfigError for
    values out of range.
    """

    def __init__(self, cls_num_list: list[float] | None = None, max_m: float = 0.5, s: float = 30,
                 reweight_epoch: int = -1):
        super().__init__(cls_num_list)
        if not s > 0:
            raise ConfigError(f"loss.args.s: must be positive, not {s}")
        self.max_m, self.s = not_negative(max_m, "max_m"), float(s)
        self.reweight_epoch = epoch_or_never(reweight_epoch)

    def scaled_margins(self) -> Tensor:
        """s · m_j, float64 [C]."""
        return self.s * ldam_margins(self.counts, self.max_m)

    @property
    def weighted(self) -> bool:
        return self.reweighting and self.counts is not None

    def sample_loss(self, z: Tensor, target: Tensor) -> Tensor:
        if self.counts is None:
            return cross_entropies(z, target)
        margins = self.table("scaled_margins", z)[target]
        return cross_entropies(z.scatter_add(1, target[:, None], -margins[:, None]), target)


class BalancedSoftmaxLoss(LongTailLoss):
    """Cross-entropy of z + log n_j (Ren et al., NeurIPS 2020)."""

    needs_counts = True

    def added(self, num_experts: int = 1) -> Tensor:
        return self.log_frequencies()

    def sample_loss(self, z: Tensor, target: Tensor) -> Tensor:
        return cross_entropies(z + self.table("log_frequencies", z), target)


class LogitAdjustmentLoss(LongTailLoss):
    """Cross-entropy of z + tau · log(n_j / n) (Menon et al., ICLR 2021). `model.shift` has the post-hoc form."""

    needs_counts = True

    def __init__(self, cls_num_list: list[float] | None = None, tau: float = 1.0):
        super().__init__(cls_num_list)
        self.tau = finite(tau, "tau")

    def added(self, num_experts: int = 1) -> Tensor:
        return self.tau * self.log_frequencies()

    def sample_loss(self, z: Tensor, target: Tensor) -> Tensor:
        return cross_entropies(z + self.table("added", z), target)


class LabelSmoothingLoss(LongTailLoss):
    """Cross-entropy against (1 - smoothing) · one-hot + smoothing / C (Szegedy et al., CVPR 2016)."""

    def __init__(self, cls_num_list: list[float] | None = None, smoothing: float = 0.1):
        super().__init__(cls_num_list)
        if not 0 <= smoothing <= 1:
            raise ConfigError(f"loss.args.smoothing: must be from 0 to 1, not {smoothing}")
        self.smoothing = float(smoothing)

    def sample_loss(self, z: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(z, target, label_smoothing=self.smoothing, reduction="none")


class HCMLoss(BalancedSoftmaxLoss):
    """Hard category mining (Li et al., CVPR 2022, as NBN uses it): the sum of two balanced softmax losses.

    In the second only the `HCM_N` classes with the largest logits, always including the target, keep their balanced
    logit z_j + log(n_j / n); all others get the logit 0. With at most `HCM_N` classes all keep theirs.
    """

    def __init__(self, cls_num_list: list[float] | None = None, HCM_N: int = 300):
        super().__init__(cls_num_list)
        if HCM_N < 1:
            raise ConfigError(f"loss.args.HCM_N: must be 1 or more, not {HCM_N}")
        self.HCM_N = int(HCM_N)

    def sample_loss(self, z: Tensor, target: Tensor) -> Tensor:
        balanced = z + self.table("log_frequencies", z)
        # The hardest classes are chosen by the raw logits, without the frequencies.
        ranked = z.detach().scatter(1, target[:, None], math.inf)
        hard = ranked.topk(min(self.HCM_N, z.shape[1]), dim=1).indices
        mined = torch.zeros_like(balanced).scatter(1, hard, balanced.gather(1, hard))
        return cross_entropies(balanced, target) + cross_entropies(mined, target)


class VSLoss(LogitAdjustmentLoss):
    """Vector scaling: cross-entropy of (n_j / n_max)^gamma · z_j + tau · log(n_j / n) (Kini et al., NeurIPS 2021).

    gamma 0 is logit adjustment; tau 0 leaves only the per-class temperatures.
    """

    def __init__(self, cls_num_list: list[float] | None = None, gamma: float = 0.3, tau: float = 1.0):
        super().__init__(cls_num_list, tau)
        self.gamma = not_negative(gamma, "gamma")

    def scales(self) -> Tensor:
        """(n_j / n_max)^gamma, float64 [C] in (0, 1]."""
        return (self.counts / self.counts.max()).pow(self.gamma)

    def sample_loss(self, z: Tensor, target: Tensor) -> Tensor:
        return cross_entropies(z * self.table("scales", z) + self.table("added", z), target)


class GCLLoss(LongTailLoss):
    """Gaussian clouded logits (Li et al., CVPR 2022): cross-entropy of z_j - s · noise · d_j · |e_j|, with e normal of
    standard deviation 1/3, clipped to [-1, 1] and drawn anew for each logit.

    d_j = log(n_max / n_j), scaled so that the rarest class's is 1: rare classes get the most noise, so that their
    samples spread wider. The logits must already include the cosine head's scale s. `m`: a margin subtracted from the
    target's cosine. In evaluation there is no noise and no margin.
    """

    needs_counts = True

    def __init__(self, cls_num_list: list[float] | None = None, s: float = 30, noise: float = 1.0, m: float = 0.0):
        super().__init__(cls_num_list)
        if not s > 0:
            raise ConfigError(f"loss.args.s: must be positive, not {s}")
        self.s, self.noise, self.m = float(s), not_negative(noise, "noise"), not_negative(m, "m")

    def cloud_sizes(self) -> Tensor:
        """d_j, float64 [C] in [0, 1]; all 0 if the classes are balanced."""
        sizes = (self.counts.max() / self.counts).log()
        return sizes / sizes.max().clamp_min(torch.finfo(sizes.dtype).tiny)

    def sample_loss(self, z: Tensor, target: Tensor) -> Tensor:
        if self.training:
            cloud = torch.randn_like(z).div_(3).clamp_(-1, 1).abs_()
            z = z - cloud * (self.s * self.noise * self.table("cloud_sizes", z))
            if self.m:
                z = z.scatter_add(1, target[:, None], z.new_full((len(z), 1), -self.s * self.m))
        return cross_entropies(z, target)


class LabelAwareSmoothingLoss(LongTailLoss):
    """Cross-entropy against (1 - e_y) · one-hot + e_y / C, with e_y between `smooth_tail` for the rarest class and
    `smooth_head` for the most frequent one (MiSLAS; Zhong et al., CVPR 2021).

    With t = (n_y - n_min) / (n_max - n_min), e_y is, by `shape`: `concave` tail + (head - tail) · sin(pi t / 2),
    `linear` in t, `convex` head + (head - tail) · sin(3 pi / 2 + pi t / 2). Meant for the second stage of decoupled
    training, since frequent classes tend to be overconfident.
    """

    needs_counts = True
    SHAPES = ("concave", "linear", "convex")

    def __init__(self, cls_num_list: list[float] | None = None, smooth_head: float = 0.3, smooth_tail: float = 0.0,
                 shape: str = "concave"):
        super().__init__(cls_num_list)
        for name, value in (("smooth_head", smooth_head), ("smooth_tail", smooth_tail)):
            if not 0 <= value <= 1:
                raise ConfigError(f"loss.args.{name}: must be from 0 to 1, not {value}")
        if shape not in self.SHAPES:
            raise unknown("loss.args.shape", shape, self.SHAPES, "shape")
        self.smooth_head, self.smooth_tail, self.shape = float(smooth_head), float(smooth_tail), shape

    def smoothings(self) -> Tensor:
        """e_j of each class, float64 [C] in [0, 1]."""
        low, high = self.counts.min(), self.counts.max()
        t = (self.counts - low) / (high - low).clamp_min(1)
        rise = {"concave": torch.sin(math.pi / 2 * t), "linear": t,
                "convex": 1 + torch.sin(math.pi / 2 * (3 + t))}[self.shape]
        return self.smooth_tail + (self.smooth_head - self.smooth_tail) * rise

    def sample_loss(self, z: Tensor, target: Tensor) -> Tensor:
        smoothing = self.table("smoothings", z)[target]
        log_probs = F.log_softmax(z, dim=1)
        hit = log_probs.gather(1, target[:, None]).squeeze(1)
        return -(1 - smoothing) * hit - smoothing * log_probs.mean(1)
