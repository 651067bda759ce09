"""What a training step and an evaluation cost as classes, experts and the batch grow: time and peak memory.

    python -m benchmarks.scale [--json FILE] [--plot FILE.png] [--rounds N]

RIDE's ResNet-32 at 32 x 32 with its loss and metrics, channels_last, float32; each setting in a process of its own, so
that a peak is that setting's. Memory is what comes on top of an idle process with torch imported.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.timing import begin, cpu_seconds, finish, parser
from utils.device import peak_memory

BASE = {"classes": 100, "experts": 3, "batch": 64}
AXES = {"classes": (100, 1000, 8142), "experts": (1, 2, 4, 8), "batch": (16, 64, 256)}
MEGA = 1 << 20


def measure(classes: int, experts: int, batch: int, rounds: int, cpu_time: bool) -> dict[str, float]:
    """Median seconds of a training step and of an evaluation step, peak bytes, and bytes of the EvalState."""
    from model.loss import build_loss
    from model.metric import EvalState, accuracy, top_k_acc
    from model.model import build_model
    from tools.allocator import keep_freed_memory
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    idle, clock = peak_memory(device), cpu_seconds if cpu_time else time.perf_counter
    model = build_model({"type": "ResNet32Model", "args": {"num_experts": experts, "reduce_dimension": True}}, classes)
    model.to(device, memory_format=torch.channels_last)
    criterion = build_loss({"type": "RIDELoss"}, cls_num_list=[10] * classes)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, classes, (batch,), device=device)
    state = EvalState(classes, device, experts)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        outputs = model(images)
        criterion(outputs, labels).backward()
        optimizer.step()
        with torch.no_grad():
            _ = accuracy(outputs["output"], labels), top_k_acc(outputs["output"], labels)

    @torch.no_grad()
    def evaluate() -> None:
        outputs = model(images)
        state.update(outputs["output"], labels, expert_logits=outputs["logits"])

    result = {}
    for name, mode, step in (("train", True, train), ("evaluate", False, evaluate)):
        model.train(mode)
        seconds = []
        for _ in range(rounds + 1):
            began = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - began)
        result[f"{name}_s"] = statistics.median(seconds[1:])
    counters = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors())
    return {**result, "peak_bytes": peak_memory(device) - idle, "counter_bytes": counters}


def settings() -> list[dict[str, int]]:
    """Each axis's values with the others as in BASE; no setting twice."""
    every = [{**BASE, axis: value} for axis, values in AXES.items() for value in values]
    return [setting for i, setting in enumerate(every) if setting not in every[:i]]


def run(setting: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    """`measure` a setting in a process of its own, and print the result."""
    command = [sys.executable, "-m", "benchmarks.scale", "--only", json.dumps(setting), "--threads", args.threads,
               "--rounds", args.rounds or 3, *(["--cpu-time"] if args.cpu_time else [])]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
    row = {**setting, **json.loads(done.stdout.splitlines()[-1])}
    print(f"{row['classes']:6} classes {row['experts']:2} experts  batch {row['batch']:4}   training step "
          f"{row['train_s'] * 1e3:7.0f} ms   evaluation {row['evaluate_s'] * 1e3:6.0f} ms   peak "
          f"{row['peak_bytes'] / MEGA:6.0f} MiB   counters {row['counter_bytes'] / MEGA:.2f} MiB", flush=True)
    return row


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Draw a column of panels per axis: time of a step above, peak memory below, both from zero."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, panels = pyplot.subplots(2, len(AXES), figsize=(10, 5), sharex="col", layout="constrained")
    for column, axis in enumerate(AXES):
        others = {key: value for key, value in BASE.items() if key != axis}
        line = sorted((row for row in rows if others.items() <= row.items()), key=lambda row: row[axis])
        x = [row[axis] for row in line]
        time_panel, memory_panel = panels[:, column]
        time_panel.plot(x, [row["train_s"] * 1e3 for row in line], "o-", label="training step")
        time_panel.plot(x, [row["evaluate_s"] * 1e3 for row in line], "o--", label="evaluation")
        memory_panel.plot(x, [row["peak_bytes"] / MEGA for row in line], "o-", color="tab:green")
        time_panel.set_title(", ".join(f"{value} {key}" if key != "batch" else f"batch {value}"
                                       for key, value in others.items()), fontsize=9)
        memory_panel.set_xlabel(axis)
        for panel in (time_panel, memory_panel):
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("ms a step")
    panels[1, 0].set_ylabel("peak memory, MiB")
    panels[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    print(f"plotted in {path}")


def main() -> int:
    """The command; returns the exit status."""
    flags = parser(__doc__.splitlines()[0], cpu_time=True)
    flags.add_argument("--plot", metavar="FILE", help="also draw the figures there (PNG)")
    flags.add_argument("--only", type=json.loads, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.only:
        torch.set_num_threads(1 if args.cpu_time else args.threads)
        print(json.dumps(measure(**args.only, rounds=args.rounds, cpu_time=args.cpu_time)))
        return 0
    begin(args)
    rows = [run(setting, args) for setting in settings()]
    if args.plot:
        plot(rows, args.plot)
    finish("scale", rows, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
