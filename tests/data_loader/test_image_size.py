"""`"image_size": "auto"`: chosen from the photos and the device, said in the summary, kept in the run's config."""
import numpy as np
import pytest
from PIL import Image

from data_loader.image_loader import suited_size
from tools.parts import make_loader, settled
from tools.session import data_facts


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of three photos each, 300 x 240 pixels, and one that can't be read."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / name).mkdir()
        for n in range(3):
            Image.fromarray(rng.integers(0, 255, (240, 300, 3), dtype=np.uint8)).save(root / name / f"{n}.jpg")
    return root


@pytest.mark.parametrize("side, fast, size", [(240, True, 224), (240, False, 64), (150, True, 128), (40, True, 64)])
def test_suited_size(tmp_path, side, fast, size):
    paths = []
    for n in range(5):
        paths.append(str(tmp_path / f"{n}.png"))
        Image.new("L", (side, side + 100)).save(paths[-1])
    (tmp_path / "0.png").write_text("no image")
    chosen, note = suited_size(paths, fast)
    assert chosen == size and f"image size: {size}" in note and f"{side} pixels" in note
    assert ("times as long" in note) == (side >= 128 and not fast)


@pytest.mark.parametrize("fits, size", [(True, 112), (False, 224)])
def test_half_of_a_networks_size_only_where_it_takes_that(tmp_path, fits, size):
    Image.new("L", (60, 60)).save(tmp_path / "0.png")
    chosen, note = suited_size([str(tmp_path / "0.png")], True, 224, lambda tried: fits and tried == 112)
    assert chosen == size and ("it takes none of 112" in note) == (not fits)
    assert suited_size([str(tmp_path / "0.png")], True, 60, lambda tried: 1 / 0)[0] == 60      # not asked


def test_no_readable_image_leaves_the_smallest(tmp_path):
    (tmp_path / "x.png").write_text("no image")
    assert suited_size([str(tmp_path / "x.png")], True)[0] == 64


def test_the_choice_is_kept(photos):
    config = {"arch": {"type": "ResNet32Model"}, "data_loader": {"type": "ImageFolderLTDataLoader",
                              "args": {"data_dir": str(photos), "batch_size": 2, "image_size": "auto"}},
              "trainer": {"epochs": 1}}
    loader = make_loader(config)
    effective = settled(config, loader)
    assert effective["data_loader"]["args"]["image_size"] == loader.image_size == 64
    assert effective["arch"]["args"] == {"num_classes": loader.num_classes}
    assert config["data_loader"]["args"]["image_size"] == "auto" and "args" not in config["arch"]
    assert next(iter(loader))[0].shape[1:] == (3, 64, 64) and loader.preprocess["image_size"] == 64
    assert any("image size: 64" in line for line in loader.summary())
    facts = {**data_facts(loader), "preprocess": {**loader.preprocess, "image_size": 48}}
    assert make_loader(config, training=False, facts=facts).image_size == 48     # what the model was trained at
    assert make_loader(config, facts={**facts, "optional": True}).image_size == 64
