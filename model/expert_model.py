"""Models whose `backbone` is a network of experts: checks of their arguments, and `BaseModel`'s interface."""
from __future__ import annotations

from typing import Any

import torch

from base import BaseModel
from base.base_model import CostPart
from model import batchformer
from model.classifier import HEADS
from model.experts import ExpertNet
from model.norm import convert_norm, norm_spec
from model.routing import GATES
from utils.config.build import lookup
from utils.errors import ConfigError


def require(ok: bool, key: str, message: str) -> None:
    """Raises ConfigError about the config key `arch.args.{key}` unless `ok`."""
    if not ok:
        raise ConfigError(f"arch.args.{key}: {message}")


def chosen_experts(use_experts: str | list | None, num_experts: int) -> list[int] | str | None:
    """`use_experts` as a list of indices, "rand" or None (all). Raises ConfigError if it names no expert, one twice, or
    one that doesn't exist."""
    if use_experts is None:
        return None
    if use_experts == "rand":
        require(num_experts > 1, "use_experts", "'rand' leaves one expert out and needs num_experts 2 or more")
        return "rand"
    parts = use_experts.split(",") if isinstance(use_experts, str) else use_experts
    try:
        chosen = [int(part) for part in parts] if all(type(part) in (int, str) for part in parts) else []
    except (TypeError, ValueError):
        chosen = []
    require(bool(chosen) and len(set(chosen)) == len(chosen) and all(0 <= i < num_experts for i in chosen),
            "use_experts", f"{use_experts!r} should be 'rand' or different numbers from 0 to {num_experts - 1}, "
                           "like '0,1'")
    return chosen


def check_common(*, num_classes: int | None, num_experts: int, use_norm: bool, s: float, use_experts: str | list | None,
                 dropout: float | None, add_bt: int, eval_bt: bool, classifier: str, shared_classifier: bool | None,
                 bt_gather: bool, bt_weight: float | None, routed: bool, shared_by_default: bool) -> dict[str, Any]:
    """Check the arguments that every such model has; returns them as the backbones' constructors take them.

    routed: whether it is for expert assignment. shared_by_default: what `shared_classifier=None` means if BatchFormer
    is on. Raises ConfigError for a value out of range or a combination that makes no sense.
    """
    require(num_classes is not None, "num_classes", "missing; give the number of classes")
    for key, value in (("num_classes", num_classes), ("num_experts", num_experts)):
        require(type(value) is int and value >= 1, key, f"{value!r} should be a whole number, 1 or more")
    require(s > 0, "s", f"{s} should be above 0")
    require(0 <= (dropout or 0) < 1, "dropout", f"{dropout} should be at least 0 and below 1")
    require(add_bt in batchformer.DEPTHS, "add_bt", f"{add_bt} should be one of {list(batchformer.DEPTHS)}")
    require(not eval_bt or bool(add_bt), "eval_bt", "needs a BatchFormer block: add_bt 1, 12, 13, 32 or 33")
    require(not (eval_bt and routed), "eval_bt", "routed images see no common batch; use 0 with an EAModel")
    require(not (use_experts and routed), "use_experts", "the gates choose the experts of an EAModel")
    lookup(HEADS, classifier, "arch.args.classifier", "classifier")
    require(not use_norm or classifier in ("linear", "cosine"), "use_norm",
             f"means the cosine classifier, but classifier is {classifier!r}")
    require(shared_classifier is not False or add_bt not in (32, 33), "shared_classifier",
             f"add_bt {add_bt} is the one with a shared classifier; leave it out or use add_bt 1")
    if shared_classifier is None:
        # Without sharing, these collapse: about 25% accuracy on CIFAR-100-LT (zhihou7/BatchFormer, issue 7).
        shared_classifier = shared_by_default or add_bt in (32, 33)
    shared = bool(shared_classifier and add_bt)
    require(bt_weight is None or shared, "bt_weight",
            "weighs the two streams of a shared classifier; needs add_bt 1 and shared_classifier true")
    require(bt_weight is None or bt_weight >= 0, "bt_weight", f"{bt_weight} should be 0 or more")
    after, before = batchformer.STREAM_WEIGHTS.get(add_bt, (1.0, 1.0))
    return dict(num_classes=num_classes, num_experts=num_experts, classifier="cosine" if use_norm else classifier, s=s,
                use_experts=chosen_experts(use_experts, num_experts), dropout=dropout or 0.0, add_bt=int(add_bt),
                eval_bt=bool(eval_bt), shared_classifier=shared, bt_gather=bool(bt_gather),
                bt_weights=(after if bt_weight is None else float(bt_weight), before))


