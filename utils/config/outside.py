"""Classes from outside the project, `"type": "package.module:Class"`: importing them, and when that is allowed."""
from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from utils.config.schema import NESTED
from utils.errors import ConfigError, unknown

#: Keys whose text names a class or function.
NAMING_KEYS = {"type", "metrics", "init_classifier", *(key for parts in NESTED.values() for key in parts)}


def is_outside(name: Any) -> bool:
    """Whether a name in a config is a `package.module:Class`."""
    return isinstance(name, str) and ":" in name


def short_name(name: str) -> str:
    """A name without its module, as messages and metrics.csv show it."""
    return name.rpartition(":")[2]


def import_named(name: str, path: str) -> Any:
    """The object that `package.module:Class` names; its module may also lie in the working folder.

    Raises ConfigError, naming the config key `path`, where the module can't be imported or lacks such a callable.
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise ConfigError(f"{path}: {name[:80]!r} should read package.module:Class")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing there shadows our or installed modules
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"{path}: {module} needs {error.name}, which isn't installed") from None
        raise ConfigError(f"{path}: there is no module {error.name}, neither in {os.getcwd()} nor installed") from None
    except Exception as error:
        raise ConfigError(f"{path}: {module} can't be imported: {type(error).__name__}: {error}") from None
    value = getattr(found, attribute, None)
    if not callable(value):
        named = [key for key, item in vars(found).items() if not key.startswith("_") and callable(item)]
        raise unknown(path, attribute, named, f"class of {module}")
    return value


def outside_names(config: Any, path: str = "", listed: tuple[str, list] | None = None
                  ) -> Iterator[tuple[str, str, str]]:
    """(dotted key, name, flag) of every outside class that a config, or the part of one at `path`, names.

    The flag, ` --set KEY=VALUE`, repeats the name on a command line; for a name in a list (`listed`: the list's key
    and the list) it repeats the whole list.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from outside_names(value, f"{path}.{key}" if path else str(key), listed)
    elif isinstance(config, list):
        for i, value in enumerate(config):
            yield from outside_names(value, f"{path}[{i}]", listed or (path, config))
    elif is_outside(config) and path.rpartition(".")[2].partition("[")[0] in NAMING_KEYS:
        key, value = listed or (path, config)
        yield path, config, f" --set {shlex.quote(f'{key}={json.dumps(value) if listed else value}')}"


def refuse_outside(config: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Raise ConfigError for an outside class not in `allowed`: a checkpoint's config alone can't choose what is run."""
    for path, name, flag in outside_names(config):
        if name not in allowed:
            raise ConfigError(f"{path}: {name} is code from outside, and a checkpoint's config alone doesn't run any; "
                              f"if you trust it, name it too:{flag}")


def outside_flags(config: Mapping[str, Any]) -> str:
    """The flags, each after a space, that allow a config's outside classes to a command that opens its checkpoint."""
    return "".join(dict.fromkeys(flag for _, _, flag in outside_names(config)))
