"""Renaming EfficientNet weights from `EfficientNet-PyTorch` and its Lite ports to timm's names."""
from __future__ import annotations

import re

import torch

_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
# An inverted residual block (expand, depthwise, project; Sandler et al., CVPR 2018), and one without expansion.
_WIDENING = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
             "_project_conv": "conv_pwl", "_bn2": "bn3", **_SQUEEZE}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2", **_SQUEEZE}


def from_efficientnet(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`_blocks.3._project_conv.weight` -> `blocks.2.0.conv_pwl.weight`; unknown keys stay as they are.

    The file numbers its blocks consecutively, timm within stages. A stage is a run of blocks with the same output
    width, since neighbouring stages of an EfficientNet never have the same (Tan and Le, ICML 2019, table 1).
    """
    place: dict[str, str] = {}
    stage, block, width = -1, 0, 0
    widths = {int(match[1]): len(value) for key, value in weights.items()
              if (match := re.fullmatch(r"_blocks\.(\d+)\._project_conv\.weight", key))}
    for number in sorted(widths):
        stage, block = (stage, block + 1) if widths[number] == width else (stage + 1, 0)
        width, place[str(number)] = widths[number], f"blocks.{stage}.{block}"
    renamed = {}
    for key, value in weights.items():
        first, _, rest = key.partition(".")
        if first == "_blocks" and (number := rest.partition(".")[0]) in place:
            names = _WIDENING if f"_blocks.{number}._expand_conv.weight" in weights else _PLAIN
            part, _, last = rest.partition(".")[2].partition(".")
            key = f"{place[number]}.{names.get(part, part)}.{last}"
        elif first in _OUTSIDE:
            key = f"{_OUTSIDE[first]}.{rest}"
        renamed[key] = value
    return renamed
