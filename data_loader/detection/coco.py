"""Reading and checking COCO annotation files, with one-line errors that name the file and entry.

The format: https://cocodataset.org/#format-data, object detection. Boxes there are [x, y, width, height].
"""
from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_loader.class_names import class_numbers
from data_loader.detection.lvis import federated, image_name, is_federated, is_name
from data_loader.detection.masks import area, decode
from data_loader.files import Look, outside
from utils.errors import ConfigError

#: Pixels by which a box may reach outside its image: real annotations do so by fractions of a pixel.
TOLERANCE = 1.0


@dataclass
class CocoSplit:
    """One annotation file and its images.

    Attributes:
        file, folder: the annotation file and the folder of its images.
        images: {"id", "file_name", "height", "width"}, in LVIS's files also which classes are annotated (see
            `data_loader.detection.lvis`), in the file's order.
        annotations: for each image, its annotations: {"id", "bbox", "category_id", "segmentation", "area",
            "iscrowd"}; boxes are clipped to the image.
        categories: {"id", "name"}, by id, or in a checkpoint's order (`number_as`); the k-th (0, 1, ...) is class k,
            label k + 1 (0 is the background).
        notes: lines for the log about what was left out.
        names: the classes' names as spelled in a checkpoint; None: as in the file.
    """

    file: Path
    folder: Path
    images: list[dict[str, Any]]
    annotations: list[list[dict[str, Any]]]
    categories: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    names: list[str] | None = None

    @property
    def class_names(self) -> list[str]:
        """The classes' names, [C]."""
        return self.names or [category["name"] for category in self.categories]

    @property
    def labels(self) -> dict[int, int]:
        """The label, 1 to C, of each category id."""
        return {category["id"]: k + 1 for k, category in enumerate(self.categories)}

    def counts(self) -> list[int]:
        """The number of instances of each class, [C], without crowds; of images that have it if the file is LVIS's,
        whose groups of frequent and rare classes go by these."""
        kind = set if is_federated(self.images) else list
        seen = Counter(n for found in self.annotations for n in kind(a["category_id"] for a in found
                                                                     if not a["iscrowd"]))
        return [seen[category["id"]] for category in self.categories]

    def number_as(self, wanted: list[str], data_dir: str, some: bool) -> None:
        """Put the classes in the order of a checkpoint's `wanted`, by name, in place. some: the split may lack classes.

        Raises ConfigError if the names don't match.
        """
        numbers = class_numbers(self.class_names, wanted, data_dir, some)
        if numbers != list(range(len(numbers))):
            self.notes = [*self.notes, "classes are numbered as in the checkpoint, by their names"]
        # A class that the split lacks gets an unused id: the model may predict it, but nothing is annotated with it.
        free = itertools.count(self.categories[-1]["id"] + 1)
        found = dict(zip(numbers, self.categories))
        self.categories = [found[k] if k in found else {"id": next(free), "name": name}
                           for k, name in enumerate(wanted)]
        self.names = wanted

    def subset(self, indices: Iterable[int]) -> CocoSplit:
        """The same split with only these images."""
        indices = list(indices)
        return CocoSplit(self.file, self.folder, [self.images[i] for i in indices],
                         [self.annotations[i] for i in indices], self.categories, self.notes, self.names)

    def ground_truth(self) -> dict[str, Any]:
        """The split as one COCO dict, including crowds, for the evaluation."""
        annotations = [{**a, "image_id": image["id"]} for image, found in zip(self.images, self.annotations)
                       for a in found]
        return {"images": self.images, "annotations": annotations, "categories": self.categories}


