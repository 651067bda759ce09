"""A run's config: read from JSON, overridden from the command line, checked key by key, defaults filled in.

What comes out is a plain nested dict that can be saved as JSON and gives itself when it is loaded again. Nothing
heavy is imported here (no torch, no numpy), so that a mistake is answered at once.
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from utils.config.annotation import parse, shown
from utils.config.build import check_value
from utils.config.check import check_metrics, check_monitor, check_spec, check_within
from utils.config.read import MAX_BYTES, MAX_DEPTH, parse_json, plain, read_config, read_json  # noqa: F401  handed on
from utils.config.schema import (
    DETECTION_ARCHS,
    DETECTION_LOADERS,
    GROUPS,
    REQUIRED,
    SECTIONS,
    TOP,
    TRAINER,
    TRAINER_TYPES,
    Row,
)
from utils.errors import ConfigError, unknown

#: The order of keys in an effective config.
_ORDER = ("name", "n_gpu", "seed", "arch", "data_loader", "optimizer", "loss", "metrics", "groups", "lr_scheduler",
          "trainer", "add_extra_info", "distill", "distill_arch", "distill_checkpoint", "resume_state_dict_only",
          "pretrained", "load_crt", "second_stage")


class Override(NamedTuple):
    """One value from the command line: dotted path, value, the flag that gave it, and the text as it was typed."""

    path: str
    value: Any
    flag: str = "--set"
    text: str | None = None


def load_config(path: str | os.PathLike, overrides: Iterable[tuple] = (), flag: str = "-c") -> dict[str, Any]:
    """The effective config of a JSON file.

    Args:
        path: the file, UTF-8; it may extend another (see `utils.config.read.read_config`).
        overrides: `Override`s (or plain (path, value, flag) tuples), applied in order.
        flag: how the file was given, for messages.
    Raises:
        ConfigError: the file can't be read, or any key or value is wrong; one line that names it.
    """
    config, inherited = read_config(path, flag)
    return check_config(config, overrides, inherited)


def check_config(raw: Mapping[str, Any], overrides: Iterable[tuple] = (),
                 inherited: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The effective config of a nested dict, e.g. the one in a checkpoint; `raw` isn't changed.

    inherited: {dotted key: the extended file that gave its value}, for messages.

    Raises ConfigError as `load_config` does.
    """
    overrides = [Override(*item) for item in overrides]
    config = plain(raw, "config")
    try:
        for item in overrides:
            apply_override(config, item)
        return _check(config, overrides)
    except ConfigError as error:
        raise _blame(error, overrides, inherited or {}) from None


def apply_override(config: dict[str, Any], item: Override) -> None:
    """Set one value in place, making the objects on the way to it. Raises ConfigError."""
    keys = item.path.split(".")
    if not all(keys) or len(keys) > MAX_DEPTH:
        raise ConfigError(f"{item.flag} {item.path[:80]}: write keys with dots between them, e.g. trainer.epochs=5")
    place = config
    for depth, key in enumerate(keys[:-1]):
        inner = place.get(key)
        if isinstance(inner, str) and keys[depth + 1] in ("type", "args"):
            # "norm": "MABN" is short for "norm": {"type": "MABN"}
            inner = place[key] = {"type": inner}
        elif inner is None:
            inner = place[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(keys[:depth + 1])}: is {shown(inner)}, not an object, so "
                              f"{item.path} can't be set")
        place = inner
    place[keys[-1]] = plain(item.value, f"config.{item.path}", len(keys))


def _blame(error: ConfigError, overrides: list[Override], inherited: Mapping[str, str]) -> ConfigError:
    """Say which flag, or which extended file, gave the value that is wrong."""
    message = str(error)
    given = [(path, flag) for path, flag in (*inherited.items(), *((item.path, item.flag) for item in overrides))
             if message.startswith((f"{path}:", f"{path}.", f"{path}["))]
    if not given:
        return error
    longest = max(len(path) for path, _ in given)
    return ConfigError(f"{message} (from {[flag for path, flag in given if len(path) == longest][-1]})")


