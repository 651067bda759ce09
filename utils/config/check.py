"""The config's `{"type", "args"}` parts against the classes they name, and the other values that are names."""
from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.config import signature
from utils.config.annotation import ANY, parse, shown
from utils.config.build import check_args, check_value
from utils.config.schema import LIMITS, MONITORED, OWN_SCHEDULES, SCHEDULES_FILE, SECTIONS, Section
from utils.config.signature import ROOT, Parameter, Signature
from utils.errors import ConfigError, unknown

_SPEC_KEYS = ("type", "args")
_DEFAULT_SPECS = {"loss": {"type": "CrossEntropyLoss", "args": {}}, "lr_scheduler": {}, "distill_arch": None}


def check_spec(name: str, spec: Any, texts: Mapping[str, str], overrides: Sequence[Any] = ()) -> Any:
    """One section, e.g. `arch`: its type is known, its arguments are what that type's constructor takes.

    Returns it with `args` filled in, or the section's default where it is absent. Raises ConfigError.
    """
    section = SECTIONS[name]
    if spec is None:
        if section.required:
            raise ConfigError(f"{name}: missing; give {{\"type\": ..., \"args\": {{...}}}} for the {section.what}")
        return _copy(_DEFAULT_SPECS[name])
    kind, args = _parts(name, spec, overrides, may_be_empty=name == "lr_scheduler", default=_DEFAULT_SPECS.get(name))
    if kind is None:
        return {}
    found, dropped = _signature(name, kind, section)
    for key in args:
        if key in section.reserved:
            raise ConfigError(f"{name}.args.{key}: can't be set here; it comes from {section.reserved[key]}")
    idle = {key: value for key, value in args.items() if key in dropped and key not in found.parameters}
    for key, value in idle.items():
        check_value(value, parse(dropped[key]), f"{name}.args.{key}", texts)
    args = check_args(found.without(*section.reserved), {key: args[key] for key in args if key not in idle},
                      f"{name}.args", section.provided, texts)
    _check_limits(name, args)
    _check_nested(name, args, texts)
    return {"type": kind, "args": args}


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def _parts(path: str, spec: Any, overrides: Sequence[Any] = (), may_be_empty: bool = False,
           default: dict[str, Any] | None = None) -> tuple[str | None, dict[str, Any]]:
    """A spec's type and arguments, its own keys checked."""
    if not isinstance(spec, dict):
        raise ConfigError(f"{path}: must be an object {{\"type\": ..., \"args\": {{...}}}}, not {shown(spec)}")
    for key in spec:
        if key not in _SPEC_KEYS:
            raise unknown(f"{path}.{key}", key, _SPEC_KEYS, "key")
    args = {} if spec.get("args") is None else spec["args"]
    if not isinstance(args, dict):
        raise ConfigError(f"{path}.args: must be an object {{...}}, not {shown(args)}")
    kind = spec.get("type", (default or {}).get("type"))
    if kind is None:
        for item in overrides:
            if item.path.startswith(f"{path}.args."):
                raise ConfigError(f"{item.path}: the config has no {path}.type, so there is nothing to change")
        if may_be_empty and not args:
            return None, {}
        raise ConfigError(f"{path}.type: missing")
    if not isinstance(kind, str):
        raise ConfigError(f"{path}.type: must be text, not {shown(kind)}")
    return kind, args


def _signature(name: str, kind: str, section: Section) -> tuple[Signature, Mapping[str, str]]:
    """The constructor that a section's type names, and the arguments of old configs that it does without."""
    if name == "lr_scheduler" and kind in OWN_SCHEDULES:
        function, idle = OWN_SCHEDULES[kind]
        found = signature.of_name(function, ROOT / SCHEDULES_FILE).without("epochs")
        return Signature(kind, found.parameters, found.open, found.doc), {**section.dropped, **idle}
    path, root = _file(section)
    names = known_types(name)
    if kind not in names:
        raise unknown(f"{name}.type", kind, names, section.what)
    if kind in section.refused:
        raise ConfigError(f"{name}.type: {kind} can't be used: {section.refused[kind]}")
    found = signature.of_name(kind, path, root)
    for key, item in found.parameters.items():
        # torch's LambdaLR wants a function, SequentialLR other schedules.
        if item.required and not item.type.jsonable and key not in section.provided:
            raise ConfigError(f"{name}.type: {kind} needs {key}, a Python object that a config can't give; "
                              f"use another {section.what}")
    return found, section.dropped


def _file(section: Section) -> tuple[Path, Path]:
    if not section.file.startswith("torch/"):
        return ROOT / section.file, ROOT
    root = signature.torch_root()
    if root is None:
        raise ConfigError("torch isn't installed; run: pip install -r requirements.txt")
    return root / section.file, root


