"""The ResNet family: CIFAR's and ImageNet's, one expert or several on a shared trunk (RIDE; Wang et al., ICLR 2021).

State_dict keys and registration order are RIDE's: stage n is `layer{n}` if it is shared or there is one expert, and
`layer{n}s` if every expert has its own. So an expert isn't a module: `expert_feat` picks its stages by index.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from model.blocks import PadShortcut, projection
from model.experts import ExpertNet, nbn_stages
from model.norm.act import norm_relu
from model.norm.facts import is_norm
from utils.errors import ConfigError


def init_cifar(module: nn.Module) -> None:
    """Initialise the weights of all convolutions and `nn.Linear`s (also BatchFormer's and the gates') with
    Kaiming-normal, fan-in."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight)


def init_imagenet(module: nn.Module) -> None:
    """Initialise convolutions with normal(0, std sqrt(2 / (k * k * out))) and norms with weight 1 and bias 0; linear
    layers keep torch's initialisation."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            kernel = part.kernel_size[0] * part.kernel_size[1]
            nn.init.normal_(part.weight, 0.0, (2 / (kernel * part.out_channels)) ** 0.5)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


@dataclass(frozen=True)
class Layout:
    """What distinguishes the CIFAR and ImageNet families, apart from blocks and depths."""

    widths: tuple[int, ...]                 # channels of each stage, before the block's expansion
    reduced: tuple[int, ...]                # the same with `reduce_dimension`
    first_private: int                      # the first stage (from 1) that isn't shared by experts
    stem: dict[str, int]                    # kernel_size, stride, padding of conv1
    pool: bool                              # whether a 3x3 max pool with stride 2 follows the stem
    shortcut: Callable[[int, int, int], nn.Module]
    init: Callable[[nn.Module], None]

    def stage_widths(self, reduce_dimension: bool, overrides: dict[int, int | None]) -> tuple[int, ...]:
        """Channels of stages 1, 2, ...: the layout's, replaced by `overrides` (stage -> width, None: keep). Raises
        ConfigError for a stage that doesn't exist or a width below 1."""
        widths = list(self.reduced if reduce_dimension else self.widths)
        for stage, width in overrides.items():
            if width is None:
                continue
            if stage > len(widths):
                raise ConfigError(f"arch.args.layer{stage}_output_dim: this architecture has {len(widths)} stages")
            if width < 1:
                raise ConfigError(f"arch.args.layer{stage}_output_dim: {width} should be 1 or more")
            widths[stage - 1] = width
        return tuple(widths)


CIFAR = Layout(widths=(16, 32, 64), reduced=(16, 24, 48), first_private=2,
               stem=dict(kernel_size=3, stride=1, padding=1), pool=False, shortcut=PadShortcut, init=init_cifar)
IMAGENET = Layout(widths=(64, 128, 256, 512), reduced=(64, 128, 192, 384), first_private=3,
                  stem=dict(kernel_size=7, stride=2, padding=3), pool=True, shortcut=projection, init=init_imagenet)


