"""Mask R-CNN with a ResNet-50 feature pyramid (He et al., ICCV 2017) and a choice of norm layers.

It is torchvision's detector, with its state_dict keys (`backbone.body.*`, `backbone.fpn.*`, `rpn.*`, `roi_heads.*`),
built as in MABN's detection study (Yan et al., ICLR 2020): norms in the backbone, the pyramid, the box head (four
3x3 convolutions and one fully connected layer) and the mask head.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import resnet50
from torchvision.ops import MultiScaleRoIAlign

from base import BaseModel
from model.detection.weights import fit_weights
from model.norm import convert_norm, norm_spec
from utils.errors import ConfigError, unknown

#: The ResNet's parts from last to first, as counted by `trainable_layers`.
STAGES = ("layer4", "layer3", "layer2", "layer1", "conv1")
BOX_HEADS = ("4conv1fc", "2fc")


class _AcceptsNoRegions:
    """Mixin for a head that may get no regions at all (from a batch of empty images): it then returns an empty tensor
    and doesn't update its norms.

    Its parameters still get a zero gradient, so that data-parallel ranks stay in step. A head with synchronised norms
    is run all the same, as other ranks wait for this rank's part of the statistics.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, C, h, w], R regions -> features [R, ...]."""
        if len(x) or any(isinstance(module, nn.SyncBatchNorm) for module in self.modules()):
            return super().forward(x)
        nothing = sum(p.sum() * 0 for p in self.parameters() if p.requires_grad)
        return x.new_zeros((0, *self.out_shape(x))) + nothing


class BoxHead(_AcceptsNoRegions, FastRCNNConvFCHead):
    """Four 3x3 convolutions and one fully connected layer: regions [R, C, 7, 7] to features [R, D]."""

    def out_shape(self, x: torch.Tensor) -> Sequence[int]:
        """The output's shape for input x, without the first dimension: (D,)."""
        return (next(m.out_features for m in self if isinstance(m, nn.Linear)),)


class MaskHead(_AcceptsNoRegions, MaskRCNNHeads):
    """Four 3x3 convolutions: regions [R, C, 14, 14] to features [R, C', 14, 14]."""

    def out_shape(self, x: torch.Tensor) -> Sequence[int]:
        """The output's shape for input x, without the first dimension: (C', h, w)."""
        return (self[-1][0].out_channels, *x.shape[2:])


