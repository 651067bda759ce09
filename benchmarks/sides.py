"""The sides that `benchmarks.train_step` times, each in a process of its own: SIDES has a function to build each."""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.original import WORKERS, OriginalTrainer
from benchmarks.timing import cpu_seconds, timed
from data_loader.data_loaders import ImbalanceCIFAR100DataLoader
from data_loader.datasets import ImageSet, Splits
from data_loader.imbalance import img_num_per_cls
from data_loader.policies import DRAWS
from model.loss import build_loss
from model.model import build_model
from tools.allocator import keep_freed_memory
from trainer.hooks.averages import WeightAverage
from trainer.schedules import build_optimizer
from trainer.trainer import Trainer
from utils.config.load import load_config

CONFIG, MUON, BATCH = "configs/cifar100_lt_ride_bt.json", "configs/cifar100_lt_muon.json", 128
COUNTS = img_num_per_cls(500, 100, "exp", 0.01)     # CIFAR-100-LT's, 10,847 images
KINDS = {"convolution": ("conv",), "norm": ("batch_norm",), "ReLU": ("relu", "threshold", "clamp_min"),
         "addition": ("add",), "matrix product": ("mm", "linear", "attention")}
#: The profiler's names of compiled layers; a norm's includes the addition and the ReLU after it.
COMPILED = {"_Convolution": "conv", "_BatchNorm": "batch_norm", "_MovingAverage": "batch_norm"}


class NoiseLoader(ImbalanceCIFAR100DataLoader):
    """Noise of 32 x 32, with CIFAR-100-LT's class counts."""

    def read(self, training: bool) -> Splits:
        """Training and test images, made here."""
        def noise(labels: np.ndarray) -> ImageSet:
            pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
            return ImageSet(labels, pixels)
        return Splits(noise(np.repeat(np.arange(100), COUNTS)),
                      noise(np.repeat(np.arange(100), 100)), num_classes=100)

    def _imbalanced(self, splits: Splits) -> tuple:
        return splits.train, None


def make_loader(args: argparse.Namespace, **more: Any) -> ImbalanceCIFAR100DataLoader:
    """The training loader of CIFAR-100-LT in --data_dir, or of noise without it."""
    kind = ImbalanceCIFAR100DataLoader if args.data_dir else NoiseLoader
    return kind(args.data_dir, BATCH, imb_factor=0.01, validation="test", **more)


def parts(args: argparse.Namespace, amp: str) -> tuple[dict, Any, nn.Module, nn.Module]:
    """The config, the training loader, the model and the loss, the same for both sides."""
    config = load_config(CONFIG, [("trainer.amp", amp, "")])
    loader = make_loader(args)
    torch.manual_seed(0)
    model = build_model(config["arch"], loader.num_classes)
    return config, loader, model, build_loss(config["loss"], cls_num_list=loader.cls_num_list)


def valid_steps(args: argparse.Namespace, loader: Any, valid: Any) -> int:
    """Validation batches per turn: the same share of all as `--steps` is of an epoch's steps."""
    return max(1, round(len(valid) * args.steps / len(loader)))


# ---- how they are timed --------------------------------------------------------------------------------------------

def profile(turn: Callable[[], None]) -> dict[str, float]:
    """Kind of work -> its share, 0 to 1, of the time of `turn`, in descending order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        turn()
    shares: dict[str, float] = {}
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::")
        own = name if event.key.startswith("aten::") else ""
        own = COMPILED.get(name.removesuffix("Backward"), own)
        kind = next((kind for kind, words in KINDS.items() if any(word in own for word in words)), "the rest")
        if kind == "convolution":
            kind += ", backward" if "backward" in name.lower() else ", forward"
        shares[kind] = shares.get(kind, 0.0) + event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: value / total for kind, value in sorted(shares.items(), key=lambda item: -item[1])}


# ---- the sides -----------------------------------------------------------------------------------------------------

def make_trainer(args: argparse.Namespace, amp: str, **options: Any) -> Trainer:
    """The trainer as train.py makes it; options: further keys of the config's `trainer`."""
    keep_freed_memory()
    config, loader, model, criterion = parts(args, amp)
    config["trainer"].update(options)
    return Trainer(model, criterion, build_optimizer(config["optimizer"], model, config["trainer"]), config,
                   train_loader=loader, valid_loader=loader.split_validation())