def make_stage(layout: Layout, block: type[nn.Module], inputs: int, planes: int, depth: int, stride: int,
               block_args: dict[str, int]) -> nn.Sequential:
    """A stage of `depth` blocks. The first has the stride, and the layout's shortcut if it changes the shape."""
    outputs = planes * block.expansion
    shortcut = layout.shortcut(inputs, outputs, stride) if stride != 1 or inputs != outputs else None
    blocks = [block(inputs, planes, stride, shortcut, **block_args)]
    blocks += [block(outputs, planes, **block_args) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


class ResNet(ExpertNet):
    """Stem, shared stages, then each expert's own stages and head; BatchFormer before the heads if `add_bt` isn't 0.

    Inputs and outputs: see `model.experts.ExpertNet`. Arguments: see `model.model.Model`; `block_args` are those of
    `block`.
    """

    def __init__(self, *, layout: Layout, block: type[nn.Module], depths: tuple[int, ...], widths: tuple[int, ...],
                 num_classes: int, num_experts: int = 1, share_layer3: bool = False, classifier: str = "linear",
                 s: float = 30.0, use_experts: list[int] | str | None = None, dropout: float = 0.0, add_bt: int = 0,
                 eval_bt: bool = False, shared_classifier: bool = False, bt_gather: bool = False,
                 bt_weights: tuple[float, float] = (1.0, 1.0), **block_args: int):
        super().__init__(num_classes=num_classes, feat_dim=widths[-1] * block.expansion, num_experts=num_experts,
                         use_experts=use_experts, eval_bt=eval_bt, shared_classifier=shared_classifier,
                         bt_gather=bt_gather, bt_weights=bt_weights)
        self.num_stages = len(depths)
        self.init = layout.init
        self.first_private = layout.first_private + (1 if share_layer3 else 0)
        if num_experts == 1:
            self.first_private = self.num_stages + 1

        stem = layout.widths[0]
        self.conv1 = nn.Conv2d(3, stem, **layout.stem, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if layout.pool else nn.Identity()

        inputs = stem
        for n, (depth, planes) in enumerate(zip(depths, widths, strict=True), start=1):
            stage = partial(make_stage, layout, block, inputs, planes, depth, 1 if n == 1 else 2, block_args)
            if n < self.first_private:
                self.add_module(f"layer{n}", stage())
            else:
                self.add_module(f"layer{n}s", nn.ModuleList([stage() for _ in range(num_experts)]))
            inputs = planes * block.expansion
        self.add_heads(classifier, s, dropout, add_bt)
        layout.init(self)  # last, so that nothing above can change the initial weights

    def stage(self, n: int, expert: int = 0) -> nn.Sequential:
        """Stage n (from 1) as used by `expert` (from 0)."""
        return getattr(self, f"layer{n}") if n < self.first_private else getattr(self, f"layer{n}s")[expert]

    # ---- forward -----------------------------------------------------------------------------------------------

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        """The part that all experts share: x `[N, 3, H, W]` -> maps `[N, c, h, w]`."""
        x = self.maxpool(norm_relu(self.bn1, self.conv1(x)))
        for n in range(1, min(self.first_private, self.num_stages + 1)):
            x = self.stage(n)(x)
        return x

    def expert_feat(self, shared: torch.Tensor, expert: int) -> torch.Tensor:
        """The pooled features of one expert (index from 0): shared maps `[N, c, h, w]` -> `[N, D]`."""
        for n in range(self.first_private, self.num_stages + 1):
            shared = self.stage(n, expert)(shared)
        return shared.mean((2, 3))

    # ---- for norm conversion -----------------------------------------------------------------------------------

    def nbn_scope(self, where: str | list[int] = "last") -> list[list[nn.Module]]:
        """The norms that NBN replaces, one list per expert, whose norms share a scale (Bao et al., TIP 2024).

        where: "last" (stage), a list of stage numbers (from 1), or "all" (the stem's and every block's norms). With
        several experts these are all norms of the chosen stages; with one expert, unless `where` is "all", only each
        block's last norm and its shortcut's. Norms in shared stages use expert 0's scale.
        Raises ConfigError for any other `where`.
        """
        chosen = nbn_stages(where, list(range(1, self.num_stages + 1)))
        inner = where == "all" or self.num_experts > 1
        scope: list[list[nn.Module]] = [[] for _ in range(self.num_experts)]
        if where == "all":
            scope[0].append(self.bn1)
        for n in chosen:
            for expert in range(self.num_experts if n >= self.first_private else 1):
                for block in self.stage(n, expert):
                    outer = [getattr(block, block.last_norm), *(block.downsample or nn.Identity()).modules()]
                    parts = block.modules() if inner else outer
                    scope[expert] += [part for part in parts if is_norm(part)]
        return scope
