"""How long the norms take: ours against batch norm in training, folded against plain networks in evaluation.

Training is timed for a single layer, the worst case for the fixed cost of a norm's vectors, and for a whole network.

    python -m benchmarks.norms [--only layers|networks|folding] [--cpu-time] [--json FILE] [--threads N] [--rounds N]

Every ratio is the median over rounds of (ours / torch.nn.BatchNorm2d), both timed in the same round; quartiles follow.
"""
from __future__ import annotations

import sys

import torch
from torch import nn

from benchmarks.timing import begin, finish, interleave, parser, spread, timed
from model.native.build import compiler
from model.norm import BatchRenorm2d, MABN2d, NormalizedBatchNorm2d, compile_norms, convert_norm, fold_norm
from model.norm.grouped import GroupedBatchNorm2d
from tools.allocator import keep_freed_memory
from trainer.precision import autocast, choose_precision

SHAPES = ((32, 64, 56, 56), (128, 16, 32, 32))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# The most time over batch norm's that we accept: for a layer alone, and for a network of them.
LIMITS = {"MABN": 1.5, "NBN": 1.25, "BatchRenorm": None, "BN of 2": None}
NETWORK_LIMITS = {"MABN": 1.10, "NBN": 1.04}


def training_step(layer: nn.Module, shape: tuple[int, ...], memory_format: torch.memory_format):
    """A function that runs `layer` forward and backward once on a fixed float32 input."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).contiguous(memory_format=memory_format) for _ in range(2))
    x.requires_grad_()

    def step():
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(dy)
    return step


def layers(channels: int) -> dict[str, nn.Module]:
    """Batch norm and our norms: MABN past its warm-up, so that the buffers are in use; `BN of 2` normalises by groups
    of two images within the batch."""
    mabn = MABN2d(channels, B=2, real_B=32)
    mabn.iters.fill_(1001)
    mabn.buffer_x2.fill_(1.0)
    owner = nn.Module()
    owner.scale_factor = nn.Parameter(torch.ones(1))
    nbn = NormalizedBatchNorm2d(channels)
    nbn.share_scale(owner)
    return {"BN": nn.BatchNorm2d(channels), "MABN": mabn, "NBN": nbn,
            "BatchRenorm": BatchRenorm2d(channels), "BN of 2": GroupedBatchNorm2d(channels)}


def time_training(rounds: int) -> list[dict]:
    """Forward and backward passes of each norm alone, against batch norm's."""
    results = []
    for shape in SHAPES:
        for name, memory_format in FORMATS.items():
            timing = interleave({norm: training_step(layer, shape, memory_format)
                                 for norm, layer in layers(shape[1]).items()}, rounds, warmup=5, budget=15)
            for norm, limit in LIMITS.items():
                ratio = timing.ratio(norm, "BN")
                results.append({"norm": norm, "shape": shape, "format": name, "ratio": ratio, "limit": limit,
                                "bn_ms": timing.median("BN") * 1e3})
                held = f"limit {limit:.2f}x" if limit else " " * 11
                print(f"{norm:11} {list(shape)!s:18} {name:14} {spread(ratio):24} {held}   "
                      f"(BN {timing.median('BN') * 1e3:.2f} ms)")
    return results


def time_networks(rounds: int, cpu_time: bool) -> list[dict]:
    """A training step, without the optimizer, of ResNet-32 on 128 images of 32 x 32, for each norm; `compiled`: with
    `trainer.compile: "norms"`."""
    from model.model import ResNet32Model
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(128, 3, 32, 32, generator=generator)
    labels = torch.randint(100, (128,), generator=generator)

    def step(norm, memory_format, amp, compiled):
        net = ResNet32Model(num_classes=100, num_experts=1, norm=norm).to(memory_format=memory_format).train()
        given = images.contiguous(memory_format=memory_format)
        for layer in net.modules():
            if isinstance(layer, MABN2d):
                layer.iters.fill_(1001)                # past the warm-up, so that the buffers are in use
                layer.buffer_x2.fill_(1.0)
        if compiled:
            compile_norms(net)

        def run():
            net.zero_grad(set_to_none=True)
            with autocast(torch.device("cpu"), amp):
                loss = nn.functional.cross_entropy(net(given)["output"], labels)
            loss.backward()
        return timed(run, cpu_time)

    norms = {"BN": "BatchNorm2d", "MABN": {"type": "MABN", "args": {"B": 128, "real_B": 2048}},
             "NBN": {"type": "NBN", "args": {"where": "all"}}}
    kinds = [(name, spec, False) for name, spec in norms.items()]
    if compiler() is not None:
        kinds += [(f"{name}, compiled", spec, True) for name, spec in norms.items()]
    results, (half, why) = [], choose_precision("auto", "cpu")
    if half == "off":
        print(f"float32 alone: {why}")
    for amp, precision in (("off", "float32"), ("bf16", "bf16"))[:1 if half == "off" else 2]:
        for name, memory_format in FORMATS.items():
            timing = interleave({kind: step(spec, memory_format, amp, compiled) for kind, spec, compiled in kinds},
                                rounds, warmup=2, budget=90)
            for kind, _, _ in kinds[1:]:
                ratio, limit = timing.ratio(kind, "BN"), NETWORK_LIMITS.get(kind)
                results.append({"norm": kind, "precision": precision, "format": name, "ratio": ratio, "limit": limit,
                                "bn_ms": timing.median("BN") * 1e3})
                held = f"limit {limit:.2f}x" if limit else " " * 11
                print(f"{kind:15} {precision:8} {name:14} {spread(ratio):24} {held}   "
                      f"(BN {timing.median('BN') * 1e3:.0f} ms)", flush=True)
    return results


@torch.no_grad()
def time_folding(rounds: int) -> list[dict]:
    """Images per second of a ResNet-18 at 128 x 128, with each norm as it is and folded, against plain batch norm."""
    import torchvision
    images = torch.randn(8, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    nets = {norm: convert_norm(torchvision.models.resnet18(), norm).eval()
            for norm in ("BatchNorm2d", "MABN", "GroupNorm", "LayerNorm", "InstanceNorm")}
    nets |= {"BatchNorm2d, folded": fold_norm(nets["BatchNorm2d"]), "MABN, folded": fold_norm(nets["MABN"])}
    timing = interleave({name: (lambda net=net: net(images)) for name, net in nets.items()}, rounds, budget=30)
    results = []
    for name in nets:
        speed_up = timing.speed_up(name, "BatchNorm2d")
        rate = len(images) / timing.median(name)
        results.append({"network": name, "speed_up": speed_up, "images_per_second": rate})
        print(f"{name:20} {rate:7.1f} images/s   {spread(speed_up)} of BatchNorm2d's speed")
    return results


def main() -> int:
    """The command; returns the exit status."""
    flags = parser(__doc__.splitlines()[0], cpu_time=True)
    flags.add_argument("--only", choices=["layers", "networks", "folding"], help="this part alone")
    args = flags.parse_args()
    keep_freed_memory()
    begin(args)
    results = {}
    if args.only in (None, "layers"):
        print("\nTraining, forward + backward, float32: time over BatchNorm2d's")
        results["training"] = time_training(args.rounds or 100)
    if args.only in (None, "networks"):
        print("\nTraining step, ResNet-32 of one expert, 128 images: time over batch norm's")
        results["networks"] = time_networks(args.rounds or 12, args.cpu_time)
    if args.only in (None, "folding"):
        print("\nEvaluation, ResNet-18, 8 images of 128 x 128")
        results["inference"] = time_folding(args.rounds or 20)
    finish("norms", results, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
