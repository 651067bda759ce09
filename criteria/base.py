"""The base class of all losses: BatchFormer's two streams, mixed labels, class-weighted means, precision.

Every loss takes `criterion(outputs, target)` with `outputs["output"]` [N, C] (the experts' mean logits),
`outputs["logits"]` [N, E, C] where experts are trained one by one, and `target` [N] class indices or `MixedLabels`, and
returns a scalar. A subclass defines the loss of one image (`sample_loss`); what losses share is written once, here:
class weights, margins, log frequencies, the epoch from which re-weighting is in force, the second stream of
BatchFormer, mixed labels, and the precision (at least float32, also under autocast).
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.labels import MixedLabels, WholeBatch
from utils.class_counts import class_counts
from utils.dist import all_reduce_sum
from utils.errors import ConfigError

BETA = 0.9999  # of the effective number of samples, as in LDAM-DRW and RIDE
COUNTS_PATH = "loss.args.cls_num_list"


def effective_number_weights(counts: Tensor, beta: float = BETA) -> Tensor:
    """w_j = (1 - beta) / (1 - beta^n_j), scaled to the sum C (Cui et al., CVPR 2019). counts: [C], positive; -> [C]."""
    weights = (1 - beta) / -torch.expm1(counts * math.log(beta))
    return weights * (len(counts) / weights.sum())


def ldam_margins(counts: Tensor, max_m: float) -> Tensor:
    """m_j ~ n_j^(-1/4), scaled so that the largest is `max_m` (Cao et al., NeurIPS 2019). counts:
    [C], positive; -> [C]."""
    margins = counts.pow(-0.25)
    return margins * (max_m / margins.max())


def temperature_factors(counts: Tensor, reweight_factor: float) -> Tensor:
    """RIDE's distribution-aware temperature factors: d_j = C (n_j / n) f + 1 - f with f = `reweight_factor`, divided by
    the largest. counts: [C], 0 or more; -> [C] in (0, 1]. Raises ConfigError if one isn't positive."""
    factors = len(counts) * (counts / counts.sum()) * reweight_factor + 1 - reweight_factor
    if not bool((factors > 0).all()):
        raise ConfigError(f"loss.args.reweight_factor: {reweight_factor} makes a class's temperature negative; "
                          "use a smaller one (0.05 by default)")
    return factors / factors.max()


