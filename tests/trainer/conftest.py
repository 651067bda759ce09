"""What the trainer's tests share: a folder of tiny images, and train.py called in this process."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from tools.shard import main as shard
from trainer.trainer import Trainer

COUNTS = (12, 7, 4)  # 23 training images: with batches of 6 the last has 5


def write_images(folder: Path, counts=COUNTS, size: int = 16) -> None:
    """A folder a class, each class of a colour of its own, with noise."""
    rng = np.random.default_rng(0)
    for label, count in enumerate(counts):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 120, (size, size, 3))
            pixels[..., label % 3] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{label}" / f"{i:02d}.png")


@pytest.fixture(scope="module", autouse=True)
def networks(shallow_resnet32):
    """Of few blocks, in processes of `run_ranks` too."""


class Runs:
    """Trains in `save_dir`, on the same 23 images each time."""

    def __init__(self, save_dir: Path, data: Path):
        self.save_dir, self.data = save_dir, data
        self.base = {
            "name": "tiny",
            "arch": {"type": "ResNet32Model", "args": {"num_experts": 1, "layer2_output_dim": 16,
                                                       "layer3_output_dim": 16}},
            "data_loader": {"type": "ImageFolderLTDataLoader", "args": {
                "data_dir": str(data), "batch_size": 6, "image_size": 16, "num_workers": 0}},
            "optimizer": {"type": "SGD", "args": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}},
            "loss": {"type": "CrossEntropyLoss"},
            "lr_scheduler": {"type": "CustomLR", "args": {"step1": 3, "step2": 4, "warmup_epoch": 2}},
            "trainer": {"epochs": 2, "save_dir": str(save_dir), "save_period": 1, "verbosity": 1,
                        "tensorboard": False, "figures": False}}

    def config(self, **sections) -> Path:
        """A config file: the tiny one with `sections` merged in, by key."""
        merged = json.loads(json.dumps(self.base))
        for name, value in sections.items():
            if isinstance(value, dict) and isinstance(merged.get(name), dict):
                for key, inner in value.items():
                    old = merged[name].get(key)
                    merged[name][key] = {**old, **inner} if isinstance(old, dict) and isinstance(inner, dict) else inner
            else:
                merged[name] = value
        path = self.save_dir / f"config-{abs(hash(json.dumps(merged, sort_keys=True)))}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(merged))
        return path

    def __call__(self, run_id: str | None, *flags, **sections) -> Path:
        """Train the config with `sections` as `run_id`, with flags of train.py; the run's models folder."""
        start = [] if run_id is None else ["-c", self.config(**sections), "--run_id", run_id]
        train.main([str(part) for part in (*start, "-d", "cpu", *flags)])
        return self.models(run_id or "")

    def models(self, run_id: str) -> Path:
        return self.save_dir / "models" / "tiny" / run_id

    def log(self, run_id: str) -> Path:
        return self.save_dir / "log" / "tiny" / run_id


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory) -> Path:
    """train/ with 12, 7 and 4 images of 16x16 and val/ with 5, 4 and 2. Read only."""
    folder = tmp_path_factory.mktemp("tiny")
    write_images(folder / "train")
    write_images(folder / "val", (5, 4, 2))
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory, tiny_images) -> Path:
    """`tiny_images`, val/ as the test split, in two shards and one (`SHARDS` of ranks.py), without an index."""
    source, target = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("shards") / "out"
    shutil.copytree(tiny_images / "train", source / "train")
    shutil.copytree(tiny_images / "val", source / "test")
    size = sum(file.stat().st_size for file in (source / "train").rglob("*.png"))
    shard([str(source), str(target), "--size", str(size // 2 + 500)])
    for file in target.glob("*.npz"):
        file.unlink()
    assert len(list(target.glob("train-*.tar"))) == 2 and len(list(target.glob("*.tar"))) == 3
    return target


@pytest.fixture
def runs(tmp_path, tiny_images) -> Runs:
    return Runs(tmp_path / "saved", tiny_images)


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory, tiny_images) -> Runs:
    """Runs that several tests of a file look at: read from them only."""
    return Runs(tmp_path_factory.mktemp("runs"), tiny_images)


@pytest.fixture
def signal_at(monkeypatch):
    """`signal_at(step, number)`: send this process a real signal inside optimizer step `step` (1, 2, ...). A test whose
    signal is never sent fails: it has stopped nothing."""
    armed, sent = [], []

    def arm(step: int, number: int = signal.SIGTERM) -> None:
        taken = [0]
        original = Trainer._update
        armed.append(step)

        def update(self, *args):
            taken[0] += 1
            if taken[0] == step:
                sent.append(step)
                os.kill(os.getpid(), number)
            return original(self, *args)
        monkeypatch.setattr(Trainer, "_update", update)
    yield arm
    assert sorted(sent) == sorted(armed)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def same(a: object, b: object) -> bool:
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


@pytest.fixture(scope="session")
def same_state():
    """`same_state(checkpoint, checkpoint)`: do two files hold the same weights, optimizer, schedule and randomness?"""
    def compare(one: Path, other: Path) -> list[str]:
        first, second = load(one), load(other)
        keys = ("epoch", "batch", "global_step", "state_dict", "optimizer", "lr_scheduler", "scaler", "monitor_best",
                "not_improved", "rng")
        return [key for key in keys if not same(first[key], second[key])]
    return compare
