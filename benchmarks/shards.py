"""A data set of iNaturalist 2018's size, 437 thousand images of 8,142 classes: opened as listed files and as shards.

`python -m benchmarks.shards [--json FILE] [--rounds N]` (also a part of `python -m benchmarks.data`)

The files are empty and the shards' index is written without their images, since opening reads neither. Then the index
of a real shard is made, with a tenth as many images and each one's label beside it, and JPEGs are read from files and
from a shard.
"""
from __future__ import annotations

import gc
import io
import sys
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import finish, interleave, machine, parser, spread, timed
from data_loader.data_loaders import ListFileDataLoader
from data_loader.imbalance import img_num_per_cls
from data_loader.places import stamp
from data_loader.shard_names import expand
from data_loader.shards import Index, index_file, open_index
from data_loader.transforms import IMAGENET_STATISTICS, read_for_test, test_pixels, test_preprocess
from utils.device import own_memory

CLASSES, LARGEST, SMALLEST = 8142, 268, 2      # an exponential tail of nearly as many images
SHARDS = 200
SPEC = f"train-{{000..{SHARDS - 1:03d}}}.tar"
INDEXED = 43_827        # images in the shard whose index is made
BATCH = 64


def listed(folder: Path) -> tuple[list[str], np.ndarray]:
    """Write empty files in a folder per class, and their lists; returns their names and labels."""
    counts = img_num_per_cls(LARGEST, CLASSES, "exp", SMALLEST / LARGEST)
    names = [f"train_val2018/{label:04d}/{label * 1000 + i:032x}.jpg"
             for label, count in enumerate(counts) for i in range(count)]
    labels = np.repeat(np.arange(CLASSES), counts)
    for label in range(CLASSES):
        (folder / f"train_val2018/{label:04d}").mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    text = "".join(f"{name} {label}\n" for name, label in zip(names, labels))
    for file in ("train.txt", "test.txt"):
        (folder / file).write_text(text if file == "train.txt" else text[:text.index("\n") + 1])
    return names, labels


def sharded(folder: Path, names: list[str], labels: np.ndarray) -> None:
    """Write the index that shards of those images would have, empty files for these, and a shard of one test image."""
    with tarfile.open(folder / "test.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0/0.jpg"))
    for number in range(SHARDS):
        (folder / f"train-{number:03d}.tar").touch()
    every = [str(folder / name) for name in expand(SPEC)]
    stamps = np.array([stamp(shard) for shard in every])
    count = len(names)
    kinds = sorted(map(str, range(CLASSES)))
    place = np.argsort(np.array(kinds, dtype=np.int64))     # each label's place in `kinds`
    Index(every, stamps, names, np.arange(count, dtype=np.int32) % SHARDS, np.arange(count, dtype=np.int64) * 1024,
          np.full(count, 512, dtype=np.int64), kinds, place[labels].astype(np.int32)
          ).save(index_file(SPEC, every, folder))


def time_opening(folder: Path, rounds: int) -> dict[str, Any]:
    """CPU seconds and memory to open a loader on listed files and on shards, in turns; seconds of the index alone."""
    files, shards = folder / "files", folder / "shards"
    files.mkdir()
    shards.mkdir()
    names, labels = listed(files)
    sharded(shards, names, labels)
    del names, labels
    both = {"train": SPEC, "test": "test.tar"}
    kinds = {"files": {"data_dir": str(files)}, "shards": {"data_dir": str(shards), "shards": both}}

    def load(name: str) -> ListFileDataLoader:
        return ListFileDataLoader(**kinds[name], batch_size=128, validation="none", num_workers=1)
    memory, counts = {}, {}
    for name in kinds:
        gc.collect()
        before, loader = (own_memory() or 0), load(name)
        memory[name], counts[name] = (own_memory() or 0) - before, (loader.n_samples, loader.num_classes)
        del loader
    timing = interleave({**{name: timed(partial(load, name)) for name in kinds},
                         "index": timed(partial(open_index, SPEC, str(shards)))}, rounds, warmup=0, budget=90)
    for name in kinds:
        print(f"{counts[name][0]:,} images of {counts[name][1]:,} classes in {name}: open in "
              f"{timing.median(name):.1f} s of CPU, {memory[name] / 2**20:.0f} MiB")
    speed_up = timing.speed_up("shards", "files")
    print(f"shards {spread(speed_up)} as fast as files; the shards' index alone: {timing.median('index'):.2f} s")
    return {**{name: {"seconds": timing.median(name), "bytes": memory[name]} for name in kinds},
            "index_seconds": timing.median("index"), "speed_up": speed_up}


def time_indexing(folder: Path) -> dict[str, float]:
    """Seconds to make the index of a shard; the disk hardly matters, as the file was just written and is cached."""
    with tarfile.open(folder / "many.tar", "w") as tar:
        for number in range(INDEXED):
            for ending, content in (("jpg", b"x" * 512), ("cls", b"%d" % (number % CLASSES))):
                about = tarfile.TarInfo(f"train_val2018/{number:032x}.{ending}")
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    start = time.perf_counter()
    open_index("many.tar", str(folder))
    seconds = time.perf_counter() - start
    print(f"making the index of {INDEXED:,} labelled images: {seconds:.1f} s")
    return {"images": INDEXED, "seconds": seconds}


def time_reading(folder: Path, rounds: int) -> dict[str, Any]:
    """Images per second from JPEGs to test pixels, read from files and from a shard."""
    rng, preprocess = np.random.default_rng(0), test_preprocess(224, *IMAGENET_STATISTICS)
    (folder / "jpeg").mkdir()
    with tarfile.open(folder / "jpeg.tar", "w") as tar:
        for i in range(BATCH):
            out = io.BytesIO()
            small = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
            small.resize((500, 375), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
            (folder / "jpeg" / f"{i}.jpg").write_bytes(out.getvalue())
            about = tarfile.TarInfo(f"a/{i}.jpg")
            about.size = len(out.getvalue())
            tar.addfile(about, io.BytesIO(out.getvalue()))
    paths = {"files": [str(folder / "jpeg" / f"{i}.jpg") for i in range(BATCH)],
             "shards": open_index("jpeg.tar", str(folder)).paths}

    def read(every: list[str]) -> None:
        for path in every:
            test_pixels(read_for_test(path, preprocess), preprocess)
    timing = interleave({name: partial(read, every) for name, every in paths.items()}, rounds)
    speed_up = timing.speed_up("shards", "files")
    print(f"500 x 375 JPEGs from shards {BATCH / timing.median('shards'):.0f} images/s a core, from files "
          f"{BATCH / timing.median('files'):.0f}: {spread(speed_up)}")
    return {"images_per_second": {name: BATCH / timing.median(name) for name in paths}, "speed_up": speed_up}


def run(rounds: int) -> dict[str, Any]:
    """Run all parts in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        return {"opening": time_opening(Path(folder), rounds), "indexing": time_indexing(Path(folder)),
                "reading": time_reading(Path(folder), rounds)}


def main() -> int:
    """The command; returns the exit status."""
    args = parser(__doc__.splitlines()[0], threads=1).parse_args()
    args.threads = 1
    torch.set_num_threads(1)
    print(machine(1))
    finish("shards", run(args.rounds or 9), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
