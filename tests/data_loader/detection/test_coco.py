"""COCO files and scenes: what is refused, what a batch holds, and that it is a function of seed, epoch and position."""
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pycocotools")

from data_loader.derived import nothing_kept
from data_loader.detection.coco import read_coco
from data_loader.detection.dataset import DetectionDataset
from data_loader.detection.loaders import CocoDataLoader, DigitScenesDataLoader
from data_loader.detection.masks import decode
from data_loader.held_out import check_held_out, of_same_data
from data_loader.splitting import is_same_place
from logger.log import get_logger
from tests.conftest import call_python
from tests.scenes import SCENES, annotation, coco_content, lvis_content
from utils.errors import ConfigError, RunError

log = get_logger()


def broken(**changes):
    content = coco_content()
    for key, change in changes.items():
        change(content[key])
    return content


WRONG = {
    "missing image": (broken(images=lambda i: i[0].update(file_name="gone.png")), "image 10: missing image .*gone.png"),
    "image size": (broken(images=lambda i: i[0].update(width=0)), "image 10: width 0"),
    "duplicate image": (broken(images=lambda i: i[1].update(id=10)), "image 10: duplicate id"),
    "duplicate annotation": (broken(annotations=lambda a: a[1].update(id=1)), "annotation 1: duplicate id"),
    "duplicate category": (broken(categories=lambda c: c[1].update(id=7)), "category 7: duplicate id"),
    "no id": (broken(annotations=lambda a: a[1].pop("id")), "annotation number 1: id None"),
    "unknown image": (broken(annotations=lambda a: a[0].update(image_id=99)), "annotation 1: image_id 99"),
    "unknown category": (broken(annotations=lambda a: a[0].update(category_id=5)),
                         "annotation 1: unknown category 5.*3, 7"),
    "box outside": (broken(annotations=lambda a: a[0].update(bbox=[60, 5, 20, 30])), "annotation 1: box .* outside"),
    "box far outside": (broken(annotations=lambda a: a[0].update(bbox=[-50, 5, 20, 30])), "annotation 1: box .*outs"),
    "empty box": (broken(annotations=lambda a: a[0].update(bbox=[4, 5, 0, 30])), "annotation 1: degenerate .*skip_deg"),
    "negative box": (broken(annotations=lambda a: a[0].update(bbox=[4, 5, -2, 30])), "annotation 1: degenerate box"),
    "three numbers": (broken(annotations=lambda a: a[0].update(bbox=[4, 5, 3])), "annotation 1: bbox .*four numbers"),
    "text for a number": (broken(annotations=lambda a: a[0].update(bbox=[4, 5, "3", 3])), "annotation 1: bbox"),
    "no polygon": (broken(annotations=lambda a: a[0].update(segmentation=[])), "annotation 1: empty polygon"),
    "empty polygon": (broken(annotations=lambda a: a[0].update(segmentation=[[]])), "annotation 1: empty polygon"),
    "far polygon": (broken(annotations=lambda a: a[0].update(segmentation=[[1, 2, 3e9, 4, 5, 6]])),
                    "annotation 1: polygon reaches far outside"),
    "two points": (broken(annotations=lambda a: a[0].update(segmentation=[[1, 2, 3, 4]])), "annotation 1: polygon of"),
    "no mask": (broken(annotations=lambda a: a[0].pop("segmentation")), "annotation 1: no segmentation"),
    "broken runs": (broken(annotations=lambda a: a[3]["segmentation"].update(counts="1")), "annotation 4: bad run"),
    "short runs": (broken(annotations=lambda a: a[3]["segmentation"].update(counts=[4])), "annotation 4: bad run"),
    "runs of another size": (broken(annotations=lambda a: a[3]["segmentation"].update(size=[3, 3])), "annotation 4: r"),
    "crowd": (broken(annotations=lambda a: a[0].update(iscrowd=2)), "annotation 1: iscrowd 2"),
    "annotation is text": (broken(annotations=lambda a: a.append("x")), "annotation number 4"),
    "category without name": (broken(categories=lambda c: c[0].pop("name")), "category 7: needs"),
    "no categories": ({**coco_content(), "categories": []}, "categories is empty"),
    "no images": ({**coco_content(), "images": [], "annotations": []}, "images is empty"),
    "not COCO": ({"images": []}, "not a COCO annotation file.*annotations, categories missing"),
    "a list": ([1, 2], "not a COCO annotation file"),
    "not JSON": ("{", "not JSON"),
    "nothing to learn": ({**coco_content(), "annotations": []}, "no image has an instance"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_gets_one_clear_line(name, coco_folder):
    content, message = WRONG[name]
    root = coco_folder(content)
    with pytest.raises(ConfigError) as error:
        CocoDataLoader(str(root))
    text = str(error.value)
    assert "\n" not in text and len(text) < 400 and "instances_train2017.json" in text
    assert re.search(message, text), text


def test_missing_files_and_folders_are_named(coco_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"data_dir: no folder .*nowhere"):
        CocoDataLoader(str(tmp_path / "nowhere"))
    root = coco_folder()
    with pytest.raises(ConfigError, match=r"no annotation file .*other.json"):
        CocoDataLoader(str(root), train_annotations="other.json")
    with pytest.raises(ConfigError, match=r"no image folder .*other"):
        CocoDataLoader(str(root), train_images="other")


def test_processes_on_a_machine_share_its_cores_for_their_workers(coco_folder, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    loader = CocoDataLoader(str(coco_folder()), batch_size=2, num_workers=12, world_size=4)
    assert [line for line in loader.summary() if "num_workers" in line] == [
        "data_loader.args.num_workers: 1 for each training process instead of 12, as the processes on this machine "
        "share its cores"]


def test_unreadable_and_wrongly_sized_pictures_are_named(coco_folder):
    root = coco_folder()
    (root / "train2017" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"0\.png: can't be read as an image"):
        list(CocoDataLoader(str(root), batch_size=2, num_workers=1))
    content = coco_content()
    content["images"][0].update(width=70)
    with pytest.raises(ConfigError, match=r"64x48 pixels, but .* says 70x48"):
        list(CocoDataLoader(str(coco_folder(content)), batch_size=2))


@pytest.mark.parametrize("args, message", [
    ({"batch_size": 0}, "batch_size"), ({"min_size": 2000}, "min_size"), ({"flip": 2.0}, "flip"),
    ({"validation": "some"}, "validation.*holdout"), ({"holdout_fraction": 0.0}, "holdout_fraction"),
    ({"split_seed": -1}, "split_seed"),
    ({"annotated_on": "paper"}, "annotated_on.*upright"),
    ({"sampler": {"type": "ClassBalanced"}}, "sampler.type.*balanced"), ({"repeat_threshold": 0.0}, "repeat_threshold"),
])
def test_wrong_arguments_are_named(args, message, coco_folder):
    with pytest.raises(ConfigError, match=message):
        CocoDataLoader(str(coco_folder()), **args)


def test_degenerate_boxes_can_be_left_out(coco_folder):
    content = broken(annotations=lambda a: a[0].update(bbox=[4, 5, 0, 30]))
    loader = CocoDataLoader(str(coco_folder(content)), skip_degenerate=True)
    assert any("1 boxes without width or height left out" in line for line in loader.summary())
    assert loader.cls_num_list == [1, 1]


def test_boxes_that_stick_out_by_a_fraction_are_clipped(coco_folder):
    content = broken(annotations=lambda a: a[0].update(bbox=[44.5, 5, 20, 30]))
    split = read_coco(coco_folder(content) / "annotations/instances_train2017.json", coco_folder(content) / "train2017")
    assert split.annotations[0][0]["bbox"] == [44.5, 5, 19.5, 30]


def test_a_batch_holds_boxes_labels_and_masks_of_the_resized_picture(coco_folder):
    loader = CocoDataLoader(str(coco_folder()), batch_size=2, shuffle=False, min_size=96, max_size=200, flip=0.0)
    assert loader.class_names == ["dog", "cat"] and loader.num_classes == 2 and loader.cls_num_list == [1, 2]
    assert loader.n_samples == 2 and "1 training images without instances left out" in loader.summary()[-1]
    (images, targets), = list(loader)
    assert [tuple(image.shape) for image in images] == [(3, 96, 128)] * 2
    assert images[0].min() >= 0 and images[0].max() <= 1
    assert targets[0]["boxes"].tolist() == [[8, 10, 48, 70], [60, 16, 92, 48]]
    assert targets[0]["labels"].tolist() == [2, 1] and targets[0]["image_id"] == 10
    assert targets[0]["masks"].sum(dim=(1, 2)).tolist() == [40 * 60, 32 * 32]
    assert targets[0]["masks"][0, 10:70, 8:48].all()
    assert targets[1]["boxes"].shape == (1, 4)  # the crowd isn't trained on


def test_annotations_without_area_get_the_masks_and_a_byte_order_mark_is_skipped(coco_folder):
    content = broken(annotations=lambda a: a[0].update(segmentation=[[4, 4, 44, 4, 4, 44]], area=None))
    file = coco_folder(content) / "annotations/instances_train2017.json"
    file.write_text(json.dumps(content), encoding="utf-8-sig")
    assert abs(read_coco(file, file.parent.parent / "train2017").annotations[0][0]["area"] - 800) < 60


def turned_folder(root, orientation):
    """The folder, its pictures with an EXIF orientation."""
    for path in root.glob("*2017/*.png"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.open(path).save(path, exif=exif)
    return root


@pytest.mark.parametrize("orientation, annotated_on", [(o, a) for o in range(2, 9) for a in ("auto", "stored")
                                                       if a == "stored" or o >= 5])
def test_annotations_of_stored_pixels_turn_with_the_photo(orientation, annotated_on, coco_folder):
    args = {"batch_size": 2, "shuffle": False, "min_size": 48, "flip": 0.0}
    (images, targets), = CocoDataLoader(str(coco_folder()), **args)
    root = turned_folder(coco_folder(), orientation)
    (turned, moved), = CocoDataLoader(str(root), annotated_on=annotated_on, **args)
    for image, target, other, found in zip(images, targets, turned, moved, strict=True):
        height, width = image.shape[1:]
        assert other.shape[1:] == ((width, height) if orientation >= 5 else (height, width))
        assert found["orientation"] == orientation
        for mask, box, new_mask in zip(target["masks"], found["boxes"].int().tolist(), found["masks"], strict=True):
            # What lies under the mask is the same, whichever way the photo stands.
            assert torch.equal(image[:, mask.bool()].sort(1)[0], other[:, new_mask.bool()].sort(1)[0])
            x0, y0, x1, y1 = box
            assert new_mask[y0:y1, x0:x1].sum() == new_mask.sum() == (x1 - x0) * (y1 - y0)


@pytest.mark.parametrize("orientation", [3, 6])
def test_annotations_of_upright_photos_stay(orientation, coco_folder, caplog):
    content = coco_content()
    if orientation == 6:  # the photo is shown 48 wide and 64 high
        for image in content["images"]:
            image.update(width=48, height=64)
        content["annotations"] = content["annotations"][:1]
    root = turned_folder(coco_folder(content), orientation)
    loader = CocoDataLoader(str(root), batch_size=1, shuffle=False, min_size=48, flip=0.0)
    caplog.set_level("WARNING")
    log.addHandler(caplog.handler)
    try:
        (_, targets), *_ = list(loader)
    finally:
        log.removeHandler(caplog.handler)
    assert targets[0]["boxes"][0].tolist() == [4, 5, 24, 35] and targets[0]["orientation"] == 1
    # Said once for all; of the others the size tells it.
    assert len({id(r) for r in caplog.records if "annotated_on" in r.getMessage()}) == (orientation == 3)
    if orientation == 6:
        with pytest.raises(ConfigError, match=r"48x64 pixels, but .* says 48x64, on the pixels as stored"):
            list(CocoDataLoader(str(root), batch_size=1, min_size=48, annotated_on="stored"))


def test_the_order_of_an_epoch_does_not_depend_on_what_was_read(coco_folder):
    loader = CocoDataLoader(str(turned_folder(coco_folder(), 6)), batch_size=1, min_size=48)
    before = loader.epoch_order(3).tolist()
    list(loader)
    assert loader.epoch_order(3).tolist() == before and loader.ground_truth()["images"][0]["width"] == 64


def test_without_pycocotools_one_line_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pycocotools")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    done = call_python(["train.py", "-c", "configs/digit_scenes_maskrcnn_bn.json", "-d", "cpu", "--data_dir",
                        tmp_path / "data", "--save_dir", tmp_path / "saved"])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "pip install pycocotools" in done.stderr
    assert not (tmp_path / "data").exists() and not (tmp_path / "saved").exists()


def test_flips_mirror_picture_boxes_and_masks(coco_folder):
    args = {"batch_size": 2, "shuffle": False, "min_size": 48}
    plain, mirrored = (next(iter(CocoDataLoader(str(coco_folder()), flip=flip, **args))) for flip in (0.0, 1.0))
    assert torch.equal(mirrored[0][0], plain[0][0].flip(-1))
    for i, (x0, y0, x1, y1) in enumerate(plain[1][0]["boxes"].tolist()):
        assert mirrored[1][0]["boxes"][i].tolist() == [64 - x1, y0, 64 - x0, y1]
        assert mirrored[1][0]["masks"][i, int(y0):int(y1), int(64 - x1):int(64 - x0)].all()


def test_pictures_without_instances_can_be_trained_on(coco_folder):
    loader = CocoDataLoader(str(coco_folder()), batch_size=3, shuffle=False, min_size=48, keep_empty=True)
    (images, targets), = list(loader)
    assert len(images) == 3 and targets[2]["boxes"].shape == (0, 4) and targets[2]["masks"].shape == (0, 48, 64)


def test_evaluation_gives_pictures_as_they_are_and_passes_crowds_on(coco_folder):
    loader = CocoDataLoader(str(coco_folder()), batch_size=2, min_size=96).split_validation()
    images = [image for batch, _ in loader for image in batch]
    assert [tuple(image.shape) for image in images] == [(3, 48, 64)] * 3
    crowds = [a for a in loader.ground_truth()["annotations"] if a["iscrowd"]]
    assert len(crowds) == 1 and decode(crowds[0]["segmentation"], *crowds[0]["segmentation"]["size"])[:, 32:].all()
    assert loader.cls_num_list == [1, 2] and not loader.training and loader.raw_image(0).shape == (48, 64, 3)


def test_validation_categories_must_be_the_training_ones(coco_folder):
    root = coco_folder()
    content = coco_content()
    content["categories"].append({"id": 9, "name": "cow"})
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"instances_val2017.json: unknown category 9 \('cow'\)"):
        CocoDataLoader(str(root)).split_validation()


@pytest.mark.parametrize("names", [["cat", "dog"], ["CAT", "dog "]], ids=["another order", "and spelling"])
def test_classes_are_a_checkpoints_by_their_names(names, coco_folder):
    facts = {"class_names": names, "cls_num_list": [150, 2]}
    loader = CocoDataLoader(str(coco_folder()), batch_size=2, shuffle=False, min_size=48, flip=0.0, facts=facts)
    (_, targets), = list(loader)
    assert targets[0]["labels"].tolist() == [1, 2]              # a cat, a dog
    assert loader.class_names == names and loader.cls_num_list == [2, 1]      # a training's groups are its own
    assert "classes are numbered as in the checkpoint, by their names" in loader.summary()
    held = loader.split_validation()
    assert held.class_names == names and held.cls_num_list == [2, 1]
    test = CocoDataLoader(str(coco_folder()), training=False, facts=facts)
    assert test.class_names == names and test.cls_num_list == [150, 2] and list(test.split.labels) == [7, 3]


@pytest.mark.parametrize("names", [["cat", "cow"], ["cow", "pig"], ["cat"], ["cat", "cow", "dog"]])
def test_other_classes_than_a_checkpoints_are_refused_in_training(names, coco_folder):
    root, facts = str(coco_folder()), {"class_names": names, "cls_num_list": [1] * len(names)}
    with pytest.raises(ConfigError, match=r"data_loader\.args\.data_dir: .* has the classes dog, cat, and .* knows c"):
        CocoDataLoader(root, facts=facts)
    assert CocoDataLoader(root, facts={**facts, "optional": True}).class_names == ["dog", "cat"]
    if len(names) < 3:
        with pytest.raises(ConfigError, match="--pretrained"):
            CocoDataLoader(root, training=False, facts=facts)


@pytest.mark.parametrize("trained", [True, False], ids=["with training annotations", "test alone"])
def test_a_test_split_may_lack_classes(trained, coco_folder):
    root = coco_folder()
    if not trained:
        (root / "annotations/instances_train2017.json").unlink()
    facts = {"class_names": ["ant", "cat", "dog"], "cls_num_list": [120, 50, 3]}
    loader = CocoDataLoader(str(root), training=False, batch_size=3, facts=facts)
    assert loader.num_classes == 3 and loader.class_names == facts["class_names"]
    assert loader.cls_num_list == facts["cls_num_list"]
    assert next(iter(loader))[1][0]["labels"].tolist() == [2, 3]
    assert len({category["id"] for category in loader.ground_truth()["categories"]}) == 3


def test_a_checkpoint_knows_its_images_again(coco_folder, scenes, tmp_path):
    root = coco_folder()
    memory = CocoDataLoader(str(root)).split_memory
    assert list(memory["sample"]) == ["train2017/0.png", "train2017/1.png"]
    for name in ("same", "other"):
        shutil.copytree(root / "train2017", tmp_path / name / "train2017")
    for image in (tmp_path / "other/train2017").iterdir():
        Image.new("RGB", (64, 48)).save(image)
    assert is_same_place(str(tmp_path / "same"), memory) and not is_same_place(str(tmp_path / "other"), memory)
    # An older version's checkpoint remembers none: only the folder tells.
    spec, facts = {"type": "CocoDataLoader"}, {"split": {"rule": "names"}, "preprocess": {"task": "detection"}}
    before, now = ({**spec, "args": {"data_dir": str(root)}}, {**spec, "args": {"data_dir": str(tmp_path / "other")}})
    assert of_same_data(before, now, facts) and not of_same_data(before, now, facts, doubt=False)
    assert of_same_data(before, before, facts, doubt=False)
    # Below what the config names, not below the folder that the settings make there.
    sample = DigitScenesDataLoader(str(scenes), **SCENES).split_memory
    assert is_same_place(str(scenes), sample) and not is_same_place(str(tmp_path), sample)


OUTSIDE = {"up": "../../secret.png", "from the root": "{}/secret.png", "link": "link.png",
           "through a link": "far/secret.png"}


@pytest.mark.parametrize("kind", [*OUTSIDE, "not there"])
def test_a_file_mustnt_name_images_elsewhere(kind, coco_folder, tmp_path_factory):
    root, elsewhere = coco_folder() / "data", tmp_path_factory.mktemp("elsewhere")
    name = OUTSIDE.get(kind, "../../gone.png").format(elsewhere)
    coco_folder(broken(images=lambda i: i[0].update(file_name=name)))
    root.mkdir()
    for folder in ("annotations", "train2017", "val2017"):
        shutil.move(root.parent / folder, root / folder)
    for place in (elsewhere, root.parent):
        shutil.copy(root / "train2017/1.png", place / "secret.png")
    (root / "train2017/link.png").symlink_to(elsewhere / "secret.png")
    (root / "train2017/far").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=r"train2017\.json: image 10: .*\.png leads outside .*allow_outside"):
        CocoDataLoader(str(root))
    if kind == "not there":
        with pytest.raises(ConfigError, match=r"image 10: missing image .*gone\.png"):
            CocoDataLoader(str(root), allow_outside=True)
    else:
        assert len(list(CocoDataLoader(str(root), batch_size=1, min_size=48, allow_outside=True))) == 2