def read_coco(file: str | os.PathLike, folder: str | os.PathLike, *, categories: list[dict[str, Any]] | None = None,
              skip_degenerate: bool = False, data_dir: str | os.PathLike | None = None,
              allow_outside: bool = False) -> CocoSplit:
    """Read and check an annotation file.

    Args:
        folder: where its images are.
        categories: the training file's, which must include all of this file's; they become the split's.
        skip_degenerate: leave out boxes without width or height instead of refusing the file.
        data_dir: unless `allow_outside`, images must lie in it or in `folder`, with links resolved.
    Raises:
        ConfigError: one line that names the file and the entry that is wrong.
    """
    file, folder = Path(file), Path(folder)
    data = _load(file)
    found = _categories(file, data["categories"], categories)
    # If the config's own image folder leads outside data_dir, by a link, that is intended; paths in an annotation file
    # that do so may not be.
    known = {category["id"] for category in found}
    images = _images(file, folder, data["images"], None if allow_outside else [Path(data_dir or folder), folder], known)
    place = {image["id"]: i for i, image in enumerate(images)}
    per_image: list[list[dict[str, Any]]] = [[] for _ in images]
    skipped = 0
    seen: set[int] = set()
    for n, entry in enumerate(data["annotations"]):
        where = _where(file, "annotation", n, entry)
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: {str(entry)[:40]!r} is no annotation")
        _new_id(where, entry, seen, "annotation")
        if not _is_id(entry.get("image_id")) or entry["image_id"] not in place:
            raise ConfigError(f"{where}: image_id {entry.get('image_id')!r} is not among the file's images")
        if not _is_id(entry.get("category_id")) or entry["category_id"] not in known:
            raise ConfigError(f"{where}: unknown category {entry.get('category_id')!r}; the categories' ids are "
                              f"{_some(sorted(known))}")
        index = place[entry["image_id"]]
        checked = _annotation(where, entry, images[index], skip_degenerate)
        if checked is None:
            skipped += 1
        else:
            per_image[index].append(checked)
    notes = [f"{file.name}: {skipped} boxes without width or height left out"] if skipped else []
    return CocoSplit(file, folder, images, per_image, found, notes)


def _load(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"data_loader.args.data_dir: no annotation file {file}") from None
    except OSError as error:
        raise ConfigError(f"{file}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not JSON ({error})") from None
    keys = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in keys):
        missing = [k for k in keys if not isinstance(data, dict) or not isinstance(data.get(k), list)]
        raise ConfigError(f"{file}: not a COCO annotation file: it needs an object with the lists images, annotations "
                          f"and categories ({', '.join(missing)} missing)")
    return data


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _some(values: list, n: int = 8) -> str:
    return ", ".join(map(str, values[:n])) + (", ..." if len(values) > n else "")


def _new_id(where: str, entry: dict, seen: set[int], what: str) -> None:
    if not _is_id(entry.get("id")):
        raise ConfigError(f"{where}: id {entry.get('id')!r}; every {what} needs an integer id of its own")
    if entry["id"] in seen:
        raise ConfigError(f"{where}: duplicate id: another {what} has the id {entry['id']} too")
    seen.add(entry["id"])


def _where(file: Path, what: str, n: int, entry: Any) -> str:
    """The location of a mistake for messages: the file and the entry's id, or its place (from 0) in the list."""
    place = f"number {n}"
    return f"{file}: {what} {entry.get('id', place) if isinstance(entry, dict) else place}"


def _categories(file: Path, entries: list, reference: list[dict] | None) -> list[dict[str, Any]]:
    seen: set[int] = set()
    for n, entry in enumerate(entries):
        where = _where(file, "category", n, entry)
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ConfigError(f"{where}: needs an id and a name")
        _new_id(where, entry, seen, "category")
    found = sorted(({"id": e["id"], "name": e["name"]} for e in entries), key=lambda e: e["id"])
    if not found:
        raise ConfigError(f"{file}: categories is empty; there is nothing to detect")
    if reference is None:
        return found
    for category in found:
        if category not in reference:
            raise ConfigError(f"{file}: unknown category {category['id']} ({category['name']!r}): the training "
                              f"annotations have {_some([(c['id'], c['name']) for c in reference], 4)}")
    return reference


