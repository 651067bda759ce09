"""A bfloat16 training step of a network with depthwise convolutions: these in float32, as we train them, or not.

    python -m benchmarks.depthwise [--threads N] [--rounds N] [--json FILE]

EfficientNet-Lite0 as timm has it (`pip install timm`), random weights, 64 images of 112 pixels, channels_last, forward
and backward pass; whole, and with the first half of its stages frozen as `configs/image_folder.json` fine-tunes it.
Sides run in turns in one process; seconds are CPU time.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.timing import begin, finish, interleave, parser, spread, timed
from model.model import build_model
from trainer.precision import choose_precision

SIDES = {"float32": (False, True), "bfloat16": (True, False), "bfloat16, depthwise float32": (True, True)}


def network(frozen: float | None, steady: bool) -> nn.Module:
    """frozen: share of stages to freeze, or None. steady: with depthwise convolutions in float32."""
    torch.manual_seed(0)
    model = build_model({"type": "TimmModel", "args": {"model_name": "tf_efficientnet_lite0", "weights": False}}, 100)
    if not steady:
        for part in model.modules():
            part.__dict__.pop("forward", None)
    if frozen is not None:
        model.freeze(frozen)
    return model.to(memory_format=torch.channels_last).train()


def step(model: nn.Module, half: bool, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    """A forward and backward pass as a function that returns its CPU seconds; half: under bfloat16 autocast."""
    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = F.cross_entropy(model(images)["output"].float(), labels)
        loss.backward()
    return timed(run)


def main() -> None:
    """The command."""
    args = parser(__doc__.splitlines()[0]).parse_args()
    begin(args)
    half, why = choose_precision("auto", "cpu")
    if half == "off":
        print(f"nothing to compare: {why}")
        return
    images = torch.randn(64, 3, 112, 112).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(100, (64,))
    results = {}
    for frozen in (None, 0.5):
        what = "whole" if frozen is None else "half frozen"
        sides = {name: step(network(frozen, steady), half, images, labels) for name, (half, steady) in SIDES.items()}
        timing = interleave(sides, args.rounds or 7, warmup=1)
        for name in sides:
            row = results[f"{what}, {name}"] = {"seconds": timing.median(name),
                                                "speed_up": timing.speed_up(name, "bfloat16")}
            print(f"{what:12} {name:28} {row['seconds']:.3f} s of CPU   {spread(row['speed_up'])} as fast as bfloat16")
    finish("depthwise", results, args)


if __name__ == "__main__":
    main()