def test_images_may_lie_in_other_folders_of_the_data(coco_folder, tmp_path_factory):
    """Below data_dir, and where the config's own folder of images is: data sets are often linked."""
    content = coco_content()
    for image, name in zip(content["images"], ("../val2017/0.png", "deep/er/1.png", "2.png"), strict=True):
        image["file_name"] = name
    root, elsewhere = coco_folder(content), tmp_path_factory.mktemp("elsewhere") / "pictures"
    (root / "train2017/deep/er").mkdir(parents=True)
    shutil.move(root / "train2017/1.png", root / "train2017/deep/er/1.png")
    assert CocoDataLoader(str(root)).n_samples == 2
    content["images"][0]["file_name"] = "0.png"
    coco_folder(content)
    shutil.move(root / "train2017", elsewhere)
    (root / "train2017").symlink_to(elsewhere)
    assert CocoDataLoader(str(root)).n_samples == 2


@pytest.mark.parametrize("name", ["a\0/b.png", "../a\0/b.png", "\ud800/b.png", "deep", "", ".."])
def test_names_that_no_image_has_are_missing(name, coco_folder):
    root = coco_folder(broken(images=lambda i: i[0].update(file_name=name)))
    (root / "train2017/deep").mkdir()
    with pytest.raises(ConfigError, match=r"image 10: (missing image|.* leads outside)"):
        CocoDataLoader(str(root))


