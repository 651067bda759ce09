"""Drawing validation images for a model that is already trained: none of them may have been trained on."""
from __future__ import annotations

import inspect
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_loader.splitting import is_same_place, is_there, relative_name
from utils.errors import ConfigError

_MISSING = object()
MOST_ALIKE = 4      # images with the same file and folder name; with more, the name says nothing


def check_held_out(loader: Any, facts: Mapping[str, Any], trained: Mapping[str, Any] | None,
                   now: Mapping[str, Any]) -> None:
    """Raises ConfigError if a loader's validation images may include images that a model was trained on.

    loader: the training split's loader, built from `now`. facts: what the model's checkpoint records about its data
    (`data_facts`). trained, now: `data_loader.args` of the model's training (None: it had other data) and of the
    loader. Validation images that the data set provides aren't drawn and so are checked only for the training photos
    that the checkpoint records; "test" isn't checked.
    """
    if getattr(loader, "draws_validation", False):
        _check_drawn(loader, facts, trained, now)
    if reason := getattr(loader, "seen", {}).get("val"):
        raise ConfigError(f"data_loader: {reason}; give images that it wasn't trained on (val/, a list)")


def _check_drawn(loader: Any, facts: Mapping[str, Any], trained: Mapping[str, Any] | None,
                 now: Mapping[str, Any]) -> None:
    if trained is not None:
        _check_arguments(loader, trained, now)
        if reason := (facts.get("seen") or {}).get("val"):
            raise ConfigError("data_loader: weights that the model began from, or its teacher, may have learned from "
                              f"the validation images: {reason}")
        before = (facts.get("split") or {}).get("drawn_from")       # older versions didn't record it
        if before not in (None, (loader.split_memory or {}).get("drawn_from")):
            key, own, photos = ("imb_factor", "val/, a list", "photos") if loader.task == "classification" else (
                "validation", "\"test\" takes the val split", "images of the training annotations")
            raise ConfigError(f"data_loader.args.{key}: {photos} were added, renamed or removed since the model was "
                              "trained, so it draws others, and \"holdout\" may take some that the model was trained "
                              f"on: give validation images of their own ({own}), or restore the photos")
    known, own = facts.get("class_names"), loader.class_names
    same = loader.paths is None and known and own and list(known) == list(own)       # images in memory have no names
    if same and list(facts["cls_num_list"]) != loader.cls_num_list:
        raise ConfigError(f"data_loader: trains on {sum(loader.cls_num_list):,} images, the model was trained on "
                          f"{sum(facts['cls_num_list']):,} of the same data; \"holdout\" may draw images that it was "
                          "trained on: leave the loader and its arguments as they were")


def of_same_data(before: Mapping[str, Any], now: Mapping[str, Any], facts: Mapping[str, Any] | None,
                 doubt: bool = True) -> bool:
    """Whether two configs' `data_loader` objects refer to the same data, even if in another place.

    facts: what the first one's checkpoint records about its data. doubt: the answer if it can't be known, because their
    shards differ or because a detector's checkpoint of an older version records none of its images.
    """
    places = [(spec.get("args") or {}).get("data_dir") for spec in (before, now)]
    if before.get("type", now.get("type")) != now.get("type"):
        return False
    if before and _other_shards(before, now):
        return doubt
    if None in places or os.path.realpath(places[0]) == os.path.realpath(places[1]):
        return True
    split = (facts or {}).get("split") or {}
    if not split.get("sample") and ((facts or {}).get("preprocess") or {}).get("task") == "detection":
        return doubt
    return is_same_place(places[1], split)