class LongTailLoss(nn.Module):
    """Base class of all losses. Subclasses define `sample_loss(z, target)` on plain logits z [M, C].

    Half-precision inputs are computed in float32; float64 stays float64. With `output_old` (BatchFormer, shared
    classifier, training) the loss is b · loss(after the block) + a · loss(before it), (b, a) = `outputs["bt_weights"]`,
    by default (1, 1). With `MixedLabels` it is weight · L(first) + (1 - weight) · L(second), each sample's term
    multiplied by its own weight; terms without labels (RIDE's diversity) count once. If the outputs are only a part of
    a batch, `outputs["whole"]` is the `WholeBatch`: class-weighted means are then divided by the sum of the whole
    batch's class weights.

    cls_num_list: training images per class, [C]. A class without images counts as the rarest that has some.
    Raises ConfigError for counts that are negative, all zero, or not as many as the logits have classes.
    """

    needs_counts = False
    uses_teacher = False
    reweight_epoch = -1

    def __init__(self, cls_num_list: list[float] | None = None):
        super().__init__()
        if cls_num_list is None and self.needs_counts:
            raise ConfigError(f"{COUNTS_PATH}: {type(self).__name__} needs the training images per class")
        self.counts = self.images = None     # the latter with the classes that have no image
        if cls_num_list is not None:
            self.counts = torch.tensor(class_counts(cls_num_list, COUNTS_PATH), dtype=torch.float64)
            self.images = torch.tensor(cls_num_list, dtype=torch.float64)
        self.epoch = 0
        self._tables: dict[tuple[str, tuple, torch.device, torch.dtype], Tensor] = {}

    def set_epoch(self, epoch: int) -> None:
        """Tell the loss which epoch (1, 2, ...) begins. Until the first call deferred re-weighting is off."""
        if int(epoch) != self.epoch:
            self._tables.clear()
        self.epoch = int(epoch)

    @property
    def reweighting(self) -> bool:
        """True from epoch `reweight_epoch` + 1 on; never with -1."""
        return self.reweight_epoch != -1 and self.epoch > self.reweight_epoch

    @property
    def weighted(self) -> bool:
        """Whether the mean over samples is currently weighted by class (see `class_weights`)."""
        return False

    def forward(self, outputs: Mapping[str, Any], target: Tensor | MixedLabels) -> Tensor:
        """outputs: the model's dict; target: [N] class indices. Returns a scalar, float32 or float64."""
        with torch.autocast(outputs["output"].device.type, enabled=False):
            whole = outputs.get("whole")
            after = self._stream(outputs, "output", "logits")
            loss = self.stream_loss(after, target, whole)
            if "output_old" not in outputs or self.evaluates(after):
                return loss
            weight_after, weight_before = outputs.get("bt_weights", (1, 1))
            before = self._stream(outputs, "output_old", "logits_old")
            return weight_after * loss + weight_before * self.stream_loss(before, target, whole)

    def _stream(self, outputs: Mapping[str, Any], output: str, logits: str) -> dict[str, Tensor]:
        stream = {"output": outputs.get(output), "logits": outputs.get(logits), "teacher": outputs.get("teacher"),
                  "feat": outputs.get("feat")}
        stream = {key: at_least_float32(value) for key, value in stream.items() if value is not None}
        classes = stream["output"].shape[-1]
        if self.counts is not None and len(self.counts) != classes:
            raise ConfigError(f"{COUNTS_PATH}: has {len(self.counts)} classes, the model's output {classes}")
        return stream

    def evaluates(self, stream: Mapping[str, Tensor]) -> bool:
        """Whether to compute the evaluation form of a loss whose training form differs. stream: see `stream_loss`."""
        return False

    def stream_loss(self, stream: Mapping[str, Tensor], target: Tensor | MixedLabels,
                    whole: WholeBatch | None = None) -> Tensor:
        """The loss of one stream: a dict with `output` [N, C] and perhaps `logits` [N, E, C], `teacher` [N, C] and
        `feat` [N, E, D], which is before BatchFormer in both streams."""
        return self.mean_loss(stream["output"], target, whole)

    def sample_loss(self, z: Tensor, target: Tensor) -> Tensor:
        """Each sample's loss, before class weights: logits z [M, C] and target [M] -> [M]."""
        raise NotImplementedError

    def mean_loss(self, z: Tensor, target: Tensor | MixedLabels, whole: WholeBatch | None = None) -> Tensor:
        """The mean of `sample_loss`, weighted by class if `weighted`. z: [N, C], or [N, E, C] for the mean over N · E
        rows; target: [N]."""
        if not isinstance(target, MixedLabels):
            return self._mean(z, target, None, whole and whole.labels, whole)
        rest = 1 - target.weight
        first, second = (None, None) if whole is None else (whole.labels.first, whole.labels.second)
        return (self._mean(z, target.first, target.weight, first, whole)
                + self._mean(z, target.second, rest, second, whole))

    def _mean(self, z: Tensor, target: Tensor, factor: Tensor | float | None, everyones: Tensor | None,
              whole: WholeBatch | None) -> Tensor:
        """The part of `mean_loss` for one of two mixed labels. factor: that label's weight, [N] or one for all; None:
        1. everyones: that label for the whole batch."""
        rows = z.shape[1] if z.dim() == 3 else 1
        labels = target.repeat_interleave(rows) if rows > 1 else target
        losses = self.sample_loss(z.flatten(0, 1) if z.dim() == 3 else z, labels)
        if isinstance(factor, Tensor) and factor.dim():
            losses = losses * factor.to(losses.dtype).repeat_interleave(rows)
            factor = None
        if self.weighted:
            table = self.table("class_weights", z)
            weights = table[labels]
            if whole is None:
                total = weights.sum()
            else:
                total = rows * all_reduce_sum(table[everyones].sum() * (whole.own > 0)) \
                    * (max(whole.here, 1) / whole.everywhere)
            loss = (losses * weights).sum() / total
        else:
            loss = losses.mean()
        return loss if factor is None else loss * factor

    def table(self, name: str, like: Tensor, *args: Any) -> Tensor:
        """The per-class values [..., C] that the method `name` returns for `args`, with the device and dtype of `like`.

        Computed once an epoch in float64 and cached per device and dtype, so that a loss never has to be moved to a
        device. The method may depend on `self.epoch`.
        """
        key = (name, args, like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = getattr(self, name)(*args).to(like.device, like.dtype)
        return self._tables[key]

    def class_weights(self) -> Tensor:
        """Each class's sample weight while `weighted`, from its effective number of images: float64 [C], sum C."""
        return effective_number_weights(self.counts)

    def log_frequencies(self) -> Tensor:
        """log(n_j / n), float64 [C]. A class without images has the rarest one's n_j, which n doesn't include."""
        return (self.counts / self.images.sum()).log()

    def added(self, num_experts: int = 1) -> Tensor | float:
        """What training adds to the logits and testing doesn't: [C], or [E, C] if experts differ; 0
        if nothing is added."""
        return 0.0

    def learned_prior(self, seen: Tensor, num_experts: int = 1, expert_weights: Tensor | None = None) -> Tensor:
        """The class prior that the plain logits imply at test time: `seen`, the class frequencies drawn in training,
        times the class weights now in force, divided by exp(`added`). Margins are ignored.

        seen: shares [C], sum 1; returns the same in float64. num_experts: number of experts that were trained.
        expert_weights: the weight of each in the test logits, [E], sum 1; None: the logits are averaged.
        """
        added = torch.as_tensor(self.added(num_experts), dtype=torch.float64)
        if added.dim() == 2:
            added = added.mean(0) if expert_weights is None else expert_weights.double() @ added
        log = seen.double().log() - added
        if self.weighted:
            log = log + self.class_weights().log()
        return log.softmax(0)


def cross_entropies(z: Tensor, target: Tensor) -> Tensor:
    """Each sample's cross-entropy: [M, C], [M] -> [M]."""
    return F.cross_entropy(z, target, reduction="none")


def plain_loss(z: Tensor, target: Tensor | MixedLabels) -> Tensor:
    """Mean cross-entropy of logits [N, C] and labels [N] or mixed ones: the evaluation form of the experts' losses."""
    if not isinstance(target, MixedLabels):
        return F.cross_entropy(z, target)
    first, second = (cross_entropies(z, labels) for labels in (target.first, target.second))
    return (target.weight * first + (1 - target.weight) * second).mean()


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def finite(value: float, name: str) -> float:
    """The argument `name` of a loss as a float. Raises ConfigError for infinity and NaN."""
    if not math.isfinite(value):
        raise ConfigError(f"loss.args.{name}: must be a finite number, not {value}")
    return float(value)


def not_negative(value: float, name: str) -> float:
    """The argument `name` of a loss as a float. Raises ConfigError for infinity, NaN and negative numbers."""
    if not (value >= 0 and math.isfinite(value)):
        raise ConfigError(f"loss.args.{name}: must be 0 or more, not {value}")
    return float(value)


def epoch_or_never(epoch: int) -> int:
    """`reweight_epoch` as an int: an epoch, or -1 for never. Raises ConfigError for anything below -1."""
    if epoch < -1:
        raise ConfigError(f"loss.args.reweight_epoch: must be an epoch, or -1 for never, not {epoch}")
    return int(epoch)