def test_a_killed_loader_process_is_one_line(coco_folder, monkeypatch):
    monkeypatch.setattr(DetectionDataset, "__getitem__", lambda self, key: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RunError, match=r"^DataLoader worker .*data_loader\.args\.num_workers\)$"):
        list(CocoDataLoader(str(coco_folder()), batch_size=2, num_workers=1))


def test_splits(scenes):
    test = DigitScenesDataLoader(str(scenes), training=False, **SCENES)
    loader = DigitScenesDataLoader(str(scenes), validation="holdout", holdout_fraction=0.3, **SCENES)
    held = loader.split_validation()
    assert not {*held.paths} & {*loader.paths} and held.cls_num_list == loader.cls_num_list
    assert DigitScenesDataLoader(str(scenes), validation="none", **SCENES).split_validation() is None
    assert test.paths == DigitScenesDataLoader(str(scenes), **SCENES).split_validation().paths


def test_held_out_images_are_the_same_whatever_the_seed_is(scenes):
    """A training that goes on, or is tested, with another seed mustn't validate on what was trained on."""
    def make(**more):
        more = {"validation": "holdout", "holdout_fraction": 0.3, **more}
        return DigitScenesDataLoader(str(scenes), **SCENES, **more)
    held = make().split_validation().paths
    assert make(seed=1).split_validation().paths == held != make(split_seed=1).split_validation().paths
    facts, own = {"class_names": make().class_names, "cls_num_list": make().cls_num_list}, {"validation": "holdout"}
    check_held_out(make(seed=1), facts, {**own, "seed": 0}, {**own, "seed": 1})
    check_held_out(make(), facts, None, own)
    for now, before, says in (({"split_seed": 1}, {}, "split_seed: 1, but the model was trained with 0"),
                              ({"holdout_fraction": 0.5}, {"holdout_fraction": 0.3}, "holdout_fraction: 0.5, but"),
                              ({}, {"validation": "test"}, "validation: the model was trained with 'test'")):
        with pytest.raises(ConfigError, match=f"data_loader.args.{says}"):
            check_held_out(make(**now), facts, {**own, **before}, {**own, **now})
    check_held_out(make(validation="test"), facts, {**own, **before}, {"validation": "test"})       # nothing is drawn


