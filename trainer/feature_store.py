"""Features of a frozen network, computed once and kept on disk, and a loader that yields them in place of images."""
from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from base.base_data_loader import BaseDataLoader
from logger.progress import progress_bar
from model.crops import forward_crops
from model.norm import fold_norm
from model.norm.facts import is_norm
from model.posthoc import used_experts
from trainer.precision import autocast
from utils import dist
from utils.errors import ConfigError, RunError
from utils.files import write_json

IN_MEMORY = 256 << 20     # bytes; files up to this size are held whole on the device
CHUNK = 32 << 20          # bytes written at once
STOP_EVERY = 16           # batches between two checks for a stop request
LARGEST = torch.finfo(torch.float16).max


def feature_key(model: nn.Module, loader: Any, views: int, amp: object) -> str:
    """A digest of everything that features depend on: the layers below the classifier and their weights, which experts
    are used, the images, their preprocessing, `views` and `amp`."""
    digest = hashlib.blake2b(f"3 {views} {amp}".encode(), digest_size=16)
    experts = used_experts(model)
    if experts != list(range(len(model.heads()))):      # either of two experts alone: same shape, same weights
        digest.update(f"experts {experts}".encode())
    after = tuple(model.feature_prefixes())
    for name, module in model.named_modules():                  # what weights don't show: strides, a norm's eps
        if not f"{name}.".startswith(after):
            digest.update(f"{name} {type(module).__name__} {module.extra_repr()}".encode())
    for name, value in model.state_dict().items():
        if not name.startswith(after):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    loader.describe(digest)
    return digest.hexdigest()


