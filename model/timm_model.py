"""Any classification network of timm's or torchvision's, pretrained or not, as a backbone like every other."""
from __future__ import annotations

from typing import Any, Literal

import torch

from base.base_model import CostPart
from model.depthwise import steady_depthwise
from model.expert_model import ExpertModel, Gated, check_common, require
from model.norm.facts import is_batch_norm
from model.routing import Routed
from model.timm_net import TimmNet, check_name
from model.timm_size import size_problem
from model.tuning import install_tuning
from model.tuning_parts import added_names
from model.weights.pretrained import input_of, load_pretrained, timm_names


class RoutedTimmNet(Routed, TimmNet):
    """A `TimmNet` with gates."""


class TimmModel(ExpertModel):
    """A network by its name in timm (`resnet18`, `vit_base_patch16_224.augreg_in21k`), or in torchvision
    (`torchvision/resnet18`), with this project's experts, BatchFormer, norms and classifiers.

    The network without its classifier is `backbone.body`. With several experts each has its own last stage in
    `backbone.experts.{i}`, under the body's names, or, where the body has none that can be told, a block of its own on
    the pooled features; `summary` says which. What goes in and comes out: see `ExpertModel`.

    Args:
        model_name: with timm, optionally a tag: which of the pretrained weights.
        weights: true: the package's own, from its cache or the network; false: none; text: a file of weights, of
            timm's, torchvision's, lukemelas' EfficientNets (.pth or .safetensors), one in which others have put the
            network under a prefix, or a checkpoint of this project. A classifier of other classes is left new.
        norm: exchanges batch norms, in networks that have them. NBN's `where` counts the network's stages.
        tuning: fine-tuning with few parameters: a name of `model.tuning.TUNINGS` or {"type": name, "args": {...}}; all
            else of the network is frozen. It comes after the weights, whose names stay.
        shared_classifier: None: where BatchFormer is on and there is one expert.
        The others are those of `model.model.Model`.

    Raises:
        ConfigError: a missing package, unknown network, value out of range, weights that don't fit; `MissingWeights`
            where `weights` is true and they can't be had.
    """

    def __init__(self, model_name: str, weights: Literal[True, False] | str = True, num_classes: int | None = None,
                 num_experts: int = 1, use_norm: bool = False, s: float = 30.0, use_experts: str | list | None = None,
                 dropout: float | None = None, returns_feat: bool = True, add_bt: int = 0, eval_bt: bool = False,
                 top_choices_num: int = 5, pos_weight: float = 20.0, share_expert_help_pred_fc: bool = True,
                 force_all: bool = False, route_threshold: float = 0.5, norm: str | dict = "BatchNorm2d",
                 classifier: str = "linear", shared_classifier: bool | None = None, bt_gather: bool = False,
                 tuning: str | dict | None = None, bt_weight: float | None = None):
        super().__init__()
        check_name(model_name)
        common = check_common(
            num_classes=num_classes, num_experts=num_experts, use_norm=use_norm, s=s, use_experts=use_experts,
            dropout=dropout, add_bt=add_bt, eval_bt=eval_bt, classifier=classifier,
            shared_classifier=shared_classifier, bt_gather=bt_gather, bt_weight=bt_weight,
            routed=self.routed, shared_by_default=num_experts == 1)
        gates = dict(top_choices_num=top_choices_num, pos_weight=pos_weight, force_all=force_all,
                     share_expert_help_pred_fc=share_expert_help_pred_fc, route_threshold=route_threshold)
        self.model_name = model_name
        self.backbone: TimmNet = (RoutedTimmNet if self.routed else TimmNet)(
            model_name=model_name, size=self.preprocess(model_name)["image_size"], **common,
            **(gates if self.routed else {}))
        self._check_norm(norm)
        self._finish(norm)
        steady_depthwise(self.backbone)
        if weights:
            load_pretrained(self, weights)
        if tuning is not None:
            self._tune(tuning)

    def _tune(self, tuning: str | dict) -> None:
        """Freeze the network but for what `tuning` trains; heads, BatchFormer and experts' new blocks are trained."""
        net = self.backbone
        install_tuning(net.body, tuning, self.num_classes, tails=net.experts if net.private else ())
        if self.routed and not self.force_all:
            net.freeze_experts()

    @staticmethod
    def preprocess(model_name: str) -> dict[str, Any]:
        """What the network's weights expect of images: `image_size`, `crop_share` (of the resized short side; None: no
        crop), `interpolation`, `mean`, `std`. Needs no weights."""
        return input_of(model_name)

    @staticmethod
    def size_problem(model_name: str, size: int) -> str | None:
        """Why images of `size` pixels can't be used, and what can; None where they can. Needs no weights."""
        return size_problem(model_name, size)

    def _check_norm(self, norm: str | dict) -> None:
        kind = norm if isinstance(norm, str) else (norm or {}).get("type")
        layers = list(self.backbone.modules())
        require(kind == "BatchNorm2d" or any(is_batch_norm(layer) for layer in layers), "norm",
                f"{self.model_name} has no batch norm that could become {kind}; leave it out")
        padded = [layer for layer in layers if type(layer).__name__ == "Conv2dSame"]
        require(kind != "MABN" or not padded, "norm", f"MABN's centred convolutions don't pad as {self.model_name}'s "
                "(TensorFlow's way) do; take a network without tf_ in its name")

    def own_names(self, weights: dict[str, torch.Tensor], origin: str, spread: bool) -> dict[str, torch.Tensor]:
        """Weights of the network, as timm, torchvision or this project names them, under this model's names."""
        return timm_names(self, weights, spread)

    @property
    def new_prefixes(self) -> tuple[str, ...]:
        """Beginnings of the names of what no network has that weights to start from are of: the experts' own blocks."""
        return () if self.num_experts == 1 or self.backbone.private else ("backbone.experts.",)

    @property
    def added_names(self) -> set[str]:
        """The names of what `tuning` has added: weights to start from have all of it, or none and it starts anew."""
        return {f"backbone.{name}" for name in added_names(self.backbone)}

    def stage_prefixes(self) -> list[tuple[str, ...]]:
        modules = dict(self.backbone.named_modules())
        return [tuple(f"backbone.{name}" + ("." if name in modules else "") for name in names)
                for names in self.backbone.stages()]

    def cost_parts(self) -> list[CostPart]:
        net, several = self.backbone, self.num_experts > 1
        modules = dict(net.named_modules())
        parts = []
        for n, names in enumerate(net.stages()):
            shared = tuple(f"backbone.{name}" for name in names if name in modules and name.startswith("body."))
            if shared:
                parts.append(CostPart(f"stage {n}" if n else "stem", shared))
        for i in range(self.num_experts):
            if several:
                parts.append(CostPart(f"expert {i + 1}, " + (", ".join(net.private) or "block"),
                                      (f"backbone.experts.{i}",), i))
            parts.append(CostPart(f"expert {i + 1}, classifier" if several else "classifier",
                                  (f"backbone.linears.{i}" if several else "backbone.linear",), i))
        if net.batchformer is not None:
            parts.append(CostPart("BatchFormer", ("backbone.encoder_layers",), training=True))
        return parts

    def summary(self) -> str:
        text = super().summary()
        if self.num_experts > 1:
            own = self.backbone.private
            text += f"\n  {self.model_name}: each expert has " + (
                f"its own {', '.join(own)}" if own else "a block of its own on the pooled features")
        return text


class TimmEAModel(Gated, TimmModel):
    """Expert assignment on the same network; the arguments are `TimmModel`'s."""
