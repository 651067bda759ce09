"""Residual blocks and their shortcuts, shared by every ResNet and ResNeXt here (He et al., CVPR 2016)."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.norm.act import norm_relu
from utils.errors import ConfigError


def conv3x3(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with padding 1 and no bias."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, groups=groups, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


class PadShortcut(nn.Module):
    """Shortcut option A: every `stride`-th pixel, with zero channels added half before and half after; no parameters.

    x `[N, inputs, H, W]` -> `[N, outputs, ceil(H / stride), ceil(W / stride)]`. If the number of new channels is odd,
    the larger half comes after; with fewer outputs than inputs, channels are cut off in the same way.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        before = (outputs - inputs) // 2
        self.stride, self.padding = stride, (0, 0, 0, 0, before, outputs - inputs - before)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # 1x1 pooling equals slicing, but its backward is one pass, where slicing's fills and copies twice.
        return F.pad(F.avg_pool2d(x, 1, self.stride), self.padding)


def projection(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Shortcut option B: a 1x1 convolution and a norm. x `[N, inputs, H, W]` -> `[N, outputs, H / stride, W / stride]`.
    """
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. x `[N, inputs, H, W]` -> `[N, planes, H / stride, W / stride]`.

    The norms are called `bn1`, `bn2` whatever their type, so that old weights load.
    """

    expansion = 1
    last_norm = "bn2"

    def __init__(self, inputs: int, planes: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = conv3x3(inputs, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(out), x if self.downsample is None else self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions. x `[N, inputs, H, W]` -> `[N, 4 * planes, H / stride,
    W / stride]`.

    `groups` and `base_width` make it ResNeXt's block (Xie et al., CVPR 2017): the 3x3 convolution has
    floor(planes * base_width / 64) channels in each of its groups. Raises ConfigError if that is 0.
    """

    expansion = 4
    last_norm = "bn3"

    def __init__(self, inputs: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
                 groups: int = 1, base_width: int = 64):
        super().__init__()
        width = planes * base_width // 64 * groups
        if width < 1:
            raise ConfigError(f"arch.args: a stage {planes} wide leaves no channel for {groups} groups; "
                              f"layerN_output_dim must be {-(-64 // base_width)} or more")
        outputs = planes * self.expansion
        self.conv1 = conv1x1(inputs, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = norm_relu(self.bn1, self.conv1(x))
        out = norm_relu(self.bn2, self.conv2(out))
        return norm_relu(self.bn3, self.conv3(out), x if self.downsample is None else self.downsample(x))
