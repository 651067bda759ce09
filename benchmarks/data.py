"""The data path: small images and large JPEGs against torchvision's per-image pipelines; files against shards.

Small images are augmented by the batch; the last part (see `benchmarks.shards`) opens a large data set.

`python -m benchmarks.data [--json FILE] [--rounds N]`

Both sides work in one thread and are timed in CPU seconds, so that other programs on the machine count for neither:
images per second are per core.
"""
from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.autoaugment import AutoAugmentPolicy

from benchmarks import shards
from benchmarks.timing import Timing, begin, finish, interleave, parser, spread, timed
from data_loader.datasets import ImageSet, Splits
from data_loader.image_loader import ImageDataLoader
from data_loader.images import read_rgb
from data_loader.policies import DRAWS
from data_loader.transforms import (
    IMAGENET_STATISTICS,
    Normalise,
    read_for_test,
    read_for_training,
    test_pixels,
    test_preprocess,
)

SMALL, BATCH = 2048, 128
CIFAR10 = AutoAugmentPolicy.CIFAR10
SIZES = ((500, 375), (800, 600), (1600, 1200))
PER_ROUND = 8


def cpu_timing(sides: dict[str, Callable[[], object]], rounds: int) -> Timing:
    """`interleave` in CPU seconds."""
    return interleave({name: timed(side) for name, side in sides.items()}, rounds, warmup=1)


class _Arrays(ImageDataLoader):
    """32 x 32 noise in memory: the pixels don't matter for the speed."""

    default_size = 32

    def read(self, training: bool) -> Splits:
        pixels = np.random.default_rng(0).integers(0, 256, (SMALL, 32, 32, 3), dtype=np.uint8)
        images = ImageSet(np.arange(SMALL) % 10, pixels)
        return Splits(images, images, num_classes=10)


class _PerImage(torch.utils.data.Dataset):
    """The same images through torchvision's transforms, one by one, as CIFAR's published pipelines do it."""

    def __init__(self, loader: ImageDataLoader, augment: str):
        import torchvision.transforms as T
        step = {"basic": partial(T.RandomRotation, 15), "autoaugment": partial(T.AutoAugment, CIFAR10),
                "randaugment": T.RandAugment, "trivialaugment": T.TrivialAugmentWide}[augment]()
        self.pixels, self.labels = [loader.raw_image(i) for i in range(SMALL)], loader.targets
        self.transform = T.Compose([T.RandomCrop(32, 4), T.RandomHorizontalFlip(), step, T.ToTensor(),
                                    T.Normalize(loader.mean, loader.std)])

    def __len__(self) -> int:
        return SMALL

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


def time_small(rounds: int, augment: str = "basic") -> dict:
    """Images per second of crop, flip, rotation or a policy, and normalising at 32 x 32, in one process."""
    loader = _Arrays(None, BATCH, validation="none", augment=augment)
    per_image = torch.utils.data.DataLoader(_PerImage(loader, augment), batch_size=BATCH, shuffle=True)
    timing = cpu_timing({"by the batch": lambda: [None for _ in loader],
                         "per image": lambda: [None for _ in per_image]}, rounds)
    rates = {name: SMALL / timing.median(name) for name in timing.seconds}
    speed_up = timing.speed_up("by the batch", "per image")
    step = "rotation" if augment == "basic" else augment
    print(f"32 x 32, crop + flip + {step}: {rates['by the batch']:,.0f} images/s a core by the batch, "
          f"{rates['per image']:,.0f} per image with Pillow: {spread(speed_up)}")
    return {"images_per_second": rates, "speed_up": speed_up, "target": 20 if augment == "basic" else 8}


