"""Splitting images by class: held-out shares, balanced subsets of unused images, and log lines about a split."""
from __future__ import annotations

import contextlib
import hashlib
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_loader.datasets import Splits
from data_loader.imbalance import indices_by_class
from data_loader.places import file_of, name_below
from logger.text import count_of, first_of
from utils.class_counts import FEW, MANY
from utils.errors import ConfigError

_PERSON = b"split313"   # personalises the hash of names; chosen so that numbered names are split evenly
TOO_FEW_TO_TELL = 10   # with fewer test images, a class's accuracy says little


def take_share(targets: np.ndarray, share: float, seed: int, keep_rare: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Take a random share (0 to 1) of each class: (indices kept, indices taken), both ascending. targets: [N] labels.

    round(share · n) of a class's n images are taken, at least one if n >= `keep_rare`, and never all of them.
    """
    rng = np.random.RandomState(seed)
    taken = []
    for own in map(rng.permutation, indices_by_class(targets)):
        count = max(round(share * len(own)), int(len(own) >= keep_rare))
        taken.append(own[:min(count, len(own) - 1)])
    taken = np.sort(np.concatenate(taken)) if taken else np.empty(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(targets)), taken), taken


@dataclass
class Division:
    """Which images of a folder or list are set aside for testing or validation, by name: adding a photo moves no other.

    An image is taken if a hash, 0 to 1, of its name relative to `root` and of the seed is below the share. Exceptions:
    a class never gives all its images; with two or more it gives at least one for testing, with five or more at least
    one for validation. Exceptions are made once and recorded (`memory`), so that these images keep their split when
    others are added or removed: later the class's other images have been trained on.

    rule: "names", or "shares" for runs of old versions, which drew a share of each class by position.
    kept, taken: "test:NAME" or "val:NAME" of exceptions. taken is None for a new division, whose own are in `forced`.
    """

    root: str
    seed: int
    test_share: float
    val_share: float
    rule: str = "names"
    kept: set[str] = field(default_factory=set)
    taken: set[str] | None = None
    forced: set[str] = field(default_factory=set)
    sample: dict[str, int] = field(default_factory=dict)

    @classmethod
    def following(cls, facts: Mapping[str, Any], **settings: Any) -> Division:
        """The division recorded in a checkpoint's facts about its data (`data_facts`), or a new one without facts."""
        return cls.of(facts.get("split") or {} if facts else None, **settings)

    @classmethod
    def of(cls, memory: dict[str, Any] | None, **settings: Any) -> Division:
        """The division for a checkpoint's `memory`; None: a new one. Memory without a `rule` is an old run's."""
        if memory is None:
            return cls(**settings)
        taken = memory.get("taken")       # None for versions that didn't record it
        return cls(**settings, rule=memory.get("rule", "shares"), kept=set(memory.get("kept", ())),
                   taken=None if taken is None else set(taken))

    def divide(self, images: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
        """(indices kept, indices taken) of an ImageSet, both ascending. what: "test" or "val"."""
        share, keep_rare = (self.test_share, 2) if what == "test" else (self.val_share, 5)
        if self.rule == "shares" or images.paths is None:
            return take_share(images.targets, share, self.seed, keep_rare)
        names = [relative_name(path, self.root) for path in images.paths]
        values = np.array([name_value(name, self.seed, what) for name in names])
        free = np.array([f"{what}:{name}" not in self.kept for name in names])
        under = (values < share) | np.array([f"{what}:{name}" in (self.taken or ()) for name in names])
        taken = np.zeros(len(names), dtype=bool)
        for own in indices_by_class(images.targets):
            candidates = own[free[own]]
            if len(own) < keep_rare or not len(candidates):
                continue
            chosen = candidates[under[candidates]]
            if not len(chosen) and self.taken is None:
                chosen = candidates[[values[candidates].argmin()]]
                self.forced.add(f"{what}:{names[chosen[0]]}")
            if len(chosen) == len(own):
                chosen = np.setdiff1d(chosen, chosen[[values[chosen].argmax()]])
            taken[chosen] = True
        alone = np.bincount(images.targets, minlength=1)[images.targets] < keep_rare
        self.kept |= {f"{what}:{names[i]}" for i in np.flatnonzero(~taken & ((values < share) | alone))}
        return np.flatnonzero(~taken), np.flatnonzero(taken)

    def splits(self, sets: dict[str, Any], where: str, kind: str, notes: list[str], **about: Any) -> Splits:
        """The Splits of a data set with split images in `sets` ("train", "test", "val"), or with one set only, of which
        some images are set aside for testing (added to `notes`). where: prefix of errors; kind: what holds a split.

        Raises ConfigError if that leaves nothing to test on.
        """
        if len(sets) > 1:
            return Splits(sets["train"], sets.get("test", sets.get("val")),
                          val=sets.get("val") if "test" in sets else None, notes=notes, **about)
        images, = sets.values()
        kept, taken = self.divide(images, "test")
        if not len(taken):
            raise ConfigError(f"{where}: every class has one image; none is left to test on")
        notes.append(f"no test {kind}: {len(taken)} of {len(images)} images, about {self.test_share:.0%} of each "
                     "class, set aside for testing, chosen by their names: adding images moves none of them (in a new "
                     "run, where a class is larger than a handful)")
        return Splits(images.subset(kept), images.subset(taken), notes=notes, **about)

    def memory(self, images: Any, drawn_from: Sequence[str] | None = None) -> dict[str, Any]:
        """What a checkpoint records about the division, as plain data. images: the training split, a sample of which is
        recorded by name and size, to recognise the same photos in another place (for images in shards, the shards). For
        images in memory, which have no names, only the rule and seed are recorded. drawn_from: the paths of more images
        from which the training split was drawn by position: their names are recorded as a digest, since a photo more
        or less would draw others."""
        if images.paths is None:
            return {"rule": self.rule, "seed": self.seed}
        sample = sample_of(images.paths, self.root)
        drawn = {} if drawn_from is None else {"drawn_from": names_digest(drawn_from, self.root)}
        return {"rule": self.rule, "seed": self.seed, "test_share": self.test_share, "val_share": self.val_share,
                "kept": sorted(self.kept), "taken": sorted((self.taken or set()) | self.forced), "sample": sample,
                **drawn}

    def agree(self, facts: Mapping[str, Any], class_names: Sequence[str] | None) -> None:
        """Raises ConfigError if the settings differ from those that a model was trained with, since it would be tested
        on photos that it has seen. facts: the checkpoint's `data_facts`; class_names: the data's.

        If the checkpoint only initialises a training ("optional"), this is checked only if it was trained on this data,
        judged by a recorded sample of photos or, for images in memory, by equal class names.
        """
        memory, known = facts.get("split") or {}, facts.get("class_names")
        alike = bool(class_names and known) and list(class_names) == list(known)
        if facts.get("optional") and not (memory.get("sample") or alike):
            return
        for key, own in (("split_seed", self.seed), ("test_share", self.test_share), ("val_share", self.val_share)):
            before = memory.get(key.removeprefix("split_"), own)
            if before != own:
                raise ConfigError(f"data_loader.args.{key}: {own}, but the checkpoint's split was made with {before}, "
                                  "and another one would test images that were trained on; leave it as it was")


def sample_of(paths: Sequence[str], root: str) -> dict[str, int]:
    """{name below `root`: size in bytes} of at most 64 images (for images in shards, of their shards), to recognise the
    same photos again; without those that aren't there, as testing needs no training images."""
    step = max(1, len(paths) // 64)
    files = dict.fromkeys(file_of(path) for path in paths[::step][:64])
    return {name_below(path, root): os.path.getsize(path) for path in files
            if "://" not in path and os.path.exists(path)}


def is_same_place(root: str, memory: dict[str, Any] | None) -> bool:
    """Whether folder `root` has at least half of the sample of training photos in a checkpoint's memory; True if there
    is no sample."""
    sample = (memory or {}).get("sample") or {}
    return not sample or sum(is_there(root, name, size) for name, size in sample.items()) * 2 >= len(sample)


def is_there(root: str, name: str, size: int) -> bool:
    """Whether folder `root` has a file `name`, in any Unicode form, of `size` bytes."""
    for own in (unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name), name):  # macOS decomposes é
        with contextlib.suppress(OSError):
            return os.path.getsize(os.path.join(root, own)) == size
    return False


def relative_name(path: str, root: str) -> str:
    """An image's name below `root`, in a form that is the same on every system and in shards."""
    return unicodedata.normalize("NFC", name_below(path, root))


def names_digest(paths: Sequence[str], root: str) -> str:
    """A hash of images' names below `root` and of their order."""
    names = "\0".join(relative_name(path, root) for path in paths)
    return hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def name_value(name: str, seed: int, what: str) -> float:
    """A hash of name, seed and `what` ("test" or "val"), as a number from 0 to 1."""
    text = f"{seed}/{what}/{name}".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(text, digest_size=8, person=_PERSON).digest()
    return int.from_bytes(digest, "little") / 2**64


def holdout_of_spare(targets: np.ndarray, num_classes: int, cap: int | None, seed: int,
                     fewest: int = 1) -> tuple[np.ndarray, int]:
    """A validation split from unused images with labels `targets` [N]: (indices, number of classes without any).

    Balanced: every class with unused images gives as many as the class with the fewest has, at most `cap`. If that
    would be less than `fewest`, each gives up to `cap` instead.
    """
    rng = np.random.RandomState(seed)
    counts = np.bincount(targets, minlength=num_classes)
    poorest = int(counts[counts > 0].min())
    count = min(poorest, cap or poorest) if poorest >= fewest or cap is None else cap
    chosen = [rng.permutation(own)[:count] for own in indices_by_class(targets)]
    return np.concatenate(chosen), int((counts == 0).sum())


def summary(train: list[int], test: np.ndarray, names: list[str] | None, notes: list[str], many: float = MANY,
            few: float = FEW) -> list[str]:
    """Lines for the log: classes, counts, imbalance, groups, and warnings, followed by `notes`.

    train, test: images per class, [C]. many, few: the limits of the groups, in training images.
    """
    counts = np.asarray(train)
    filled = counts[counts > 0]
    named = [str(label) for label in range(len(counts))] if names is None else names
    lines = []
    if len(filled):
        big, small = int(counts.argmax()), int(np.where(counts > 0, counts, counts.max() + 1).argmin())
        lines = [f"classes: {len(counts)}, training images: {counts.sum():,}, test images: {int(test.sum()):,}",
                 f"training images a class: {filled.max():,} ({named[big]}) to {filled.min():,} ({named[small]}), "
                 f"imbalance {filled.max() / filled.min():.4g} : 1" if filled.max() > filled.min() else
                 f"training images a class: {filled.max():,} in each",
                 f"groups: {(counts > many).sum()} many-shot (over {many:g}), "
                 f"{((counts <= many) & (counts >= few)).sum()} medium-shot, "
                 f"{(counts < few).sum()} few-shot (under {few:g})"]

    def listed(labels: np.ndarray) -> str:
        return first_of([named[label] for label in labels])

    untrained, untested = np.flatnonzero(counts == 0), np.flatnonzero(test == 0)
    small = np.flatnonzero((test > 0) & (test < TOO_FEW_TO_TELL))
    if len(filled) and len(untrained):
        lines.append(f"warning: {count_of(len(untrained), 'class has', 'classes have')} no training image: "
                     f"{listed(untrained)}")
    if len(untested):
        whose = "its" if len(untested) == 1 else "their"
        lines.append(f"warning: {count_of(len(untested), 'class has', 'classes have')} no test image, {whose} accuracy "
                     f"isn't measured: {listed(untested)}")
    if len(small):
        whose = "its" if len(small) == 1 else "their"
        lines.append(f"warning: the test split is small: {count_of(len(small), 'class has', 'classes have')} under "
                     f"{TOO_FEW_TO_TELL} test images, {listed(small)}; {whose} accuracy is a rough guess")
    return lines + notes
