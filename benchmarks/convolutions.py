"""The compiled 3x3 convolutions (`trainer.compile: "layers"`) against torch's own, pass by pass.

    python -m benchmarks.convolutions [--cpu-time] [--threads N] [--rounds N] [--json FILE]

channels_last, stride 1, on shapes of ResNet-32 (batch 128) and ResNet-50 (batch 32), in float32 and, where the CPU
has instructions for it, bfloat16 (where ours also takes filters in float32); each pass of both sides in turns. Errors
are the largest difference from float64, as a share of the result's standard deviation.
"""
from __future__ import annotations

import itertools
import sys
from functools import partial

import torch

from benchmarks.timing import begin, finish, interleave, parser, spread, timed
from model.native.build import compiler
from model.native.winograd import compiled
from tools.allocator import keep_freed_memory
from trainer.precision import choose_precision

SHAPES = ((128, 16, 32), (128, 32, 16), (128, 64, 8), (32, 64, 56), (32, 128, 28), (32, 256, 14), (32, 512, 7))


def gradient(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, of: int) -> torch.Tensor:
    """torch's gradient of only the input (of = 0) or the filters (1)."""
    return torch.ops.aten.convolution_backward(dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
                                               [of == 0, of == 1, False])[of]


def main() -> int:
    """The command; returns the exit status."""
    args = parser(__doc__.splitlines()[0], threads=1, cpu_time=True).parse_args()
    begin(args)
    if compiler() is None:
        print("nothing to compare: no C++ compiler")
        return 0
    keep_freed_memory()
    fast, results = compiled(), {}
    passes = {"forward": (lambda x, w, dy: fast.forward(x, w), lambda x, w, dy: torch.conv2d(x, w, padding=1)),
              "input gradient": (lambda x, w, dy: fast.input_gradient(dy, w), partial(gradient, of=0)),
              "filter gradient": (lambda x, w, dy: fast.filter_gradient(x, dy), partial(gradient, of=1))}
    kinds = {"float32": torch.float32, "bf16": torch.bfloat16}
    if choose_precision("auto", "cpu")[0] != "bf16":
        del kinds["bf16"]
    for (n, channels, size), (kind, dtype) in itertools.product(SHAPES, kinds.items()):
        x, dy = (torch.randn(n, channels, size, size).to(dtype, memory_format=torch.channels_last) for _ in range(2))
        weight = (torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5).to(memory_format=torch.channels_last)
        half = weight.to(dtype)
        for name, (ours, torchs) in passes.items():
            sides = {"ours": partial(ours, x, weight, dy), "torch": partial(torchs, x, half, dy)}
            timing = interleave({side: timed(run, args.cpu_time) for side, run in sides.items()}, args.rounds or 9)
            exact = torchs(x.double(), weight.double(), dy.double())
            errors = [((run().double() - exact).abs().max() / exact.std()).item() for run in sides.values()]
            row = results[f"{n}x{channels}x{size}x{size}, {kind}, {name}"] = {
                "speed_up": timing.speed_up("ours", "torch"), "ours_ms": timing.median("ours") * 1e3,
                "torch_ms": timing.median("torch") * 1e3,
                "error": errors[0], "torch_error": errors[1]}
            print(f"[{n}, {channels}, {size}, {size}] {kind} {name:16} {spread(row['speed_up'])} as fast as torch's "
                  f"{row['torch_ms']:.1f} ms; errors {errors[0]:.1e} and {errors[1]:.1e}", flush=True)
    finish("convolutions", results, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
