"""A training epoch, data included: RIDE with 3 experts and BatchFormer on CIFAR-100-LT, against a plain implementation.

    python -m benchmarks.train_step [--data_dir DIR] [--steps N] [--rounds N] [--bf16] [--profile] [--json FILE]

Both sides train the same ResNet-32 on the same images with the same loss, batch 128, float32, each in a process of its
own; they take turns of `--steps` steps. Ours is the trainer as `train.py` runs it. The plain side is what its papers'
code does: torchvision's transforms of one Pillow image after the other in 2 loader processes, NCHW, batch norm, ReLU
and addition one by one out of place, torch's default SGD step, and loss and metrics read with `.item()` each step.
Without `--data_dir` the images are noise, as many as CIFAR-100-LT has: the pixels don't matter for the speed.

`--cpu-time` counts CPU seconds instead of wall time, all in one thread and one process a side, for machines that are
busy with something else.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from benchmarks.allocator import keep_freed_memory
from benchmarks.timing import cpu_seconds, finish, interleave, machine, parser, spread
from data_loader.data_loaders import ImbalanceCIFAR100DataLoader
from data_loader.datasets import ImageSet, Splits
from data_loader.imbalance import img_num_per_cls
from model.blocks import BasicBlock
from model.loss import build_loss
from model.metric import accuracy, top_k_acc
from model.model import build_model
from trainer.schedules import build_optimizer
from trainer.trainer import Trainer
from utils.config.load import load_config

CONFIG, BATCH, LOADER_PROCESSES = "configs/cifar100_lt_ride_bt.json", 128, 2
KINDS = {"convolution": ("conv",), "norm": ("batch_norm",), "ReLU": ("relu", "threshold", "clamp_min"),
         "addition": ("add",), "matrix product": ("mm", "linear", "attention")}


class NoiseLoader(ImbalanceCIFAR100DataLoader):
    """CIFAR-100-LT's counts, 32 x 32 noise."""

    def read(self, training: bool) -> Splits:
        labels = np.repeat(np.arange(100), img_num_per_cls(500, 100, "exp", 0.01))
        images = ImageSet(labels, np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8))
        return Splits(images, images, num_classes=100)

    def _imbalanced(self, splits: Splits) -> tuple:
        return splits.train, None


def parts(args: argparse.Namespace) -> tuple[dict, Any, nn.Module, nn.Module]:
    """The config, the training loader, the model and the loss, alike for both sides."""
    # Said on either side: the config's own "auto" is bf16 on hardware that has it.
    config = load_config(CONFIG, [("trainer.amp", "bf16" if args.side == "ours, bf16" else "off", "--bf16")])
    kind = ImbalanceCIFAR100DataLoader if args.data_dir else NoiseLoader
    loader = kind(args.data_dir, BATCH, imb_factor=0.01, validation="none")
    torch.manual_seed(0)
    model = build_model(config["arch"], loader.num_classes)
    return config, loader, model, build_loss(config["loss"], cls_num_list=loader.cls_num_list)


# ---- ours ----------------------------------------------------------------------------------------------------------

def ours(args: argparse.Namespace) -> Callable[[], None]:
    """A function that trains the last `--steps` steps of an epoch with the trainer that `train.py` uses."""
    keep_freed_memory()
    config, loader, model, criterion = parts(args)
    trainer = Trainer(model, criterion, build_optimizer(config["optimizer"], model, config["trainer"]), config,
                      train_loader=loader)
    epochs = iter(range(1, 10**9))
    return lambda: trainer.train_epoch(next(epochs), len(loader) - args.steps)


# ---- the plain side ------------------------------------------------------------------------------------------------

