"""`trainer.freeze` as a config writes it: which parameters aren't trained, and for how long."""
from __future__ import annotations

import re
from typing import Any, NamedTuple

from utils.errors import ConfigError, unknown

KEYS = ("what", "until")


class Freeze(NamedTuple):
    """what: "backbone", "norms" or beginnings of parameters' names. until: the last epoch in which they are frozen;
    None: the whole run."""

    what: str | list[str]
    until: int | None = None


def freeze_plan(value: Any) -> Freeze | None:
    """`trainer.freeze` read: None, a part, a list of beginnings, or {"until": "epoch 3", "what": "backbone"}.

    Raises ConfigError for another key or another value.
    """
    if value is None or not isinstance(value, dict):
        return None if value is None else Freeze(value)
    for key in value:
        if key not in KEYS:
            raise unknown(f"trainer.freeze.{key}", key, KEYS, "key")
    what, until = value.get("what", "backbone"), value.get("until")
    parts = [what] if isinstance(what, str) else what
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"trainer.freeze.what: must be \"backbone\", \"norms\" or a list of beginnings of names, not "
                          f"{what!r}")
    if isinstance(until, str) and (found := re.fullmatch(r"\s*epoch\s+(\d{1,9})\s*", until)):
        until = int(found[1])
    if type(until) is not int or until < 1:
        raise ConfigError("trainer.freeze.until: must be the last epoch of the frozen part, like \"epoch 3\" or 3, not "
                          f"{value.get('until')!r}")
    return Freeze(what, until)