class ExpertModel(BaseModel):
    """A model with an `ExpertNet` as its `backbone`, made by a subclass's constructor.

    x `[N, 3, H, W]` -> dict with `output` `[N, C]`, `logits` `[N, E, C]`, `feat` `[N, E, D]`; see `ExpertNet` and, for
    expert assignment, `model.routing.Routed`, which also takes `target` `[N]`.
    """

    backbone: ExpertNet

    def _finish(self, norm: str | dict) -> None:
        """The last step of a constructor, once `backbone` is set."""
        self._convert_norms(norm)
        if self.routed:
            self.backbone.freeze_experts()   # again: NBN's scales were added since
        net = self.backbone
        self.num_classes, self.num_experts, self.feat_dim = net.num_classes, net.num_experts, net.feat_dim

    def _convert_norms(self, norm: str | dict) -> None:
        kind, args = norm_spec(norm, "arch.args.norm")
        if kind != "BatchNorm2d" or args:
            convert_norm(self.backbone, kind, path="arch.args.norm", **args)

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return self.backbone(x, target) if self.routed else self.backbone(x)

    def from_features(self, feats: torch.Tensor, **more: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.backbone.from_features(feats, **more)

    # ---- BaseModel's interface ---------------------------------------------------------------------------------

    @property
    def batchformer(self) -> torch.nn.Module | None:
        return self.backbone.batchformer

    @property
    def nbn_scales(self) -> torch.nn.Parameter | None:
        return getattr(self.backbone, "scale_factor", None)

    @property
    def force_all(self) -> bool:
        return getattr(self.backbone, "force_all", False)

    @force_all.setter
    def force_all(self, value: bool) -> None:
        self.backbone.force_all = value

    def gather_batches(self) -> None:
        if self.drops_experts:
            raise ConfigError("trainer.bt_gather: with arch.args.use_experts \"rand\" each process leaves out another "
                              "expert, whose features would meet in one attention; leave one of them out")
        self.backbone.bt_gather = True

    def heads(self) -> list[torch.nn.Module]:
        return self.backbone.heads

    def used_heads(self) -> list[torch.nn.Module]:
        used = range(self.num_experts) if self.drops_experts else self.backbone.use_experts
        return [self.backbone.heads[i] for i in used]

    def classifier_prefixes(self) -> list[str]:
        return ["backbone.linear."] if self.num_experts == 1 else ["backbone.linears."]

    @property
    def uses_all_parameters(self) -> bool:
        return not self.drops_experts and len(self.backbone.use_experts) == self.num_experts

    @property
    def drops_experts(self) -> bool:
        return self.backbone.use_experts == "rand"

    @property
    def route(self) -> bool:
        return getattr(self.backbone, "route", False)

    @route.setter
    def route(self, value: bool) -> None:
        self.backbone.route = value


class Gated(ExpertModel):
    """Mixin, listed before an `ExpertModel` among a class's bases: expert assignment, RIDE's second stage."""

    routed = True

    def feature_prefixes(self) -> list[str]:
        return [*self.classifier_prefixes(), f"backbone.{GATES}"]

    def gates(self) -> list[torch.nn.Linear]:
        """The last linear layer of each of the E - 1 gates, or the single one that all share."""
        return self.backbone.gates

    def gate_logits(self, feats: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Each gate's logit for "another expert would help": feats [N, E, D] and the experts' logits [N, E, C] ->
        [N, E - 1]."""
        means = logits.cumsum(1) / torch.arange(1, self.num_experts + 1, device=logits.device)[:, None]
        return torch.stack([self.backbone.ask(i, feats[:, i], means[:, i]) for i in range(self.num_experts - 1)], 1)

    def cost_parts(self) -> list[CostPart]:
        names = tuple(f"backbone.{name}" for name, _ in self.backbone.named_children() if name.startswith(GATES))
        return super().cost_parts() + ([CostPart("gates", names, gates=True)] if self.num_experts > 1 else [])
