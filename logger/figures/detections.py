"""Detections drawn into a picture: masks tinted, boxes outlined, classes and scores written."""
from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

MASK_OPACITY = 0.45


def class_colour(label: int) -> tuple[int, int, int]:
    """A class's colour, the same in every picture; neighbours differ (golden-ratio steps round the colour wheel)."""
    red, green, blue = colorsys.hsv_to_rgb((label * 0.61803398875) % 1.0, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def as_picture(image: Any) -> np.ndarray:
    """A picture as uint8 [H, W, 3]; it may be such an array, a PIL image, or a float tensor [3, H, W] from 0 to 1."""
    if isinstance(image, torch.Tensor):
        image = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = np.array(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture is uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}")
    return picture


def draw_detections(image: Any, prediction: dict[str, torch.Tensor], class_names: list[str] | None = None,
                    threshold: float = 0.5) -> np.ndarray:
    """The picture with the detections drawn in: uint8 [H, W, 3].

    Args:
        image: see `as_picture`.
        prediction: `boxes` [n, 4] corners in the picture's pixels, `labels` [n] from 1 on and, if there are any,
            `scores` [n] and `masks` [n, 1, H, W] (thresholded at 0.5). A target can be drawn too: it has no scores.
        class_names: of the labels 1, 2, ...; None: the numbers are written.
        threshold: detections with a lower score aren't drawn.
    """
    picture = as_picture(image)
    boxes, labels = prediction["boxes"].detach().float().cpu(), prediction["labels"].tolist()
    scores = prediction["scores"].tolist() if "scores" in prediction else [None] * len(labels)
    shown = [i for i, score in enumerate(scores) if score is None or score >= threshold]
    masks = prediction.get("masks")
    # The most certain last, on top.
    shown.sort(key=lambda i: -1.0 if scores[i] is None else scores[i])
    for i in shown if masks is not None else ():
        inside = (masks[i].detach().float().reshape(masks.shape[-2:]) > 0.5).cpu().numpy()
        tint = (1 - MASK_OPACITY) * picture[inside] + MASK_OPACITY * np.array(class_colour(labels[i]))
        picture[inside] = tint.astype(np.uint8)
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    width = max(1, round(min(canvas.size) / 300))
    for i in shown:
        left, top, right, bottom = boxes[i].tolist()
        colour = class_colour(labels[i])
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=width)
        name = class_names[labels[i] - 1] if class_names and labels[i] <= len(class_names) else str(labels[i])
        text = name if scores[i] is None else f"{name} {scores[i]:.2f}"
        box = draw.textbbox((left, max(0, top - 11)), text)
        draw.rectangle(box, fill=colour)
        draw.text(box[:2], text, fill=(0, 0, 0), anchor="lt")
    return np.asarray(canvas)
