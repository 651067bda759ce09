"""A run's config: read from JSON, overridden from the command line, checked key by key, defaults filled in.

The result is a plain nested dict that can be saved as JSON; loading it again gives the same dict. Keys, types and
ranges are checked first, so that most mistakes are reported at once; only then are the classes it names imported.
"""
from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from utils.config.annotation import parse, shown
from utils.config.build import check_value
from utils.config.check import (
    check_classes,
    check_form,
    check_metrics,
    check_monitor,
    check_part,
    check_within,
    constructor,
    task_name,
)
from utils.config.outside import is_outside, outside_names, refuse_outside
from utils.config.read import MAX_DEPTH, plain, read_config
from utils.config.schema import GROUPS, HOOKS, REQUIRED, SECTIONS, STARTS, TOP, TRAINER, TRAINERS, Row
from utils.errors import ConfigError, unknown
from utils.files import check_folder_name

#: The order of keys in an effective config.
_ORDER = ("name", "n_gpu", "seed", "arch", "data_loader", "optimizer", "loss", "metrics", "groups", "lr_scheduler",
          "trainer", "add_extra_info", "distill", "distill_arch", "distill_checkpoint", "resume_state_dict_only",
          "pretrained", "fallback", "load_crt", "init_classifier", "second_stage")


class Override(NamedTuple):
    """One value from the command line: dotted path, value, the flag that gave it, and the text as it was typed."""

    path: str
    value: Any
    flag: str = "--set"
    text: str | None = None


def load_config(path: str | os.PathLike, overrides: Iterable[tuple] = (), flag: str = "-c",
                allowed: Collection[str] | None = None) -> dict[str, Any]:
    """The effective config of a JSON file.

    Args:
        path: the file, UTF-8; it may extend another (see `utils.config.read.read_config`).
        overrides: `Override`s (or plain (path, value, flag) tuples), applied in order.
        flag: how the file was given, for messages.
        allowed: see `check_config`.
    Raises:
        ConfigError: the file can't be read, or any key or value is wrong; one line that names it.
    """
    config, inherited = read_config(path, flag)
    return check_config(config, overrides, inherited, allowed)


def check_config(raw: Mapping[str, Any], overrides: Iterable[tuple] = (),
                 inherited: Mapping[str, str] | None = None, allowed: Collection[str] | None = None) -> dict[str, Any]:
    """The effective config of a nested dict, e.g. the one in a checkpoint; `raw` isn't changed.

    Args:
        inherited: {dotted key: the extended file that gave its value}, for messages.
        allowed: the classes outside the repo ("package.module:Class") that the config may name besides those in
            `overrides`; None: any. For a config that comes with somebody's checkpoint it is empty: what it names is
            neither imported nor run unless the command line names it too.
    Raises:
        ConfigError: as `load_config` does.
    """
    overrides = [Override(*item) for item in overrides]
    config = plain(raw, "config")
    try:
        for item in overrides:
            apply_override(config, item)
        if allowed is not None:
            named = {name for item in overrides for _, name, _ in outside_names(item.value, item.path)}
            refuse_outside(config, named.union(allowed))
        return _check(config, overrides)
    except ConfigError as error:
        raise _blame(error, overrides, inherited or {}) from None


