"""The compiled 3x3 convolutions (`trainer.compile: "layers"`) against torch's own, pass by pass.

    python -m benchmarks.convolutions [--cpu-time] [--threads N] [--rounds N] [--json FILE]

float32, channels_last, stride 1, on shapes of ResNet-32 (batch 128) and ResNet-50 (batch 32); each pass of both sides
in turns. Errors are the largest difference from float64, as a share of the result's standard deviation.
"""
from __future__ import annotations

import sys
from functools import partial

import torch

from benchmarks.timing import begin, finish, interleave, parser, spread, timed
from model.native.build import compiler
from model.native.winograd import compiled
from tools.allocator import keep_freed_memory

SHAPES = ((128, 16, 32), (128, 32, 16), (128, 64, 8), (32, 64, 56), (32, 128, 28), (32, 256, 14), (32, 512, 7))


def gradient(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, of: int) -> torch.Tensor:
    """torch's gradient of the input (0) or of the filters (1), alone."""
    return torch.ops.aten.convolution_backward(dy, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
                                               [of == 0, of == 1, False])[of]


def main() -> int:
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
    for n, channels, size in SHAPES:
        x, dy = (torch.randn(n, channels, size, size).contiguous(memory_format=torch.channels_last) for _ in range(2))
        weight = (torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5).to(memory_format=torch.channels_last)
        for name, (ours, torchs) in passes.items():
            timing = interleave({"ours": timed(partial(ours, x, weight, dy), args.cpu_time),
                                 "torch": timed(partial(torchs, x, weight, dy), args.cpu_time)}, args.rounds or 9)
            exact = torchs(x.double(), weight.double(), dy.double())
            errors = [((run(x, weight, dy).double() - exact).abs().max() / exact.std()).item()
                      for run in (ours, torchs)]
            row = results[f"{n}x{channels}x{size}x{size}, {name}"] = {
                "speed_up": timing.speed_up("ours", "torch"), "ours_ms": timing.median("ours") * 1e3,
                "torch_ms": timing.median("torch") * 1e3,
                "error": errors[0], "torch_error": errors[1]}
            print(f"[{n}, {channels}, {size}, {size}] {name:16} {spread(row['speed_up'])} as fast as torch's "
                  f"{row['torch_ms']:.1f} ms; errors {errors[0]:.1e} and {errors[1]:.1e}", flush=True)
    finish("convolutions", results, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
