"""Which shards patterns in `data_loader.args.shards` stand for."""
from __future__ import annotations

import itertools
import re

from data_loader.places import KEY
from utils.errors import ConfigError

RANGE = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<words>[^{}]*,[^{}]*))\}")
SPLITS = ("train", "val", "test")


def expand(pattern: str) -> list[str]:
    """The names that a pattern stands for: `{000..999}` is a range with leading zeros, `{a,b}` a list. Raises
    ConfigError for anything but a non-empty string, for a descending range, and for repeated names.

    >>> expand("t-{08..10}.tar")
    ['t-08.tar', 't-09.tar', 't-10.tar']
    """
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"{KEY}: must be a pattern like \"train-{{000..999}}.tar\", or one for each split, "
                          f"not {pattern!r}")
    parts, at = [], 0
    for found in RANGE.finditer(pattern):
        parts.append([pattern[at:found.start()]])
        at = found.end()
        if found["words"] is not None:
            parts.append(found["words"].split(","))
            continue
        first, last = int(found["first"]), int(found["last"])
        if first > last:
            raise ConfigError(f"{KEY}: {pattern}: {found[0]} counts down; write {{{found['last']}..{found['first']}}}")
        parts.append([str(number).zfill(len(found["first"])) for number in range(first, last + 1)])
    parts.append([pattern[at:]])
    names = ["".join(words) for words in itertools.product(*parts)]
    twice = next((name for one, name in itertools.pairwise(sorted(names)) if one == name), None)
    if twice is not None:
        raise ConfigError(f"{KEY}: {pattern}: names {twice} twice")
    return names


def patterns(spec: str | dict[str, str]) -> dict[str, str]:
    """{split: pattern} for `data_loader.args.shards`; a single pattern, for all splits, has the key "". Raises
    ConfigError for anything else, and without train or test shards."""
    if isinstance(spec, str):
        return {"": spec}
    wrong = not isinstance(spec, dict) or not spec or set(spec) - set(SPLITS)
    if wrong or not all(isinstance(value, str) for value in spec.values()):
        raise ConfigError(f"{KEY}: must be a pattern like \"train-{{000..999}}.tar\", or an object of them with the "
                          f"keys train, val and test, not {spec!r}")
    if "train" not in spec and "test" not in spec:
        raise ConfigError(f"{KEY}: has no train and no test shards")
    return dict(spec)
