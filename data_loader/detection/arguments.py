"""Checks of the detection loaders' arguments."""
from __future__ import annotations

from typing import Any

from utils.errors import ConfigError, unknown


def check_arguments(options: dict[str, Any], min_size: list[int]) -> None:
    """Raises ConfigError, naming the argument, for a value out of range. options: the arguments of `CocoDataLoader`;
    min_size: its `min_size` as a list."""
    where = "data_loader.args"
    if not min_size or min(min_size) < 1 or options["max_size"] < max(min_size):
        raise ConfigError(f"{where}.min_size: {options['min_size']}; it must be above 0 and at most max_size "
                          f"({options['max_size']})")
    spec = options["sampler"] or "InstanceBalanced"
    kind = spec.get("type") if isinstance(spec, dict) else spec
    if kind != "InstanceBalanced":
        raise ConfigError(f"{where}.sampler.type: {kind!r} draws single labels, which pictures with many objects don't "
                          "have; use \"balanced\": true (repeat factors)")
    if options["repeat_threshold"] <= 0:
        raise ConfigError(f"{where}.repeat_threshold: {options['repeat_threshold']} should be above 0")
    if not 0 <= options["flip"] <= 1:
        raise ConfigError(f"{where}.flip: {options['flip']}; it is a probability, 0 to 1")
    if not 0 < options["holdout_fraction"] < 1:
        raise ConfigError(f"{where}.holdout_fraction: {options['holdout_fraction']}; it must be between 0 and 1")
    if options["split_seed"] not in range(2**32):
        raise ConfigError(f"{where}.split_seed: {options['split_seed']}; it must be 0 to 4294967295")
    if options["num_workers"] < 0:
        raise ConfigError(f"{where}.num_workers: {options['num_workers']} is under 0")
    if options["annotated_on"] not in ("auto", "upright", "stored"):
        raise unknown(f"{where}.annotated_on", options["annotated_on"], ["auto", "upright", "stored"])
    if options["validation"] not in ("test", "holdout", "none"):
        raise unknown(f"{where}.validation", options["validation"], ["test", "holdout", "none"])