def known_types(name: str) -> list[str]:
    """The types that section `name` of a config can have."""
    section = SECTIONS[name]
    path, root = _file(section)
    if name == "optimizer":
        # torch/optim/__init__.py only imports; its classes are known by their capitals, without reading them all.
        return [item for item in signature.read(path, root).imports if item[0].isupper() and item not in section.skip]
    found = signature.class_names(path, root, section.skip, section.suffix)
    return found + list(OWN_SCHEDULES) if name == "lr_scheduler" else found


def check_within(value: Any, path: str, low: float | None = None, high: float | None = None,
                 above: float | None = None) -> None:
    """A number, or each of a list's, within [low, high] and greater than `above`. Raises ConfigError."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        wrong = (f"at least {low}" if low is not None and number < low else
                 f"at most {high}" if high is not None and number > high else
                 f"greater than {above}" if above is not None and number <= above else "")
        if wrong:
            said = int(number) if number == int(number) else number
            raise ConfigError(f"{path}: must be {wrong}, not {shown(said)}")


def _check_limits(name: str, args: dict[str, Any]) -> None:
    _check_args_within(args, f"{name}.args", LIMITS.get(f"{'arch' if name == 'distill_arch' else name}.args", {}))


def _check_args_within(args: dict[str, Any], path: str, limits: Mapping[str, Mapping[str, float]]) -> None:
    for key in sorted(args.keys() & limits.keys()):
        check_within(args[key], f"{path}.{key}", **limits[key])


def _check_nested(name: str, args: dict[str, Any], texts: Mapping[str, str]) -> None:
    """Names and specs inside arguments: a model's classifier and norm, a loader's sampler."""
    if "classifier" in args:
        _check_classifier(name, args)
    for key, find in (("norm", _norm_signature), ("sampler", _sampler_signature)):
        value = args.get(key)
        if value is None:
            continue
        path = f"{name}.args.{key}"
        kind, inner = _parts(path, {"type": value} if isinstance(value, str) else value)
        inner = check_args(find(kind, path), inner, f"{path}.args", ("epochs",), texts)
        _check_args_within(inner, f"{path}.args", LIMITS.get(f"{key}.args", {}))
        args[key] = value if isinstance(value, str) else {"type": kind, "args": inner}


def _norm_signature(kind: str, path: str) -> Signature:
    """What a norm of model/norm takes, read from its table there: the builder's arguments and `own_args`."""
    file = ROOT / "model/norm/convert.py"
    table = signature.table_of(file, "NORMS")
    if kind not in table:
        raise unknown(f"{path}.type", kind, table, "norm")
    row = table[kind]
    maker = row.args[0] if isinstance(row, ast.Call) and row.args else row
    found = signature.of_name(maker.id, file)
    first = next(iter(found.parameters))  # the width, which convert_norm gives
    more = [name for item in getattr(row, "keywords", ()) if isinstance(item.value, ast.Tuple)
            for name in ast.literal_eval(item.value)]  # arguments of convert_norm's own
    return Signature(kind, {**found.without(first, "affine").parameters,
                            **{name: Parameter(name, ANY, False) for name in more}})


def _sampler_signature(kind: str, path: str) -> Signature:
    file = ROOT / "data_loader/samplers.py"
    table = signature.table_of(file, "SAMPLERS")
    if kind not in table:
        raise unknown(f"{path}.type", kind, table, "sampler")
    return signature.of_name(table[kind].id, file).without("targets", "seed", "rank", "world_size")


def _check_classifier(name: str, args: dict[str, Any]) -> None:
    heads = signature.table_of(ROOT / "model/classifier.py", "HEADS")
    if args.get("classifier") is not None and args["classifier"] not in heads:
        raise unknown(f"{name}.args.classifier", args["classifier"], heads, "classifier")


def metric_names() -> list[str]:
    """The functions of model/metric.py that take (output, target)."""
    path = ROOT / "model/metric.py"
    return [name for name in signature.function_names(path)
            if list(signature.of_name(name, path).parameters)[:2] == ["output", "target"]]


def check_metrics(metrics: list[str]) -> None:
    """Each is a metric, and none is there twice. Raises ConfigError."""
    known = metric_names()
    for i, name in enumerate(metrics):
        if name not in known:
            raise unknown(f"metrics[{i}]", name, known, "metric")
        if name in metrics[:i]:
            raise ConfigError(f"metrics[{i}]: {name} is there twice")


def check_monitor(monitor: str, metrics: list[str]) -> None:
    """`off`, or `min` or `max` and the name of a figure. Raises ConfigError."""
    if monitor == "off":
        return
    mode, _, name = monitor.partition(" ")
    if mode not in ("min", "max") or not name:
        raise ConfigError(f"trainer.monitor: must be \"off\", \"max val_accuracy\", \"min val_loss\" or the like, "
                          f"not {shown(monitor)}")
    figures = dict.fromkeys((*metrics, *MONITORED))
    known = [f"{prefix}{figure}" for figure in figures for prefix in ("", "val_")]
    if name not in known:
        raise unknown("trainer.monitor", name, known, "figure")
