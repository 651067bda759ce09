"""Where in a file a network lies: who trains encoders puts a prefix before their names, and other parts beside them."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

# Encoders that follow another slowly; what is trained on begins from the one that they follow.
_FOLLOWERS = re.compile(r"encoder_k|momentum|target|teacher|ema\b|_ema|key_encoder")


def find_trunk(weights: Iterable[str]) -> tuple[str, dict[str, str]] | None:
    """(prefix, {name in the file: ours}) of the ResNet in `weights`: the first that follows no other, else the first.

    The names are empty but for a numbered one: "0" is conv1, "1" is bn1, those that hold blocks are the layers.
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
    """The prefix (ends in a dot, or is "") under which `names` has over half of a network's `own` names; else None.

    Of several one that follows no other encoder, of these the one with most of the names, of these the first.
    """
    found = Counter(name[:start] for name in names for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
                    if name[start:] in own)
    return min((prefix for prefix, count in found.items() if 2 * count > len(own)),
               key=lambda prefix: (bool(_FOLLOWERS.search(prefix)), -found[prefix]), default=None)
