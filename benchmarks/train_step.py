"""A training epoch, data and validation included, against RIDE's own loop; and what the parts of a recipe cost.

    python -m benchmarks.train_step [--data_dir DIR] [--threads N] [--steps N] [--rounds N] [--only loop|parts|layers]
                                    [--profile] [--cpu-time] [--json FILE]

The loop: RIDE with 3 experts and BatchFormer on CIFAR-100-LT, ResNet-32, batch 128. Both sides train the same network
on the same images with the same loss and validate it on the test images, each in a process of its own. They take turns
of `--steps` training steps and the same share of the validation. Ours is the trainer as `train.py` runs it: in float32
and with `trainer.amp` "auto"; where there is a C++ compiler, the latter also with `trainer.compile` "norms", and both
with "layers". The original is `benchmarks.original`. Without `--data_dir` the images are noise, as many as CIFAR-100-LT
has: the pixels don't matter for the speed.

The parts: what averaging the weights, Muon in place of SGD, and an augmentation policy in place of the rotation add to
that training. Each is timed by itself, inside training steps (a policy: over whole epochs of its loader), because steps
differ from one another by more than the hundredth of a step that a part may cost.

The layers (`--only layers`): training steps with `trainer.compile` "norms", "layers", and without, each in a
process of its own.

`--cpu-time` counts CPU seconds instead of wall time, all in one thread and one process a side, for machines that are
busy with something else.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from functools import partial
from typing import Any

import torch

from benchmarks.sides import BATCH, COUNTS, SIDES
from benchmarks.timing import Timing, begin, finish, interleave, parser, spread
from data_loader.policies import DRAWS
from model.native.build import compiler
from trainer.precision import choose_precision

#: What we aim at, as ratios: how much faster epochs are with bf16 and without, and how much slower with each part.
TARGETS = {"bf16": 2.2, "off": 1.45}
LIMITS = {"ema": 1.03, **dict.fromkeys(DRAWS, 1.05)}


def serve(args: argparse.Namespace) -> None:
    """Build one side, then do what each line on stdin asks for and answer in JSON."""
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    answers = SIDES[args.side](args)
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


class Side:
    """The process of one side."""

    def __init__(self, name: str, args: argparse.Namespace):
        flags = ["--side", name, "--steps", args.steps, "--threads", args.threads]
        flags += ["--data_dir", args.data_dir] if args.data_dir else []
        flags += ["--cpu-time"] if args.cpu_time else []
        self.process = subprocess.Popen([sys.executable, "-m", "benchmarks.train_step", *map(str, flags)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> Any:
        """The side's answer to "go" or "profile"; ends the benchmark where its process has died."""
        print(what, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"a side ended with status {self.process.wait()}")
        return json.loads(answer)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()


# ---- what is printed -----------------------------------------------------------------------------------------------

def compare_loops(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Time epochs, validation included, of all sides in turns."""
    shown = {"original": "original", "ours, float32": "ours, float32"}
    if precision != "off":
        shown["ours, auto"] = f"ours, {precision}"
    if compiler():
        shown["ours, compiled norms"] = f"ours, {'float32' if precision == 'off' else precision}, compiled norms"
        shown["ours, compiled layers"] = "ours, float32, compiled layers"
        if precision != "off":
            shown["ours, auto, compiled layers"] = f"ours, {precision}, compiled layers"
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(Side(name, args)) for name in shown}
        timing = interleave({name: partial(side.ask, "go") for name, side in sides.items()}, args.rounds or 5,
                            warmup=1, budget=240)
        results: dict[str, Any] = {"steps": args.steps, "batch": BATCH, "target": TARGETS[precision], "sides": {}}
        for name, label in shown.items():
            rate = args.steps * BATCH / timing.median(name)
            results["sides"][name] = {"images_per_second": rate, "speed_up": timing.speed_up(name, "original")}
            print(f"{label:28} {rate:6.1f} images/s, validation included: {sum(COUNTS) / rate:.0f} s an epoch, "
                  f"{spread(timing.speed_up(name, 'original'))}")
        print(f"aim on this machine: {TARGETS[precision]}x")
        if args.profile:
            results["profile"] = {name: sides[name].ask("profile") for name in shown}
            for name, shares in results["profile"].items():
                print(f"{name}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))
    return results


def compare_parts(args: argparse.Namespace) -> dict[str, Any]:
    """What each part of a recipe adds to an epoch."""
    with Side("parts", args) as side:
        side.ask("go")     # the first turn is slow
        rounds = [side.ask("go") for _ in range(args.rounds or 9)]
    results: dict[str, Any] = {}
    for part in ("ema", "muon", *DRAWS):
        timing = Timing({"with": [turn["epoch"] + turn[part] for turn in rounds],
                         "without": [turn["epoch"] for turn in rounds]})
        added, ratio = statistics.median(turn[part] for turn in rounds), timing.ratio("with", "without")
        results[part] = {"ratio": ratio, "seconds_an_epoch": added, "limit": LIMITS.get(part)}
        bar = f"; at most {LIMITS[part]:.2f}x" if part in LIMITS else ""
        print(f"{part:14} {ratio['median']:.4f}x ({ratio['low']:.4f} to {ratio['high']:.4f}) of an epoch's time without"
              f" it, {added:.2f} s of {timing.median('without'):.1f}{bar}")
    return results


def compare_layers(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Time training steps with norms, or norms and convolutions, in C++, and without."""
    results: dict[str, Any] = {}
    for amp in ("off", *(["auto"] if precision != "off" else [])):
        names = ("without", "norms", "layers")
        with contextlib.ExitStack() as stack:
            sides = {name: stack.enter_context(Side(f"{name}, {amp}", args)) for name in names}
            timing = interleave({name: partial(side.ask, "go") for name, side in sides.items()}, args.rounds or 7,
                                warmup=1, budget=120)
        shown = "float32" if amp == "off" else precision
        results[shown] = {"speed_up": {name: timing.speed_up(name, "without") for name in names[1:]},
                          "step_s": {name: timing.median(name) / args.steps for name in names}}
        for name in names[1:]:
            print(f"trainer.compile \"{name}\", {shown}: {spread(results[shown]['speed_up'][name])} as fast as "
                  f"without, {results[shown]['step_s']['without']:.3f} s a step there")
    return results


def main() -> int:
    """The command; returns the exit status."""
    flags = parser(__doc__.splitlines()[0], cpu_time=True)
    flags.add_argument("--data_dir", help="where CIFAR-100 is (default: noise)")
    flags.add_argument("--steps", type=int, default=12, help="steps of a turn (default: %(default)s; 85 are an epoch)")
    flags.add_argument("--only", choices=("loop", "parts", "layers"), help="just these (default: loop and parts)")
    flags.add_argument("--profile", action="store_true", help="say where the time goes")
    flags.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.side:
        serve(args)
        return 0
    precision, why = choose_precision("auto", "cpu")
    begin(args)
    print(f"trainer.amp \"auto\" is {'float32' if precision == 'off' else precision} here: {why}")
    results: dict[str, Any] = {"data": args.data_dir or "noise", "precision": precision, "why": why,
                               "seconds": "CPU" if args.cpu_time else "wall"}
    if args.only in (None, "loop"):
        results["loop"] = compare_loops(args, precision)
    if args.only in (None, "parts"):
        results["parts"] = compare_parts(args)
    if args.only == "layers":
        results["layers"] = compare_layers(args, precision)
    finish("train_step", results, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
