"""Scenes of handwritten digits on textured ground, made once from scikit-learn's real scans, as COCO files.

Each scene holds two to seven digits of the UCI "Optical Recognition of Handwritten Digits" scans (8x8, shipped with
scikit-learn), enlarged, turned and coloured. Training instances are long-tailed: class k of 10 has
int(n_max * imb_factor ** (k / 9)) of them (Cao 2019); the validation scenes have equally many of each. Training and
validation scenes use different scans.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_loader.datasets import digit_scans
from data_loader.detection.masks import encode, mask_tools
from utils.dist import barrier, local_rank
from utils.errors import ConfigError
from utils.files import atomic_write, write_json
from utils.seed import numpy_rng

PER_SCENE = (2, 7)
VERSION = 1


def instance_counts(n_max: int, imb_factor: float) -> list[int]:
    """Training instances of the digits 0 to 9, at least one each."""
    return [max(1, int(n_max * imb_factor ** (k / 9))) for k in range(10)]


def scenes_folder(data_dir: str | Path, settings: dict[str, Any]) -> Path:
    """The folder of these settings' scenes: different settings never share files."""
    name = "size{image_size}-max{n_max}-factor{imb_factor:g}-val{n_val}-seed{scene_seed}".format(**settings)
    return Path(data_dir) / name


def make_scenes(data_dir: str | Path, *, image_size: int = 128, n_max: int = 300, imb_factor: float = 0.02,
                n_val: int = 40, scene_seed: int = 0) -> Path:
    """Write the scenes, unless they are there, in COCO's layout; returns their folder. Of several processes one a
    machine writes: the same bytes, where they share a disk.

    Args:
        image_size: the scenes' longer side in pixels, at least 64; a third of them are narrower or lower.
        n_max: training instances of the digit 0.
        imb_factor: those of the digit 9 over those of the digit 0.
        n_val: validation instances of each digit.
    """
    settings = {"image_size": image_size, "n_max": n_max, "imb_factor": imb_factor, "n_val": n_val,
                "scene_seed": scene_seed}
    for key, least in (("image_size", 64), ("n_max", 1), ("n_val", 1)):
        if settings[key] < least:
            raise ConfigError(f"data_loader.args.{key}: {settings[key]}; it must be at least {least}")
    if not 0 < imb_factor <= 1:
        raise ConfigError(f"data_loader.args.imb_factor: {imb_factor}; it must be above 0 and at most 1")
    mask_tools()  # that it is missing is said before anything is written
    folder = scenes_folder(data_dir, settings)
    stamp = folder / "scenes.json"
    if local_rank() == 0 and not _is_complete(stamp, settings):
        try:
            _write_split(folder, "train", instance_counts(n_max, imb_factor), settings, 0)
            _write_split(folder, "val", [n_val] * 10, settings, 1)
            # Written last: it says that everything before it is there.
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
    """For each digit, its scans [n, 8, 8] scaled to 0 to 1: the first two thirds for training, the rest else."""
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
    """One scene: picture uint8 [H, W, 3] and, for each digit, its mask, bool [H, W], not empty."""
    sides = [(1.0, 1.0), (0.75, 1.0), (1.0, 0.75)][int(rng.integers(3))]
    height, width = (int(image_size * side) for side in sides)
    picture = _ground(rng, height, width)
    taken = np.zeros((height, width), dtype=bool)
    masks = []
    for digit in digits:
        scan = scans[digit][int(rng.integers(len(scans[digit])))]
        for attempt in range(200):
            # Ever smaller: the later attempts find room in a crowded scene.
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
        # A colour away from the ground's, so that what is labelled can be seen.
        colour = np.where(ground > 128, rng.uniform(0, 80, 3), rng.uniform(176, 255, 3))
        patch = picture[top:top + side, left:left + side]
        cover = np.clip(ink * 1.6, 0, 1)[..., None]
        patch[:] = patch * (1 - cover) + colour * cover
    picture += rng.normal(0, 4, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8), masks


def _enlarge(scan: np.ndarray, side: int, angle: float) -> np.ndarray:
    """A scan's ink, turned, as [side, side] from 0 to 1."""
    picture = Image.fromarray(np.uint8(scan * 255)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture.rotate(angle, Image.Resampling.BILINEAR), dtype=np.float32) / 255


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Textured ground [H, W, 3], 0 to 255: noise at three grains around one colour."""
    picture = np.zeros((height, width, 3), dtype=np.float32) + rng.uniform(60, 196, 3)
    for grain, strength in ((4, 30), (12, 18), (40, 8)):
        coarse = rng.normal(0, strength, (grain, grain, 3))
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel].astype(np.float32))
            picture[..., channel] += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(picture, 0, 255)
