"""The losses of long-tailed recognition, each on the model's dict of outputs and the labels.

Every loss takes `criterion(outputs, target)` with `outputs["output"]` [N, C] (the experts' mean logits),
`outputs["logits"]` [N, E, C] where experts are trained one by one, and `target` [N] class indices, and returns a
scalar. What they share is written once: class weights, margins, log frequencies, the epoch from which re-weighting
is in force, the second stream of BatchFormer, and the arithmetic (float32 at least, whatever autocast says).
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.mixed_labels import MixedLabels  # noqa: F401  offered here: a public name of this module
from utils.class_counts import class_counts
from utils.config.build import build
from utils.dist import all_reduce_sum
from utils.errors import ConfigError

BETA = 0.9999  # of the effective number of samples, as in LDAM-DRW and RIDE
COUNTS_PATH = "loss.args.cls_num_list"


def effective_number_weights(counts: Tensor, beta: float = BETA) -> Tensor:
    """w_j = (1 - beta) / (1 - beta^n_j), scaled to sum C (Cui et al., CVPR 2019). counts: [C], positive; -> [C]."""
    weights = (1 - beta) / -torch.expm1(counts * math.log(beta))
    return weights * (len(counts) / weights.sum())


def ldam_margins(counts: Tensor, max_m: float) -> Tensor:
    """m_j ~ n_j^(-1/4), the largest being `max_m` (Cao et al., NeurIPS 2019). counts: [C], positive; -> [C]."""
    margins = counts.pow(-0.25)
    return margins * (max_m / margins.max())


def temperature_factors(counts: Tensor, reweight_factor: float) -> Tensor:
    """RIDE's distribution-aware d_j = C n_j / n f + 1 - f over its maximum. counts: [C]; -> [C] in (0, 1]."""
    factors = len(counts) * (counts / counts.sum()) * reweight_factor + 1 - reweight_factor
    if not bool((factors > 0).all()):
        raise ConfigError(f"loss.args.reweight_factor: {reweight_factor} makes a class's temperature negative; "
                          "use a smaller one (0.05 by default)")
    return factors / factors.max()


