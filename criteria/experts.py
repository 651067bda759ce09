"""Losses for several experts: one loss per expert, RIDE's diversity term, distillation, and per-expert offsets."""
from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from base.labels import MixedLabels, WholeBatch
from criteria.base import LongTailLoss, cross_entropies, finite, plain_loss, temperature_factors
from criteria.plain import BalancedSoftmaxLoss, LDAMLoss
from utils.errors import ConfigError


class PerExpert(LongTailLoss):
    """RIDE's scheme (Wang et al., ICLR 2021) for any base loss: the sum of each expert's base loss and a diversity
    term. A mixin: put it before a `LongTailLoss` among the bases.

    In evaluation (`criterion.eval()`, or outputs without `logits`) it is the cross-entropy of `output`.
    The base loss is called once for all experts: their logits [N, E, C] become N · E rows, and the mean over these,
    times E, is the sum over experts of each expert's mean.
    """

    base_loss_factor = 1.0
    additional_diversity_factor = 0.0
    base_diversity_temperature = 1.0
    collaborative = False

    def evaluates(self, stream: Mapping[str, Tensor]) -> bool:
        return not self.training or "logits" not in stream

    def stream_loss(self, stream: Mapping[str, Tensor], target: Tensor | MixedLabels,
                    whole: WholeBatch | None = None) -> Tensor:
        mean = stream["output"]
        if self.evaluates(stream):
            return plain_loss(mean, target)
        experts = stream["logits"]
        num_experts = experts.shape[1]
        base = self.mean_loss(mean if self.collaborative else experts, target, whole)
        loss = self.base_loss_factor * num_experts * base
        if self.additional_diversity_factor:
            loss = loss + self.additional_diversity_factor * self.diversity(experts, mean)
        return loss

    def temperature_factors(self) -> Tensor | None:
        """What each class's temperature is multiplied by while re-weighting is in force, [C]."""
        return None

    def diversity(self, experts: Tensor, mean: Tensor) -> Tensor:
        """T̄² times the sum over experts of KL(softmax(mean / T) ‖ softmax(expert / T)), averaged over samples. No
        gradient flows through the mean.

        experts: [N, E, C]; mean: [N, C]. T is one number, or one per class once re-weighting is in
        force; T̄ is its mean.
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
        """The argument `name` of a loss as a float. Raises ConfigError unless it is positive and finite."""
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"loss.args.{name}: must be positive, not {value}")
        return float(value)


class RIDELoss(PerExpert, LDAMLoss):
    """RIDE (Wang et al., ICLR 2021), the sum over experts i of

        base_loss_factor · LDAM-DRW(z_i, y) + additional_diversity_factor · T̄² · KL(softmax(z̄ / T) ‖ softmax(z_i / T))

    with z̄ = `output`. T_j = `base_diversity_temperature`, multiplied from epoch `reweight_epoch` + 1 on by the
    distribution-aware d_j = C n_j / n · `reweight_factor` + 1 - `reweight_factor`, divided by the largest d_j.
    `collaborative`: every expert's base loss is computed on z̄; by default only if the diversity factor is 0, as in
    RIDE. `reweight` False is the same as `reweight_epoch` -1. Without class counts the base loss is cross-entropy and T
    is the same for all classes. Raises ConfigError for values out of range.
    """

    def __init__(self, cls_num_list: list[float] | None = None, base_diversity_temperature: float = 1.0,
                 max_m: float = 0.5, s: float = 30, reweight: bool = True, reweight_epoch: int = -1,
                 base_loss_factor: float = 1.0, additional_diversity_factor: float = -0.2,
                 reweight_factor: float = 0.05, collaborative: bool | None = None):
        super().__init__(cls_num_list, max_m, s, reweight_epoch if reweight else -1)
        self.base_diversity_temperature = self.check_temperature(base_diversity_temperature,
                                                                 "base_diversity_temperature")
        self.base_loss_factor = finite(base_loss_factor, "base_loss_factor")
        self.additional_diversity_factor = finite(additional_diversity_factor, "additional_diversity_factor")
        self.reweight_factor = finite(reweight_factor, "reweight_factor")
        self.collaborative = self.additional_diversity_factor == 0 if collaborative is None else bool(collaborative)
        if self.counts is not None:
            self.temperature_factors()  # an unusable factor is reported now, not after 160 epochs

    def temperature_factors(self) -> Tensor:
        return temperature_factors(self.images, self.reweight_factor)


class RIDELossWithDistill(RIDELoss):
    """RIDE plus distillation: `ride_loss_factor` · RIDE + `additional_distill_loss_factor` · T² · KL.

    The KL divergence is that from softmax(output / T) to softmax(teacher / T), KL(teacher ‖ output), with T =
    `distill_temperature`; it is one term on the mean logits, not one per expert. `outputs["teacher"]` [N, C]
    are the teacher's logits, which get no gradient; without them training raises ConfigError. The other
    arguments are RIDELoss's.
    """

    uses_teacher = True

    def __init__(self, cls_num_list: list[float] | None = None, additional_distill_loss_factor: float = 1.0,
                 distill_temperature: float = 1.0, ride_loss_factor: float = 1.0,
                 base_diversity_temperature: float = 1.0, max_m: float = 0.5, s: float = 30, reweight: bool = True,
                 reweight_epoch: int = -1, base_loss_factor: float = 1.0, additional_diversity_factor: float = -0.2,
                 reweight_factor: float = 0.05, collaborative: bool | None = None):
        super().__init__(cls_num_list, base_diversity_temperature, max_m, s, reweight, reweight_epoch,
                         base_loss_factor, additional_diversity_factor, reweight_factor, collaborative)
        self.additional_distill_loss_factor = finite(additional_distill_loss_factor, "additional_distill_loss_factor")
        self.distill_temperature = self.check_temperature(distill_temperature, "distill_temperature")
        self.ride_loss_factor = finite(ride_loss_factor, "ride_loss_factor")

    def stream_loss(self, stream: Mapping[str, Tensor], target: Tensor | MixedLabels,
                    whole: WholeBatch | None = None) -> Tensor:
        ride = super().stream_loss(stream, target, whole)
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
    """Balanced softmax per expert plus RIDE's diversity term, one temperature for all classes; as
    in NBN's repository."""

    def __init__(self, cls_num_list: list[float] | None = None, base_diversity_temperature: float = 1.0,
                 additional_diversity_factor: float = -0.2):
        super().__init__(cls_num_list)
        self.base_diversity_temperature = self.check_temperature(base_diversity_temperature,
                                                                 "base_diversity_temperature")
        self.additional_diversity_factor = finite(additional_diversity_factor, "additional_diversity_factor")


