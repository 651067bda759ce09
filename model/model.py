"""The public architectures: each name is a line of data given to the one ResNet family; norms are converted here."""
from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from base import BaseModel
from base.base_model import CostPart
from model import batchformer
from model.blocks import BasicBlock, Bottleneck
from model.classifier import HEADS
from model.resnet import CIFAR, IMAGENET, ResNet
from model.routing import GATES, RoutedResNet
from utils.config.build import build, lookup
from utils.errors import ConfigError

if TYPE_CHECKING:
    from model.detection.mask_rcnn import MaskRCNNR50FPNModel  # noqa: F401


def _require(ok: bool, key: str, message: str) -> None:
    if not ok:
        raise ConfigError(f"arch.args.{key}: {message}")


def _experts(use_experts: str | list | None, num_experts: int) -> list[int] | str | None:
    """`use_experts` as a list of indices, "rand" or None; ConfigError where it names none or one that isn't there."""
    if use_experts is None:
        return None
    if use_experts == "rand":
        _require(num_experts > 1, "use_experts", "'rand' leaves one expert out and needs num_experts 2 or more")
        return "rand"
    parts = use_experts.split(",") if isinstance(use_experts, str) else use_experts
    try:
        chosen = [int(part) for part in parts]
    except (TypeError, ValueError):
        chosen = []
    _require(bool(chosen) and len(set(chosen)) == len(chosen) and all(0 <= i < num_experts for i in chosen),
             "use_experts", f"{use_experts!r} should be 'rand' or different numbers from 0 to {num_experts - 1}, "
                            "like '0,1'")
    return chosen