def ours(args: argparse.Namespace, amp: str, **options: Any) -> dict[str, Callable]:
    """The last `--steps` steps of an epoch, and their share of the validation, by the trainer that `train.py` uses."""
    trainer = make_trainer(args, amp, **options)
    start = len(trainer.train_loader) - args.steps
    batches = valid_steps(args, trainer.train_loader, trainer.valid_loader)
    epochs = iter(range(1, 10**9))

    def turn() -> None:
        trainer.train_epoch(next(epochs), start)
        trainer.evaluate(trainer.valid_loader, validating=True, max_batches=batches)
    return {"go": timed(turn, args.cpu_time), "profile": partial(profile, turn)}


def steps_alone(args: argparse.Namespace, amp: str, compiled: str | bool) -> dict[str, Callable]:
    """The last `--steps` steps of an epoch with `trainer.compile` as given, without validation."""
    trainer = make_trainer(args, amp, compile=compiled)
    start, epochs = len(trainer.train_loader) - args.steps, iter(range(1, 10**9))
    return {"go": timed(lambda: trainer.train_epoch(next(epochs), start), args.cpu_time)}


def original(args: argparse.Namespace) -> dict[str, Callable]:
    """The same steps by RIDE's own loop."""
    config, loader, model, criterion = parts(args, "off")
    valid = loader.split_validation()
    trainer = OriginalTrainer(model, criterion, config["optimizer"]["args"], loader, valid, args.steps,
                              valid_steps(args, loader, valid), 0 if args.cpu_time else WORKERS)
    return {"go": timed(trainer.epoch, args.cpu_time), "profile": partial(profile, trainer.epoch)}


class Stopwatch:
    """Counts the seconds spent in the method `name` of `owner` by replacing it."""

    def __init__(self, owner: Any, name: str, clock: Callable[[], float]):
        self.seconds, self.clock, self.inner = 0.0, clock, getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **more: Any) -> Any:
        began = self.clock()
        try:
            return self.inner(*args, **more)
        finally:
            self.seconds += self.clock() - began


def recipe_parts(args: argparse.Namespace) -> dict[str, Callable]:
    """A turn measures every part: seconds of an epoch without any of them, and what each adds to it."""
    trainer = make_trainer(args, "auto", ema={"decay": 0.999})
    clock = cpu_seconds if args.cpu_time else time.perf_counter
    loaders = {name: make_loader(args, augment=name) for name in ("basic", *DRAWS)}
    steps, epochs = len(trainer.train_loader), iter(range(1, 10**9))
    muon = build_optimizer(load_config(MUON)["optimizer"], trainer.model, trainer.options)
    optimizers = {"SGD": trainer.optimizer, "muon": muon}
    watches = {name: Stopwatch(optimizer, "step", clock) for name, optimizer in optimizers.items()}
    average = next(hook for hook in trainer.hooks if isinstance(hook, WeightAverage))
    averaging = Stopwatch(average, "step_taken", clock)

    def train(name: str) -> tuple[float, float, float]:
        """Seconds per training step: in all, in the optimizer's step, in averaging the weights."""
        trainer.optimizer, watches[name].seconds, averaging.seconds = optimizers[name], 0.0, 0.0
        began = clock()
        trainer.train_epoch(next(epochs), steps - args.steps)
        return tuple(seconds / args.steps for seconds in (clock() - began, watches[name].seconds, averaging.seconds))

    def load(loader: Any) -> float:
        loader.set_epoch(next(epochs))
        began = clock()
        for _ in loader:
            pass
        return clock() - began

    def turn() -> dict[str, float]:
        (whole, sgd, ema), (_, own, _) = train("SGD"), train("muon")
        loading = {name: load(loader) for name, loader in loaders.items()}
        return {"epoch": (whole - ema) * steps, "ema": ema * steps, "muon": (own - sgd) * steps,
                **{name: loading[name] - loading["basic"] for name in DRAWS}}
    # Muon's steps count as steps taken: the average follows them too.
    muon.register_step_post_hook(trainer._note_change)
    return {"go": turn}


SIDES: dict[str, Callable[[argparse.Namespace], dict[str, Callable]]] = {
    "original": original, "ours, float32": partial(ours, amp="off"), "ours, auto": partial(ours, amp="auto"),
    "ours, compiled norms": partial(ours, amp="auto", compile="norms"),
    "ours, compiled layers": partial(ours, amp="off", compile="layers"),
    "ours, auto, compiled layers": partial(ours, amp="auto", compile="layers"), "parts": recipe_parts,
    **{f"{name}, {amp}": partial(steps_alone, amp=amp, compiled=compiled)
       for name, compiled in (("without", False), ("norms", "norms"), ("layers", "layers")) for amp in ("off", "auto")}}