class ShiftedExperts(LongTailLoss):
    """Cross-entropy of each expert's logits plus a per-expert, per-class offset: each expert is trained for another
    class distribution, and at test time their mean logits are used without offsets.

    In evaluation it is the cross-entropy of `output`.
    """

    needs_counts = True
    sums = False    # whether the loss is the sum over experts rather than their mean

    def evaluates(self, stream: Mapping[str, Tensor]) -> bool:
        return not self.training or "logits" not in stream

    def offsets(self, num_experts: int) -> Tensor:
        """What is added to each expert's logits, float64 [E, C]. Raises ConfigError for a wrong number of experts."""
        raise NotImplementedError

    def added(self, num_experts: int = 1) -> Tensor:
        return self.offsets(num_experts)

    def stream_loss(self, stream: Mapping[str, Tensor], target: Tensor | MixedLabels,
                    whole: WholeBatch | None = None) -> Tensor:
        if self.evaluates(stream):
            return plain_loss(stream["output"], target)
        experts = stream["logits"]
        loss = self.mean_loss(experts + self.table("offsets", experts, experts.shape[1]), target, whole)
        return loss * experts.shape[1] if self.sums else loss

    def sample_loss(self, z: Tensor, target: Tensor) -> Tensor:
        return cross_entropies(z, target)


class BalPoELoss(ShiftedExperts):
    """Balanced product of experts: the mean over experts e of the cross-entropy of z_e + tau_e · log(n_j / n) (Aimar
    et al., CVPR 2023).

    taus: the strength of each expert's offset, [E]; by default equally spaced from 0 to 2 (one expert: 1), so that
    their mean is 1 and the mean logits are balanced. Raises ConfigError if there aren't as many as experts.
    """

    def __init__(self, cls_num_list: list[float] | None = None, taus: list[float] | None = None):
        super().__init__(cls_num_list)
        if taus is not None and not taus:
            raise ConfigError("loss.args.taus: must be a list of numbers, one an expert, not []")
        self.taus = None if taus is None else [finite(tau, "taus") for tau in taus]

    def offsets(self, num_experts: int) -> Tensor:
        taus = self.taus
        if taus is None:
            taus = [1.0] if num_experts == 1 else [2 * e / (num_experts - 1) for e in range(num_experts)]
        if len(taus) != num_experts:
            raise ConfigError(f"loss.args.taus: has {len(taus)} numbers, the model {num_experts} experts")
        return torch.tensor(taus, dtype=torch.float64)[:, None] * self.log_frequencies()


class SADELoss(ShiftedExperts):
    """Three experts, for long-tailed, uniform and inversely long-tailed test data (SADE; Zhang et al., NeurIPS 2022).

    The sum of the cross-entropies of z_1, z_2 + log pi and z_3 + log pi - tau · log pi', with pi the class
    frequencies and pi' these in reverse order: the rarest class gets the most frequent one's. Raises ConfigError
    unless there are 3 experts.
    """

    sums = True

    def __init__(self, cls_num_list: list[float] | None = None, tau: float = 2.0):
        super().__init__(cls_num_list)
        self.tau = finite(tau, "tau")

    def offsets(self, num_experts: int) -> Tensor:
        if num_experts != 3:
            raise ConfigError(f"loss.type: SADELoss is for 3 experts, the model has {num_experts}; set "
                              "arch.args.num_experts 3")
        logs = self.log_frequencies()
        order = self.counts.argsort(stable=True)
        inverse = torch.empty_like(logs)
        inverse[order] = logs[order.flip(0)]
        return torch.stack([torch.zeros_like(logs), logs, logs - self.tau * inverse])
