"""Inferring the architecture that weights belong to from their names and shapes."""
from __future__ import annotations

import re
from typing import Any

import torch

from model.batchformer import DEPTHS
from model.blocks import BasicBlock, Bottleneck
from model.model import ARCHS
from model.resnet import CIFAR, IMAGENET
from model.routing import HIDDEN
from utils.errors import ConfigError

PREFIX = "backbone."


def infer_arch(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The config `{"type": ..., "args": {...}}` of the model that `weights` (under our keys) belong to.

    Infers the family and depth, experts, widths, the classifier and its classes, BatchFormer, the gates, NBN and MABN.
    Arguments that leave no trace in the weights (s, dropout, pos_weight, `add_bt` 32 or 33) keep their defaults.
    Raises ConfigError, without a file name, for weights of none of our architectures.
    """
    shapes = {key.removeprefix(PREFIX): tuple(value.shape) for key, value in weights.items() if key.startswith(PREFIX)}
    if "conv1.weight" not in shapes:
        raise ConfigError("its weights aren't of a ResNet that this project has (no conv1)")
    layout = CIFAR if shapes["conv1.weight"][-1] == 3 else IMAGENET
    stages = [_stage(shapes, n) for n in range(1, len(layout.widths) + 1)]
    experts = 1 + max((int(m[1]) for key in shapes if (m := re.match(r"(?:layer\d|linear)s\.(\d+)\.", key))), default=0)
    block = Bottleneck if stages[0] + "0.conv3.weight" in shapes else BasicBlock
    depths = tuple(len({key[len(stage):].split(".")[0] for key in shapes if key.startswith(stage)}) for stage in stages)
    second = shapes[stages[0] + "0.conv2.weight"]
    groups = second[0] // second[1] if block is Bottleneck else 1
    routed = any(key.startswith("expert_help_pred") for key in shapes)
    args = {**_classifier(shapes), "num_experts": experts, **_widths(shapes, layout, stages, block),
            **_block(shapes), **(_gates(shapes) if routed else {}), **_norm(shapes)}
    if layout is IMAGENET and experts > 1 and "layer3.0.conv1.weight" in shapes:
        args["share_layer3"] = True
    for name, arch in ARCHS.items():
        family = {"layout": IMAGENET, "groups": 1, **getattr(arch, "family", {})}
        if (family.get("depths"), family["groups"], family.get("block"), family["layout"],
                getattr(arch, "routed", False)) == (depths, groups, block, layout, routed):
            return {"type": name, "args": args}
    raise ConfigError(f"its weights aren't of a ResNet that this project has ({'-'.join(map(str, depths))} blocks)")


def _stage(shapes: dict, n: int) -> str:
    """The key prefix of stage n, for the first expert."""
    for start in (f"layer{n}.", f"layer{n}s.0."):
        if start + "0.conv1.weight" in shapes:
            return start
    raise ConfigError(f"its weights aren't of a ResNet that this project has (no layer{n})")


def _classifier(shapes: dict) -> dict[str, Any]:
    """`num_classes` and `classifier`. The cosine head stores [D, C] and has no bias."""
    head = "linear." if "linear.weight" in shapes else "linears.0."
    if head + "weight" not in shapes:
        raise ConfigError("it holds no classifier, only features; use it with --pretrained")
    if head + "bias" not in shapes:
        return {"num_classes": shapes[head + "weight"][1], "classifier": "cosine"}
    kinds = {"bn.weight": "linear_fcbn", "bn.running_mean": "linear_fcbn_notaffine", "scales": "lws"}
    kind = next((name for key, name in kinds.items() if head + key in shapes), "linear")
    return {"num_classes": shapes[head + "weight"][0], "classifier": kind}


def _widths(shapes: dict, layout: Any, stages: list[str], block: type) -> dict[str, Any]:
    """`reduce_dimension`, and `layerN_output_dim` for each stage whose width differs from that network's default."""
    last = "0.conv3.weight" if block is Bottleneck else "0.conv2.weight"
    widths = [shapes[stage + last][0] // block.expansion for stage in stages]
    reduced = widths[-1] == layout.reduced[-1]
    usual = layout.reduced if reduced else layout.widths
    if widths[0] != usual[0]:
        raise ConfigError(f"its weights aren't of a ResNet that this project has (first stage {widths[0]} wide)")
    return {"reduce_dimension": reduced, **{f"layer{n}_output_dim": width for n, (width, plain) in enumerate(
        zip(widths, usual, strict=True), start=1) if width != plain}}


def _block(shapes: dict) -> dict[str, Any]:
    """`add_bt`, from BatchFormer's number of layers."""
    layers = {m[1] for key in shapes if (m := re.match(r"encoder_layers\.layers\.(\d+)\.", key))}
    depth = len(layers) or int("encoder_layers.linear1.weight" in shapes)
    return {"add_bt": next(number for number, count in DEPTHS.items() if count == depth)} if depth in DEPTHS.values() \
        else {}


def _gates(shapes: dict) -> dict[str, Any]:
    """`top_choices_num`, and whether the gates share their last layer."""
    shared = "expert_help_pred_fc.weight" in shapes
    last = shapes.get("expert_help_pred_fc.weight" if shared else "expert_help_pred_fcs.0.weight", (1, HIDDEN + 5))
    return {"top_choices_num": last[1] - HIDDEN, "share_expert_help_pred_fc": shared}


def _norm(shapes: dict) -> dict[str, Any]:
    """`norm`, as far as the weights show it: NBN by its scale, MABN by running variances without means."""
    if "scale_factor" in shapes:
        return {"norm": {"type": "NBN"}}
    if "bn1.running_var" in shapes and "bn1.running_mean" not in shapes:
        history = shapes.get("bn1.buffer_x2", (16,))[0]
        return {"norm": {"type": "MABN", "args": {"B": 2, "real_B": 2 * history}}}
    return {}
