"""Errors whose message is one line for the user, and the nearest right name for a misspelt one."""
from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable


class OneLine(Exception):
    """An error whose message is one line for the user."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))
        #: True on a rank whose error only repeats rank 0's and isn't printed (see utils.dist.on_main).
        self.told = False


class ConfigError(OneLine):
    """A mistake by the caller: unknown key or type, missing file, value out of range.

    The message is one line that names the key, file or flag and what would be right. The entry points print
    that line on stderr and exit with status 2.
    """


def closest(name: object, choices: Iterable[str]) -> str | None:
    """The choice most like `name` (case ignored), or None where nothing is near."""
    by_lower = {str(choice).lower(): str(choice) for choice in choices}
    found = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[found[0]] if found else None


def unknown(path: str, value: object, choices: Iterable[str], what: str = "name") -> ConfigError:
    """The error for a misspelt name: `path: unknown what 'value'; did you mean 'x'? (one of a, b, c)`.

    >>> str(unknown("loss.type", "RIDELos", ["RIDELoss", "LDAMLoss"], "loss"))
    "loss.type: unknown loss 'RIDELos'; did you mean 'RIDELoss'? (one of LDAMLoss, RIDELoss)"
    """
    names = sorted(str(choice) for choice in choices)
    near = closest(value, names)
    hint = f" did you mean {near!r}?" if near else ""
    return ConfigError(f"{path}: unknown {what} {str(value)[:80]!r};{hint} (one of {', '.join(names)})")


def brief(error: object, limit: int = 160) -> str:
    """Another package's error message on one line of at most `limit` characters, cut between words."""
    text = " ".join(str(error).split()) or type(error).__name__
    cut = textwrap.shorten(text, limit, placeholder=" ...")
    return cut if len(cut) > 4 else text[:limit - 3] + "..."      # a single long word, such as a URL


class RunError(OneLine):
    """A run that can't go on for a reason outside the config (a loss that isn't finite, a full disk): exit status 1.

    Unlike a ConfigError, it isn't caused by what the caller typed.
    """