@pytest.mark.parametrize("version", ["v0.5", "v1"])
def test_lviss_files_are_read(version, coco_folder):
    """Without iscrowd and a file_name that there is; a split's images may lie in another split's folder. Counts are of
    images."""
    content = lvis_content()
    for image in content["images"]:
        image |= {"file_name": f"COCO_train2014_{image['id']}.png"} if version == "v0.5" else {}
    root = coco_folder(content)
    for image in (root / "val2017").iterdir():
        image.unlink()
    loader = CocoDataLoader(str(root), batch_size=1, min_size=48)
    assert [Path(path).name for path in loader.paths] == ["0.png", "1.png"] and len(list(loader)) == 2
    assert len(list(loader.split_validation())) == 3
    assert CocoDataLoader(str(root), training=False, val_images=".").n_samples == 3
    content["annotations"].append(annotation(9, 10, (40, 30, 8, 8)))
    loader = CocoDataLoader(str(coco_folder(content)), batch_size=1)
    assert loader.cls_num_list == [1, 2] and loader.class_names == ["dog", "cat"]       # cats: three, on two images
    assert any("training images a class: 2 (cat) to 1 (dog)" in line for line in loader.summary())
    for image in (root / "train2017").iterdir():
        image.unlink()
    for image in (root / "val2017").iterdir():
        image.unlink()
    with pytest.raises(ConfigError, match=r"image 10: missing image .*train2017/(0|COCO_train2014_10)\.png"):
        CocoDataLoader(str(root))