def other_files(kind: type, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names, without endings, of files and folders from which `now` reads splits and `before` didn't.

    before, now: `data_loader.args` of a loader of the class `kind`, whose `split_files` are the arguments that name
    such files, if it has any.
    """
    found = []
    for key in getattr(kind, "split_files", ()):
        one, two = (os.path.normpath(str(args.get(key, _default(kind, key)))) for args in (before, now))
        if one != two:
            found.append(os.path.splitext(os.path.basename(two))[0].strip(".") or key)
    return list(dict.fromkeys(found))


def seen_in(splits: Mapping[str, Any], root: str, facts: Mapping[str, Any], elsewhere: bool) -> dict[str, str]:
    """{"test" or "val": in words, that a model was trained on images of this split}, where that is known.

    splits: an `ImageSet` or None for each. facts: the model's `data_facts`. elsewhere: its training images aren't in
    `root` as they were.
    """
    memory = facts.get("split") or {}
    counts = {part: seen_among(images and images.paths, root, memory) for part, images in splits.items()}
    found = {part: f"{count} of the {len(memory['sample'])} training photos that the checkpoint records are now among "
             f"the {'test' if part == 'test' else 'validation'} images" for part, count in counts.items() if count}
    before = {} if elsewhere else facts.get("seen") or {}
    return {part: reason for part, reason in before.items() if part == "test"} | found


def seen_among(paths: Sequence[str] | None, root: str, memory: Mapping[str, Any]) -> int:
    """How many of the training photos that a checkpoint records (up to 64, in `memory`, its facts' `split`) are among
    the images `paths` of a test or validation split below `root`, because photos or lists were divided anew since.

    A photo that is no longer at its recorded place is looked for by its name, its folder's name and its size; that
    counts if sizes differ between photos and if most photos with equal names agree in size. Images in shards, which are
    recorded by shard, are never found.
    """
    sample = {unicodedata.normalize("NFC", name): size for name, size in (memory.get("sample") or {}).items()}
    alike: dict[str, list[str]] = {_tail(name): [] for name in sample}
    # A million paths are compared by their last part only, in either form in which a disk may keep it.
    bases = {unicodedata.normalize(form, tail.rpartition("/")[2]) for tail in alike for form in ("NFC", "NFD")}
    for path in paths or ():
        if path.rpartition(os.sep)[2] in bases and "\0" not in path:
            alike.get(_tail(relative_name(path, root)), []).append(path)
    staying, moved, agreeing = 0, 0, 0
    for name, size in sample.items():
        found = alike[_tail(name)]
        if found and is_there(root, name, size):    # others of its name are other photos
            staying += any(relative_name(path, root) == name for path in found)
        elif 0 < len(found) <= MOST_ALIKE:
            moved += 1
            agreeing += any(os.path.getsize(path) == size for path in found)
    differ = 4 * max(Counter(sample.values()).values(), default=0) < len(sample)
    return staying + (agreeing if differ and 2 * agreeing >= moved else 0)


def _tail(name: str) -> str:
    """The last two parts of a name."""
    return "/".join(name.split("/")[-2:])


def _other_shards(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two `data_loader` objects name different shards for a split, or shards for different splits."""
    one, two = (spec if isinstance(spec, Mapping) else {"": spec} for spec in (
        (spec.get("args") or {}).get("shards") for spec in (before, now)))
    both = one.keys() & two.keys()
    return not both or any(one[split] != two[split] for split in both)


def _check_arguments(loader: Any, trained: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in ("split_seed", "holdout_fraction", "imb_type", "imb_factor"):
        if trained.get(key, _MISSING) == now.get(key, _MISSING):
            continue                                            # the same value, or omitted both times
        before, given = (args.get(key, _default(type(loader), key)) for args in (trained, now))
        if _MISSING not in (before, given) and before != given:
            raise ConfigError(f"data_loader.args.{key}: {given}, but the model was trained with {before}; validation "
                              "images drawn with another one may be images that it was trained on: leave it as it was")
    before = trained.get("validation", _default(type(loader), "validation"))
    if loader.holds_out and before not in ("holdout", _MISSING):
        raise ConfigError(f"data_loader.args.validation: the model was trained with {before or 'none'!r}, so on the "
                          "images that \"holdout\" would take now; give images of their own (val/, a list)")


def _default(kind: type, argument: str) -> Any:
    """The default of a constructor's argument, from the first class in the MRO whose constructor names it."""
    signatures = (inspect.signature(base.__init__).parameters for base in kind.__mro__ if "__init__" in vars(base))
    return next((known[argument].default for known in signatures if argument in known), _MISSING)
