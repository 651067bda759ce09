"""Drawing validation images for a model that is already trained: none of them may have been trained on."""
from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from data_loader.splitting import is_same_place
from utils.errors import ConfigError

_MISSING = object()


def check_held_out(loader: Any, facts: Mapping[str, Any], trained: Mapping[str, Any] | None,
                   now: Mapping[str, Any]) -> None:
    """Raises ConfigError if a loader's validation images may include images that a model was trained on.

    loader: the training split's loader, built from `now`. facts: what the model's checkpoint records about its data
    (`data_facts`). trained, now: `data_loader.args` of the model's training (None: it had other data) and of the
    loader. Validation images that the data set provides, and "test", aren't drawn and so aren't checked.
    """
    if not getattr(loader, "draws_validation", False):
        return
    if trained is not None:
        _check_arguments(loader, trained, now)
        before = (facts.get("split") or {}).get("drawn_from")       # older versions didn't record it
        if before not in (None, (loader.split_memory or {}).get("drawn_from")):
            raise ConfigError("data_loader.args.imb_factor: photos were added, renamed or removed since the model was "
                              "trained, so it draws others, and \"holdout\" may take some that the model was trained "
                              "on: give validation images of their own (val/, a list), or restore the photos")
    known, own = facts.get("class_names"), loader.class_names
    same = loader.paths is None and known and own and list(known) == list(own)       # images in memory have no names
    if same and list(facts["cls_num_list"]) != loader.cls_num_list:
        raise ConfigError(f"data_loader: trains on {sum(loader.cls_num_list):,} images, the model was trained on "
                          f"{sum(facts['cls_num_list']):,} of the same data; \"holdout\" may draw images that it was "
                          "trained on: leave the loader and its arguments as they were")


def of_same_data(before: Mapping[str, Any], now: Mapping[str, Any], facts: Mapping[str, Any] | None,
                 doubt: bool = True) -> bool:
    """Whether two configs' `data_loader` objects refer to the same data, even if in another place.

    facts: what the first one's checkpoint records about its data. doubt: the answer if it can't be known, because a
    detector's checkpoint of an older version records none of its images.
    """
    places = [(spec.get("args") or {}).get("data_dir") for spec in (before, now)]
    if before.get("type", now.get("type")) != now.get("type"):
        return False
    if None in places or os.path.realpath(places[0]) == os.path.realpath(places[1]):
        return True
    split = (facts or {}).get("split") or {}
    if not split.get("sample") and ((facts or {}).get("preprocess") or {}).get("task") == "detection":
        return doubt
    return is_same_place(places[1], split)


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
