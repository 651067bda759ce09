"""Parses `trainer.freeze`: which parameters aren't trained, and for how long."""
from __future__ import annotations

import re
from typing import Any, NamedTuple

from utils.errors import ConfigError, unknown

KEYS = ("what", "until", "then")
Parts = str | list[str] | float


class Freeze(NamedTuple):
    """What `trainer.freeze` asks for.

    what: "backbone", "norms", prefixes of parameter names, or a share of the stages (0 to 1), from the stem on. until:
    the last epoch (1, 2, ...) in which `what` is frozen; None: the whole run. then: what stays frozen after that.
    """

    what: Parts
    until: int | None = None
    then: Parts | None = None


def freeze_plan(value: Any) -> Freeze | None:
    """`trainer.freeze` as a `Freeze`. value: None (gives None), parts, or {"until": "epoch 3", "what":
    parts, "then": parts}.

    Raises ConfigError for unknown keys and invalid values.
    """
    if value is None or not isinstance(value, dict):
        return None if value is None else Freeze(_parts(value, "trainer.freeze"))
    for key in value:
        if key not in KEYS:
            raise unknown(f"trainer.freeze.{key}", key, KEYS, "key")
    what = _parts(value.get("what", "backbone"), "trainer.freeze.what")
    then = value.get("then")
    if then is not None:
        then = _parts(then, "trainer.freeze.then")
    until = value.get("until")
    if isinstance(until, str) and (found := re.fullmatch(r"\s*epoch\s+(\d{1,9})\s*", until)):
        until = int(found[1])
    if type(until) is not int or until < 1:
        raise ConfigError("trainer.freeze.until: must be the last epoch of the frozen part, like \"epoch 3\" or 3, not "
                          f"{value.get('until')!r}")
    return Freeze(what, until, then)


def _parts(value: Any, path: str) -> Parts:
    if isinstance(value, float) and 0 < value < 1:
        return value
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: must be \"backbone\", \"norms\", a list of beginnings of names, or a share of the "
                          f"stages like 0.5, not {value!r}")
    return value