@pytest.mark.parametrize("ids", [[5], 3, ["3"], [True]])
def test_classes_that_an_image_isnt_annotated_for_must_exist(ids, coco_folder):
    content = lvis_content()
    content["images"][1]["neg_category_ids"] = ids
    with pytest.raises(ConfigError, match=r"image 11: neg_category_ids has .*; it must be a list of categories' ids"):
        CocoDataLoader(str(coco_folder(content)))


@pytest.mark.parametrize("side", [1e-6, 0.009, 0.02])
def test_boxes_whose_corners_coincide_in_training_are_left_out(side, coco_folder):
    """In float32; torchvision would refuse them in the middle of an epoch."""
    content = coco_content()
    content["annotations"] += [annotation(5, 10, (40, 20, side, 8)), annotation(6, 12, (60, 20, 3, side))]
    loader = CocoDataLoader(str(coco_folder(content)), batch_size=1, min_size=48)
    targets = [target for _, (target,) in loader]
    assert all((target["boxes"][:, 2:] > target["boxes"][:, :2]).all() for target in targets)
    assert sorted(len(target["boxes"]) for target in targets) == ([1, 1, 3] if side == 0.02 else [1, 2])
    said = "instances_train2017.json: 2 boxes under 0.01 pixels wide or high in training images left out (annotation 5"
    assert any(said in line for line in loader.summary()) is (side != 0.02)
    assert sum(loader.cls_num_list) == (5 if side == 0.02 else 3)
    validated = loader.split_validation()
    assert len(validated.ground_truth()["annotations"]) == 6