def _images(file: Path, folder: Path, entries: list, within: list[Path] | None,
            known: set[int]) -> list[dict[str, Any]]:
    if not folder.is_dir():
        raise ConfigError(f"data_loader.args.data_dir: no image folder {folder}")
    look = Look(folder, within)
    images, seen = [], set()
    for n, entry in enumerate(entries):
        where = _where(file, "image", n, entry)
        name = image_name(entry, look) if isinstance(entry, dict) else None
        if name is None:
            raise ConfigError(f"{where}: needs id, file_name (or coco_url), width and height")
        _new_id(where, entry, seen, "image")
        for side in ("width", "height"):
            if not _is_id(entry.get(side)) or entry[side] < 1:
                raise ConfigError(f"{where}: {side} {entry.get(side)!r}; it must be a whole number of pixels")
        there = is_name(name) and look(name)
        if there is None:
            raise outside(where, name, within[0])
        if not there:
            raise ConfigError(f"{where}: missing image {str(folder / name)!r}")
        images.append({"file_name": name, **{key: entry[key] for key in ("id", "height", "width")},
                       **federated(where, entry, known)})
    if not images:
        raise ConfigError(f"{file}: images is empty")
    return images


def _annotation(where: str, entry: dict, image: dict, skip_degenerate: bool) -> dict[str, Any] | None:
    """The checked annotation with a clipped box, or None if its box is empty and `skip_degenerate` is true."""
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) for v in box):
        raise ConfigError(f"{where}: bbox {str(box)[:60]}; it must be four numbers [x, y, width, height]")
    x, y, w, h = box
    if w <= 0 or h <= 0:
        if skip_degenerate and w >= 0 and h >= 0:
            return None
        hint = "" if w < 0 or h < 0 else "; set data_loader.args.skip_degenerate to true to leave such boxes out"
        raise ConfigError(f"{where}: degenerate box {box} (width and height must be above 0){hint}")
    right, bottom = x + w, y + h
    if x < -TOLERANCE or y < -TOLERANCE or right > image["width"] + TOLERANCE or bottom > image["height"] + TOLERANCE:
        raise ConfigError(f"{where}: box {box} reaches outside its image {image['file_name']} of "
                          f"{image['width']}x{image['height']}")
    x, y, right, bottom = max(x, 0.0), max(y, 0.0), min(right, image["width"]), min(bottom, image["height"])
    if right <= x or bottom <= y:
        raise ConfigError(f"{where}: box {box} is outside its image {image['file_name']} of "
                          f"{image['width']}x{image['height']}")
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise ConfigError(f"{where}: iscrowd {crowd!r}; it must be 0 or 1")
    segmentation = _segmentation(where, entry.get("segmentation"), image)
    size = entry.get("area")
    if not _is_number(size) or size < 0:
        size = area(segmentation, image["height"], image["width"])  # AP by size uses the mask's area
    return {"id": entry["id"], "bbox": [x, y, right - x, bottom - y], "category_id": entry["category_id"],
            "segmentation": segmentation, "area": size, "iscrowd": int(crowd)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _segmentation(where: str, value: Any, image: dict) -> list | dict:
    if isinstance(value, list):
        if not value or not all(isinstance(p, list) and p for p in value):
            raise ConfigError(f"{where}: empty polygon; segmentation must be polygons [[x0, y0, x1, y1, ...], ...] or "
                              "run lengths {\"size\", \"counts\"}")
        for polygon in value:
            if len(polygon) < 6 or len(polygon) % 2 or not all(_is_number(v) for v in polygon):
                raise ConfigError(f"{where}: polygon of {len(polygon)} numbers; it must have x and y of at least "
                                  "three points")
            # pycocotools steps along every edge, however long it is.
            if any(not -side <= v <= 2 * side for start, side in enumerate((image["width"], image["height"]))
                   for v in polygon[start::2]):
                raise ConfigError(f"{where}: polygon reaches far outside its image {image['file_name']} of "
                                  f"{image['width']}x{image['height']}")
        return value
    if not isinstance(value, dict) or not isinstance(value.get("counts"), list | str):
        raise ConfigError(f"{where}: no segmentation; a mask model needs polygons or run lengths for every instance")
    if value.get("size") != [image["height"], image["width"]]:
        raise ConfigError(f"{where}: run lengths for size {value.get('size')}, the image is "
                          f"[{image['height']}, {image['width']}] (height, width)")
    try:
        decode(value, *value["size"])
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{where}: bad run lengths: {error}") from None
    return value


def box_corners(annotations: list[dict[str, Any]]) -> np.ndarray:
    """The annotations' boxes as corners x0, y0, x1, y1: float32 [n, 4]."""
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
