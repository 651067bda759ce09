"""`trainer.cache_features`: training the classifier of a frozen network on features that were computed once."""
from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.freezing import freeze_plan
from logger.log import get_logger
from trainer.feature_store import FeatureLoader, FeatureStore, feature_key
from utils.errors import ConfigError, unknown

log = get_logger()
KEY = "trainer.cache_features"


def views_wanted(value: Any) -> int | None:
    """How many augmented views of each image `trainer.cache_features` asks for; 0: the plain image; None: it is off.

    Raises ConfigError for unknown keys and invalid values.
    """
    if value is None or value is False:
        return None
    if value is True:
        return 0
    for key in value:
        if key != "views":
            raise unknown(f"{KEY}.{key}", key, ("views",), "key")
    views = value.get("views")
    if type(views) is not int or views < 1:
        raise ConfigError(f"{KEY}.views: must be 1 or more, the number of augmented views of each image, not {views!r}")
    return views


def check_options(options: dict[str, Any]) -> None:
    """Check `trainer.freeze` and `trainer.cache_features` as far as possible without a model. Raises ConfigError."""
    freeze_plan(options["freeze"])
    views_wanted(options["cache_features"])


def keeps_plain(options: dict[str, Any]) -> bool:
    """Whether the features that training caches are those of images without augmentation."""
    return views_wanted(options["cache_features"]) == 0


class OnFeatures(nn.Module):
    """Wraps a model so that its input is features, [N, E, D], instead of images; it returns the model's dict."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, feats: torch.Tensor, **more: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.model.from_features(feats, **more)

    @property
    def num_experts(self) -> int:
        """The wrapped model's."""
        return self.model.num_experts

    @property
    def route(self) -> bool:
        """The wrapped model's."""
        return self.model.route


class CachedFeatures:
    """The features of a run's training and validation images, stored in its folder, and the loaders that read them.

    views: 0 for one pass over the plain images, else the number of augmented views. until: the last epoch that trains
    on features; None: all do. Raises ConfigError if features can't stand in for images: something below the classifier
    is trained, images are mixed throughout, a teacher needs them, or the loader has none (detection).
    """

    def __init__(self, model: nn.Module, train_loader: Any, valid_loader: Any, views: int, until: int | None,
                 teacher: nn.Module | None = None):
        self.views, self.until = views, until
        self.sources = {"train": train_loader, "valid": valid_loader}
        if train_loader.task != "classification" or not hasattr(train_loader, "feature_loader"):
            raise ConfigError(f"{KEY}: is for classifiers and our own loaders of images; set it to null")
        if teacher is not None:
            raise ConfigError(f"{KEY}: with \"distill\" the teacher needs the images; set it to null")
        after = tuple(model.feature_prefixes())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.startswith(after):
                raise ConfigError(f"{KEY}: {name} is trained, so features change; freeze all but the classifier "
                                  "(trainer.freeze: \"backbone\", or load_crt), or set it to null")
        if getattr(train_loader, "mixing", None) is not None:
            if until is None:
                raise ConfigError(f"{KEY}: features can't be mixed as images are; leave data_loader.args.mix out, or "
                                  "set it to null")
            log.info("%s: images are mixed from epoch %d on, features aren't", KEY, until + 1)
        given = () if views else train_loader.augmentation.given
        if given:
            log.warning("%s: features are of images as they are; data_loader.args.%s %s", KEY, ", ".join(given),
                        "have no effect ({\"views\": 4} augments)" if until is None else
                        f"have an effect from epoch {until + 1} on")
        self.train: FeatureLoader | None = None
        self.valid: FeatureLoader | None = None

    @classmethod
    def wanted(cls, options: dict[str, Any], *args: Any, **more: Any) -> CachedFeatures | None:
        """The cache that the config's `trainer` (`options`) asks for, or None. args, more: the constructor's others."""
        views, plan = views_wanted(options["cache_features"]), freeze_plan(options["freeze"])
        return None if views is None else cls(*args, views=views, until=plan and plan.until, **more)

    def prepare(self, model: nn.Module, folder: Path, amp: object, stop: Callable[[], bool],
                progress: bool = True) -> bool:
        """Create the loaders `train` and `valid`, computing what isn't in `folder` yet. Returns False if `stop` ended
        it. Every rank must call it."""
        for name, loader in self.sources.items():
            if loader is None or getattr(self, name) is not None:
                continue
            if name == "valid" and "crops" in getattr(loader, "views", {}):
                continue    # several crops' logits are averaged, not their features
            plain = name == "valid" or self.views == 0
            source = loader.feature_loader(augment=not plain)
            views = 1 if plain else self.views
            store = store_of(model, source, folder / f"{name}.f16", views, amp)
            began, there = time.monotonic(), store.rows_done()
            if not store.fill(model, source, amp, stop, progress):
                return False
            total = views * source.n_samples
            log.info("features of %s %s images%s, %.1f MB: %s", f"{source.n_samples:,}", name,
                     "" if plain else f" in {views} views", store.bytes / 1e6,
                     "there already" if there == total else f"{time.monotonic() - began:.1f} s")
            setattr(self, name, FeatureLoader(loader, store))
        return True


def store_of(model: nn.Module, loader: Any, file: Path, views: int, amp: object) -> FeatureStore:
    """The store for the features of `loader`'s images (a `feature_loader`) in `file`."""
    shape = (views, loader.n_samples, len(model.used_heads()), model.feat_dim)
    return FeatureStore(file, feature_key(model, loader, views, amp), shape, loader.device)
