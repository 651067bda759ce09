"""Setting rectangles of training images to zero after normalising, in batches: Cutout and random erasing."""
from __future__ import annotations

import math

import torch
from torch import Tensor

AREA, RATIO, TRIES = (0.02, 0.33), (0.3, 3.3), 10  # random erasing: share of area, height / width, draws per image


def draw_boxes(count: int, size: int, cutout: int, erasing: float, source: torch.Generator) -> Tensor:
    """Draw the boxes to erase in `count` images of size x size pixels: int32 [count, boxes, 4] with top, bottom
    (exclusive), left, right (exclusive); empty boxes for images that stay as they are.

    cutout: side of a square centred at any pixel, so that part of it may lie outside (DeVries and Taylor, 2017); 0:
    none. erasing: the share of images, 0 to 1, with a rectangle of 2 to 33 % of the area and an aspect ratio of 0.3 to
    3.3 that lies inside (Zhong et al., AAAI 2020).
    """
    boxes = []
    if cutout:
        first = torch.randint(0, size, (count, 2), generator=source) - cutout // 2
        edges = torch.stack((first, first + cutout), 2).clamp_(0, size)
        boxes.append(edges.view(count, 4))
    if erasing:
        area, ratio, down, across = torch.rand(4, count, TRIES, generator=source, dtype=torch.float64)
        area = size * size * (AREA[0] + (AREA[1] - AREA[0]) * area)
        low, high = (math.log(value) for value in RATIO)
        ratio = torch.exp(low + (high - low) * ratio)
        high, wide = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (high < size) & (wide < size)
        chosen = fits.int().argmax(1, keepdim=True)  # the first that fits
        high, wide, down, across = (value.gather(1, chosen).view(-1) for value in (high, wide, down, across))
        taken = fits.any(1) & (torch.rand(count, generator=source) < erasing)
        top, left = ((room * (size - side + 1)).floor() for room, side in ((down, high), (across, wide)))
        boxes.append(torch.stack((top, top + high, left, left + wide), 1) * taken.view(-1, 1))
    return torch.stack(boxes, 1).int() if boxes else torch.zeros(count, 0, 4, dtype=torch.int32)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Set each image's boxes to zero, in place; returns images. images: [n, C, H, W]; boxes: int [n, boxes, 4], see
    `draw_boxes`."""
    down, across = (torch.arange(side, device=images.device) for side in images.shape[2:])
    for box in boxes.unbind(1):
        top, bottom, left, right = box.t().unsqueeze(2)  # [n, 1] each
        inside = ((down >= top) & (down < bottom)).unsqueeze(2) & ((across >= left) & (across < right)).unsqueeze(1)
        images.masked_fill_(inside.unsqueeze(1), 0)
    return images