@pytest.mark.parametrize("change", ["added", "reordered", "relabelled"])
def test_a_changed_annotation_file_is_noticed_where_images_were_held_out(change, coco_folder, tmp_path):
    """They are drawn by position, so with other images, "holdout" may take some that were trained on."""
    args = {"validation": "holdout", "holdout_fraction": 0.3, "keep_empty": True}
    before = CocoDataLoader(str(coco_folder()), **args)
    facts = {"class_names": before.class_names, "cls_num_list": before.cls_num_list, "split": before.split_memory}
    content = coco_content()
    if change == "added":
        content["images"].append({**content["images"][2], "id": 13})
    elif change == "reordered":
        content["images"].reverse()
    else:
        content["annotations"][0]["bbox"] = [4, 5, 19, 30]
    now = CocoDataLoader(str(coco_folder(content)), **args)
    check_held_out(now, {"split": {"rule": "names"}}, args, args)       # an older version's checkpoint
    if change == "relabelled":
        check_held_out(now, facts, args, args)
        return
    with pytest.raises(ConfigError, match=r"args\.validation: images of the training annotations were added, renamed"):
        check_held_out(now, facts, args, args)
    assert "drawn_from" not in CocoDataLoader(str(tmp_path)).split_memory


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)) and \
        all(torch.equal(x["masks"], y["masks"]) and torch.equal(x["boxes"], y["boxes"])
            for x, y in zip(a[1], b[1], strict=True))


