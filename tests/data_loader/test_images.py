"""Odd and damaged image files: a stated result, or one line that names the file."""
from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from data_loader.images import read_rgb
from data_loader.transforms import (
    IMAGENET_STATISTICS,
    base_pixels,
    read_for_test,
    read_for_training,
    test_pixels,
    test_preprocess,
)
from utils.errors import ConfigError

PREPROCESS = test_preprocess(64, *IMAGENET_STATISTICS)


def ramp(width: int = 40, height: int = 30) -> Image.Image:
    across = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.stack([np.tile(across, (height, 1))] * 3, -1))


@pytest.mark.parametrize(("mode", "name"), [
    ("CMYK", "a.jpg"), ("L", "a.jpg"), ("P", "a.png"), ("RGBA", "a.png"), ("LA", "a.png"), ("1", "a.png"),
    ("RGB", "a.webp"), ("P", "a.gif"), ("RGB", "a.tif"), ("RGB", "a.bmp"), ("RGB", "a.ppm")])
def test_modes_become_rgb(tmp_path: Path, mode: str, name: str) -> None:
    (ramp().quantize(64) if mode == "P" else ramp().convert(mode)).save(tmp_path / name)
    image = read_rgb(str(tmp_path / name))
    assert image.mode == "RGB" and image.size == (40, 30)
    if mode != "1":
        assert np.abs(np.asarray(image).astype(int) - np.asarray(ramp())).mean() < 12


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    levels = np.asarray(read_rgb(str(tmp_path / "deep.png")))
    assert np.abs(levels[..., 0] - deep / 257).max() <= 0.5 and levels.max() == 255


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0), (8, 1), (8, 0)])
def test_grey_tiffs_span_black_to_white(tmp_path: Path, bits: int, photometric: int) -> None:
    """Whatever the depth, and also where 0 is white (photometric interpretation 0)."""
    levels = np.linspace(0, 2 ** bits - 1, 64).round().astype(np.uint16).reshape(8, 8)
    if bits == 12:      # two levels in three bytes
        one, two = levels.ravel()[::2], levels.ravel()[1::2]
        pixels = np.stack([one >> 4, (one & 15) << 4 | two >> 8, two & 255], 1).astype(np.uint8).tobytes()
    else:
        pixels = levels.astype(np.uint8 if bits == 8 else "<u2").tobytes()
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: photometric, 273: 134, 277: 1, 278: 8, 279: len(pixels), 296: 1}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4
    (tmp_path / "a.tif").write_bytes(header + pixels)
    assert len(header) == tags[273]
    grey = np.asarray(read_rgb(str(tmp_path / "a.tif")))[..., 0]
    wanted = np.linspace(0, 255, 64).reshape(8, 8)
    assert np.abs(grey - (wanted if photometric else 255 - wanted)).max() <= 1


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("most", [1, 255, 65535, 10 ** 6])
def test_numbers_of_unknown_range_are_refused(tmp_path: Path, dtype: type, most: int) -> None:
    Image.fromarray(np.linspace(0, most, 64).reshape(8, 8).astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ConfigError, match=r"a\.tif.*save it with 8 or 16 bits"):
        read_rgb(str(tmp_path / "a.tif"))


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_rgb(str(tmp_path / "a.gif")).getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 2), (7, 5)])
def test_tiny_and_long_images_fill_the_crop(tmp_path: Path, size: tuple[int, int]) -> None:
    path = str(tmp_path / "a.png")
    Image.new("RGB", size, (10, 200, 30)).save(path)
    for pixels in (test_pixels(read_for_test(path, PREPROCESS), PREPROCESS),
                   read_for_training(path, np.random.default_rng(0), 64)):
        assert pixels.shape == (3, 64, 64) and pixels[1].min() == 200
    assert base_pixels(read_for_test(path, PREPROCESS), PREPROCESS).shape == (73, 73, 3)


def test_huge_jpeg_is_reduced_while_decoding(tmp_path: Path) -> None:
    path = str(tmp_path / "huge.jpg")
    Image.new("L", (20000, 20000), 77).save(path, quality=10)
    image = read_for_test(path, PREPROCESS)
    assert image.size == (2500, 2500)
    assert test_pixels(image, PREPROCESS).float().std() == 0


def test_other_huge_images_are_refused_by_name(tmp_path: Path) -> None:
    path = str(tmp_path / "huge.png")
    Image.new("1", (20000, 20000)).save(path)
    with pytest.raises(ConfigError, match=r"huge\.png.*(pixels|bomb)"):
        read_rgb(path)


def damaged(folder: Path) -> dict[str, Path]:
    ramp(300, 200).save(folder / "whole.jpg")
    ramp(300, 200).save(folder / "whole.png")
    for kind in ("jpg", "png"):
        content = (folder / f"whole.{kind}").read_bytes()
        (folder / f"cut.{kind}").write_bytes(content[: int(len(content) * 0.7)])
        (folder / f"start.{kind}").write_bytes(content[:15])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    (folder / "folder.jpg").mkdir()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "float.tif")
    return {path.name: path for path in folder.iterdir() if not path.name.startswith("whole")}


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "start.jpg", "start.png", "empty.jpg", "text.jpg",
                                  "folder.jpg", "float.tif", "gone.jpg"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    damaged(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_rgb(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "said"), [
    (b"", "the file is empty"), (b"hello", "not an image in a known format"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, .* convert it to JPEG")])
def test_what_is_no_image_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_rgb(str(tmp_path / "photo.jpg"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_isnt_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "photo.jpg")
    with pytest.raises(ConfigError, match=r"photo.jpg: can't be read as an image \(neither a file"):
        read_rgb(str(tmp_path / "photo.jpg"))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr("data_loader.images.open_image", refuse)
    with pytest.raises(ConfigError, match=r"\(Permission denied\); replace"):
        read_rgb(str(tmp_path / "photo.jpg"))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    path = os.fsdecode(name)
    try:
        with open(name, "wb") as handle:
            ramp().save(handle, "PNG")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert read_rgb(path).size == (40, 30)
    Path(path).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"caf\\xe9"):
        read_rgb(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_photos_stand_upright(tmp_path: Path, name: str, orientation: int) -> None:
    upright = ramp(64, 32)
    stored = upright
    for method in {2: ["FLIP_LEFT_RIGHT"], 3: ["ROTATE_180"], 4: ["FLIP_TOP_BOTTOM"], 5: ["TRANSPOSE"],
                   6: ["ROTATE_90"], 7: ["TRANSVERSE"], 8: ["ROTATE_270"]}.get(orientation, []):
        stored = stored.transpose(Image.Transpose[method])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(tmp_path / name, exif=exif)
    seen = []
    image = read_rgb(str(tmp_path / name), lambda *size: seen.append(size) or 1)
    assert image.size == (64, 32) and seen in ([], [(64, 32)])
    assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).mean() < 3
    halved = read_rgb(str(tmp_path / name), lambda *size: 2)
    assert halved.size == ((32, 16) if name == "a.jpg" else (64, 32))


def test_a_damaged_exif_block_costs_nothing(tmp_path: Path) -> None:
    ramp().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0garbage that is no directory")
    assert read_rgb(str(tmp_path / "a.jpg")).size == (40, 30)
