"""The public architectures: each name is one row of data for the same ResNet code, and `build_model` makes them."""
from __future__ import annotations

import re
from typing import TYPE_CHECKING

from base import BaseModel
from base.base_model import CostPart
from model.blocks import BasicBlock, Bottleneck
from model.expert_model import ExpertModel, Gated, check_common, require
from model.resnet import CIFAR, IMAGENET, ResNet
from model.routing import RoutedResNet
from utils.config.build import build, lookup
from utils.errors import ConfigError

if TYPE_CHECKING:
    from model.detection.mask_rcnn import MaskRCNNR50FPNModel  # noqa: F401
    from model.timm_model import TimmEAModel, TimmModel  # noqa: F401


class Model(ExpertModel):
    """A backbone with its classifier. Subclasses set `family`, the network's layout, block, depths and groups.

    x `[N, 3, H, W]` -> dict; see `ExpertModel`.

    Args:
        num_classes: C. Taken from the data if the config omits it.
        num_experts: E, 1 or more.
        reduce_dimension: narrower last two stages (CIFAR 24, 48; ImageNet 192, 384).
        layer2_output_dim, layer3_output_dim, layer4_output_dim: channels of single stages, before the block's
            expansion.
        use_norm: the cosine classifier, same as `classifier="cosine"`.
        s: scale of the cosine classifier, above 0.
        share_layer3: ImageNet layouts only: experts share stage 3 too.
        use_experts: "0,2" or [0, 2]: only these experts; "rand": each training step leaves out one at random.
        dropout: dropout probability on the pooled features, 0 or more and below 1 (None: no dropout).
        returns_feat: accepted for old configs; features are always returned.
        add_bt: BatchFormer: 0 off, 1 one layer, 12 and 13 with 8 and 6 layers, 33 and 32 one layer with a shared
            classifier (32 weights the loss of the stream after the block by 0.01).
        eval_bt: apply the BatchFormer block in evaluation too.
        top_choices_num, pos_weight, share_expert_help_pred_fc, force_all, route_threshold: for expert assignment only,
            see `model.routing.Routed`.
        norm: a type of `model.norm`, or {"type": ..., "args": {...}}.
        classifier: linear, cosine, linear_fcbn, linear_fcbn_notaffine or lws.
        shared_classifier: with BatchFormer, train the classifier on the features before the block as well as after it.
            None: yes, if the backbone is CIFAR's, has one expert, or `add_bt` is 32 or 33.
        bt_gather: BatchFormer attends across all ranks' images.
        bt_weight: with a shared classifier, the loss weight of the stream after BatchFormer's block, 0 or more; the
            stream before it has weight 1. None: the default for `add_bt` (`model.batchformer.STREAM_WEIGHTS`).

    Raises:
        ConfigError: a value out of range or an unknown name.
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
                 shared_classifier: bool | None = None, bt_gather: bool = False,
                 bt_weight: float | None = None):
        super().__init__()
        family = {"layout": IMAGENET, **self.family}
        layout = family["layout"]
        require(not (share_layer3 and layout is CIFAR), "share_layer3", "CIFAR's experts split after stage 1")
        common = check_common(
            num_classes=num_classes, num_experts=num_experts, use_norm=use_norm, s=s, use_experts=use_experts,
            dropout=dropout, add_bt=add_bt, eval_bt=eval_bt, classifier=classifier,
            shared_classifier=shared_classifier, bt_gather=bt_gather, bt_weight=bt_weight,
            routed=self.routed, shared_by_default=layout is CIFAR or num_experts == 1)
        gates = dict(top_choices_num=top_choices_num, pos_weight=pos_weight, force_all=force_all,
                     share_expert_help_pred_fc=share_expert_help_pred_fc, route_threshold=route_threshold)
        self.backbone: ResNet = (RoutedResNet if self.routed else ResNet)(
            **family,
            widths=layout.stage_widths(reduce_dimension, {2: layer2_output_dim, 3: layer3_output_dim,
                                                          4: layer4_output_dim}),
            share_layer3=bool(share_layer3), **common,
            **(gates if self.routed else {}))
        self._finish(norm)

    # ---- BaseModel's interface ---------------------------------------------------------------------------------

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

    def stage_prefixes(self) -> list[tuple[str, ...]]:
        return [("backbone.conv1.", "backbone.bn1.")] + [(f"backbone.layer{n}.", f"backbone.layer{n}s.")
                                                        for n in range(1, self.backbone.num_stages + 1)]


class EAModel(Gated, Model):
    """Expert assignment (`model.routing`) on the same backbone; the arguments are `Model`'s."""


#: Name and settings of each network. NAMEModel is the plain model, NAMEEAModel the one with expert assignment.
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

#: What a config's `arch.type` may name. Also set as attributes of this module, so that pickle and help() find them.
ARCHS: dict[str, type[BaseModel]] = {
    name + base.__name__: type(name + base.__name__, (base,), {
        "family": family, "__module__": __name__, "__doc__": f"{name}; the arguments are `Model`'s."})
    for base in (Model, EAModel) for name, family in FAMILIES.items()}
globals().update(ARCHS)


#: Architectures whose modules are imported only on demand: importing torchvision alone takes a second.
ELSEWHERE = {"MaskRCNNR50FPNModel": "model.detection.mask_rcnn:MaskRCNNR50FPNModel",
             "TimmModel": "model.timm_model:TimmModel", "TimmEAModel": "model.timm_model:TimmEAModel"}


def __getattr__(name: str) -> type[BaseModel]:
    if name not in ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lookup(ELSEWHERE, name, name)


def build_model(arch: dict, num_classes: int | None = None, path: str = "arch", bare: bool = False) -> BaseModel:
    """Build the model that `arch` = {"type", "args"} describes.

    Args:
        num_classes: the data's, used if the config gives none.
        path: the config key of `arch`, for error messages.
        bare: don't fetch or read the pretrained weights that the arch's `weights` names, because others (a
            checkpoint's) will replace them.
    Raises:
        ConfigError: an unknown type, one that doesn't make a `BaseModel`, values out of range, or config and data
            disagree about the number of classes.
    """
    given = (arch.get("args") or {}).get("num_classes")
    if None not in (given, num_classes) and given != num_classes:
        raise ConfigError(f"{path}.args.num_classes: {given}, but the data has {num_classes} classes")
    try:
        model = build(ARCHS | ELSEWHERE, arch, path, num_classes=num_classes if given is None else given,
                      **({"weights": False} if bare else {}))
    except ConfigError as error:
        # The constructors assume the key "arch.args"; put in the actual one.
        raise type(error)(re.sub(r"^arch\.args", f"{path}.args", str(error))) from None
    if not isinstance(model, BaseModel):
        raise ConfigError(f"{path}.type: {arch['type']} makes a {type(model).__name__}, which isn't a model here: it "
                          "doesn't derive from base.BaseModel; networks of timm and torchvision are TimmModel's")
    return model