class MaskRCNNR50FPNModel(MaskRCNN, BaseModel):
    """Detects, classifies and segments objects.

    images: a list of [3, H, W] of any sizes (or one tensor [N, 3, H, W]), values 0 to 1. They are normalised here, and
    in evaluation also resized to `min_size` (in training the loader has resized them).
    Training also takes targets, a list of dicts with `boxes` [n, 4] (corners x0, y0, x1, y1 in pixels), `labels` [n]
    from 1 to C and `masks` [n, H, W], n >= 0. It returns `loss` and its parts `loss_classifier`, `loss_box_reg`,
    `loss_mask`, `loss_objectness` and `loss_rpn_box_reg`. Evaluation returns {"detections": [one dict per image]} with
    `boxes` [n, 4], `labels` [n], `scores` [n] in descending order and `masks` [n, 1, H, W] from 0 to 1, in the image's
    original size.

    Args:
        num_classes: C without the background, which is added here as label 0. Taken from the data if omitted.
        norm: as for classifiers, or "Frozen": fixed norms in the backbone, none in pyramid and heads. `MABN` centres
            the filters of the backbone, the pyramid and both heads.
        trainable_layers: how many parts of the ResNet learn, from the last: 5 all, 3 all but conv1 and layer1, 0 none.
        min_size, max_size: evaluation resizes the shorter side to `min_size` pixels, or less if the longer side would
            exceed `max_size`.
        box_head: "4conv1fc", or "2fc" as in torchvision's checkpoints.
        fpn_channels, head_channels, fc_dim: widths (256, 256, 1024 in the paper).
        anchor_sizes: five sizes in pixels, for the strides 4 to 64.
        rpn_*, box_*, image_mean, image_std: as in `torchvision.models.detection.MaskRCNN`.
    Raises:
        ConfigError: a value out of range or an unknown name. ValueError: training without targets.
    """

    task = "detection"

    def __init__(self, num_classes: int | None = None, norm: str | dict = "BatchNorm2d",
                 trainable_layers: int = 5, min_size: int = 800, max_size: int = 1333, box_head: str = "4conv1fc",
                 fpn_channels: int = 256, head_channels: int = 256, fc_dim: int = 1024,
                 anchor_sizes: list[int] = (32, 64, 128, 256, 512),  # a tuple: an immutable default
                 rpn_batch_size_per_image: int = 256, rpn_pre_nms_top_n_train: int = 2000,
                 rpn_post_nms_top_n_train: int = 2000, rpn_pre_nms_top_n_test: int = 1000,
                 rpn_post_nms_top_n_test: int = 1000, box_batch_size_per_image: int = 512,
                 box_score_thresh: float = 0.05, box_nms_thresh: float = 0.5, box_detections_per_img: int = 100,
                 image_mean: list[float] = (0.485, 0.456, 0.406), image_std: list[float] = (0.229, 0.224, 0.225)):
        _check(locals())
        kind, norm_args = norm_spec(norm, "arch.args.norm")
        frozen = kind == "Frozen"
        norm_layer = None if frozen else nn.BatchNorm2d
        body = resnet50(weights=None, norm_layer=nn.BatchNorm2d)
        backbone = BackboneWithFPN(body, {f"layer{k + 1}": str(k) for k in range(4)}, [256, 512, 1024, 2048],
                                   fpn_channels, norm_layer=norm_layer)
        box = (TwoMLPHead(fpn_channels * 7 * 7, fc_dim) if box_head == "2fc" else
               BoxHead((fpn_channels, 7, 7), [head_channels] * 4, [fc_dim], norm_layer=norm_layer))
        levels = ["0", "1", "2", "3"]
        super().__init__(
            backbone, None, min_size=min_size, max_size=max_size, image_mean=list(image_mean),
            image_std=list(image_std),
            rpn_anchor_generator=AnchorGenerator(tuple((size,) for size in anchor_sizes), ((0.5, 1.0, 2.0),) * 5),
            rpn_batch_size_per_image=rpn_batch_size_per_image, rpn_pre_nms_top_n_train=rpn_pre_nms_top_n_train,
            rpn_post_nms_top_n_train=rpn_post_nms_top_n_train, rpn_pre_nms_top_n_test=rpn_pre_nms_top_n_test,
            rpn_post_nms_top_n_test=rpn_post_nms_top_n_test, box_head=box,
            box_predictor=FastRCNNPredictor(fc_dim, num_classes + 1),
            box_batch_size_per_image=box_batch_size_per_image, box_score_thresh=box_score_thresh,
            box_nms_thresh=box_nms_thresh, box_detections_per_img=box_detections_per_img,
            mask_roi_pool=MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
            mask_head=MaskHead(fpn_channels, [head_channels] * 4, 1, norm_layer=norm_layer),
            mask_predictor=MaskRCNNPredictor(head_channels, head_channels, num_classes + 1),
            _skip_resize=True)
        self.num_classes, self.feat_dim = num_classes, fc_dim
        self._convert_norms(kind, norm_args)
        trained = STAGES[:trainable_layers] + (("bn1",) if trainable_layers == 5 else ())
        for name, parameter in self.backbone.body.named_parameters():
            parameter.requires_grad_(name.startswith(trained) if trained else False)

    def _convert_norms(self, kind: str, args: dict[str, Any]) -> None:
        if kind == "BatchNorm2d" and not args:
            return
        # Only these parts: the RPN and the predictors have no norms, so MABN must not centre their filters.
        for part in (self.backbone, self.roi_heads.box_head, self.roi_heads.mask_head):
            convert_norm(part, kind, path="arch.args.norm", **args)

    def forward(self, images: Sequence[torch.Tensor] | torch.Tensor,
                target: list[dict[str, torch.Tensor]] | None = None) -> dict[str, Any]:
        if not self.training:
            return {"detections": super().forward(list(images))}
        if target is None:
            raise ValueError("a detector in training needs the targets too: model(images, targets)")
        losses = super().forward(list(images), target)
        return {"loss": sum(losses.values()), **losses}

    # ---- BaseModel's interface ---------------------------------------------------------------------------------

    def load_pretrained(self, checkpoint: dict[str, Any], name: str, other_classes: bool = False) -> str:
        """Initialise the model with a file's weights; returns a line for the log.

        Args:
            checkpoint: ImageNet weights of a ResNet-50 (this project's, torchvision's, or MABN's R50-wc.pth), or a
                whole detector's (parts that depend on the number of classes may differ).
            name: the file's name, for messages.
            other_classes: whether it was trained on other classes, even if as many: the parts that depend on the
                classes then keep their initialisation.
        Raises:
            ConfigError: it holds neither, or tensors are missing or of other shapes.
        """
        return fit_weights(self, checkpoint, name, other_classes)

    def classifier_prefixes(self) -> list[str]:
        """Name prefixes of the parameters that depend on the classes."""
        return ["roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits."]


def _check(given: dict[str, Any]) -> None:
    where = "arch.args"
    if given["num_classes"] is None:
        raise ConfigError(f"{where}.num_classes: missing; give the number of classes, the background not counted")
    counts = ("num_classes", "min_size", "max_size", "fpn_channels", "head_channels", "fc_dim",
              "rpn_batch_size_per_image", "rpn_pre_nms_top_n_train", "rpn_post_nms_top_n_train",
              "rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_test", "box_batch_size_per_image", "box_detections_per_img")
    for key in counts:
        if given[key] < 1:
            raise ConfigError(f"{where}.{key}: {given[key]} should be 1 or more")
    for key in ("box_score_thresh", "box_nms_thresh"):
        if not 0 <= given[key] <= 1:
            raise ConfigError(f"{where}.{key}: {given[key]} should be from 0 to 1")
    if given["max_size"] < given["min_size"]:
        raise ConfigError(f"{where}.max_size: {given['max_size']} is under min_size {given['min_size']}")
    if not 0 <= given["trainable_layers"] <= 5:
        raise ConfigError(f"{where}.trainable_layers: {given['trainable_layers']} should be from 0 to 5")
    if given["box_head"] not in BOX_HEADS:
        raise unknown(f"{where}.box_head", given["box_head"], BOX_HEADS, "box head")
    if len(given["anchor_sizes"]) != 5 or min(given["anchor_sizes"]) < 1:
        raise ConfigError(f"{where}.anchor_sizes: {list(given['anchor_sizes'])} should be five sizes above 0, one for "
                          "each of the strides 4, 8, 16, 32 and 64")
    for key in ("image_mean", "image_std"):
        if len(given[key]) != 3 or (key == "image_std" and min(given[key]) <= 0):
            raise ConfigError(f"{where}.{key}: {list(given[key])} should be three numbers"
                              + (" above 0" if key == "image_std" else ""))