class FeatureStore:
    """The features of a split's images: float16 [V, N, E, D] in `file`, and beside it a .json with their key, their
    shape and how many of the V · N rows are done.

    key: see `feature_key`; features with another key are recomputed. shape: (V views, N images, E experts, D).
    All ranks read the same file, which rank 0 writes. A file of up to 256 MiB is held on `device`; from a larger one
    each batch's rows are read, so that memory use doesn't grow with the file.
    """

    def __init__(self, file: Path, key: str, shape: tuple[int, int, int, int], device: torch.device | str = "cpu"):
        self.file, self.key, self.shape, self.device = file, key, shape, torch.device(device)
        self.notes = file.with_suffix(".json")
        self.row = shape[2] * shape[3]
        self.bytes = 2 * math.prod(shape)
        self._held: torch.Tensor | None = None
        self._handle: BinaryIO | None = None

    # ---- writing -----------------------------------------------------------------------------------------------

    def rows_done(self) -> int:
        """How many rows the file has; 0 if it is of another key or shape."""
        try:
            known = json.loads(self.notes.read_text(encoding="utf-8"))
            fits = known["key"] == self.key and known["shape"] == list(self.shape)
            return int(known["done"]) if fits and self.file.stat().st_size == self.bytes else 0
        except (OSError, ValueError, TypeError, KeyError):
            return 0

    @property
    def complete(self) -> bool:
        """Whether all rows are done."""
        return self.rows_done() == self.shape[0] * self.shape[1]

    def _note(self, done: int) -> None:
        write_json(self.notes, {"key": self.key, "shape": list(self.shape), "dtype": "float16", "done": done})

    def _open(self) -> int:
        """Rank 0: the number of rows that are done; if none are, create the file at its full size. Raises RunError."""
        done = self.rows_done()
        if done:
            return done
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.notes.unlink(missing_ok=True)
            with open(self.file, "wb") as handle:
                handle.truncate(self.bytes)
                # Writing to mapped pages on a full disk would kill the process without a message: reserve the space.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle.fileno(), 0, self.bytes)
            self._note(0)
        except OSError as error:
            self.file.unlink(missing_ok=True)
            raise RunError(f"trainer.cache_features: can't write {self.file} ({self.bytes / 1e9:.2f} GB): "
                           f"{error.strerror}") from None
        return 0

    def fill(self, model: nn.Module, loader: Any, amp: object = "off", stop: Callable[[], bool] = lambda: False,
             progress: bool = True) -> bool:
        """Compute what is missing. Returns False if `stop`, called on every rank, ended it; what was written is kept.

        loader: the images in order, each once (`feature_loader`); its epoch is set to each view's number, from 1.
        Raises ConfigError if ranks don't share the folder or features have another shape, RunError if they aren't
        finite in float16 or the file can't be created.
        """
        done = dist.on_main(self._open)
        if not self.file.is_file():
            raise ConfigError(f"trainer.cache_features: {self.file.parent} isn't there for every process; trainer."
                              "save_dir must be on a disk that all machines see")
        was_training, n, finished = model.training, self.shape[1], True
        if done == self.shape[0] * n:
            return True
        bar = progress_bar(self.shape[0] * self.shape[1], progress, initial=done, desc=f"features, {self.file.stem}",
                           unit="image")
        with bar, _all_experts(model):
            # With folded norms: the same features up to rounding, in 10 to 20 % less time.
            folded = fold_norm(model) if any(map(is_norm, model.modules())) else model.eval()
            for view in range(done // n, self.shape[0]):
                loader.set_epoch(view + 1, 0, done % n if view == done // n else 0)
                finished = self._view(folded, loader, view, amp, stop, bar)
                if not finished:
                    break
        model.train(was_training)
        return finished

    def _view(self, model: nn.Module, loader: Any, view: int, amp: object, stop: Callable[[], bool], bar: Any) -> bool:
        waiting: list[tuple[np.ndarray, np.ndarray]] = []
        first = loader.span(0)[0]
        for batch, (images, _) in enumerate(loader):
            start, end = loader.span(batch)
            own = loader.share(batch)[0]    # 0 if this rank borrows an image
            feats = self._features(model, images, amp)[:own]
            waiting.append((loader.positions(batch)[:own], feats.cpu().numpy()))
            bar.update(end - start)
            ends = batch + 1 == len(loader)
            stops = (batch + 1) % STOP_EVERY == 0 and stop()
            if ends or stops or (end - first) * self.row * 2 >= CHUNK:
                self._write(view, first, end, waiting)
                waiting, first = [], end
            if stops and not ends:
                return False
        return True

    @torch.no_grad()
    def _features(self, model: nn.Module, images: torch.Tensor, amp: object) -> torch.Tensor:
        with autocast(images.device, amp):
            feats = forward_crops(model, images)["feat"].float()
        if tuple(feats.shape[1:]) != self.shape[2:]:
            raise ConfigError(f"trainer.cache_features: {type(model).__name__} gives features {list(feats.shape[1:])} "
                              f"an image, not {list(self.shape[2:])}")
        if not bool((feats.abs() <= LARGEST).all()):    # a NaN fails this too
            raise RunError("trainer.cache_features: a feature isn't finite in half precision, in which they are kept; "
                           "set it to null")
        return feats.half()

    def _write(self, view: int, first: int, end: int, parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Write rows [first, end) of a view, this rank's of which are `parts`, and record the number of rows.

        Rank 0 writes all ranks' rows, which alternate: on a network disk, several machines that write into the same
        pages overwrite each other's rows.
        """
        everyone = dist.gather_objects(parts)

        def write() -> None:
            begin = view * self.shape[1] + first
            place = np.memmap(self.file, np.float16, "r+", 2 * begin * self.row, (end - first, *self.shape[2:]))
            for positions, feats in itertools.chain.from_iterable(everyone):
                place[positions - first] = feats
            place.flush()
            del place       # nothing stays mapped
            self._note(view * self.shape[1] + end)
        dist.on_main(write)

    # ---- reading -----------------------------------------------------------------------------------------------

    def rows(self, view: int, index: np.ndarray) -> torch.Tensor:
        """The features of images `index` [n] in view `view` (from 0): [n, E, D] in torch's default dtype, on the
        device. Raises RunError if the file is too short."""
        kind = torch.get_default_dtype()
        if self._held is None and self.bytes <= IN_MEMORY:
            self._held = torch.from_numpy(np.fromfile(self.file, np.float16).reshape(self.shape)).to(self.device)
        if self._held is not None:
            return self._held[view][torch.from_numpy(index).to(self.device, non_blocking=True)].to(kind)
        if self._handle is None:
            self._handle = open(self.file, "rb", buffering=0)  # noqa: SIM115 read from as long as the store lives
        # With a memory map each row read would add 64 KiB of the file to this process's memory.
        found = np.empty((len(index), *self.shape[2:]), np.float16)
        for i in np.argsort(index):
            self._handle.seek(2 * self.row * (view * self.shape[1] + int(index[i])))
            if self._handle.readinto(found[i]) < 2 * self.row:
                raise RunError(f"{self.file}: ends too early; remove it, and it is made anew")
        return torch.from_numpy(found).to(self.device, non_blocking=True).to(kind)


@contextlib.contextmanager
def _all_experts(model: nn.Module) -> Iterator[None]:
    """Inside, an expert-assignment model doesn't route: only then does it return every expert's features."""
    route = getattr(model, "route", False)
    if route:
        model.route = False
    try:
        yield
    finally:
        if route:
            model.route = True


class FeatureLoader(BaseDataLoader):
    """Yields (features [n, E, D], labels [n]) in the order in which `loader` yields its images: the same batches,
    samplers and ranks. Epoch e uses view (e - 1) mod V."""

    def __init__(self, loader: Any, store: FeatureStore):
        super().__init__(loader.targets, loader.batch_size, shuffle=loader.shuffle, training=loader.training,
                         seed=loader.seed, device=loader.device, rank=loader.rank, world_size=loader.world_size,
                         sampler=loader.index_sampler)
        self.source, self.store = loader, store
        self.cls_num_list, self.num_classes = loader.cls_num_list, loader.num_classes

    def train_eval_loader(self) -> FeatureLoader:
        """A loader of the training images' features in order, each once."""
        return FeatureLoader(self.source.train_eval_loader(), self.store)

    def _batches(self, epoch: int, batches: range) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order, view = self.epoch_order(epoch), (epoch - 1) % self.store.shape[0]
        for batch in batches:
            index = order[self.positions(batch)]
            labels = torch.from_numpy(self.targets[index]).to(self.device, non_blocking=True)
            yield self.store.rows(view, index), labels
