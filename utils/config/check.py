"""Checks a config's `{"type", "args"}` sections against the classes they name, and other values that are names.

What needs no class is checked first (`check_form`), so that most mistakes are reported before any heavy import.
"""
from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from utils.config.annotation import parse, shown
from utils.config.build import check_args, check_value, lookup, public_names
from utils.config.outside import import_named, is_outside, short_name
from utils.config.schema import COUNTED, DETECTED, LIMITS, METRICS, NESTED, SECTIONS, Section
from utils.config.signature import Signature, of_callable
from utils.errors import ConfigError, unknown

_SPEC_KEYS = ("type", "args")


def check_form(name: str, spec: Any, overrides: Sequence[Any] = ()) -> Any:
    """Check one section, e.g. `arch`, as far as its class isn't needed: its keys, and the ranges of numbers.

    Returns the section with `args` filled in, or its default where it is absent. Raises ConfigError.
    """
    section = SECTIONS[name]
    if spec is None:
        if section.default is ...:
            raise ConfigError(f"{name}: missing; give {{\"type\": ..., \"args\": {{...}}}} for the {section.what}")
        return _copy(section.default)
    kind, args = _parts(name, spec, overrides, section.default)
    if kind is None:
        return {}
    for key in args:
        if key in section.reserved:
            raise ConfigError(f"{name}.args.{key}: can't be set here; it comes from {section.reserved[key]}")
    _check_limits(args, f"{name}.args", section.what)
    for _, part, path, inner in _nested(name, args):
        _check_limits(inner["args"], f"{path}.args", part.what)
    return {"type": kind, "args": args}


