"""Expert assignment, RIDE's second stage: which images need another expert (Wang et al., ICLR 2021, section 3.3)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.experts import ExpertNet
from model.norm.kernels import wide_type
from model.resnet import ResNet
from utils.errors import ConfigError

HIDDEN = 16
GATES = "expert_help_pred"


class Routed(ExpertNet):
    """Mixin, listed before a network of experts among a class's bases: experts run one after another, and a gate
    decides for each image whether to stop.

    Gate i < E takes expert i's unit-length features (linear to 16, ReLU) and the `top_choices_num` highest logits
    of the mean over experts 1..i, and gives one logit for "another expert would help".

    Training: only the gates learn; everything else is frozen and in evaluation mode (`force_all`: everything learns,
    except the last expert, which no gate sees: its gradients are 0, and only weight decay changes it). Given `target`
    `[N]` the dict adds `loss`, the mean over gates of the binary cross-entropy with positive weight `pos_weight`; the
    target is 1 where the mean so far is wrong and the mean after some later expert is right. `output` `[N, C]` is the
    mean over all experts.

    Evaluation: an image goes on to the next expert while sigmoid(gate) > `route_threshold`. The dict has `output`
    `[N, C]`, its mean over the experts it used, and `sample_num_experts` `[N]`. With `route = False` all experts run
    for all images and `logits` `[N, E, C]` and `feat` `[N, E, D]` are included; `output` and `sample_num_experts`
    still follow the gates' decisions. `force_all`: every image uses every expert.

    A BatchFormer block (`add_bt`) exists only so that the first stage's weights load; it is never run.
    """

    def __init__(self, *, top_choices_num: int = 5, pos_weight: float = 20.0, share_expert_help_pred_fc: bool = True,
                 force_all: bool = False, route_threshold: float = 0.5, num_classes: int, **network: object):
        for key, value, ok, right in (
                ("top_choices_num", top_choices_num, top_choices_num >= 1, "1 or more"),
                ("pos_weight", pos_weight, pos_weight > 0, "above 0"),
                ("route_threshold", route_threshold, 0 <= route_threshold <= 1, "from 0 to 1")):
            if not ok:
                raise ConfigError(f"arch.args.{key}: {value} should be {right}")
        super().__init__(num_classes=num_classes, **network)
        self.top_choices_num = min(top_choices_num, num_classes)
        self.pos_weight, self.force_all, self.route_threshold = pos_weight, force_all, route_threshold
        self.route = True

        gates = self.num_experts - 1
        self.expert_help_pred_hidden_fcs = nn.ModuleList(nn.Linear(self.feat_dim, HIDDEN) for _ in range(gates))
        self.init(self.expert_help_pred_hidden_fcs)
        last = nn.ModuleList(nn.Linear(self.top_choices_num + HIDDEN, 1)
                             for _ in range(1 if share_expert_help_pred_fc else gates))
        self.init(last)
        if share_expert_help_pred_fc:
            self.expert_help_pred_fc = last[0]
        else:
            self.expert_help_pred_fcs = last
        self.freeze_experts()

    def freeze_experts(self) -> None:
        """Let only the gates learn (with `force_all`: everything but BatchFormer, which isn't run here)."""
        for name, parameter in self.named_parameters():
            block = name.startswith("encoder_layers.")
            parameter.requires_grad_(not block if self.force_all else name.startswith(GATES))
        self.train(self.training)

    def train(self, mode: bool = True) -> Routed:
        """Training mode for the gates; the experts stay in evaluation mode unless `force_all`."""
        super().train(mode)
        if not self.force_all:
            for name, child in self.named_children():
                if not name.startswith(GATES):
                    child.eval()
        return self

    def ask(self, i: int, feat: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Gate i (from 0): expert i's features `[N, D]` and the mean logits of experts 0..i `[N, C]` -> logits `[N]`
        of "another expert would help"."""
        hidden = F.relu(self.expert_help_pred_hidden_fcs[i](F.normalize(feat, dim=1)))
        seen = torch.cat([logits.topk(self.top_choices_num, dim=1).values.to(hidden.dtype), hidden], dim=1)
        return self.gates[i % len(self.gates)](seen).squeeze(1)

    @property
    def gates(self) -> list[nn.Linear]:
        """The last linear layer of each gate, or the single one that all gates share."""
        return list(self.expert_help_pred_fcs) if hasattr(self, "expert_help_pred_fcs") else [self.expert_help_pred_fc]

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        if not self.training and self.route and not self.force_all:
            return self._routed(x)
        return self._decide(*self._all_experts(x), target)

    def from_features(self, feats: torch.Tensor, target: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The dict that `forward` returns, from pooled features `[N, E, D]` of all experts."""
        outputs = self._decide(*self._judge(self.dropout(feats)), target)
        if self.training or not self.route or self.force_all:
            return outputs
        return {key: outputs[key] for key in ("output", "sample_num_experts")}   # the same keys as `_routed`

    def _decide(self, outputs: dict[str, torch.Tensor], means: torch.Tensor,
                target: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Add the gates' results to `outputs` of all experts; means: the running means of the logits `[N, E, C]`."""
        if not self.training:
            used = self._used(outputs["feat"], means)
            outputs["output"] = means[torch.arange(means.shape[0], device=means.device), used - 1]
            outputs["sample_num_experts"] = used
        elif target is not None:
            outputs["loss"] = self._loss(outputs["feat"], means, target)
        return outputs

    def _all_experts(self, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Run every expert on every image; also returns the running means of the logits after 1, 2, ... experts,
        `[N, E, C]`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.force_all):
            shared = self.trunk(x)
            feats = self.dropout(torch.stack([self.expert_feat(shared, i) for i in range(self.num_experts)], dim=1))
            return self._judge(feats)

    def _judge(self, feats: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        logits = self.classify(feats, list(range(self.num_experts)))
        counts = torch.arange(1, self.num_experts + 1, device=logits.device).view(-1, 1)
        means = _wide(logits).cumsum(1) / counts
        return {"output": logits.mean(1), "logits": logits, "feat": feats}, means

    def _used(self, feats: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """How many experts each image uses by the gates' decisions: `[N, E, D]`, `[N, E, C]` -> `[N]`, 1 to E."""
        n = feats.shape[0]  # not len(), which exporters would record as a constant: the batch size must stay dynamic
        used = torch.ones(n, dtype=torch.long, device=feats.device)
        if self.force_all:
            return used * self.num_experts
        going = torch.ones(n, dtype=torch.bool, device=feats.device)
        for i in range(self.num_experts - 1):
            going = going & self._wants_more(self.ask(i, feats[:, i], means[:, i]))
            used = used + going
        return used

    def _wants_more(self, help_logits: torch.Tensor) -> torch.Tensor:
        return _wide(help_logits).sigmoid() > self.route_threshold

    def _loss(self, feats: torch.Tensor, means: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean over gates of the weighted binary cross-entropy against "wrong now, right after some later expert"."""
        if self.num_experts == 1:
            # Nothing to decide: a loss of 0 with zero gradients, so that any training loop runs.
            return sum(p.sum() for p in self.parameters() if p.requires_grad) * 0.0
        right = means.argmax(2) == target.view(-1, 1)                                # [N, E]
        truth = ~right[:, :-1] & _any_later(right)                                  # [N, E - 1]
        asked = _wide(torch.stack([self.ask(i, feats[:, i], means[:, i]) for i in range(self.num_experts - 1)], dim=1))
        weight = asked.new_full((), self.pos_weight)     # filled on the device: new_tensor would wait for a copy
        return F.binary_cross_entropy_with_logits(asked, truth.to(asked.dtype), pos_weight=weight)

    def _routed(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run each later expert only on the images that need it, gathering their shared maps once per expert."""
        shared = self.trunk(x)
        feat = self.expert_feat(shared, 0)
        total = _wide(self.logits_of(feat, 0))             # [N, C], summed logits; rows of images still going get more
        used = torch.ones(len(x), dtype=torch.long, device=x.device)
        going = torch.arange(len(x), device=x.device)      # images that the current expert saw
        for i in range(1, self.num_experts):
            more = self._wants_more(self.ask(i - 1, feat, total[going] / i)).nonzero().squeeze(1)
            if len(more) == 0:
                break
            if len(more) < len(going):
                shared = _rows(shared, more)
                going = going[more]
            feat = self.expert_feat(shared, i)
            total.index_add_(0, going, _wide(self.logits_of(feat, i)))
            used[going] = i + 1
        return {"output": total / used.unsqueeze(1), "sample_num_experts": used}


class RoutedResNet(Routed, ResNet):
    """A `ResNet` with gates."""


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x as float32 at least: half-precision sums and sigmoids of logits lose the digits that decide."""
    return x.to(wide_type(x.dtype))


def _any_later(right: torch.Tensor) -> torch.Tensor:
    """`[N, E]` bool -> `[N, E - 1]`: is any later column true?"""
    return right.flip(1).long().cummax(1).values.flip(1).bool()[:, 1:]


def _rows(maps: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """maps[index] in the memory format of `maps`: index_select alone would return NCHW, which slows convolutions."""
    if maps.is_contiguous(memory_format=torch.channels_last):
        return maps.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return maps.index_select(0, index)
