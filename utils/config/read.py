"""Config files as plain nested dicts: strict JSON, merged with the files that they extend."""
from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.config.annotation import shown
from utils.errors import ConfigError, closest

MAX_BYTES = 4 * 1024 * 1024
MAX_DEPTH = 24


def read_config(path: str | os.PathLike, flag: str = "-c") -> tuple[dict[str, Any], dict[str, str]]:
    """A config file merged over the files that it extends, and which keys came from which of those.

    `"extends": "base.json"`, a path relative to the file that says so, starts from base.json and is laid over it as
    `merge` says. Chains are followed to their end. A `fallback` is also relative to the file that names it.

    Returns:
        (the config without `extends`, {dotted key: the extended file that gave its value}).
    Raises:
        ConfigError: a file that can't be read, or one that extends itself.
    """
    return _extended(os.fspath(path), flag, ())


def _extended(path: str, flag: str, below: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    config = read_json(path, flag)
    here = os.path.realpath(path)
    if here in below or len(below) > MAX_DEPTH:
        raise ConfigError(f"-c {below[0]}: extends itself, through {len(below)} files; one of them must stand alone")
    if isinstance(config.get("fallback"), str):
        config["fallback"] = os.path.join(os.path.dirname(path), config["fallback"])
    base = config.pop("extends", None)
    if base is None:
        return config, {}
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{flag} {path}: extends: must be the path of a JSON file, not {shown(base)}")
    file = os.path.join(os.path.dirname(path), base)
    merged, origin = _extended(file, f"{flag} {path}: extends", (*below, here))
    origin = {**{key: file for key in flat(merged)}, **origin}
    own, merged = flat(config), merge(merged, config)
    return merged, {key: origin[key] for key in flat(merged) if key in origin and key not in own}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` overridden by `over`: objects merged key by key, lists, other values and `_delete_` objects replaced."""
    merged = dict(base) if over.get("_delete_") is not True else {}
    for key, value in over.items():
        if isinstance(value, Mapping):
            merged[key] = merge(merged[key] if isinstance(merged.get(key), Mapping) else {}, value)
        elif key != "_delete_" or value is not True:
            merged[key] = value
    return merged


def flat(config: Any, path: str = "") -> dict[str, Any]:
    """All values that aren't objects, by dotted key."""
    if not isinstance(config, Mapping) or not config:
        return {path: config}
    return {k: v for key, item in config.items() for k, v in flat(item, f"{path}.{key}" if path else key).items()}


def read_json(path: str | os.PathLike, flag: str = "-c") -> dict[str, Any]:
    """The object in a JSON file (4 MiB at most). Raises ConfigError, also for duplicate keys, NaN and infinity."""
    path = os.fspath(path)
    shown_path = repr(path)[1:-1]
    try:
        with open(path, "rb") as handle:
            data = handle.read(MAX_BYTES + 1)
    except FileNotFoundError:
        near = _neighbour(path)
        raise ConfigError(f"{flag} {shown_path}: no such file{f'; did you mean {near}?' if near else ''}") from None
    except IsADirectoryError:
        raise ConfigError(f"{flag} {shown_path}: is a folder; give a JSON file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} {shown_path}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{flag} {shown_path}: larger than {MAX_BYTES >> 20} MB, so it isn't a config")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ConfigError(f"{flag} {shown_path}: is UTF-16; save it as UTF-8")
    try:
        value = plain(parse_json(data.decode("utf-8-sig")), "config")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag} {shown_path}: isn't UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{flag} {shown_path}: not JSON at line {error.lineno}, column {error.colno}: "
                          f"{error.msg}") from None
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{flag} {shown_path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{flag} {shown_path}: must hold one JSON object {{...}}, not {shown(value)}")
    return value


def parse_json(text: str, **hooks: Any) -> Any:
    """Parse JSON; hooks: as for `json.loads`. Raises ValueError, also for duplicate keys and too deep nesting."""
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} is there twice in one object")
            seen[key] = value
        return seen

    try:
        return json.loads(text, object_pairs_hook=no_duplicates, **hooks)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None


def _neighbour(path: str) -> str | None:
    folder = Path(path).parent
    try:
        near = closest(Path(path).name, [item.name for item in folder.iterdir() if item.suffix == ".json"])
    except (OSError, ValueError):
        return None
    return str(folder / near) if near else None


def plain(value: Any, path: str, depth: int = 0) -> Any:
    """A copy of plain dicts and lists. Refused: other objects, numbers that aren't finite or beyond 64 bits,
    texts that no file or folder name could hold, nesting deeper than MAX_DEPTH. Raises ConfigError."""
    where = path.removeprefix("config.")[:200]
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or len(key) > 200 or not _clean(key):
                raise ConfigError(f"{where}: {shown(str(key))} can't be a key")
        return {key: plain(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, str):
        if not _clean(value):
            raise ConfigError(f"{where}: {shown(value)} holds characters that aren't text")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: must be a finite number, not {value}")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{where}: a whole number this large can't be meant")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise ConfigError(f"{where}: {type(value).__name__} isn't a JSON value")
    return value


def _clean(text: str) -> bool:
    return not any(char < " " or "\ud800" <= char <= "\udfff" for char in text)
