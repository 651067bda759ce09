"""From `{"type": ..., "args": {...}}` to an object: one look-up, one check of the arguments, one call."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from utils.config.annotation import Mismatch, convert, shown
from utils.config.outside import import_named, is_outside
from utils.config.signature import Signature, of_callable
from utils.errors import ConfigError, unknown


def check_args(signature: Signature, args: Mapping[str, Any], path: str, provided: Iterable[str] = (),
               texts: Mapping[str, str] | None = None) -> dict[str, Any]:
    """`args` checked against a constructor and converted to its types (see `annotation.convert`).

    Args:
        signature: of the constructor.
        path: where the arguments stand in the config, e.g. "loss.args".
        provided: names that the program passes itself, so that they may be missing here.
        texts: dotted path -> the text typed on the command line, which is used where the argument is a string.
    Raises:
        ConfigError: an unknown or missing name, or a value of the wrong type; one line with the path.
    """
    checked = {}
    for key, value in args.items():
        here = f"{path}.{key}"
        parameter = signature.parameters.get(key)
        if parameter is None:
            if not signature.open:
                settable = [name for name, item in signature.parameters.items() if item.type.jsonable]
                raise unknown(here, key, settable, f"argument of {signature.name}")
            checked[key] = value
            continue
        if not parameter.type.jsonable:
            raise ConfigError(f"{here}: {signature.name} takes a Python object here, which a config can't give")
        checked[key] = check_value(value, parameter.type, here, texts)
    provided = set(provided)
    for name, item in signature.parameters.items():
        if item.required and name not in checked and name not in provided:
            raise ConfigError(f"{path}.{name}: missing; {signature.name} needs it ({item.type.describe()})")
    return checked


def check_value(value: Any, kind: Any, path: str, texts: Mapping[str, str] | None = None) -> Any:
    """One value converted to its type, or a ConfigError that says what it must be."""
    try:
        return convert(value, kind)
    except Mismatch as mismatch:
        if texts and path in texts and not mismatch.where:
            try:
                return convert(texts[path], kind)
            except Mismatch:
                pass
        raise ConfigError(f"{path}{mismatch.where}: must be {mismatch.expected.describe()}, "
                          f"not {shown(mismatch.value)}") from None


def public_names(table: ModuleType | Mapping[str, Any]) -> list[str]:
    """What a look-up in `table` can find: a table's keys, or a module's public classes and functions."""
    if isinstance(table, Mapping):
        return [str(name) for name in table]
    return [name for name, value in vars(table).items()
            if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))]


def lookup(table: ModuleType | Mapping[str, Any], name: Any, path: str, what: str = "name") -> Any:
    """`table[name]`, or the outside class `name`, "package.module:Class". Raises ConfigError with the nearest name.

    Args:
        table: a dict, or a module, of which the public classes and functions count. A string in a dict,
            "module:Class", stands for a class that is imported when it is looked up.
        what: what is looked for, for the message.
    """
    if is_outside(name):
        return import_named(name, path)
    names = public_names(table)
    if not isinstance(name, str) or name not in names:
        raise unknown(path, name, names, what)
    found = table[name] if isinstance(table, Mapping) else getattr(table, name)
    return import_named(found, path) if isinstance(found, str) else found


def build(table: ModuleType | Mapping[str, Callable], spec: Mapping[str, Any], path: str, *args: Any,
          **extra: Any) -> Any:
    """Call what `spec["type"]` names in `table` with `spec["args"]`.

    Args:
        table: a module or a dict of constructors.
        spec: {"type": name, "args": {...}}; `args` may be missing.
        path: the spec's place in the config, for messages.
        args: positional arguments that the program passes, e.g. the parameters for an optimizer.
        extra: named arguments that the program passes. Those the constructor doesn't take are left out; the
            others override the spec's.
    Raises:
        ConfigError: unknown type, unknown, missing or wrong arguments, or the constructor raised ValueError.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("type"), str):
        raise ConfigError(f"{path}: must be an object with \"type\" and \"args\", not {shown(spec)}")
    constructor = lookup(table, spec["type"], f"{path}.type")
    signature = of_callable(constructor)
    given = dict(list(signature.parameters.items())[:len(args)])
    passed = {key: value for key, value in extra.items() if signature.open or key in signature.parameters}
    wanted = {key: value for key, value in (spec.get("args") or {}).items() if key not in passed}
    for key in wanted:
        if key in given:
            raise ConfigError(f"{path}.args.{key}: the program gives this one; leave it out")
    wanted = check_args(signature, wanted, f"{path}.args", provided=[*given, *passed])
    for key, value in wanted.items():
        # JSON has lists only; torch's optimizers unpack and compare tuples (betas).
        kind = signature.parameters[key].type.kind if key in signature.parameters else ""
        wanted[key] = tuple(value) if kind == "tuple" else value
    try:
        return constructor(*args, **wanted, **passed)
    except ValueError as error:
        raise ConfigError(f"{path}.args: {spec['type']}: {error}") from error