class Model(BaseModel):
    """A backbone with its classifier. Subclasses say which one in `family`: layout, block, depths, groups.

    x `[N, 3, H, W]` -> dict with `output` `[N, C]`, `logits` `[N, E, C]`, `feat` `[N, E, D]`; see `model.resnet.ResNet`
    and, for expert assignment, `model.routing.RoutedResNet`, which also takes `target` `[N]`.

    Args:
        num_classes: C. Comes from the data where a config leaves it out.
        num_experts: E, 1 or more.
        reduce_dimension: narrower last two stages (CIFAR 24, 48; ImageNet 192, 384).
        layer2_output_dim, layer3_output_dim, layer4_output_dim: widths of single stages, before the expansion.
        use_norm: the cosine classifier, as `classifier="cosine"`.
        s: its scale, above 0.
        share_layer3: ImageNet only: experts share stage 3 too.
        use_experts: "0,2" or [0, 2]: only these; "rand": all but a random one in each training step.
        dropout: share of pooled features dropped, 0 to 1 (None: none).
        returns_feat: taken for old configs; features are always returned.
        add_bt: BatchFormer: 0 off, 1 on, 12 and 13 with 8 and 6 layers, 33 and 32 with a shared classifier (32 weighs
            the stream after the block 0.01).
        eval_bt: apply the block in evaluation too.
        top_choices_num, pos_weight, share_expert_help_pred_fc, force_all, route_threshold: expert assignment only.
        norm: a type of `model.norm`, or {"type": ..., "args": {...}}.
        classifier: linear, cosine, linear_fcbn, linear_fcbn_notaffine or lws.
        shared_classifier: None: where BatchFormer is on and the backbone is CIFAR's or has one expert.
        bt_gather: BatchFormer attends across all ranks' images.

    Raises:
        ConfigError: a value out of range or a name that isn't known.
    """

    family: dict = {}
    routed = False

    def __init__(self, num_classes: int | None = None, num_experts: int = 1, reduce_dimension: bool = False,
                 layer2_output_dim: int | None = None, layer3_output_dim: int | None = None,
                 layer4_output_dim: int | None = None, use_norm: bool = False, s: float = 30.0,
                 share_layer3: bool = False, use_experts: str | list | None = None, dropout: float | None = None,
                 returns_feat: bool = True, add_bt: int = 0, eval_bt: bool = False, top_choices_num: int = 5,
                 pos_weight: float = 20.0, share_expert_help_pred_fc: bool = True, force_all: bool = False,
                 route_threshold: float = 0.5, norm: str | dict = "BatchNorm2d", classifier: str = "linear",
                 shared_classifier: bool | None = None, bt_gather: bool = False):
        super().__init__()
        family = {"layout": IMAGENET, **self.family}
        layout = family["layout"]
        _require(num_classes is not None, "num_classes", "missing; give the number of classes")
        for key, value in (("num_classes", num_classes), ("num_experts", num_experts)):
            _require(type(value) is int and value >= 1, key, f"{value!r} should be a whole number, 1 or more")
        _require(s > 0, "s", f"{s} should be above 0")
        _require(0 <= (dropout or 0) < 1, "dropout", f"{dropout} should be at least 0 and below 1")
        _require(add_bt in batchformer.DEPTHS, "add_bt", f"{add_bt} should be one of {list(batchformer.DEPTHS)}")
        _require(not eval_bt or bool(add_bt), "eval_bt", "needs a BatchFormer block: add_bt 1, 12, 13, 32 or 33")
        _require(not (eval_bt and self.routed), "eval_bt", "routed images see no common batch; use 0 with an EAModel")
        _require(not (use_experts and self.routed), "use_experts", "the gates choose the experts of an EAModel")
        _require(not (share_layer3 and layout is CIFAR), "share_layer3", "CIFAR's experts split after stage 1")
        lookup(HEADS, classifier, "arch.args.classifier", "classifier")
        _require(not use_norm or classifier in ("linear", "cosine"), "use_norm",
                 f"means the cosine classifier, but classifier is {classifier!r}")
        _require(shared_classifier is not False or add_bt not in (32, 33), "shared_classifier",
                 f"add_bt {add_bt} is the one with a shared classifier; leave it out or use add_bt 1")
        if shared_classifier is None:
            # An unshared classifier collapses there: about 25% on CIFAR-100-LT (zhihou7/BatchFormer, issue 7).
            shared_classifier = layout is CIFAR or num_experts == 1 or add_bt in (32, 33)

        gates = dict(top_choices_num=top_choices_num, pos_weight=pos_weight, force_all=force_all,
                     share_expert_help_pred_fc=share_expert_help_pred_fc, route_threshold=route_threshold)
        self.backbone: ResNet = (RoutedResNet if self.routed else ResNet)(
            **family,
            widths=layout.stage_widths(reduce_dimension, {2: layer2_output_dim, 3: layer3_output_dim,
                                                          4: layer4_output_dim}),
            num_classes=num_classes, num_experts=num_experts, share_layer3=bool(share_layer3),
            classifier="cosine" if use_norm else classifier, s=s, use_experts=_experts(use_experts, num_experts),
            dropout=dropout or 0.0, add_bt=int(add_bt), eval_bt=bool(eval_bt),
            shared_classifier=bool(shared_classifier and add_bt), bt_gather=bool(bt_gather),
            **(gates if self.routed else {}))
        self._convert_norms(norm)
        if self.routed:
            self.backbone.freeze_experts()   # NBN's scales are newer than the gates
        self.num_classes, self.num_experts, self.feat_dim = num_classes, num_experts, self.backbone.feat_dim

    def _convert_norms(self, norm: str | dict) -> None:
        spec = {"type": norm} if isinstance(norm, str) else norm
        _require(isinstance(spec, dict) and set(spec) <= {"type", "args"} and isinstance(spec.get("type"), str)
                 and isinstance(spec.get("args", {}), dict), "norm",
                 'should be a type name or {"type": name, "args": {...}}')
        if spec["type"] == "BatchNorm2d" and not spec.get("args"):
            return
        from model.norm import convert_norm
        convert_norm(self.backbone, spec["type"], path="arch.args.norm", **spec.get("args", {}))

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return self.backbone(x, target) if self.routed else self.backbone(x)

    def from_features(self, feats: torch.Tensor, **more: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.backbone.from_features(feats, **more)

    # ---- what others ask, see BaseModel ------------------------------------------------------------------------

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
        self.backbone.bt_gather = True

    def heads(self) -> list[torch.nn.Module]:
        return self.backbone.heads

    def used_heads(self) -> list[torch.nn.Module]:
        used = self.backbone.use_experts
        return [self.backbone.heads[i] for i in (range(self.num_experts) if used == "rand" else used)]

    def cost_parts(self) -> list[CostPart]:
        net = self.backbone
        stages = range(1, net.num_stages + 1)
        parts = [CostPart("stem", ("backbone.conv1", "backbone.bn1"))]
        parts += [CostPart(f"stage {n}", (f"backbone.layer{n}",)) for n in stages if n < net.first_private]
        several = self.num_experts > 1
        for i in range(self.num_experts):
            parts += [CostPart(f"expert {i + 1}, stage {n}", (f"backbone.layer{n}s.{i}",), i)
                      for n in stages if n >= net.first_private]
            parts.append(CostPart(f"expert {i + 1}, classifier" if several else "classifier",
                                  (f"backbone.linears.{i}" if several else "backbone.linear",), i))
        if net.batchformer is not None:
            parts.append(CostPart("BatchFormer", ("backbone.encoder_layers",), training=True))
        return parts

    def classifier_prefixes(self) -> list[str]:
        return ["backbone.linear."] if self.num_experts == 1 else ["backbone.linears."]

    def stage_prefixes(self) -> list[tuple[str, ...]]:
        return [("backbone.conv1.", "backbone.bn1.")] + [(f"backbone.layer{n}.", f"backbone.layer{n}s.")
                                                        for n in range(1, self.backbone.num_stages + 1)]

    def stage2_prefixes(self) -> list[str]:
        scales = [name for name, _ in self.named_parameters() if name.endswith(".scales")]
        return scales or self.classifier_prefixes()

    @property
    def uses_all_parameters(self) -> bool:
        experts = self.backbone.use_experts
        return experts != "rand" and len(experts) == self.num_experts

    @property
    def route(self) -> bool:
        return getattr(self.backbone, "route", False)

    @route.setter
    def route(self, value: bool) -> None:
        self.backbone.route = value


class EAModel(Model):
    """Expert assignment on the same backbone: RIDE's second stage."""

    routed = True

    def feature_prefixes(self) -> list[str]:
        return [*self.classifier_prefixes(), f"backbone.{GATES}"]

    def gates(self) -> list[torch.nn.Linear]:
        """Each gate's last layer, [E - 1], or the one that all share."""
        return self.backbone.gates

    def gate_logits(self, feats: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """What each gate says, "help" above 0: feats [N, E, D] and the experts' logits [N, E, C] -> [N, E - 1]."""
        means = logits.cumsum(1) / torch.arange(1, self.num_experts + 1, device=logits.device)[:, None]
        return torch.stack([self.backbone.ask(i, feats[:, i], means[:, i]) for i in range(self.num_experts - 1)], 1)

    def cost_parts(self) -> list[CostPart]:
        names = tuple(f"backbone.{name}" for name, _ in self.backbone.named_children() if name.startswith(GATES))
        return super().cost_parts() + ([CostPart("gates", names, gates=True)] if self.num_experts > 1 else [])


#: Each network and, with EAModel for Model at its name's end, its expert assignment: what differs is data.
FAMILIES: dict[str, dict] = {
    "ResNet32": dict(layout=CIFAR, block=BasicBlock, depths=(5, 5, 5)),
    "ResNet10": dict(block=BasicBlock, depths=(1, 1, 1, 1)),
    "ResNet50": dict(block=Bottleneck, depths=(3, 4, 6, 3)),
    "ResNet101": dict(block=Bottleneck, depths=(3, 4, 23, 3)),
    "ResNet152": dict(block=Bottleneck, depths=(3, 8, 36, 3)),
    "ResNeXt50": dict(block=Bottleneck, depths=(3, 4, 6, 3), groups=32, base_width=4),
    "ResNeXt101": dict(block=Bottleneck, depths=(3, 4, 23, 3), groups=32, base_width=4),
    "ResNeXt152": dict(block=Bottleneck, depths=(3, 8, 36, 3), groups=32, base_width=4),
}

#: A config's `arch.type`: also names of this module, which pickle and help() know like any other class.
ARCHS: dict[str, type[BaseModel]] = {
    name + base.__name__: type(name + base.__name__, (base,), {
        "family": family, "__module__": __name__, "__doc__": f"{name}; the arguments are `Model`'s."})
    for base in (Model, EAModel) for name, family in FAMILIES.items()}
globals().update(ARCHS)


#: Architectures whose module is imported when they are asked for: torchvision alone takes a second.
ELSEWHERE = {"MaskRCNNR50FPNModel": "model.detection.mask_rcnn:MaskRCNNR50FPNModel"}


def __getattr__(name: str) -> type[BaseModel]:
    if name not in ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lookup(ELSEWHERE, name, name)


def build_model(arch: dict, num_classes: int | None = None, path: str = "arch") -> BaseModel:
    """The model that `arch` = {"type", "args"} describes.

    `num_classes` is the data's, filled in where the config has none. Raises ConfigError, with `path` in the message,
    for an unknown type, for values out of range, and where config and data disagree about the number of classes.
    """
    given = (arch.get("args") or {}).get("num_classes")
    if None not in (given, num_classes) and given != num_classes:
        raise ConfigError(f"{path}.args.num_classes: {given}, but the data has {num_classes} classes")
    try:
        return build(ARCHS | ELSEWHERE, arch, path, num_classes=num_classes if given is None else given)
    except ConfigError as error:
        # The constructors don't know where in the config they were named.
        raise ConfigError(re.sub(r"^arch\.args", f"{path}.args", str(error))) from None