def _check(config: dict[str, Any], overrides: list[Override]) -> dict[str, Any]:
    texts = {item.path: item.text for item in overrides if item.text is not None}
    known = [row.name for row in TOP] + list(SECTIONS) + ["groups", "trainer"]
    for key in config:
        if key == "extends":
            raise ConfigError("extends: only a config file can extend another, whose path is relative to it")
        if key not in known:
            raise unknown(key, key, known, "key")
    top = _check_rows({key: value for key, value in config.items() if key in {row.name for row in TOP}}, TOP, "", texts)
    for name in SECTIONS:
        top[name] = check_spec(name, config.get(name), texts, overrides)
    top["groups"] = _check_rows(config.get("groups"), GROUPS, "groups.", texts)
    top["trainer"] = _check_rows(config.get("trainer"), TRAINER, "trainer.", texts)
    _check_name(top["name"])
    check_metrics(top["metrics"])
    _check_trainer(top)
    if top["groups"]["few"] > top["groups"]["many"]:
        raise ConfigError(f"groups.few: must be at most groups.many ({top['groups']['many']}), "
                          f"not {top['groups']['few']}")
    for key in ("distill_arch", "distill_checkpoint"):
        if top["distill"] and not top[key]:
            raise ConfigError(f"{key}: missing; \"distill\": true needs it")
    return {key: top[key] for key in _ORDER}


def _check_rows(values: Any, rows: tuple[Row, ...], prefix: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """One object of the schema: known keys only, types and ranges right, defaults filled in."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix[:-1]}: must be an object {{...}}, not {shown(values)}")
    names = [row.name for row in rows]
    for key in values:
        if key not in names:
            raise unknown(f"{prefix}{key}", key, names, "key")
    checked = {}
    for row in rows:
        path = f"{prefix}{row.name}"
        if row.name not in values:
            if row.default is REQUIRED:
                raise ConfigError(f"{path}: missing; {row.doc}")
            checked[row.name] = list(row.default) if isinstance(row.default, list) else row.default
            continue
        if values[row.name] is None and row.default is None:
            checked[row.name] = None
            continue
        value = check_value(values[row.name], parse(row.type), path, texts)
        check_within(value, path, row.low, row.high, row.above)
        checked[row.name] = value
    return checked


def _check_name(name: str) -> None:
    if name in ("", ".", "..") or len(name) > 200 or any(char in name for char in "/\\"):
        raise ConfigError(f"name: {shown(name)} can't name a folder; use letters, digits, '-' and '_'")


def _check_trainer(top: dict[str, Any]) -> None:
    """The trainer's own rules: its type, the monitor, `amp: false` as "off"."""
    trainer, arch = top["trainer"], top["arch"]["type"]
    if trainer["type"] is None:
        trainer["type"] = inferred_trainer(arch, top["distill"])
    elif trainer["type"] not in TRAINER_TYPES:
        raise unknown("trainer.type", trainer["type"], TRAINER_TYPES, "trainer")
    loader = top["data_loader"]["type"]
    if (arch in DETECTION_ARCHS) != (loader in DETECTION_LOADERS):
        said = f"gives boxes and masks, and {arch} learns classes" if loader in DETECTION_LOADERS else \
            f"gives a class an image, and {arch} learns from boxes and masks"
        raise ConfigError(f"data_loader.type: {loader} {said}; choose a loader or an arch that fits")
    fitting = inferred_trainer(arch, top["distill"])
    if trainer["type"] != fitting and not {trainer["type"], fitting} <= {"Trainer", "DistillTrainer"}:
        raise ConfigError(f"trainer.type: a {trainer['type']} can't train {arch}; leave the key out, or give {fitting}")
    if fitting == "ExpertAssignmentTrainer" and top["arch"]["args"].get("num_experts") == 1:
        raise ConfigError("arch.args.num_experts: 1 expert leaves nothing to assign; use 2 or more")
    trainer["amp"] = trainer["amp"] or "off"
    check_monitor(trainer["monitor"], top["metrics"])
    if trainer["type"] != "DetectionTrainer":
        if trainer["iterations"] is not None:
            raise ConfigError("trainer.iterations: only detection is counted in steps; use trainer.epochs")
        if top["lr_scheduler"].get("type") == "IterationLR":
            raise ConfigError("lr_scheduler.type: IterationLR is stepped after each batch, in detection only; use "
                              "CustomLR or MultiStepLR, in epochs")


def check_second_stage(config: dict[str, Any]) -> None:
    """A second stage that trains has a first stage's model to start from. Raises ConfigError."""
    if config["second_stage"] and not config["load_crt"]:
        raise ConfigError("load_crt: missing; this config trains the classifier of a model that is trained already: "
                          "--load_crt STAGE1_CHECKPOINT")


def inferred_trainer(arch: str, distill: bool) -> str:
    """Which trainer a config without `trainer.type` means."""
    if arch.endswith("EAModel"):
        return "ExpertAssignmentTrainer"
    if distill:
        return "DistillTrainer"
    return "DetectionTrainer" if arch in DETECTION_ARCHS else "Trainer"
