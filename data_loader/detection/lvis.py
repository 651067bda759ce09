"""What LVIS's annotation files have beyond COCO's (Gupta et al., CVPR 2019, https://www.lvisdataset.org/dataset).

Their images are named by `coco_url`, and each image is annotated for some of the classes only: those of its instances,
which may be incomplete (`not_exhaustive_category_ids`), and those that it is known not to have (`neg_category_ids`).
"""
from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from utils.errors import ConfigError

#: Keys of an image that list the ids of classes.
NEGATIVE, INCOMPLETE = "neg_category_ids", "not_exhaustive_category_ids"


def is_name(name: str) -> bool:
    """Whether `name` can be a file's name."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def image_name(entry: dict[str, Any], look: Callable[[str], bool | None]) -> str | None:
    """The name of an image's file below the image folder; None if the entry has none.

    look: whether there is such a file. LVIS's splits have images of several of COCO's, each in its folder: where the
    image folder lacks `file_name` (v0.5: as in COCO 2014; v1 has none), the file is looked for as `coco_url` names it,
    also in the folder beside or below the image folder that it names.
    """
    name, url = entry.get("file_name"), entry.get("coco_url")
    if name is not None and not isinstance(name, str):
        return None
    if not isinstance(url, str) or (name is not None and is_name(name) and look(name)):
        return name
    try:
        split, _, last = urlsplit(url).path.rpartition("/")
    except ValueError:
        return name
    places = (last, f"../{os.path.basename(split)}/{last}", f"{os.path.basename(split)}/{last}")
    return next((place for place in places if is_name(place) and look(place)), name or last)


def federated(where: str, entry: dict[str, Any], known: set[int]) -> dict[str, list[int]]:
    """An image's NEGATIVE and INCOMPLETE, as far as it has them. where: its place, for messages; known: the ids of all
    classes. Raises ConfigError."""
    found = {key: entry[key] for key in (NEGATIVE, INCOMPLETE) if key in entry}
    for key, ids in found.items():
        wrong = [n for n in ids if type(n) is not int or n not in known] if isinstance(ids, list) else [ids]
        if wrong:
            raise ConfigError(f"{where}: {key} has {str(wrong[0])[:40]!r}; it must be a list of categories' ids")
    return found


def is_federated(images: list[dict[str, Any]]) -> bool:
    """Whether images are annotated for some of the classes only."""
    return any(NEGATIVE in image or INCOMPLETE in image for image in images)