def photo(width: int, height: int, seed: int) -> Image.Image:
    """A picture with a photograph's falling spectrum and some grain, about as hard to compress for JPEG."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for step in range(2, 10):
        cells = [max(2, side * 2**step // 512 + 2) for side in (height, width)]
        for channel in range(3):
            field = Image.fromarray(rng.normal(size=cells).astype(np.float32))
            field = field.resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(field) * 2 ** (-0.7 * step)
    total = (total - total.min()) / np.ptp(total) * 255 + rng.normal(size=total.shape) * 4
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def _pipelines(jitter: float) -> dict[str, tuple[Callable, Callable]]:
    """Each pipeline as (ours, torchvision's): lists of paths to a normalised batch."""
    import torchvision.transforms as T
    normalise, rng = Normalise(*IMAGENET_STATISTICS), np.random.default_rng(0)
    preprocess = test_preprocess(224, *IMAGENET_STATISTICS)
    last = [T.ToTensor(), T.Normalize(*IMAGENET_STATISTICS)]
    colours = [T.ColorJitter(jitter, jitter, jitter)] if jitter else []
    train = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), *colours, *last])
    test = T.Compose([T.Resize(256), T.CenterCrop(224), *last])

    def theirs(transform: Callable) -> Callable:
        return lambda paths: torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])

    def ours(read: Callable) -> Callable:
        return lambda paths: normalise(torch.stack([read(path) for path in paths]))

    pipelines = {f"train, jitter {jitter}": (ours(lambda p: read_for_training(p, rng, 224, True, jitter)),
                                             theirs(train))}
    if not jitter:
        pipelines["test"] = (ours(lambda p: test_pixels(read_for_test(p, preprocess), preprocess)), theirs(test))
    return pipelines


def time_large(folder: Path, rounds: int) -> list[dict]:
    """Images per second and core from JPEG files to normalised 224 x 224, in one thread."""
    results = []
    for width, height in SIZES:
        paths = [str(folder / f"{width}_{i}.jpg") for i in range(PER_ROUND)]
        for i, path in enumerate(paths):
            photo(width, height, i % 3).save(path, quality=90)
        for name, (ours, theirs) in {**_pipelines(0.4), **_pipelines(0)}.items():
            timing = cpu_timing({"ours": partial(ours, paths), "Pillow": partial(theirs, paths)}, rounds)
            rates = {side: PER_ROUND / timing.median(side) for side in timing.seconds}
            speed_up = timing.speed_up("ours", "Pillow")
            results.append({"jpeg": [width, height], "pipeline": name, "images_per_second": rates,
                            "speed_up": speed_up, "target": 1.5})
            print(f"{width} x {height} JPEG, {name:18} {rates['ours']:5.0f} images/s a core, Pillow "
                  f"{rates['Pillow']:4.0f}: {spread(speed_up)}")
    return results


def pixel_difference(folder: Path) -> list[dict]:
    """Difference, in levels of 255, between our test pixels and Pillow's (resize 256, crop 224) of the same file."""
    import torchvision.transforms as T
    crop, preprocess = T.Compose([T.Resize(256), T.CenterCrop(224)]), test_preprocess(224, *IMAGENET_STATISTICS)
    results = []
    for width, height in SIZES:
        path = str(folder / f"{width}_0.jpg")
        theirs = torch.from_numpy(np.array(crop(read_rgb(path)))).permute(2, 0, 1).int()
        away = (test_pixels(read_for_test(path, preprocess), preprocess).int() - theirs).abs().float()
        full = (test_pixels(read_rgb(path), preprocess).int() - theirs).abs().float()
        results.append({"jpeg": [width, height], "mean": away.mean().item(), "max": away.max().item(),
                        "mean_decoded_in_full": full.mean().item(), "max_decoded_in_full": full.max().item()})
        print(f"{width} x {height} JPEG, test pixels differ from Pillow's by {away.mean():.2f} levels of 255 on "
              f"average, {away.max():.0f} at most (decoded in full: {full.mean():.2f}, {full.max():.0f})")
    return results


def main() -> int:
    """The command; returns the exit status."""
    args = parser(__doc__.splitlines()[0], threads=1).parse_args()
    args.threads = 1
    begin(args)
    results: dict = {"small": time_small(args.rounds or 9)}
    results |= {policy: time_small(args.rounds or 5, policy) for policy in DRAWS}
    with tempfile.TemporaryDirectory() as folder:
        results["large"] = time_large(Path(folder), args.rounds or 7)
        results["pixels"] = pixel_difference(Path(folder))
    results["shards"] = shards.run(args.rounds or 9)
    finish("data", results, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