def apply_override(config: dict[str, Any], item: Override) -> None:
    """Set one value in place, creating missing objects along its path. Raises ConfigError."""
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
    """The error, completed by the flag or the extended file that gave the wrong value."""
    message = str(error)
    given = [(path, flag) for path, flag in (*inherited.items(), *((item.path, item.flag) for item in overrides))
             if message.startswith((f"{path}:", f"{path}.", f"{path}["))]
    if not given:
        return error
    _, source = max(reversed(given), key=lambda item: len(item[0]))
    drop = "; \"_delete_\": true in args drops those" if "unknown argument" in message else ""
    return ConfigError(f"{message} (from {source}{drop if source in inherited.values() else ''})")


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
        top[name] = check_form(name, config.get(name), overrides)
    top["groups"] = _check_rows(config.get("groups"), GROUPS, "groups.", texts)
    top["trainer"] = _check_rows(config.get("trainer"), TRAINER, "trainer.", texts)
    check_folder_name(top["name"], "name")
    for part, key in ((top["trainer"], "save_dir"), (top["data_loader"]["args"], "data_dir")):
        if isinstance(part.get(key), str):
            part[key] = os.path.expanduser(part[key])
    if top["groups"]["few"] > top["groups"]["many"]:
        raise ConfigError(f"groups.few: must be at most groups.many ({top['groups']['many']}), "
                          f"not {top['groups']['few']}")
    for key in ("distill_arch", "distill_checkpoint"):
        if top["distill"] and not top[key]:
            raise ConfigError(f"{key}: missing; \"distill\": true needs it")
    for item in overrides:
        if item.path.startswith("distill_") and item.value is not None and not top["distill"]:
            raise ConfigError(f"{item.path}: the config doesn't distil, so it has no effect; leave it out, or add "
                              "--set distill=true")
    # From here on what the config names is imported.
    for name in SECTIONS:
        if top[name]:
            top[name] = check_classes(name, top[name], texts)
    check_metrics(top["metrics"])
    task = task_name(constructor(SECTIONS["arch"], top["arch"]["type"], "arch.type"))
    check_monitor(top["trainer"]["monitor"], top["metrics"], task)
    if isinstance(top["init_classifier"], str):
        top["init_classifier"] = {"type": top["init_classifier"]}
    if top["init_classifier"] is not None:
        top["init_classifier"] = check_part(STARTS, top["init_classifier"], "init_classifier", texts)
    _check_trainer(top)
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


def _check_trainer(top: dict[str, Any]) -> None:
    """Check that arch, loader and trainer fit together; fill in `trainer.type`, and "off" for `amp: false`."""
    trainer, kind = top["trainer"], top["arch"]["type"]
    data = top["data_loader"]["type"]
    arch = constructor(SECTIONS["arch"], kind, "arch.type")
    loader = constructor(SECTIONS["data_loader"], data, "data_loader.type")
    if task_name(arch) != task_name(loader):
        said = f"gives boxes and masks, and {kind} learns classes" if task_name(loader) == "detection" else \
            f"gives a class an image, and {kind} learns from boxes and masks"
        raise ConfigError(f"data_loader.type: {data} {said}; choose a loader or an arch that fits")
    fitting = inferred_trainer(arch, top["distill"])
    trainer["type"] = trainer["type"] or fitting
    constructor(TRAINERS, trainer["type"], "trainer.type")
    if trainer["type"] != fitting and not {trainer["type"], fitting} <= {"Trainer", "DistillTrainer"} \
            and not is_outside(trainer["type"]):
        raise ConfigError(f"trainer.type: a {trainer['type']} can't train {kind}; leave the key out, or give {fitting}")
    if fitting not in ("Trainer", "DistillTrainer") and top["init_classifier"]:
        raise ConfigError(f"init_classifier: {kind} has no classifier to start; leave it out")
    if fitting == "ExpertAssignmentTrainer" and top["arch"]["args"].get("num_experts") == 1:
        raise ConfigError("arch.args.num_experts: 1 expert leaves nothing to assign; use 2 or more")
    if fitting == "ExpertAssignmentTrainer" and (top["data_loader"]["args"] or {}).get("mix"):
        raise ConfigError("data_loader.args.mix: no expert is right about a mixed image; leave it out with an EAModel")
    trainer["amp"] = trainer["amp"] or "off"
    trainer["hooks"] = [check_part(HOOKS, spec, f"trainer.hooks[{i}]") for i, spec in enumerate(trainer["hooks"])]
    if fitting != "DetectionTrainer":
        if trainer["iterations"] is not None:
            raise ConfigError("trainer.iterations: only detection is counted in steps; use trainer.epochs")
        if top["lr_scheduler"].get("type") == "IterationLR":
            raise ConfigError("lr_scheduler.type: IterationLR is for detection only; use CustomLR or MultiStepLR")


def check_second_stage(config: dict[str, Any]) -> None:
    """Raise ConfigError where a config for a second stage has no first stage's model to start from."""
    if config["second_stage"] and not config["load_crt"]:
        raise ConfigError("load_crt: missing; this trains a trained model's classifier: --load_crt STAGE1_CHECKPOINT")


def inferred_trainer(arch: Any, distill: bool) -> str:
    """The name of the trainer that fits a model's class, used where a config leaves out `trainer.type`."""
    if getattr(arch, "routed", False):
        return "ExpertAssignmentTrainer"
    if distill:
        return "DistillTrainer"
    return "DetectionTrainer" if task_name(arch) == "detection" else "Trainer"
