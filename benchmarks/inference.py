"""Images per second in evaluation: plain, folded, channels_last, compiled and routed, in one table; MABN folded too.

    python -m benchmarks.inference [--batch N] [--rounds N] [--compile] [--json FILE]

RIDE's ResNet-32 with 3 experts, 32 x 32. All sides run in turns on the same images in float32, and each one's outputs
are compared with its plain twin's before anything is timed. Weights are random and norm statistics are made up: neither
matters for the speed. Each gate is biased so that half of all images would ask for another expert.
"""
from __future__ import annotations

import sys
from functools import partial

import torch
from torch import nn

from benchmarks.timing import begin, finish, interleave, parser, spread, timed
from model.model import build_model
from model.norm import MABN2d, fold_norm
from tools.allocator import keep_freed_memory

TOLERANCE = 1e-4     # largest allowed difference, as a share of the largest output


def network(kind: str = "ResNet32Model", **args: object) -> nn.Module:
    """A model in evaluation mode whose norms aren't the identity."""
    torch.manual_seed(0)
    model = build_model({"type": kind, "args": {"reduce_dimension": True, "num_experts": 3, **args}}, num_classes=100)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d | MABN2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.running_var, 5, 20)
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.running_mean)
    return model.eval()


def channels_last(model: nn.Module) -> nn.Module:
    """`model`, its weights in NHWC memory."""
    return model.to(memory_format=torch.channels_last)


def check(name: str, fast: torch.Tensor, slow: torch.Tensor) -> float:
    """The largest difference as a share of the largest output; ends the benchmark where it exceeds TOLERANCE."""
    away = ((fast - slow).abs().max() / slow.abs().max()).item()
    if not away <= TOLERANCE:
        sys.exit(f"{name}: outputs differ by {away:.2g} of the largest")
    return away


def routed(images: torch.Tensor) -> tuple[nn.Module, list[float]]:
    """A folded expert-assignment model, and the shares of images that use 1, 2, 3 experts."""
    model = channels_last(fold_norm(network("ResNet32EAModel", share_expert_help_pred_fc=False)))
    model.route = False
    outputs = model(images)
    for gate, said in zip(model.gates(), model.gate_logits(outputs["feat"], outputs["logits"]).unbind(1)):
        gate.bias -= said.quantile(0.5)
    slow = model(images)
    model.route = True
    fast = model(images)
    check("routed", fast["output"], slow["output"])
    used = fast["sample_num_experts"]
    assert torch.equal(used, slow["sample_num_experts"])
    return model, (used.bincount(minlength=4)[1:] / len(used)).tolist()


@torch.no_grad()
def main() -> int:
    """The command; returns the exit status."""
    flags = parser(__doc__.splitlines()[0], cpu_time=True)
    flags.add_argument("--batch", type=int, default=128, help="images a batch (default: %(default)s)")
    flags.add_argument("--compile", action="store_true", help="time torch.compile too (compiling takes a minute)")
    args = flags.parse_args()
    keep_freed_memory()
    begin(args)
    nchw = torch.randn(args.batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    nhwc = nchw.contiguous(memory_format=torch.channels_last)

    plain, mabn = network(), network(norm="MABN")
    assigned, shares = routed(nhwc)
    every = network("ResNet32EAModel")
    every.route = False
    models = {"plain": (plain, nchw), "folded": (fold_norm(plain), nchw),
              "channels_last": (channels_last(network()), nhwc),
              "folded, channels_last": (channels_last(fold_norm(plain)), nhwc),
              "MABN": (mabn, nchw), "MABN folded, channels_last": (channels_last(fold_norm(mabn)), nhwc),
              "EA, every expert": (every, nchw), "EA, routed, folded, channels_last": (assigned, nhwc)}
    if args.compile:
        models["folded, channels_last, compiled"] = (torch.compile(channels_last(fold_norm(plain))), nhwc)
    twins = {"MABN folded, channels_last": "MABN", **dict.fromkeys(
        ("folded", "channels_last", "folded, channels_last", "folded, channels_last, compiled"), "plain")}
    outputs = {name: model(images)["output"] for name, (model, images) in models.items()}
    away = {name: check(name, outputs[name], outputs[twin]) for name, twin in twins.items() if name in outputs}

    timing = interleave({name: timed(partial(model, images), args.cpu_time)
                         for name, (model, images) in models.items()},
                        args.rounds or 15, budget=150)
    rows = []
    for name in models:
        speed_up = timing.speed_up(name, "plain")
        rows.append({"model": name, "images_per_second": args.batch / timing.median(name), "speed_up": speed_up,
                     "largest_difference": away.get(name)})
        differs = f"   differs by {away[name]:.0e}" if name in away else ""
        print(f"{name:34} {rows[-1]['images_per_second']:8.1f} images/s   {spread(speed_up):24}{differs}")
    promise = timing.ratio("MABN folded, channels_last", "folded, channels_last")
    print(f"time of MABN folded over batch norm folded: {spread(promise)}")
    print("share of images that used 1, 2, 3 experts: " + ", ".join(f"{share:.0%}" for share in shares))
    finish("inference", {"rows": rows, "mabn_over_bn_folded": promise, "expert_share": shares}, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