def test_batches_depend_on_seed_epoch_and_position_alone(scenes):
    args = {**SCENES, "batch_size": 2, "min_size": [48, 64], "flip": 0.5, "seed": 3}
    loader = DigitScenesDataLoader(str(scenes), **args)
    loader.set_epoch(2)
    whole = list(loader)
    assert len(whole) == len(loader)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    later = DigitScenesDataLoader(str(scenes), num_workers=2, **args)
    later.set_epoch(2, 1)
    assert all(same(a, b) for a, b in zip(whole[1:], later, strict=True))
    assert torch.equal(state, torch.get_rng_state())  # a resumed run's dropout and sampling don't notice the loader
    loader.set_epoch(3)
    assert not all(same(a, b) for a, b in zip(whole, loader, strict=True))


def test_ranks_share_a_batch(scenes):
    args = {**SCENES, "batch_size": 3, "seed": 1}
    whole = DigitScenesDataLoader(str(scenes), **args)
    ranks = [DigitScenesDataLoader(str(scenes), rank=r, world_size=2, **args) for r in range(2)]
    for batch, (one, first, second) in enumerate(zip(whole, *ranks, strict=True)):
        shares = [rank.share(batch) for rank in ranks]
        assert shares[0][0] + shares[1][0] == shares[0][1] == len(one[0])
        ids = [[target["image_id"] for target in part[1]] for part in (one, first, second)]
        assert ids[0][::2] == ids[1]
        assert ids[0][1::2] == ids[2][: shares[1][0]]


