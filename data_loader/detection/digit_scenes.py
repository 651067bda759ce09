"""Scenes of handwritten digits on a textured background, generated once from scikit-learn's real scans, as COCO files.

Each scene has two to seven digits (the last one may have fewer) of the UCI "Optical Recognition of Handwritten Digits"
scans (8x8, shipped with scikit-learn), enlarged, rotated and coloured. Training instances are long-tailed: class k of
10 has int(n_max * imb_factor ** (k / 9)), at least one (Cao et al., NeurIPS 2019); validation scenes have equally many
of each. Training and validation scenes use different scans.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_loader.datasets import digit_scans
from data_loader.derived import kept, temporary_folder
from data_loader.detection.masks import encode, mask_tools
from utils.dist import any_rank, barrier, local_rank
from utils.errors import ConfigError
from utils.files import atomic_write, write_json
from utils.seed import numpy_rng

PER_SCENE = (2, 7)
VERSION = 1


def instance_counts(n_max: int, imb_factor: float) -> list[int]:
    """The numbers of training instances of the digits 0 to 9, at least one each."""
    return [max(1, int(n_max * imb_factor ** (k / 9))) for k in range(10)]


def scenes_folder(data_dir: str | Path, settings: dict[str, Any]) -> Path:
    """The folder for scenes with these settings; different settings have different folders."""
    name = "size{image_size}-max{n_max}-factor{imb_factor:g}-val{n_val}-seed{scene_seed}".format(**settings)
    return Path(data_dir) / name


def make_scenes(data_dir: str | Path, *, image_size: int = 128, n_max: int = 300, imb_factor: float = 0.02,
                n_val: int = 40, scene_seed: int = 0) -> Path:
    """Write the scenes in COCO's layout, unless they exist; returns their folder: a temporary one where nothing
    may be kept (`data_loader.derived`). One process per machine writes; on a shared disk all write the same bytes.

    Args:
        image_size: the scenes' longer side in pixels, at least 64; about two thirds aren't square, but 4:3 or 3:4.
        n_max: training instances of the digit 0.
        imb_factor: instances of the digit 9 relative to those of the digit 0, above 0 and at most 1.
        n_val: validation instances of each digit.
        scene_seed: selects the scenes.
    Raises:
        ConfigError: a value out of range, pycocotools is missing, or the folder can't be written to.
    """
    settings = {"image_size": image_size, "n_max": n_max, "imb_factor": imb_factor, "n_val": n_val,
                "scene_seed": scene_seed}
    for key, least in (("image_size", 64), ("n_max", 1), ("n_val", 1)):
        if settings[key] < least:
            raise ConfigError(f"data_loader.args.{key}: {settings[key]}; it must be at least {least}")
    if not 0 < imb_factor <= 1:
        raise ConfigError(f"data_loader.args.imb_factor: {imb_factor}; it must be above 0 and at most 1")
    mask_tools()  # fails before anything is written if pycocotools is missing
    folder = scenes_folder(data_dir, settings)
    stamp = folder / "scenes.json"
    missing = local_rank() == 0 and not _is_complete(stamp, settings)
    if not kept() and any_rank(missing):
        folder = temporary_folder()
        stamp = folder / "scenes.json"
        missing = local_rank() == 0
    if missing:
        try:
            _write_split(folder, "train", instance_counts(n_max, imb_factor), settings, 0)
            _write_split(folder, "val", [n_val] * 10, settings, 1)
            # Written last, to mark the folder as complete.
            write_json(stamp, {**settings, "version": VERSION})
        except OSError as error:
            raise ConfigError(f"data_loader.args.data_dir: can't write scenes to {folder}: {error.strerror}") from None
    barrier()
    return folder


def _is_complete(stamp: Path, settings: dict[str, Any]) -> bool:
    try:
        return json.loads(stamp.read_text()) == {**settings, "version": VERSION}
    except (OSError, ValueError):
        return False


def _scans(split: int) -> list[np.ndarray]:
    """For each digit its scans [n, 8, 8], 0 to 1: the first two thirds for training (split 0), the rest for validation.
    """
    images, labels = digit_scans()
    images = images.astype(np.float32) / 16
    per_class = [images[labels == digit] for digit in range(10)]
    return [scans[:2 * len(scans) // 3] if split == 0 else scans[2 * len(scans) // 3:] for scans in per_class]


def _write_split(folder: Path, name: str, counts: list[int], settings: dict[str, Any], split: int) -> None:
    rng = numpy_rng(settings["scene_seed"], split, VERSION)
    scans = _scans(split)
    waiting = rng.permutation(np.repeat(np.arange(10), counts)).tolist()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    while waiting:
        n = min(len(waiting), int(rng.integers(PER_SCENE[0], PER_SCENE[1] + 1)))
        digits, waiting = waiting[:n], waiting[n:]
        picture, masks = scene(rng, scans, digits, settings["image_size"])
        image_id = len(images) + 1
        file_name = f"{image_id:06d}.png"
        with atomic_write(folder / f"{name}2017" / file_name) as handle:
            Image.fromarray(picture).save(handle, format="PNG")
        images.append({"id": image_id, "file_name": file_name, "height": picture.shape[0], "width": picture.shape[1]})
        for digit, mask in zip(digits, masks):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": digit + 1,
                                "bbox": box, "segmentation": encode(mask), "area": int(mask.sum()), "iscrowd": 0})
    write_json(folder / "annotations" / f"instances_{name}2017.json",
               {"images": images, "annotations": annotations,
                "categories": [{"id": digit + 1, "name": f"digit {digit}"} for digit in range(10)]})


def scene(rng: np.random.Generator, scans: list[np.ndarray], digits: list[int],
          image_size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """One scene with the given digits: (image uint8 [H, W, 3], a non-empty mask bool [H, W] for each digit).

    scans: for each digit 0 to 9, its scans [n, 8, 8]; image_size: the longer side in pixels.
    """
    sides = [(1.0, 1.0), (0.75, 1.0), (1.0, 0.75)][int(rng.integers(3))]
    height, width = (int(image_size * side) for side in sides)
    picture = _ground(rng, height, width)
    taken = np.zeros((height, width), dtype=bool)
    masks = []
    for digit in digits:
        scan = scans[digit][int(rng.integers(len(scans[digit])))]
        for attempt in range(200):
            # Later attempts are smaller, to find room in a crowded scene.
            side = int(image_size * rng.uniform(0.14, 0.38) * (1 - 0.6 * attempt / 200))
            ink = _enlarge(scan, side, float(rng.uniform(-20, 20)))
            top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
            if not taken[top:top + side, left:left + side].any():
                break
        else:
            ink = np.where(taken[top:top + side, left:left + side], 0, ink)
        mask = np.zeros((height, width), dtype=bool)
        mask[top:top + side, left:left + side] = ink > 0.4
        if not mask.any():
            mask[top:top + side, left:left + side] = True
        taken |= mask
        masks.append(mask)
        ground = picture[mask].mean(axis=0)
        # A colour that differs from the background's, so that labelled digits are visible.
        colour = np.where(ground > 128, rng.uniform(0, 80, 3), rng.uniform(176, 255, 3))
        patch = picture[top:top + side, left:left + side]
        cover = np.clip(ink * 1.6, 0, 1)[..., None]
        patch[:] = patch * (1 - cover) + colour * cover
    picture += rng.normal(0, 4, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8), masks


def _enlarge(scan: np.ndarray, side: int, angle: float) -> np.ndarray:
    """A scan's ink enlarged to [side, side], 0 to 1, and rotated by `angle` degrees."""
    picture = Image.fromarray(np.uint8(scan * 255)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture.rotate(angle, Image.Resampling.BILINEAR), dtype=np.float32) / 255


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A textured background [H, W, 3], 0 to 255: noise at three scales around one colour."""
    picture = np.zeros((height, width, 3), dtype=np.float32) + rng.uniform(60, 196, 3)
    for grain, strength in ((4, 30), (12, 18), (40, 8)):
        coarse = rng.normal(0, strength, (grain, grain, 3))
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel].astype(np.float32))
            picture[..., channel] += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(picture, 0, 255)
