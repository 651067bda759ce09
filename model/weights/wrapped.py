"""Locating a network in a file: projects that train encoders add a prefix to its keys, and other parts beside it."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

# Momentum (EMA) encoders, which slowly follow another one; the encoder that they follow is preferred.
_FOLLOWERS = re.compile(r"encoder_k|momentum|target|teacher|ema\b|_ema|key_encoder")


def find_trunk(weights: Iterable[str]) -> tuple[str, dict[str, str]] | None:
    """(prefix, {name in the file: ours}) of the ResNet in `weights`, or None: the first that isn't a momentum encoder,
    or else the first.

    The dict is empty unless the parts are numbered: then "0" is conv1, "1" is bn1, and those with blocks are layers.
    """
    keys, found = list(weights), []
    for key in keys:
        if match := re.fullmatch(r"(.*?)(\w+)\.0\.conv1\.weight", key):
            prefix, first = match.groups()
            if first == "layer1" and f"{prefix}conv1.weight" in keys:
                found.append((prefix, {}))
            elif first.isdigit() and f"{prefix}0.weight" in keys and prefix not in [known for known, _ in found]:
                blocks = re.compile(re.escape(prefix) + r"(\d+)\.0\.conv1\.weight")
                layers = [block[1] for other in keys if (block := blocks.fullmatch(other))]
                found.append((prefix, {"0": "conv1", "1": "bn1"} | {n: f"layer{i}" for i, n in enumerate(layers, 1)}))
    return min(found, key=lambda trunk: bool(_FOLLOWERS.search(trunk[0])), default=None)


def prefix_of(names: Iterable[str], own: Collection[str]) -> str | None:
    """The prefix ("" or ending in a dot) under which `names` has more than half of a network's `own` names, or None.

    Of several prefixes, those that aren't a momentum encoder's are preferred, then the one with most of the names, then
    the first.
    """
    found = Counter(name[:start] for name in names for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
                    if name[start:] in own)
    return min((prefix for prefix, count in found.items() if 2 * count > len(own)),
               key=lambda prefix: (bool(_FOLLOWERS.search(prefix)), -found[prefix]), default=None)
