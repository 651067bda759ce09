"""A sheet of images, each with what a model sees in it, as one PNG."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from tools.classify import class_name
from utils.files import atomic_write

MOST = 120  # images on a sheet: more can't be looked at
CELL, PICTURE, MARGIN = 208, 168, 14
WIDE = 1.6  # how much larger a detector's pictures are, whose boxes must be seen
INK, SOFT, LINE, ACCENT = "#1b1f27", "#5d6675", "#e4e7ec", "#6b4fc4"


def gallery(found: Sequence[Any], names: Sequence[str] | None, path: str) -> int:
    """Write the first `MOST` predictions (see tools.classify) to the PNG `path`; returns how many are on it.

    Under each image stand its first classes with their probabilities and the file's name; a detector's boxes and
    masks are drawn in.
    """
    shown = found[:MOST]
    classified = hasattr(shown[0], "classes")
    scale = 1.0 if classified else WIDE
    cell, picture = round(CELL * scale), round(PICTURE * scale)
    guesses = min(3, len(shown[0].classes)) if classified else 1
    height = picture + 30 + 17 * (guesses - 1) + 20 + MARGIN
    columns = min(len(shown), max(3, math.ceil(math.sqrt(len(shown) * height / cell))))
    sheet = Image.new("RGB", (columns * (cell + MARGIN) + MARGIN,
                              math.ceil(len(shown) / columns) * height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, one in enumerate(shown):
        left, top = MARGIN + i % columns * (cell + MARGIN), MARGIN + i // columns * height
        draw.rectangle((left, top, left + cell - 1, top + picture - 1), fill=LINE)
        source = one.path if classified else one[0]
        image = _picture(source, cell, picture) if classified else _drawn(*one, names, cell, picture)
        sheet.paste(image, (left + (cell - image.width) // 2, top + (picture - image.height) // 2))
        at = top + picture + 5
        if classified:
            at = _guesses(draw, one, names, guesses, left, at, cell)
        else:
            counts = Counter(class_name(names, label - 1) for label in one[1]["labels"].tolist())
            text = ", ".join(f"{name} × {count}" for name, count in counts.items()) or "nothing found"
            draw.text((left, at), _fit(draw, text, _font(13, True), cell), INK, _font(13, True))
            at += 22
        draw.text((left, at), _fit(draw, "/".join(Path(source).parts[-2:]), _font(10), cell), SOFT, _font(10))
    with atomic_write(path) as handle:
        sheet.save(handle, format="PNG")
    return len(shown)


def _guesses(draw: Any, one: Any, names: Sequence[str] | None, count: int, left: int, at: int, cell: int) -> int:
    """The classes under an image, the first one large with a bar; returns where the next line goes."""
    for k, (label, probability) in enumerate(zip(one.classes[:count], one.probabilities)):
        font, colour = (_font(13, True), INK) if k == 0 else (_font(11), SOFT)
        percent = f"{100 * probability:.0f}%"
        room = cell - draw.textlength(percent, font) - 8
        draw.text((left, at), _fit(draw, class_name(names, label), font, room), colour, font)
        draw.text((left + cell, at), percent, colour, font, anchor="ra")
        at += 17
        if k == 0:
            draw.rectangle((left, at + 1, left + cell - 1, at + 4), fill=LINE)
            draw.rectangle((left, at + 1, left + max(1, round(cell * probability)) - 1, at + 4), fill=ACCENT)
            at += 8
    return at


def _picture(path: str, width: int, height: int) -> Image.Image:
    """The image at `path`, fitted into width x height; small ones are enlarged."""
    from data_loader.images import read_rgb
    from data_loader.transforms import reduction
    picture = read_rgb(path, lambda wide, high: reduction(min(wide, high), max(width, height)))
    return _fitted(picture, width, height)


def _drawn(path: str, found: dict[str, Any], names: Sequence[str] | None, width: int, height: int) -> Image.Image:
    from data_loader.images import read_rgb
    from logger.figures.detections import draw_detections
    return _fitted(Image.fromarray(draw_detections(read_rgb(path), found, names, threshold=0.0)), width, height)


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    factor = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if factor > 3 else Image.Resampling.LANCZOS)


def _fit(draw: Any, text: str, font: Any, room: float) -> str:
    """`text` cut to `room` pixels, with dots where something is missing; one line."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    if draw.textlength(text, font) <= room:
        return text
    while text and draw.textlength(text + "…", font) > room:
        text = text[:-1]
    return text + "…"


_FONTS: dict[tuple[int, bool], Any] = {}


def _font(size: int, bold: bool = False) -> Any:
    """DejaVu Sans, which comes with matplotlib and knows most alphabets; else Pillow's own."""
    if (size, bold) not in _FONTS:
        try:
            import matplotlib
            file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
            _FONTS[size, bold] = ImageFont.truetype(str(file), size)
        except (ImportError, OSError):
            _FONTS[size, bold] = ImageFont.load_default(size)
    return _FONTS[size, bold]