class PlainBlock(BasicBlock):
    """The block as ResNets are usually written down."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x
        if self.downsample is not None:
            shortcut = F.pad(x[:, :, ::self.downsample.stride, ::self.downsample.stride], self.downsample.padding)
        return F.relu(out + shortcut)


class PlainImages(torch.utils.data.Dataset):
    """The images one by one through torchvision's transforms."""

    def __init__(self, loader: ImbalanceCIFAR100DataLoader):
        import torchvision.transforms as T
        self.pixels, self.labels = [loader.raw_image(i) for i in range(len(loader.targets))], loader.targets
        self.transform = T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), T.RandomRotation(15), T.ToTensor(),
                                    T.Normalize(loader.mean, loader.std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


def plain(args: argparse.Namespace) -> Callable[[], None]:
    """A function that trains `--steps` steps the usual way."""
    config, loader, model, criterion = parts(args)
    for module in model.modules():
        if type(module) is BasicBlock:
            module.__class__ = PlainBlock
    images = PlainImages(loader)
    sampler = torch.utils.data.RandomSampler(images, num_samples=args.steps * BATCH)
    workers = 0 if args.cpu_time else LOADER_PROCESSES
    batches = torch.utils.data.DataLoader(images, BATCH, sampler=sampler, num_workers=workers,
                                          persistent_workers=workers > 0)
    optimizer = torch.optim.SGD(model.parameters(), **config["optimizer"]["args"])
    model.train()

    def epoch() -> None:
        totals = {"loss": 0.0, "accuracy": 0.0, "top_k_acc": 0.0}
        for data, target in batches:
            optimizer.zero_grad()
            outputs = model(data)
            loss = criterion(outputs, target)
            loss.backward()
            optimizer.step()
            totals["loss"] += loss.item()
            with torch.no_grad():
                for metric in (accuracy, top_k_acc):
                    totals[metric.__name__] += metric(outputs["output"], target).item()
    return epoch


SIDES = {"ours": ours, "ours, bf16": ours, "plain": plain}


# ---- turns ---------------------------------------------------------------------------------------------------------

def serve(args: argparse.Namespace) -> None:
    """Build one side, then train a turn for each line on stdin and answer with its seconds."""
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    epoch = SIDES[args.side](args)
    clock = cpu_seconds if args.cpu_time else time.perf_counter
    for line in sys.stdin:
        if line.strip() == "profile":
            print(json.dumps(profile(epoch)), flush=True)
            continue
        began = clock()
        epoch()
        print(clock() - began, flush=True)


def profile(epoch: Callable[[], None]) -> dict[str, float]:
    """Each kind of work's share of the time of `epoch`, in descending order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        epoch()
    shares: dict[str, float] = {}
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::")
        own = name if event.key.startswith("aten::") else ""
        kind = next((kind for kind, words in KINDS.items() if any(word in own for word in words)), "the rest")
        if kind == "convolution":
            kind += ", backward" if "backward" in name else ", forward"
        shares[kind] = shares.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: value / total for kind, value in sorted(shares.items(), key=lambda item: -item[1])}


class Side:
    """One side's process."""

    def __init__(self, name: str, args: argparse.Namespace):
        flags = ["--side", name, "--steps", args.steps, "--threads", args.threads]
        flags += ["--data_dir", args.data_dir] if args.data_dir else []
        flags += ["--cpu-time"] if args.cpu_time else []
        self.process = subprocess.Popen([sys.executable, "-m", "benchmarks.train_step", *map(str, flags)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> Any:
        print(what, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"a side ended with status {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> int:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--data_dir", help="where CIFAR-100 is (default: noise)")
    flags.add_argument("--steps", type=int, default=12, help="steps of a turn (default: %(default)s; 85 are an epoch)")
    flags.add_argument("--bf16", action="store_true", help="time trainer.amp bf16 too")
    flags.add_argument("--profile", action="store_true", help="say where the time goes")
    flags.add_argument("--cpu-time", action="store_true", help="count CPU seconds, on one thread")
    flags.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.side:
        serve(args)
        return 0
    names = ["plain", "ours", *(["ours, bf16"] if args.bf16 else [])]
    print(machine(1 if args.cpu_time else args.threads))
    sides = {name: Side(name, args) for name in names}
    try:
        timing = interleave({name: lambda side=side: float(side.ask("go")) for name, side in sides.items()},
                            args.rounds or 5, warmup=1, budget=240)
        results: dict[str, Any] = {"steps": args.steps, "batch": BATCH, "data": args.data_dir or "noise", "target": 1.5,
                                   "seconds": "CPU" if args.cpu_time else "wall", "sides": {}}
        for name in names:
            rate = args.steps * BATCH / timing.median(name)
            results["sides"][name] = {"images_per_second": rate, "speed_up": timing.speed_up(name, "plain")}
            print(f"{name:12} {rate:7.1f} images/s   {spread(timing.speed_up(name, 'plain'))}")
        if args.profile:
            results["profile"] = {name: sides[name].ask("profile") for name in names}
            for name, shares in results["profile"].items():
                print(f"{name}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))
    finally:
        for side in sides.values():
            side.close()
    finish("train_step", results, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
