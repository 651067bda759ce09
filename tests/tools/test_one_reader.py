"""One file gives one picture: to training, test, predict, gallery, report, detection and exported models."""
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import nn

from data_loader.detection.coco import CocoSplit
from data_loader.detection.dataset import DetectionDataset
from data_loader.images import read_rgb
from data_loader.transforms import (
    IMAGENET_STATISTICS,
    Normalise,
    read_for_test,
    read_for_training,
    test_pixels,
    test_preprocess,
    test_transform,
)
from tools.classify import Prediction, classify, detect
from tools.gallery import gallery

WIDTH, HEIGHT = 96, 64
PREPROCESS = test_preprocess(48, *IMAGENET_STATISTICS)
FILES = [("RGB", "a.jpg"), ("L", "a.jpg"), ("CMYK", "a.jpg"), ("I;16", "a.png"), ("I;16", "a.tif"), ("I;16B", "a.tif"),
         ("RGB", "a.tif"), ("RGBA", "a.png"), ("LA", "a.png"), ("P", "a.png"), ("P", "see-through.png"), ("1", "a.png"),
         ("RGB", "a.webp")]
STORED = {1: [], 3: ["ROTATE_180"], 6: ["ROTATE_90"], 7: ["TRANSVERSE"]}


def photo(mode: str, grey: np.ndarray) -> Image.Image:
    """grey [H, W] of 0 to 255 in another mode."""
    if mode == "1":
        return Image.fromarray(grey > 127)
    if mode.startswith("I;16"):
        wide = grey.astype(">u2" if mode.endswith("B") else "<u2") * 257
        return Image.frombytes(mode, grey.shape[::-1], wide.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    image = Image.fromarray(grey)
    return image.convert("RGB").quantize(64) if mode == "P" else image.convert(mode)


class Watch(nn.Module):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        self.seen = images
        if isinstance(images, list):
            empty = torch.zeros(0)
            return {"detections": [{"boxes": torch.zeros(0, 4), "labels": empty.long(), "scores": empty}]}
        return {"output": torch.zeros(len(images), 2)}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("mode, name", FILES)
def test_every_path_sees_the_same_picture(tmp_path, mode, name, orientation):
    grey = Image.fromarray(np.tile(np.linspace(0, 255, WIDTH), (HEIGHT, 1)).astype(np.uint8))
    expected = np.asarray(grey.point(lambda v: 255 * (v > 127)) if mode == "1" else grey)
    for method in STORED[orientation]:
        grey = grey.transpose(Image.Transpose[method])
    stored = photo(mode, np.asarray(grey))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    folder = tmp_path / "train" / "one"
    folder.mkdir(parents=True)
    path = str(folder / name)
    more = {"transparency": 3} if name.startswith("see") else {}
    stored.save(path, exif=exif, **more, **({"lossless": True} if name.endswith("webp") else {}))
    picture = np.asarray(read_rgb(path))
    assert picture.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(picture.astype(float) - expected[..., None]).mean() < 6

    # Classification: test, predict, the exported model's documented preprocessing.
    tested = Normalise(PREPROCESS["mean"], PREPROCESS["std"])(test_pixels(read_for_test(path, PREPROCESS), PREPROCESS))
    watch = Watch().eval()
    assert classify(watch, [path], PREPROCESS).unreadable == []
    assert torch.equal(watch.seen[0], tested)
    with open(path, "rb") as handle:  # by name, Pillow 13 maps a turned 16-bit TIFF into memory with swapped sides
        assert torch.equal(test_transform(PREPROCESS)(Image.open(handle)), tested)
    # Training: as from a plain file of the same pixels.
    plain = str(tmp_path / "plain.png")
    Image.fromarray(picture).save(plain)
    assert torch.equal(*(read_for_training(file, np.random.default_rng(1), 64) for file in (path, plain)))
    # Gallery and report.
    assert gallery([Prediction(path, [0], [1.0])], ["one"], str(tmp_path / "a.gallery")) == 1
    assert gallery([Prediction(plain, [0], [1.0])], ["one"], str(tmp_path / "plain.gallery")) == 1
    shown, same = (np.asarray(Image.open(tmp_path / f"{n}.gallery"))[:180] for n in ("a", "plain"))
    assert np.array_equal(shown, same) and shown.std() > 10
    # Detection: training, test and predict.
    split = CocoSplit(tmp_path / "a.json", folder, [{"id": 1, "file_name": name, "width": WIDTH, "height": HEIGHT}],
                      [[]], [{"id": 1, "name": "one"}])
    as_tensor = torch.from_numpy(picture.copy()).permute(2, 0, 1).float().div(255)
    for training in (False, True):
        dataset = DetectionDataset(split, training, [HEIGHT], WIDTH, 0.0, 0)
        assert torch.allclose(dataset.sample(1, 0, 0)[0], as_tensor)
    detect(watch, [path])
    assert torch.allclose(watch.seen[0], as_tensor)
