"""`"image_size": "auto"`: chosen from the photos and the device, said in the summary, kept in the run's config."""
import numpy as np
import pytest
import torch
from PIL import Image

from data_loader.data_loaders import DigitsLTDataLoader, ImageFolderLTDataLoader
from data_loader.image_loader import suited_size
from logger.log import setup_logging
from model.model import build_model
from tools.parts import make_loader, settled
from tools.session import Start, data_facts, facts_to_follow, make_teacher


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


@pytest.mark.parametrize("asked", ["auto", None])
@pytest.mark.parametrize(("how", "follows"), [
    ({}, True), ({"optional": True}, False), ({"optional": True, "frozen": True}, True), ({"teacher": True}, None)])
def test_frozen_layers_see_images_as_in_their_training(photos, asked, how, follows):
    """Of another run only where its layers stay as they are. A teacher decides the size that nobody asks for."""
    known = {"image_size": 40, "mean": [0.5] * 3, "std": [0.2] * 3}
    facts = {"preprocess": known, **how}
    loader = ImageFolderLTDataLoader(str(photos), 2, num_workers=0, image_size=asked, facts=facts)
    own = 224 if asked is None else 64
    assert loader.image_size == (40 if follows or (follows is None and asked) else own)
    assert (loader.preprocess["mean"] == [0.5] * 3) == (follows is not False)
    assert not any("warning: data_loader" in note for note in loader.notes)


@pytest.mark.parametrize(("how", "size", "warned"), [
    ({"optional": True, "frozen": True}, 32, True), ({"optional": True, "frozen": True}, 40, False),
    ({"optional": True}, 32, False), ({}, 32, False)])
def test_a_size_that_is_asked_for_is_taken(photos, how, size, warned):
    facts = {"preprocess": {"image_size": 40}, **how}
    loader = ImageFolderLTDataLoader(str(photos), 2, num_workers=0, image_size=size, facts=facts)
    assert loader.image_size == size
    said = "warning: data_loader.args.image_size: 32, but what stays frozen was trained on images of 40 pixels"
    assert any(said in note for note in loader.notes) == warned


def test_digits_are_enlarged_to_the_size_that_is_followed():
    facts = data_facts(DigitsLTDataLoader(image_size=8))
    assert next(iter(DigitsLTDataLoader(training=False, facts=facts)))[0].shape[1:] == (3, 8, 8)


@pytest.mark.parametrize(("changes", "frozen"), [
    ({}, False), ({"load_crt": "FILE"}, True), ({"pretrained": "FILE"}, False),
    ({"pretrained": "FILE", "freeze": "backbone"}, True), ({"pretrained": "FILE", "freeze": "norms"}, False),
    ({"pretrained": "FILE", "freeze": {"until": "epoch 3"}}, False),
    ({"pretrained": "FILE", "freeze": {"until": "epoch 9"}}, True)])
def test_which_starts_keep_their_layers(tmp_path, changes, frozen):
    file = tmp_path / "stage1.pth"
    torch.save({"state_dict": {}, "data": {"preprocess": {"image_size": 16}}}, file)
    config = {key: str(file) for key in changes if key != "freeze"}
    trainer = {"type": "Trainer", "epochs": 9, "freeze": changes.get("freeze")}
    facts = facts_to_follow(Start({**config, "trainer": trainer}))
    assert (facts or {}).get("frozen", False) == frozen and (facts is None) == (not config)


def test_gates_are_trained_on_images_as_the_experts_were():
    config = {"trainer": {"type": "ExpertAssignmentTrainer", "epochs": 9, "freeze": None}}
    for goes_on in (False, True):
        facts = facts_to_follow(Start(config, {"data": {"num_classes": 3}}, goes_on=goes_on))
        assert facts == {"num_classes": 3, **({} if goes_on else {"frozen": True})}


def test_a_teacher_of_another_size_is_said(tmp_path, capsys, shallow_resnet32):
    spec = {"type": "ResNet32Model", "args": {"num_classes": 3, "layer2_output_dim": 16, "layer3_output_dim": 16}}
    known, file = {"image_size": 16, "mean": [0.5] * 3, "std": [0.2] * 3}, str(tmp_path / "teacher.pth")
    torch.save({"state_dict": build_model(spec).state_dict(), "data": {"preprocess": known}}, file)
    setup_logging()
    for size, times in ((16, 0), (32, 1)):
        start = Start({"distill": True, "distill_arch": spec, "distill_checkpoint": file})
        make_teacher(start, 3, "cpu", {**known, "image_size": size})
        said = capsys.readouterr().out.count("warning: distill: the teacher was trained on images of 16 pixels")
        assert said == times


# ---------------------------------------------------------------------- what a network's package asks for changes

OLD = {"image_size": 40, "crop_share": 0.9, "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.4,) * 3}
NEW = {"image_size": 48, "crop_share": 0.95, "interpolation": "bilinear", "mean": (0.45,) * 3, "std": (0.2,) * 3}


@pytest.mark.parametrize("size", [None, 40, 64])
def test_images_are_prepared_as_recorded_and_not_as_a_later_timm_would(photos, size):
    def loader(preprocess, facts=None, **more):
        return ImageFolderLTDataLoader(str(photos), 2, num_workers=0, preprocess=preprocess, facts=facts, **more)
    first = loader(OLD)
    facts = data_facts(first)
    same, tested = (loader(wanted, facts, training=False, image_size=size) for wanted in (OLD, NEW))
    # At another size the recorded crop is known to the pixel only.
    assert abs(tested.preprocess["resize"] - same.preprocess["resize"]) <= (size == 64)
    assert {**tested.preprocess, "resize": 0} == {**same.preprocess, "resize": 0}
    assert size == 64 or tested.preprocess == first.preprocess
    said = "prepared as in the checkpoint, not by its network's defaults: "
    assert sum(said in note for note in tested.notes) == 1 and not any(said in note for note in same.notes)
    assert loader(NEW, facts).preprocess == first.preprocess            # a run that goes on
    assert loader(NEW, {**facts, "optional": True}).preprocess == loader(NEW).preprocess
