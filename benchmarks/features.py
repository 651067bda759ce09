"""A second stage on features that are computed once, against one on images; and its memory with more features.

    python -m benchmarks.features [--data_dir data] [--images 150000 1000000] [--json FILE]

The first part trains cRT's and LWS's classifiers on a frozen ResNet-32 (CIFAR-100-LT in data_dir, without it digits):
an epoch with its validation on images and one on features, timed in turns in CPU seconds, and the pass that makes the
features once.
The second part writes features of so many images, 1,280 numbers each, and trains a classifier of 100 classes on them
for an epoch, each size in a process of its own; it prints by how much the process's memory grew at most.
"""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from base import BaseModel
from base.base_data_loader import BaseDataLoader
from benchmarks.timing import begin, finish, interleave, parser, spread, timed
from utils.device import peak_memory

WIDTH, CLASSES, BATCH, MEGA = 1280, 100, 512, 1 << 20
EPOCHS = 10


# ---------------------------------------------------------------------- speed

def make_trainer(data_dir: str | None, folder: Path, stage: str, cached: bool) -> Any:
    """The trainer of `stage`, crt or lws, on random weights: what they are makes no difference to its speed."""
    from base.run_paths import RunPaths
    from tools import parts
    from trainer.schedules import build_optimizer
    from trainer.trainer import Trainer
    from utils.config.load import load_config
    config = load_config(Path("configs") / f"{'cifar100' if data_dir else 'digits'}_lt_{stage}.json")
    if data_dir:
        config["data_loader"]["args"]["data_dir"] = data_dir
    config["optimizer"]["args"]["lr"] = 1e-6      # random features are large
    config["trainer"].update(cache_features=cached or None, tensorboard=False, verbosity=0, freeze="backbone")
    train_loader = parts.make_loader(config)
    model = parts.make_model(config, train_loader.num_classes)
    model.freeze("backbone")
    return Trainer(model, parts.make_criterion(config, train_loader.cls_num_list),
                   build_optimizer(config["optimizer"], model, config["trainer"]), config, train_loader=train_loader,
                   valid_loader=train_loader.split_validation(), paths=RunPaths(folder, folder))


def compare(data_dir: str | None, stage: str, rounds: int) -> dict[str, Any]:
    """CPU seconds of an epoch on images and on features, and of the pass that makes these."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {"images": make_trainer(data_dir, Path(folder), stage, False),
                    "features": make_trainer(data_dir, Path(folder), stage, True)}
        epochs = dict.fromkeys(trainers, 0)

        def epoch(name: str) -> None:
            epochs[name] += 1
            trainers[name].train_epoch(epochs[name], 0)
            trainers[name].validate(epochs[name])
        sides = {name: timed(partial(epoch, name)) for name in trainers}
        first = sides["features"]()
        timing = interleave(sides, rounds, warmup=1)
    one = {name: timing.median(name) for name in trainers}
    made = first - one["features"]
    return {"epoch_on_images_s": one["images"], "epoch_on_features_s": one["features"], "pass_s": made,
            "epochs_ratio": timing.ratio("images", "features"),
            "whole_ratio": EPOCHS * one["images"] / (made + EPOCHS * one["features"])}


# ---------------------------------------------------------------------- memory

class Wide(BaseModel):
    """A model with features of 1,280 numbers from a few pixels, and a classifier."""

    num_classes, feat_dim = CLASSES, WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.linear = nn.Linear(48, WIDTH), nn.Linear(WIDTH, CLASSES)

    def heads(self) -> list[nn.Module]:
        return [self.linear]

    def classifier_prefixes(self) -> list[str]:
        return ["linear."]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.from_features(self.backbone(x.flatten(1)).relu()[:, None])


class Noise(BaseDataLoader):
    """Random images of 4 x 4 pixels, determined by the batch's number; shuffled in training."""

    def describe(self, digest: Any) -> None:
        digest.update(str(self.n_samples).encode())

    def _batches(self, epoch: int, batches: range) -> Any:
        for batch in batches:
            n = len(self.positions(batch))
            yield torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(batch)), torch.zeros(n)


def measure(images: int, folder: str) -> dict[str, float]:
    """Seconds, and peak bytes beyond what the process used before, of writing features and of an epoch on them."""
    from trainer.cached import store_of
    from trainer.feature_store import FeatureLoader
    targets = np.random.default_rng(0).integers(0, CLASSES, images)
    plain = Noise(targets, BATCH, shuffle=False, training=False)
    shuffled = Noise(targets, BATCH, shuffle=True, training=True)
    shuffled.cls_num_list, shuffled.num_classes = np.bincount(targets).tolist(), CLASSES
    model = Wide()
    model.freeze("backbone")
    optimizer = torch.optim.SGD(model.linear.parameters(), 0.01, momentum=0.9)
    idle, result = peak_memory(torch.device("cpu")), {}
    store = store_of(model, plain, Path(folder) / "train.f16", 1, "off")

    def train() -> None:
        for feats, labels in FeatureLoader(shuffled, store):
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model.from_features(feats)["output"], labels).backward()
            optimizer.step()
    for name, step in (("write", lambda: store.fill(model, plain)), ("epoch", train)):
        began = time.perf_counter()
        step()
        result |= {f"{name}_s": time.perf_counter() - began,
                   f"{name}_peak_bytes": peak_memory(torch.device("cpu")) - idle}
    return {"images": images, "file_bytes": store.bytes, **result}


def main() -> int:
    """The command; returns the exit status."""
    flags = parser(__doc__.splitlines()[0], threads=1)
    flags.add_argument("--data_dir", help="where CIFAR-100 is")
    flags.add_argument("--images", type=int, nargs="*", default=[150_000, 450_000], help="sizes of the second part")
    flags.add_argument("--only", type=int, metavar="IMAGES", help="one size, here")
    args = flags.parse_args()
    if args.only:
        torch.set_num_threads(args.threads)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(args.only, folder)))
        return 0
    begin(args)
    speed = {}
    for stage in ("crt", "lws"):
        speed[stage] = row = compare(args.data_dir, stage, args.rounds or 3)
        print(f"{stage}, an epoch with its validation: on images {row['epoch_on_images_s']:.2f} s, on features "
              f"{row['epoch_on_features_s']:.3f} s of CPU time: {spread(row['epochs_ratio'])}\n"
              f"{EPOCHS} epochs on features {EPOCHS * row['epoch_on_features_s']:.2f} s, with the pass "
              f"({row['pass_s']:.1f} s) {row['whole_ratio']:.1f}x as fast as on images", flush=True)
    rows = []
    for images in args.images:
        done = subprocess.run([sys.executable, "-m", "benchmarks.features", "--only", str(images), "--threads",
                               str(args.threads)], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(row := json.loads(done.stdout.splitlines()[-1]))
        print(f"{images:9,} images, {row['file_bytes'] / MEGA:6.0f} MiB: written in {row['write_s']:.1f} s, peak "
              f"{row['write_peak_bytes'] / MEGA:.0f} MiB; an epoch {row['epoch_s']:.1f} s, peak "
              f"{row['epoch_peak_bytes'] / MEGA:.0f} MiB", flush=True)
    finish("features", {"speed": speed, "memory": rows}, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