def check_classes(name: str, spec: dict[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """Check what `check_form` returned against the class itself: that it exists and takes these arguments.

    Returns the section with arguments converted to the class's types. texts: see `check_args`. Raises ConfigError.
    """
    section, kind = SECTIONS[name], spec["type"]
    found = _takes(section, kind, f"{name}.type")
    for key, item in found.parameters.items():
        # torch's LambdaLR wants a function, SequentialLR other schedules.
        if item.required and not item.type.jsonable and key not in {*section.provided, *section.reserved}:
            raise ConfigError(f"{name}.type: {kind} needs {key}, a Python object that a config can't give; "
                              f"use another {section.what}")
    dropped = {key: value for of in ("", kind) for key, value in section.dropped.get(of, {}).items()}
    idle = {key: value for key, value in spec["args"].items() if key in dropped and key not in found.parameters}
    for key, value in idle.items():
        check_value(value, parse(dropped[key]), f"{name}.args.{key}", texts)
    args = check_args(found, {key: value for key, value in spec["args"].items() if key not in idle}, f"{name}.args",
                      section.provided, texts)
    for key, part, path, inner in _nested(name, args):
        inner = check_part(part, inner, path, texts)
        args[key] = args[key] if isinstance(args[key], str) else inner
    return {"type": kind, "args": args}


def check_part(section: Section, spec: Any, path: str, texts: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Check a `{"type", "args"}` inside a section or a list against its class, as `check_classes` does."""
    kind, args = _parts(path, spec)
    takes = _takes(section, kind, f"{path}.type")
    return {"type": kind, "args": check_args(takes, args, f"{path}.args", section.provided, texts)}


def _takes(section: Section, kind: str, path: str) -> Signature:
    """What a config may give to the class that a section's type names."""
    found = of_callable(constructor(section, kind, path), short_name(kind))
    return found.without(*list(found.parameters)[:section.placed], *section.reserved)


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def _parts(path: str, spec: Any, overrides: Sequence[Any] = (), default: Any = ...) -> tuple[str | None, dict]:
    """A spec's type and arguments, its own keys checked; the type is None where `default` has none either."""
    if not isinstance(spec, dict):
        raise ConfigError(f"{path}: must be an object {{\"type\": ..., \"args\": {{...}}}}, not {shown(spec)}")
    for key in spec:
        if key not in _SPEC_KEYS:
            raise unknown(f"{path}.{key}", key, _SPEC_KEYS, "key")
    args = {} if spec.get("args") is None else spec["args"]
    if not isinstance(args, dict):
        raise ConfigError(f"{path}.args: must be an object {{...}}, not {shown(args)}")
    kind = spec.get("type", default.get("type") if isinstance(default, dict) else None)
    if kind is None:
        for item in overrides:
            if item.path.startswith(f"{path}.args."):
                raise ConfigError(f"{item.path}: the config has no {path}.type, so there is nothing to change")
        if default == {} and not args:
            return None, {}
        raise ConfigError(f"{path}.type: missing")
    if not isinstance(kind, str):
        raise ConfigError(f"{path}.type: must be text, not {shown(kind)}")
    return kind, dict(args)


def _nested(name: str, args: Mapping[str, Any]) -> Iterator[tuple[str, Section, str, dict[str, Any]]]:
    """(key, its Section, dotted path, {"type", "args"}) of each name or spec inside a section's arguments."""
    for key, part in NESTED.get(name, {}).items():
        value = args.get(key)
        if value is not None:
            path = f"{name}.args.{key}"
            kind, inner = _parts(path, {"type": value} if isinstance(value, str) else value)
            yield key, part, path, {"type": kind, "args": inner}


# ---------------------------------------------------------------------- classes by name

def _table(section: Section) -> dict[str, Any]:
    """Everything a section's type can be: name -> class, function, or "module:Class"."""
    found: dict[str, Any] = {}
    for place in section.tables:
        name, _, attribute = place.partition(":")
        module, base = importlib.import_module(name), _base(section)
        table = getattr(module, attribute) if attribute else {
            key: value for key, value in vars(module).items()
            if not key.startswith("_") and inspect.isclass(value) and issubclass(value, base)}
        found = {**table, **found}
    return {key: value for key, value in found.items() if key not in section.skip}


def _base(section: Section) -> type:
    return import_named(section.base, "base")


def constructor(section: Section, kind: str, path: str) -> Callable:
    """The class or function that a section's type names. Raises ConfigError."""
    if kind in section.refused:
        raise ConfigError(f"{path}: {kind} can't be used: {section.refused[kind]}")
    found = lookup({} if is_outside(kind) else _table(section), kind, path, section.what)
    if is_outside(kind) and inspect.isclass(found) and not issubclass(found, _base(section)):
        raise ConfigError(f"{path}: {kind} isn't a {section.what}: it doesn't derive from "
                          f"{section.base.replace(':', '.')}")
    return found


def task_name(kind: Any) -> str:
    """The task of a model or loader class: "classification" (a class per image) or "detection" (boxes and masks)."""
    return getattr(kind, "task", "classification")


# ---------------------------------------------------------------------- ranges

def check_within(value: Any, path: str, low: float | None = None, high: float | None = None,
                 above: float | None = None) -> None:
    """Check that a number, or each in a list, is in [low, high] and greater than `above`. Raises ConfigError."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        wrong = (f"at least {low}" if low is not None and number < low else
                 f"at most {high}" if high is not None and number > high else
                 f"greater than {above}" if above is not None and number <= above else "")
        if wrong:
            said = int(number) if number == int(number) else number
            raise ConfigError(f"{path}: must be {wrong}, not {shown(said)}")


def _check_limits(args: Mapping[str, Any], path: str, what: str) -> None:
    limits = LIMITS.get(what, {})
    for key in sorted(args.keys() & limits.keys()):
        check_within(args[key], f"{path}.{key}", **limits[key])


# ---------------------------------------------------------------------- metrics

def metric_kind(value: Any) -> str | None:
    """`batch` for a function of (output, target), which is averaged over batches; `split` for one of (probs, labels)
    of a whole split; None for anything else."""
    if not inspect.isfunction(value):
        return None
    kinds = {("output", "target"): "batch", ("probs", "labels"): "split"}
    return kinds.get(tuple(inspect.signature(value).parameters)[:2])


def metric_table() -> dict[str, Any]:
    """Each name that `metrics` may hold -> its function, or None for a figure that every validation computes anyway."""
    table: dict[str, Any] = dict.fromkeys(COUNTED)
    for module in map(importlib.import_module, METRICS):
        table |= {name: getattr(module, name) for name in public_names(module) if metric_kind(getattr(module, name))}
    return table


def check_metrics(metrics: list[str]) -> None:
    """Check that each is in `metric_table` or a metric from outside, and none occurs twice. Raises ConfigError."""
    known = metric_table()
    for i, name in enumerate(metrics):
        found = lookup(known, name, f"metrics[{i}]", "metric")
        if found is not None and not metric_kind(found):
            raise ConfigError(f"metrics[{i}]: {name} isn't a metric: its first arguments must be output and target, or "
                              "probs and labels")
        if short_name(name) in map(short_name, metrics[:i]):
            raise ConfigError(f"metrics[{i}]: {short_name(name)} is there twice")


def monitored(monitor: str) -> tuple[str, str]:
    """("min" or "max", a figure's name) of `trainer.monitor`; ("off", "") where it is "off". Raises ConfigError."""
    mode, _, name = monitor.partition(" ")
    if monitor != "off" and (mode not in ("min", "max") or not name):
        raise ConfigError(f"trainer.monitor: must be \"off\", \"max val_accuracy\" or the like, not {shown(monitor)}")
    return mode, name.strip()


def check_monitor(monitor: str, metrics: list[str], task: str) -> None:
    """Raise ConfigError unless the monitored figure will exist; those of boxes and masks do for detection only."""
    mode, name = monitored(monitor)
    if mode == "off":
        return
    table = metric_table()
    trained = [short_name(metric) for metric in metrics if metric_kind(lookup(table, metric, "metrics")) == "batch"]
    found = DETECTED if task == "detection" else ()
    figures = dict.fromkeys(("loss", *found, *map(short_name, metrics), *table))
    known = ["loss", *trained, *(f"val_{figure}" for figure in figures)]
    if name not in known:
        raise unknown("trainer.monitor", name, known, "figure")
