"""Dividing images by class: held-out shares, balanced left-overs, and the lines that describe a split."""
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
from data_loader.places import file_of, name_below
from logger.text import count_of
from utils.class_counts import FEW, MANY
from utils.errors import ConfigError

_PERSON = b"split313"   # of the hash that divides by name: one with which numbered names divide evenly
TOO_FEW_TO_TELL = 10   # test images a class, under which a class's accuracy says little


def take_share(targets: np.ndarray, share: float, seed: int, keep_rare: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Part a split by class: (indices kept, indices taken), both ascending.

    Of each class round(share · n) images are taken, at least one where it has `keep_rare` or more, and never its last.
    """
    rng = np.random.RandomState(seed)
    taken = []
    for label in np.unique(targets):
        own = rng.permutation(np.flatnonzero(targets == label))
        count = max(round(share * len(own)), int(len(own) >= keep_rare))
        taken.append(own[:min(count, len(own) - 1)])
    taken = np.sort(np.concatenate(taken)) if taken else np.empty(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(targets)), taken), taken


@dataclass
class Division:
    """Which images of a folder or list are set aside, by their names: a photo that is added moves no other.

    An image is taken where a hash of its name relative to `root` and of the seed, 0 to 1, is under the share. No class
    gives its last image; a class of two or more gives at least one to the test, one of five or more to validation. What
    such exceptions kept for training or took is remembered (`memory`), and stays there when images come or go; they
    are made once, since a class's other images were trained on.

    rule: "names", or "shares" for runs of versions that drew a share of each class's images by their number.
    taken: None of a new division, which may take images against their hash: `forced`.
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
        """As what a checkpoint knows of its data says (`data_facts`); a new one where that is nothing."""
        return cls.of(facts.get("split") or {} if facts else None, **settings)

    @classmethod
    def of(cls, memory: dict[str, Any] | None, **settings: Any) -> Division:
        """As a checkpoint remembers it; memory None: a new one; without a `rule`: of an old run."""
        if memory is None:
            return cls(**settings)
        taken = memory.get("taken")       # None: of a version that didn't remember it
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
        for label in np.unique(images.targets):
            own = np.flatnonzero(images.targets == label)
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
        """The splits of a data set that is parted ("train", "test", "val"), or whose one part is all there is: then
        some are set aside for testing, and `notes` says so. where: what an error names; kind: what holds a split.

        Raises ConfigError where that leaves nothing to test on.
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

    def memory(self, images: Any) -> dict[str, Any]:
        """What a checkpoint must know of it, as plain data; images: the training split, of which some are remembered by
        name and size, so that the same photos are known again in another place; of images in shards, their shards.
        Images in memory have no names: of them the seed is all there is to know."""
        if images.paths is None:
            return {"rule": self.rule, "seed": self.seed}
        sample = sample_of(images.paths, self.root)
        return {"rule": self.rule, "seed": self.seed, "test_share": self.test_share, "val_share": self.val_share,
                "kept": sorted(self.kept), "taken": sorted((self.taken or set()) | self.forced), "sample": sample}

    def agree(self, facts: Mapping[str, Any], class_names: Sequence[str] | None) -> None:
        """Raises ConfigError where the settings aren't those of the split that a model was trained with: photos that it
        has seen would be tested.

        class_names: the data's. Of weights that a training starts from ("optional") a sample of photos tells that they
        learned from this place; of images in memory, the classes do.
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
    """The sizes of 64 images at most (of images in shards, their shards), by names below `root`: by these the same
    photos are known again."""
    step = max(1, len(paths) // 64)
    files = dict.fromkeys(file_of(path) for path in paths[::step][:64])
    return {name_below(path, root): os.path.getsize(path) for path in files if "://" not in path}


def is_same_place(root: str, memory: dict[str, Any] | None) -> bool:
    """Whether a folder holds the training photos that a checkpoint remembers: half of the sample at least."""
    sample = (memory or {}).get("sample") or {}
    def there(name: str, size: int) -> bool:
        for form in ("NFC", "NFD"):     # as a Mac writes é into an archive
            with contextlib.suppress(OSError):
                return os.path.getsize(os.path.join(root, unicodedata.normalize(form, name))) == size
        with contextlib.suppress(OSError):
            return os.path.getsize(os.path.join(root, name)) == size
        return False
    return not sample or sum(there(name, size) for name, size in sample.items()) * 2 >= len(sample)


def relative_name(path: str, root: str) -> str:
    """An image's name below `root`, the same on every system, and in a shard as in a folder."""
    return unicodedata.normalize("NFC", name_below(path, root))


def name_value(name: str, seed: int, what: str) -> float:
    """A number from 0 to 1 that depends on a name and a seed alone."""
    text = f"{seed}/{what}/{name}".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(text, digest_size=8, person=_PERSON).digest()
    return int.from_bytes(digest, "little") / 2**64


def match_classes(own: Sequence[str], wanted: Sequence[str], some: bool = False) -> list[int] | None:
    """For each class of `own`, its number in `wanted`, by name: exactly, or else in any case and Unicode form.

    some: `own` may lack classes. None where names don't fit.
    """
    def key(name: str) -> str:
        return unicodedata.normalize("NFC", name).strip().casefold()
    for fold in (str, key):
        numbers = {fold(name): number for number, name in enumerate(wanted)}
        found = [numbers.get(fold(name)) for name in own]
        if len(numbers) == len(wanted) and None not in found and len(set(found)) == len(found) and (
                some or len(found) == len(wanted)):
            return found
    return None


def stranger(own: Sequence[str], wanted: Sequence[str]) -> str:
    """The first class of `own` for which `wanted` has none, or none that is left; `match_classes` found no numbers."""
    taken: set[int] = set()
    for name in own:
        number = match_classes([name], wanted, some=True)
        if number is None or number[0] in taken:
            return name
        taken.add(number[0])
    raise AssertionError("every class has its number")


def _first(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def class_numbers(own: Sequence[str], wanted: Sequence[str], data_dir: str, some: bool) -> list[int]:
    """For each class of the data in `data_dir`, its number in a checkpoint's `wanted`, by name. some: the data may lack
    classes.

    Raises ConfigError where names don't fit.
    """
    if list(own) == list(wanted):       # as they are, be one there twice
        return list(range(len(wanted)))
    numbers = match_classes(own, wanted, some)
    if numbers is None:
        raise ConfigError(f"data_loader.args.data_dir: {data_dir} has the classes {_first(own)}, and the checkpoint's "
                          f"model knows {_first(wanted)}; give the data it was trained for, or start a new classifier "
                          "with --pretrained")
    return numbers


def follow_classes(splits: Splits, wanted: list[str], data_dir: str, some: bool) -> None:
    """Number the splits' classes as `wanted` does, by name, in place. some: the data may lack classes.

    Raises ConfigError where names don't fit.
    """
    numbers = class_numbers(splits.class_names, wanted, data_dir, some)
    if splits.class_names != list(wanted):
        if numbers != list(range(len(wanted))):
            splits.notes.append("classes are numbered as in the checkpoint, by their names")
        table = np.array(numbers)
        for part in (splits.train, splits.val, splits.test, splits.spare):
            if part is not None:
                part.targets = np.where(part.targets >= 0, table[part.targets], part.targets)
        splits.class_names, splits.num_classes = list(wanted), len(wanted)


def holdout_of_spare(targets: np.ndarray, num_classes: int, cap: int | None, seed: int,
                     fewest: int = 1) -> tuple[np.ndarray, int]:
    """A validation split out of images that no split uses: (indices, number of classes without any).

    Balanced: every class that has images left gives as many as the poorest of them, `cap` at most. Where that would be
    under `fewest`, each gives up to `cap`.
    """
    rng = np.random.RandomState(seed)
    counts = np.bincount(targets, minlength=num_classes)
    poorest = int(counts[counts > 0].min())
    count = min(poorest, cap or poorest) if poorest >= fewest or cap is None else cap
    chosen = [rng.permutation(np.flatnonzero(targets == label))[:count] for label in range(num_classes)]
    return np.concatenate(chosen), int((counts == 0).sum())


def summary(train: list[int], test: np.ndarray, names: list[str] | None, notes: list[str], many: float = MANY,
            few: float = FEW) -> list[str]:
    """Lines for the log: classes, counts, imbalance, groups, and what to be careful about.

    many, few: the limits of the groups, in training images.
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
        return _first([named[label] for label in labels])

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
