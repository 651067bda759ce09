"""Reading one image file into eight-bit RGB, or a one-line error that says what is wrong with it.

Unusual files: CMYK, grey and palette images are converted; 12- and 16-bit grey is scaled, not clipped; 32-bit integer
and floating-point pixels, whose range is unknown, are refused; transparency is dropped; only an animation's first
frame is read. Photos are turned upright: the EXIF orientation is applied, as in any viewer (but not in torchvision's
`ImageFolder`), and detection's boxes and masks are turned with them. JPEGs of any size are read, reduced while
decoding; other formats up to 179 megapixels, Pillow's own limit.
"""
from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO, NoReturn

import numpy as np
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin

from data_loader.places import member_of, open_image
from utils.errors import ConfigError

MOST_PIXELS = 178_956_970
EXTENSIONS = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"}
#: Formats that phones write and Pillow can't read.
HEIC = {".heic", ".heif"}
#: Folders and files that systems and programs leave in other people's folders, in lower case.
_SYSTEM = {"__macosx", "@eadir", "@tmp", "#recycle", "lost+found", "$recycle.bin", "system volume information",
           "thumbs.db", "desktop.ini", "__pycache__"}
_WIDE_GREY = {"I;16", "I;16L", "I;16B", "I;16N", "I"}


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` upright and in mode RGB. Raises ValueError for pixels of unknown range: floating-point ones, and 32-bit
    integers unless the file format is limited to 16 bits."""
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these have 16 bits at most
        raise ValueError("32-bit integer pixels, whose range isn't known; save it with 8 or 16 bits")
    image.load()  # Pillow itself turns a TIFF upright while loading it
    wide, tags = image.mode in _WIDE_GREY, image.tag_v2 if image.format == "TIFF" else {}
    with contextlib.suppress(Exception):  # a damaged EXIF block doesn't make the pixels unusable
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if wide:  # convert() would clip at 255, and Pillow leaves TIFF's 12 bits as they are, and white where that is 0
        white = 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
        levels = np.asarray(image).astype(np.float64).clip(0, white)
        if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
            levels = white - levels
        image = Image.fromarray((levels * (255 / white)).round().astype(np.uint8))
    elif "transparency" in image.info:  # without this detour Pillow warns
        image = image.convert("RGBA")
    return image.convert("RGB")


def is_system(name: str) -> bool:
    """Whether a file or folder of this name isn't the user's: it is hidden (`.ipynb_checkpoints`, `._photo.jpg`,
    `.Trash-0`), or was created by an archiver, operating system or file server."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image: it has an image's extension and isn't a system file."""
    return not is_system(name) and os.path.splitext(name)[1].lower() in EXTENSIONS


def shown(path: str) -> str:
    """A file name in printable form, whatever bytes it has; for an image in a shard, both names."""
    found = member_of(path)
    path = path if found is None else f"{found.shard}: {found.name}"
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_rgb(path: str | np.ndarray, plan: Callable[[int, int], int] | None = None) -> Image.Image:
    """The image in file `path`, or given as an array uint8 [H, W, 3], in mode RGB.

    plan: called for JPEGs with the (width, height) of the full upright image; returns the factor (1, 2, 4, 8) by which
    the image may be reduced while decoding.
    Raises ConfigError, naming the path, if the file is missing, no image, truncated, damaged or too large.
    """
    if isinstance(path, np.ndarray):
        return Image.fromarray(path)
    try:
        with open_image(path) as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _read(handle, plan)
    except FileNotFoundError:
        raise ConfigError(f"{shown(path)}: no such image") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = str(error).replace(str(path), "").strip(": ") or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = _unknown(path)
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise ConfigError(f"{shown(path)}: can't be read as an image ({reason}); replace or remove it") from None


def refuse_folder(error: OSError) -> NoReturn:
    """Raises ConfigError for a folder that can't be read, since its photos must not be skipped silently."""
    raise ConfigError(f"{shown(str(error.filename))}: can't be read ({error.strerror})") from None


def walk(top: str) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """Yield (folder, its resolved path, names of folders in it, names of files in it) for `top` and all folders below,
    following links.

    Each folder comes once, even if links lead back to it; names are sorted, without system files (`is_system`). As with
    `os.walk`, clearing the list of folders prevents descending. Raises ConfigError for a folder that can't be read.
    """
    walked: set[str] = set()
    for where, folders, files in os.walk(top, onerror=refuse_folder, followlinks=True):
        real = os.path.realpath(where)
        if real in walked:
            folders.clear()
            continue
        walked.add(real)
        folders[:] = sorted(name for name in folders if not is_system(name))
        yield where, real, folders, sorted(name for name in files if not is_system(name))


def _unknown(path: str) -> str:
    """Why Pillow doesn't recognise a file as an image."""
    try:
        with open_image(path) as handle:
            start = handle.read(12)
    except OSError:
        start = b"?"
    if not start:
        return "the file is empty"
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"heim", b"hevc", b"mif1", b"msf1"):
        return "HEIC, as phones write it: convert it to JPEG or PNG"
    return "not an image in a known format"


def stored_as(path: str) -> tuple[int, int, int]:
    """(EXIF orientation 1 to 8, width, height) of the pixels as stored in a file, from its header alone; (1, 0, 0) if
    it can't be read."""
    try:
        with open_image(path) as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(handle)
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            size = image.size
            if image.format == "TIFF":  # newer versions of Pillow give the upright size for these
                size = tuple(image.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
            return orientation if orientation in range(1, 9) else 1, *size
    except Exception:  # the error is reported when the pixels are read
        return 1, 0, 0


def short_side(path: str) -> int | None:
    """The shorter side of the image in a file, in pixels, from its header alone; None if it can't be read."""
    try:
        with open_image(path) as handle, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return min(Image.open(handle).size)
    except Exception:  # decoders raise nearly anything; the error is reported when the pixels are read
        return None


def _read(handle: BinaryIO, plan: Callable[[int, int], int] | None) -> Image.Image:
    start = handle.read(3)
    handle.seek(0)
    if start == b"\xff\xd8\xff":  # opened directly: Image.open refuses large headers before we can reduce
        image = JpegImagePlugin.JpegImageFile(handle)
        width, height = image.size[::-1] if _on_its_side(image) else image.size
        factor = plan(width, height) if plan else 1
        while factor < 8 and (width // factor) * (height // factor) > MOST_PIXELS:
            factor *= 2
        if factor > 1:
            image.draft(None, tuple(max(length // factor, 1) for length in image.size))
    else:
        image = Image.open(handle)
        if image.format == "EPS":    # EPS is a program, which Pillow would run with Ghostscript
            raise ValueError("EPS, which isn't pixels: convert it to PNG")
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too many; make it smaller")
    return to_rgb(image)


def _on_its_side(image: Image.Image) -> bool:
    """Whether the EXIF orientation swaps width and height."""
    with contextlib.suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return False
