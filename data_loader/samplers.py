"""Samplers of decoupled training (Kang et al., ICLR 2020): which images an epoch shows, and how often each class.

A class is drawn with p_j ~ n_j^q: instance-balanced q = 1, square-root 1/2, class-balanced 0. Every epoch's indices
are a function of (seed, epoch) alone, so that a resumed run continues with the same images, and ranks that slice them
share the epoch without overlap. Classes without images are ignored; labels need not be contiguous.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from data_loader.imbalance import sorted_by_class
from utils.config.build import build, lookup
from utils.config.signature import of_callable
from utils.errors import ConfigError
from utils.seed import numpy_rng


class EpochSampler(Sampler):
    """Base class: `epoch_indices` gives the indices of an epoch, and iterating yields this rank's part of them.

    targets: [N] labels, array, tensor or list. epoch_length: indices per epoch over all ranks; None: N. rank,
    world_size: this process takes every world_size-th index, starting at `rank`. Raises ConfigError for empty targets
    or an epoch_length below 1.
    """

    #: q in the last epoch of training; None: not known, so that `test.py --prior` has to refuse.
    power: float | None = None

    def __init__(self, targets: Any, seed: int = 0, epoch_length: int | None = None, rank: int = 0,
                 world_size: int = 1):
        targets = np.asarray(targets)
        if targets.ndim != 1 or not len(targets):
            raise ConfigError("data_loader.args.sampler: needs a non-empty one-dimensional array of labels")
        if epoch_length is not None and epoch_length < 1:
            raise ConfigError(f"data_loader.args.sampler.args.epoch_length: must be 1 or more, not {epoch_length}")
        assert 0 <= rank < world_size
        self.num_images, self.seed, self.epoch = len(targets), int(seed), 1
        self.epoch_length = epoch_length or self.num_images
        self.rank, self.world_size = rank, world_size
        self._group_by_class(targets)

    def _group_by_class(self, targets: np.ndarray) -> None:
        """Sort images by class: those of class j are `by_class[starts[j] : starts[j] + counts[j]]`."""
        self.by_class, self.starts, self.counts = sorted_by_class(targets)
        self.num_classes = len(self.counts)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch (1, 2, ...) for the next iterations; initially 1."""
        self.epoch = int(epoch)

    def epoch_indices(self, epoch: int | None = None) -> np.ndarray:
        """All ranks' indices for an epoch (None: the one that is set), in order: int64 [epoch_length]. Raises
        ConfigError if a sampler draws another number."""
        epoch = self.epoch if epoch is None else int(epoch)
        indices = self._draw(numpy_rng(self.seed, epoch), epoch)
        if len(indices) != self.epoch_length:
            raise ConfigError(f"data_loader.args.sampler: {type(self).__name__} draws {len(indices)} images for an "
                              f"epoch of {self.epoch_length}; its epoch_length must be the number that it draws")
        return indices

    def _draw(self, rng: np.random.Generator, epoch: int) -> np.ndarray:
        """The indices of an epoch, int64 [epoch_length], drawn with `rng` alone. A subclass defines it."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[int]:
        return iter(self.epoch_indices()[self.rank::self.world_size].tolist())

    def __len__(self) -> int:
        return len(range(self.rank, self.epoch_length, self.world_size))

    def _draw_images(self, classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A uniformly drawn image of each of the classes [M] -> indices [M]."""
        within = (rng.random(len(classes)) * self.counts[classes]).astype(np.int64)
        return self.by_class[self.starts[classes] + within]


