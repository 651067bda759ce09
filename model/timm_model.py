"""Any timm or torchvision classification network, pretrained or not, as a backbone like any other."""
from __future__ import annotations

from typing import Any, Literal

import torch

from base.base_model import CostPart
from model.depthwise import steady_depthwise
from model.expert_model import ExpertModel, Gated, check_common, require
from model.norm.facts import is_batch_norm
from model.routing import Routed
from model.timm_body import check_name
from model.timm_net import TimmNet
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
    `backbone.experts.{i}`, under the names that the body has for it; if the body's last stage can't be identified,
    each has its own block on the pooled features (`summary` says which). Inputs and outputs: see `ExpertModel`.

    Args:
        model_name: for timm, optionally with a tag that selects the pretrained weights.
        weights: true: the package's own, from its cache or downloaded; false: none; a string: a weight file (.pth or
            .safetensors) from timm, torchvision or lukemelas' EfficientNets, one in which the network lies under a
            prefix, or a checkpoint of this project. A classifier for other classes is initialised anew.
        norm: replaces the batch norms, in networks that have them. NBN's `where` counts the network's stages.
        model_args: further arguments of the network's constructor in its package: `{"drop_path_rate": 0.1}` for
            stochastic depth (Huang et al., ECCV 2016).
        grad_checkpointing: compute most activations again in the backward pass instead of storing them (Chen et al.,
            arXiv:1604.06174): less memory for about a third more computation. For timm's networks that support it.
            Batch norms see each batch twice, so their running averages move faster.
        tuning: parameter-efficient fine-tuning: a name in `model.tuning.TUNINGS` or {"type": name, "args": {...}}; the
            rest of the network is frozen. Applied after the weights are loaded; their names don't change.
        shared_classifier: as in `model.model.Model`, but None means yes only with one expert or `add_bt` 32 or 33.
        The other arguments are those of `model.model.Model`.

    Raises:
        ConfigError: a missing package, an unknown network, a value out of range, or weights that don't fit;
            `MissingWeights` if `weights` is true and they can't be obtained.
    """

    def __init__(self, model_name: str, weights: Literal[True, False] | str = True, num_classes: int | None = None,
                 num_experts: int = 1, use_norm: bool = False, s: float = 30.0, use_experts: str | list | None = None,
                 dropout: float | None = None, returns_feat: bool = True, add_bt: int = 0, eval_bt: bool = False,
                 top_choices_num: int = 5, pos_weight: float = 20.0, share_expert_help_pred_fc: bool = True,
                 force_all: bool = False, route_threshold: float = 0.5, norm: str | dict = "BatchNorm2d",
                 classifier: str = "linear", shared_classifier: bool | None = None, bt_gather: bool = False,
                 tuning: str | dict | None = None, bt_weight: float | None = None, model_args: dict | None = None,
                 grad_checkpointing: bool = False):
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
            model_name=model_name, size=self.preprocess(model_name)["image_size"], model_args=model_args,
            grad_checkpointing=grad_checkpointing, **common, **(gates if self.routed else {}))
        self._check_norm(norm)
        self._finish(norm)
        steady_depthwise(self.backbone)
        if weights:
            load_pretrained(self, weights)
        if tuning is not None:
            self._tune(tuning)

    def _tune(self, tuning: str | dict) -> None:
        """Freeze the network except what `tuning` trains; heads, BatchFormer and new expert blocks stay trainable."""
        net = self.backbone
        install_tuning(net.body, tuning, self.num_classes, tails=net.experts if net.private else ())
        if self.routed and not self.force_all:
            net.freeze_experts()

    @staticmethod
    def preprocess(model_name: str) -> dict[str, Any]:
        """How images must be prepared for the network's weights: `image_size` in pixels, `crop_share` (the crop's share
        of the resized short side; None: no crop), `interpolation`, `mean`, `std`. Loads no weights."""
        return input_of(model_name)

    @staticmethod
    def size_problem(model_name: str, size: int) -> str | None:
        """Why images of `size` pixels can't be used, and which can; None if they can. Loads no weights."""
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
        """Rename the network's weights from timm's, torchvision's or this project's names to this model's. spread: copy
        one expert's weights to all experts."""
        return timm_names(self, weights, spread)

    @property
    def new_prefixes(self) -> tuple[str, ...]:
        """Name prefixes of parameters that no pretrained network has: the experts' own blocks."""
        return () if self.num_experts == 1 or self.backbone.private else ("backbone.experts.",)

    @property
    def added_names(self) -> set[str]:
        """The names of the tensors that `tuning` has added. Initial weights must have all of them, or none: then they
        keep their initialisation."""
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
    """Expert assignment (`model.routing`) on the same network; the arguments are `TimmModel`'s."""