def test_batches_are_grouped_by_aspect_and_lose_no_picture(scenes):
    loader = DigitScenesDataLoader(str(scenes), **{**SCENES, "n_max": 40}, batch_size=4)
    order = loader.epoch_order(5)
    assert sorted(order.tolist()) == list(range(loader.n_samples))
    wide = np.array([loader.split.images[i]["width"] >= loader.split.images[i]["height"] for i in order])
    full = len(order) // 4
    mixed = sum(len(set(wide[4 * b:4 * b + 4])) > 1 for b in range(full))
    assert mixed <= 1  # at most one batch joins what is left of both groups


def test_balanced_draws_pictures_of_rare_classes_more_often(scenes):
    args = {**SCENES, "n_max": 60, "imb_factor": 0.05}
    loader = DigitScenesDataLoader(str(scenes), balanced=True, repeat_threshold=0.5, **args)
    has_rare = np.array([any(a["category_id"] == 10 for a in found) for found in loader.split.annotations])
    drawn = np.concatenate([loader.epoch_order(epoch) for epoch in range(1, 9)])
    assert len(drawn) == 8 * loader.n_samples
    assert has_rare[drawn].mean() > 1.5 * has_rare.mean()


def test_scenes_are_long_tailed_seeded_and_written_once(scenes, tmp_path):
    loader = DigitScenesDataLoader(str(scenes), **SCENES)
    assert loader.cls_num_list == [max(1, int(8 * 0.25 ** (k / 9))) for k in range(10)]
    annotations = loader.root / "annotations/instances_train2017.json"
    written = annotations.stat().st_mtime_ns
    again = DigitScenesDataLoader(str(scenes), **SCENES)
    assert again.root == loader.root and annotations.stat().st_mtime_ns == written
    other = DigitScenesDataLoader(str(tmp_path), **SCENES)
    assert (other.raw_image(0) == loader.raw_image(0)).all()
    seeded = DigitScenesDataLoader(str(tmp_path), **{**SCENES, "scene_seed": 1})
    assert not np.array_equal(seeded.raw_image(0), loader.raw_image(0))
    for found in loader.split.annotations:
        for instance in found:
            mask = decode(instance["segmentation"], *instance["segmentation"]["size"])
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y, w, h = instance["bbox"]
            assert (x, y, x + w, y + h) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_a_dry_runs_scenes_are_temporary(scenes, tmp_path):
    data = tmp_path / "none yet"
    with nothing_kept():
        loader = DigitScenesDataLoader(str(data), **SCENES)
        assert (loader.raw_image(0) == DigitScenesDataLoader(str(scenes), **SCENES).raw_image(0)).all()
        assert len(loader.split_validation().split.annotations) == len(
            DigitScenesDataLoader(str(scenes), **SCENES).split_validation().split.annotations)
        assert loader.root.is_dir() and not data.exists() and data not in loader.root.parents
        there = DigitScenesDataLoader(str(scenes), **SCENES)
        assert scenes in there.root.parents, "scenes that are there already are used"
    assert not loader.root.exists() and there.root.exists()
    assert data in DigitScenesDataLoader(str(data), **SCENES).root.parents


def test_each_machine_makes_the_scenes_that_it_lacks(tmp_path, monkeypatch):
    """Another machine's first process, and no shared disk; its second waits for the first."""
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError):
        DigitScenesDataLoader(str(tmp_path), **SCENES)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert DigitScenesDataLoader(str(tmp_path), **SCENES).n_samples


@pytest.mark.parametrize("args, key", [({"image_size": 8}, "image_size"), ({"n_max": 0}, "n_max"),
                                       ({"imb_factor": 2.0}, "imb_factor"), ({"n_val": 0}, "n_val")])
def test_wrong_scene_settings_are_named(args, key, tmp_path):
    with pytest.raises(ConfigError, match=f"data_loader.args.{key}"):
        DigitScenesDataLoader(str(tmp_path), **args)


def test_half_written_scenes_are_made_again(tmp_path):
    loader = DigitScenesDataLoader(str(tmp_path), **SCENES)
    (loader.root / "scenes.json").unlink()
    (loader.root / "annotations/instances_train2017.json").unlink()
    assert DigitScenesDataLoader(str(tmp_path), **SCENES).n_samples == loader.n_samples