class InstanceBalancedSampler(EpochSampler):
    """q = 1: each image once per epoch in shuffled order; repeated in another order if `epoch_length` exceeds N."""

    power = 1.0

    def _draw(self, rng: np.random.Generator, epoch: int) -> np.ndarray:
        rounds = -(-self.epoch_length // self.num_images)
        return np.concatenate([rng.permutation(self.num_images) for _ in range(rounds)])[:self.epoch_length]


class SquareRootSampler(EpochSampler):
    """q = 1/2, with replacement: class j with probability proportional to the square root of its size, then any of its
    images."""

    power = 0.5

    def _draw(self, rng: np.random.Generator, epoch: int) -> np.ndarray:
        edges = np.cumsum(np.sqrt(self.counts))
        classes = np.searchsorted(edges, rng.random(self.epoch_length) * edges[-1], side="right")
        # The product may round up to the last edge.
        return self._draw_images(np.minimum(classes, self.num_classes - 1), rng)


class ClassBalancedSampler(EpochSampler):
    """q = 0, with replacement: any class with equal probability, then any of its images.

    retain_epoch_size: an epoch has N indices; if false, as in RIDE, the largest class's size times the number of
    classes. `epoch_length` overrides both.
    """

    power = 0.0

    def __init__(self, targets: Any, seed: int = 0, retain_epoch_size: bool = True, epoch_length: int | None = None,
                 rank: int = 0, world_size: int = 1):
        super().__init__(targets, seed, epoch_length=epoch_length, rank=rank, world_size=world_size)
        if not retain_epoch_size and epoch_length is None:
            self.epoch_length = int(self.counts.max()) * self.num_classes

    def _draw(self, rng: np.random.Generator, epoch: int) -> np.ndarray:
        return self._draw_images(rng.integers(self.num_classes, size=self.epoch_length), rng)


class ProgressivelyBalancedSampler(EpochSampler):
    """From instance- to class-balanced: in epoch k of T each draw is class-balanced with probability (k - 1) / (T - 1),
    else instance-balanced.

    Both with replacement. epochs: T, 1 or more; T = 1 is instance-balanced, epochs after T are class-balanced.
    """

    power = 0.0

    def __init__(self, targets: Any, epochs: int, seed: int = 0, epoch_length: int | None = None, rank: int = 0,
                 world_size: int = 1):
        super().__init__(targets, seed, epoch_length=epoch_length, rank=rank, world_size=world_size)
        if epochs < 1:
            raise ConfigError(f"data_loader.args.sampler.args.epochs: must be 1 or more, not {epochs}")
        self.epochs = int(epochs)

    def class_balanced_share(self, epoch: int) -> float:
        """The probability, 0 to 1, that a draw in this epoch is class-balanced."""
        return min(max(epoch - 1, 0) / max(self.epochs - 1, 1), 1.0) if self.epochs > 1 else 0.0

    def _draw(self, rng: np.random.Generator, epoch: int) -> np.ndarray:
        balanced = rng.random(self.epoch_length) < self.class_balanced_share(epoch)
        indices = rng.integers(self.num_images, size=self.epoch_length)
        indices[balanced] = self._draw_images(rng.integers(self.num_classes, size=int(balanced.sum())), rng)
        return indices


class ClassAwareSampler(EpochSampler):
    """Cycles through the classes in shuffled order, taking `num_samples_cls` images of a class at a time, and through
    each class's images in shuffled order.

    So classes are equally frequent to within one such turn, and no image is repeated before all of its class were used.
    """

    power = 0.0

    def __init__(self, targets: Any, seed: int = 0, num_samples_cls: int = 4, epoch_length: int | None = None,
                 rank: int = 0, world_size: int = 1):
        super().__init__(targets, seed, epoch_length=epoch_length, rank=rank, world_size=world_size)
        if num_samples_cls < 1:
            raise ConfigError("data_loader.args.sampler.args.num_samples_cls: must be 1 or more, "
                              f"not {num_samples_cls}")
        self.num_samples_cls = int(num_samples_cls)

    def _draw(self, rng: np.random.Generator, epoch: int) -> np.ndarray:
        turns = -(-self.epoch_length // self.num_samples_cls)
        cycles = -(-turns // self.num_classes)
        classes = np.concatenate([rng.permutation(self.num_classes) for _ in range(cycles)])[:turns]
        # Cycle r has each class once; with k = num_samples_cls it takes positions r k to r k + k - 1 of its stream.
        place = (np.arange(turns) // self.num_classes * self.num_samples_cls)[:, None] + np.arange(self.num_samples_cls)
        stream, begins = self._image_streams(cycles * self.num_samples_cls, rng)
        return stream[begins[classes][:, None] + place].ravel()[:self.epoch_length]

    def _image_streams(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """For each class a stream of at least `length` images in shuffled cycles.

        Returns (the streams of all classes in one array, the start of each class's stream [C]).
        """
        rounds = -(-length // self.counts)
        sizes = rounds * self.counts
        begins = np.cumsum(sizes) - sizes
        # Every image once per round of its class; sorting (round of the class, random) shuffles all rounds at once.
        round_sizes = np.repeat(self.counts, rounds)
        round_of = np.repeat(np.arange(len(round_sizes)), round_sizes)
        round_begins = np.cumsum(round_sizes) - round_sizes
        within = np.arange(len(round_of)) - round_begins[round_of]
        within = within[np.argsort(round_of + rng.random(len(round_of)))]
        class_starts = np.repeat(self.starts, sizes)
        return self.by_class[class_starts + within], begins


SAMPLERS: dict[str, type[EpochSampler]] = {
    "InstanceBalanced": InstanceBalancedSampler, "ClassBalanced": ClassBalancedSampler,
    "SquareRoot": SquareRootSampler, "ProgressivelyBalanced": ProgressivelyBalancedSampler,
    "ClassAware": ClassAwareSampler}


def sampler_of(spec: dict | None, balanced: bool, retain_epoch_size: bool, targets: np.ndarray, seed: int,
               epochs: int | None) -> Any:
    """The sampler for a loader's arguments, by `sampler` (spec) or `balanced`; None if each image is shown once.

    targets: [N] labels. Raises ConfigError for bad arguments, and if `retain_epoch_size` is false with a `sampler` that
    doesn't support it. It is ignored without any sampler, since RIDE's configs have it without `balanced`.
    """
    if spec is None:
        return ClassBalancedSampler(targets, seed=seed, retain_epoch_size=retain_epoch_size) if balanced else None
    if balanced:
        raise ConfigError("data_loader.args.sampler: give a sampler or \"balanced\": true, not both")
    own = spec.get("args") or {} if isinstance(spec, dict) else {}
    given = {"seed": seed, "epochs": epochs, "retain_epoch_size": None if retain_epoch_size else False}
    extra = {name: value for name, value in given.items() if name not in own and value is not None}
    sampler = build(SAMPLERS, spec, "data_loader.args.sampler", targets=targets, **extra)
    signature = of_callable(type(sampler))
    if "retain_epoch_size" in extra and not signature.open and "retain_epoch_size" not in signature.parameters:
        raise ConfigError(f"data_loader.args.retain_epoch_size: {spec['type']} has no such length; false goes with the "
                          "ClassBalanced sampler, others take data_loader.args.sampler.args.epoch_length")
    return sampler


def power_of(args: dict[str, Any]) -> float | None:
    """q, at the end of training, of the sampler for a loader's arguments; 1 if each image is shown once; None for a
    sampler that doesn't say."""
    spec = args.get("sampler")
    if spec is None:
        return ClassBalancedSampler.power if args.get("balanced") else 1.0
    return getattr(lookup(SAMPLERS, spec["type"], "data_loader.args.sampler.type", "sampler"), "power", None)