class LongTailLoss(nn.Module):
    """Base of all losses: one stream's loss is `stream_loss`, the rest happens here.

    Subclasses define `base_loss(z, target)` on plain logits z [M, C]. Inputs in half precision are computed in
    float32, float64 stays float64. With `output_old` (BatchFormer, shared classifier, training) the loss is
    b · loss(after the block) + a · loss(before it), (b, a) = `outputs["bt_weights"]`, (1, 1) where absent.

    cls_num_list: training images per class, [C]. A class without images counts as the rarest that has some.
    Raises ConfigError for counts that are negative, all zero, or not as many as the logits have classes.
    """

    needs_counts = False
    reweight_epoch = -1

    def __init__(self, cls_num_list: list | None = None):
        super().__init__()
        if cls_num_list is None and self.needs_counts:
            raise ConfigError(f"{COUNTS_PATH}: {type(self).__name__} needs the training images per class")
        self.counts = None
        if cls_num_list is not None:
            self.counts = torch.tensor(class_counts(cls_num_list, COUNTS_PATH), dtype=torch.float64)
        self.epoch = 0
        # (samples on this rank, samples on all ranks) of the batch, told by a data-parallel loop that scales each
        # rank's loss by its share; weighted means then have the weights of the whole batch below the line.
        self.share: tuple[int, int] | None = None
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def set_epoch(self, epoch: int) -> None:
        """Tell the loss which epoch (1, 2, ...) begins. Before any call nothing deferred is in force."""
        self.epoch = int(epoch)

    @property
    def reweighting(self) -> bool:
        """True from epoch `reweight_epoch` + 1 on; never with -1."""
        return self.reweight_epoch != -1 and self.epoch > self.reweight_epoch

    def forward(self, outputs: Mapping[str, Any], target: Tensor) -> Tensor:
        """outputs: the model's dict; target: [N] class indices. Returns a scalar, float32 or float64."""
        with torch.autocast(outputs["output"].device.type, enabled=False):
            after = self._stream(outputs, "output", "logits")
            loss = self.stream_loss(after, target)
            if "output_old" not in outputs or self.evaluates(after):
                return loss
            weight_after, weight_before = outputs.get("bt_weights", (1, 1))
            before = self._stream(outputs, "output_old", "logits_old")
            return weight_after * loss + weight_before * self.stream_loss(before, target)

    def _stream(self, outputs: Mapping[str, Any], output: str, logits: str) -> dict[str, Tensor]:
        stream = {"output": outputs.get(output), "logits": outputs.get(logits), "teacher": outputs.get("teacher")}
        stream = {key: at_least_float32(value) for key, value in stream.items() if value is not None}
        classes = stream["output"].shape[-1]
        if self.counts is not None and len(self.counts) != classes:
            raise ConfigError(f"{COUNTS_PATH}: has {len(self.counts)} classes, the model's output {classes}")
        return stream

    def evaluates(self, stream: Mapping[str, Tensor]) -> bool:
        """Whether this call is an evaluation for a loss that is another one in training."""
        return False

    def stream_loss(self, stream: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """The loss of one stream: a dict with `output` [N, C] and perhaps `logits` [N, E, C], `teacher` [N, C]."""
        return self.base_loss(stream["output"], target)

    def base_loss(self, z: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of logits z [M, C] and target [M]."""
        raise NotImplementedError

    def table(self, name: str, like: Tensor) -> Tensor:
        """The per-class values [C] that the method `name` gives, on the device and in the dtype of `like`.

        Worked out in float64 once and kept per device and dtype, so no loss need be moved to its inputs.
        """
        key = (name, like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = getattr(self, name)().to(like.device, like.dtype)
        return self._tables[key]

    def class_weights(self) -> Tensor:
        return effective_number_weights(self.counts)

    def log_frequencies(self) -> Tensor:
        return (self.counts / self.counts.sum()).log()

    def cross_entropy(self, z: Tensor, target: Tensor, weighted: bool = False) -> Tensor:
        """Mean cross-entropy of z [M, C], or the mean weighted by the effective-number weight of each target."""
        if not weighted:
            return F.cross_entropy(z, target)
        weights = self.table("class_weights", z)
        if self.share is None:
            return F.cross_entropy(z, target, weight=weights)
        here, everywhere = self.share
        total = weights[target].sum() * (here > 0)  # a rank without a sample repeats one, which doesn't count
        total = all_reduce_sum(total.detach().clone()) * (max(here, 1) / everywhere)
        return F.cross_entropy(z, target, weight=weights, reduction="sum") / total


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class CrossEntropyLoss(LongTailLoss):
    """Cross-entropy; with `reweight_CE` weighted by effective number from the first epoch on (Cui et al. 2019)."""

    def __init__(self, cls_num_list: list | None = None, reweight_CE: bool = False):
        self.needs_counts = bool(reweight_CE)
        super().__init__(cls_num_list)
        self.reweight_CE = bool(reweight_CE)

    def base_loss(self, z: Tensor, target: Tensor) -> Tensor:
        return self.cross_entropy(z, target, weighted=self.reweight_CE)


class FocalLoss(LongTailLoss):
    """Mean of (1 - p)^gamma · w_y · CE, p the target's probability (Lin et al., ICCV 2017).

    gamma: >= 0; the default 0, as in LDAM-DRW and RIDE, is plain cross-entropy. weight: a factor per class, or None.
    """

    def __init__(self, cls_num_list: list | None = None, weight: list | None = None, gamma: float = 0.0):
        super().__init__(cls_num_list)
        self.gamma = not_negative(gamma, "gamma")
        self.weight = None if weight is None else torch.tensor([not_negative(w, "weight") for w in weight],
                                                               dtype=torch.float64)

    def focal_weights(self) -> Tensor:
        return self.weight

    def base_loss(self, z: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(z, target, reduction="none")
        # 1 - p by expm1 is exact for p near 1; the clamp keeps the gradient of its power finite at p = 1.
        loss = (-torch.expm1(-loss)).clamp_min(torch.finfo(z.dtype).eps).pow(self.gamma) * loss
        if self.weight is not None:
            loss = loss * self.table("focal_weights", z)[target]
        return loss.mean()


class LDAMLoss(LongTailLoss):
    """LDAM with deferred re-weighting (Cao et al., NeurIPS 2019).

    The target's logit loses s · m_y, m_j ~ n_j^(-1/4) with maximum `max_m`; then cross-entropy, weighted by effective
    number from epoch `reweight_epoch` + 1 (-1: never). The logits are already scaled by the head's own s. Without
    class counts: plain cross-entropy.
    """

    def __init__(self, cls_num_list: list | None = None, max_m: float = 0.5, s: float = 30, reweight_epoch: int = -1):
        super().__init__(cls_num_list)
        if not s > 0:
            raise ConfigError(f"loss.args.s: must be positive, not {s}")
        self.max_m, self.s = not_negative(max_m, "max_m"), float(s)
        self.reweight_epoch = epoch_or_never(reweight_epoch)

    def scaled_margins(self) -> Tensor:
        return self.s * ldam_margins(self.counts, self.max_m)

    def base_loss(self, z: Tensor, target: Tensor) -> Tensor:
        if self.counts is None:
            return self.cross_entropy(z, target)
        margins = self.table("scaled_margins", z)[target]
        z = z.scatter_add(1, target[:, None], -margins[:, None])
        return self.cross_entropy(z, target, weighted=self.reweighting)


class BalancedSoftmaxLoss(LongTailLoss):
    """Cross-entropy of z + log n_j (Ren et al., NeurIPS 2020)."""

    needs_counts = True

    def __init__(self, cls_num_list: list | None = None):
        super().__init__(cls_num_list)

    def base_loss(self, z: Tensor, target: Tensor) -> Tensor:
        return self.cross_entropy(z + self.table("log_frequencies", z), target)


class LogitAdjustmentLoss(LongTailLoss):
    """Cross-entropy of z + tau · log(n_j / n) (Menon et al., ICLR 2021). `model.posthoc` has the post-hoc form."""

    needs_counts = True

    def __init__(self, cls_num_list: list | None = None, tau: float = 1.0):
        super().__init__(cls_num_list)
        self.tau = finite(tau, "tau")

    def base_loss(self, z: Tensor, target: Tensor) -> Tensor:
        return self.cross_entropy(z + self.tau * self.table("log_frequencies", z), target)


class LabelSmoothingLoss(LongTailLoss):
    """Cross-entropy against (1 - smoothing) · one-hot + smoothing / C (Szegedy et al., CVPR 2016)."""

    def __init__(self, cls_num_list: list | None = None, smoothing: float = 0.1):
        super().__init__(cls_num_list)
        if not 0 <= smoothing <= 1:
            raise ConfigError(f"loss.args.smoothing: must be from 0 to 1, not {smoothing}")
        self.smoothing = float(smoothing)

    def base_loss(self, z: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(z, target, label_smoothing=self.smoothing)


class HCMLoss(LongTailLoss):
    """Hard category mining (Li et al., CVPR 2022, as NBN uses it): balanced softmax twice.

    The second time only the `HCM_N` largest logits, the target among them in any case, keep their value (with the log
    frequency log(n_j / n) added); the others count as 0. Fewer classes than `HCM_N`: all keep theirs.
    """

    needs_counts = True

    def __init__(self, cls_num_list: list | None = None, HCM_N: int = 300):
        super().__init__(cls_num_list)
        if HCM_N < 1:
            raise ConfigError(f"loss.args.HCM_N: must be 1 or more, not {HCM_N}")
        self.HCM_N = int(HCM_N)

    def base_loss(self, z: Tensor, target: Tensor) -> Tensor:
        balanced = z + self.table("log_frequencies", z)
        # The hardest are picked by the raw logits, before the frequencies come in.
        ranked = z.detach().scatter(1, target[:, None], math.inf)
        hard = ranked.topk(min(self.HCM_N, z.shape[1]), dim=1).indices
        mined = torch.zeros_like(balanced).scatter(1, hard, balanced.gather(1, hard))
        return self.cross_entropy(balanced, target) + self.cross_entropy(mined, target)


class PerExpert(LongTailLoss):
    """RIDE's frame (Wang et al., ICLR 2021) around another loss: each expert's own base loss and a diversity term.

    Outside training (`criterion.eval()`, or outputs without `logits`) it is cross-entropy of `output`.
    All experts go through one call: their logits [N, E, C] are N · E rows for the base loss, whose mean, times E, is
    the sum over experts of the experts' means.
    """

    base_loss_factor = 1.0
    additional_diversity_factor = 0.0
    base_diversity_temperature = 1.0
    collaborative = False

    def evaluates(self, stream: Mapping[str, Tensor]) -> bool:
        return not self.training or "logits" not in stream

    def stream_loss(self, stream: Mapping[str, Tensor], target: Tensor) -> Tensor:
        mean = stream["output"]
        if self.evaluates(stream):
            return F.cross_entropy(mean, target)
        experts = stream["logits"]
        num_experts = experts.shape[1]
        if self.collaborative:
            base = self.base_loss(mean, target)
        else:
            base = self.base_loss(experts.flatten(0, 1), target.repeat_interleave(num_experts))
        loss = self.base_loss_factor * num_experts * base
        if self.additional_diversity_factor:
            loss = loss + self.additional_diversity_factor * self.diversity(experts, mean)
        return loss

    def temperature_factors(self) -> Tensor | None:
        """What a class's temperature is multiplied by while re-weighting is in force, [C]."""
        return None

    def diversity(self, experts: Tensor, mean: Tensor) -> Tensor:
        """Sum over experts of T̄² · KL(softmax(mean / T) ‖ softmax(expert / T)) per sample; the mean has no gradient.

        experts: [N, E, C]; mean: [N, C]. T is one number, or one a class once re-weighting is in force; T̄ its mean.
        """
        temperature: float | Tensor = self.base_diversity_temperature
        mean_temperature: float | Tensor = temperature
        if self.reweighting and self.counts is not None:
            temperature = temperature * self.table("temperature_factors", experts)
            mean_temperature = temperature.mean()
        expert_log = F.log_softmax(experts / temperature, dim=2)
        mean_log = F.log_softmax(mean.detach() / temperature, dim=1)[:, None].expand_as(expert_log)
        divergence = F.kl_div(expert_log, mean_log, reduction="sum", log_target=True) / experts.shape[0]
        return mean_temperature**2 * divergence

    @staticmethod
    def check_temperature(value: float, name: str) -> float:
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"loss.args.{name}: must be positive, not {value}")
        return float(value)


class RIDELoss(PerExpert, LDAMLoss):
    """RIDE (Wang et al., ICLR 2021), the sum over experts i of

        base_loss_factor · LDAM-DRW(z_i, y) + additional_diversity_factor · T̄² · KL(softmax(z̄ / T) ‖ softmax(z_i / T))

    with z̄ = `output`. T_j = `base_diversity_temperature`, from epoch `reweight_epoch` + 1 times the distribution-aware
    d_j = (C n_j / n · `reweight_factor` + 1 - `reweight_factor`) / max. `collaborative` takes the base loss on z̄ for
    every expert; left out, it is so where the diversity factor is 0, as in RIDE. `reweight` false is `reweight_epoch`
    -1. Without class counts the base loss is cross-entropy and the temperature one number.
    """

    def __init__(self, cls_num_list: list | None = None, base_diversity_temperature: float = 1.0, max_m: float = 0.5,
                 s: float = 30, reweight: bool = True, reweight_epoch: int = -1, base_loss_factor: float = 1.0,
                 additional_diversity_factor: float = -0.2, reweight_factor: float = 0.05,
                 collaborative: bool | None = None):
        super().__init__(cls_num_list, max_m, s, reweight_epoch if reweight else -1)
        self.base_diversity_temperature = self.check_temperature(base_diversity_temperature,
                                                                 "base_diversity_temperature")
        self.base_loss_factor = finite(base_loss_factor, "base_loss_factor")
        self.additional_diversity_factor = finite(additional_diversity_factor, "additional_diversity_factor")
        self.reweight_factor = finite(reweight_factor, "reweight_factor")
        self.collaborative = self.additional_diversity_factor == 0 if collaborative is None else bool(collaborative)
        if self.counts is not None:
            self.temperature_factors()  # a factor that can't be used is said now, not after 160 epochs

    def temperature_factors(self) -> Tensor:
        return temperature_factors(self.counts, self.reweight_factor)


class RIDELossWithDistill(RIDELoss):
    """A RIDE term plus a distillation term: `ride_loss_factor` · RIDE + `additional_distill_loss_factor` · T² · KL,

    KL from softmax(teacher / T) to softmax(output / T), T = `distill_temperature`. `outputs["teacher"]` [N, C] are the
    teacher's logits, which get no gradient. One term of each kind. The other arguments are RIDELoss's.
    """

    def __init__(self, cls_num_list: list | None = None, additional_distill_loss_factor: float = 1.0,
                 distill_temperature: float = 1.0, ride_loss_factor: float = 1.0,
                 base_diversity_temperature: float = 1.0, max_m: float = 0.5, s: float = 30, reweight: bool = True,
                 reweight_epoch: int = -1, base_loss_factor: float = 1.0, additional_diversity_factor: float = -0.2,
                 reweight_factor: float = 0.05, collaborative: bool | None = None):
        super().__init__(cls_num_list, base_diversity_temperature, max_m, s, reweight, reweight_epoch,
                         base_loss_factor, additional_diversity_factor, reweight_factor, collaborative)
        self.additional_distill_loss_factor = finite(additional_distill_loss_factor, "additional_distill_loss_factor")
        self.distill_temperature = self.check_temperature(distill_temperature, "distill_temperature")
        self.ride_loss_factor = finite(ride_loss_factor, "ride_loss_factor")

    def stream_loss(self, stream: Mapping[str, Tensor], target: Tensor) -> Tensor:
        ride = super().stream_loss(stream, target)
        if self.evaluates(stream):
            return ride
        if "teacher" not in stream:
            raise ConfigError("loss.type: RIDELossWithDistill needs the teacher's logits in outputs['teacher']; "
                              "set distill, distill_arch and distill_checkpoint")
        student = F.log_softmax(stream["output"] / self.distill_temperature, dim=1)
        teacher = F.log_softmax(stream["teacher"].detach() / self.distill_temperature, dim=1)
        distill = self.distill_temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return self.ride_loss_factor * ride + self.additional_distill_loss_factor * distill


class RIDEBalancedSoftmaxLoss(PerExpert, BalancedSoftmaxLoss):
    """Balanced softmax per expert plus RIDE's diversity term at one temperature, as in NBN's repository."""

    def __init__(self, cls_num_list: list | None = None, base_diversity_temperature: float = 1.0,
                 additional_diversity_factor: float = -0.2):
        super().__init__(cls_num_list)
        self.base_diversity_temperature = self.check_temperature(base_diversity_temperature,
                                                                 "base_diversity_temperature")
        self.additional_diversity_factor = finite(additional_diversity_factor, "additional_diversity_factor")


def finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise ConfigError(f"loss.args.{name}: must be a finite number, not {value}")
    return float(value)


def not_negative(value: float, name: str) -> float:
    if not (value >= 0 and math.isfinite(value)):
        raise ConfigError(f"loss.args.{name}: must be 0 or more, not {value}")
    return float(value)


def epoch_or_never(epoch: int) -> int:
    if epoch < -1:
        raise ConfigError(f"loss.args.reweight_epoch: must be an epoch, or -1 for never, not {epoch}")
    return int(epoch)


LOSSES: dict[str, type[LongTailLoss]] = {loss.__name__: loss for loss in (
    CrossEntropyLoss, FocalLoss, LDAMLoss, RIDELoss, RIDELossWithDistill, BalancedSoftmaxLoss,
    RIDEBalancedSoftmaxLoss, HCMLoss, LogitAdjustmentLoss, LabelSmoothingLoss)}


def build_loss(spec: Mapping[str, Any], cls_num_list: list | None = None, path: str = "loss",
               **extra: Any) -> LongTailLoss:
    """The loss that a config's `{"type": NAME, "args": {...}}` names; `extra` goes to constructors that take it.

    cls_num_list: the training data's images per class; the spec's own list, if it has one, goes before it.

    Raises ConfigError, with `path`, for an unknown type, an unknown argument or a value out of range.
    """
    if cls_num_list is not None and "cls_num_list" not in (spec.get("args") or {}):
        extra["cls_num_list"] = list(cls_num_list)
    return build(LOSSES, spec, path, **extra)
