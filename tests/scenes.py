"""A few small scenes, a three-picture COCO folder, and a detector small enough for tests."""
import json

import numpy as np
import pytest
from PIL import Image

SMALL = {"fpn_channels": 16, "head_channels": 16, "fc_dim": 32, "anchor_sizes": [8, 16, 32, 64, 128], "min_size": 64,
         "max_size": 128, "rpn_batch_size_per_image": 32, "rpn_pre_nms_top_n_train": 100,
         "rpn_post_nms_top_n_train": 50, "rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20,
         "box_batch_size_per_image": 16, "box_detections_per_img": 5}
SCENES = {"image_size": 64, "n_max": 8, "imb_factor": 0.25, "n_val": 1, "min_size": 64}


@pytest.fixture
def shallow_resnet50(monkeypatch):
    """Detectors of this process have a block a stage, the first of each of ResNet-50's: a third of its weights."""
    from torchvision.models.resnet import Bottleneck, ResNet

    from model.detection import mask_rcnn
    monkeypatch.setattr(mask_rcnn, "resnet50",
                        lambda weights, norm_layer: ResNet(Bottleneck, [1, 1, 1, 1], norm_layer=norm_layer))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A data_dir for DigitScenesDataLoader that holds the SCENES already."""
    pytest.importorskip("pycocotools")
    from data_loader.detection.loaders import DigitScenesDataLoader
    root = tmp_path_factory.mktemp("scenes")
    DigitScenesDataLoader(str(root), **SCENES)
    return root


def annotation(n, image_id, box, **more):
    x, y, w, h = box
    return {"id": n, "image_id": image_id, "category_id": 7, "bbox": list(box), "area": w * h, "iscrowd": 0,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], **more}


def coco_content():
    """Three pictures: one with two instances, one with an instance and a crowd, one empty."""
    crowd = {"size": [48, 64], "counts": [48 * 32, 48 * 32]}  # the right half
    return {"images": [{"id": 10 + i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(3)],
            "annotations": [annotation(1, 10, (4, 5, 20, 30)), annotation(2, 10, (30, 8, 16, 16), category_id=3),
                            annotation(3, 11, (2, 2, 24, 24)),
                            annotation(4, 11, (32, 0, 32, 48), iscrowd=1, segmentation=crowd)],
            "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]}


def lvis_content():
    """The same as LVIS has it: no crowds, images named by URL, and annotated for some classes only."""
    content = coco_content()
    content["annotations"] = [{key: value for key, value in a.items() if key != "iscrowd"}
                              for a in content["annotations"] if not a["iscrowd"]]
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
        image |= {"neg_category_ids": [3] if image["id"] == 11 else [], "not_exhaustive_category_ids": []}
    return content


@pytest.fixture
def coco_folder(tmp_path):
    """`write(content) -> data_dir` in COCO's layout; the same pictures and annotations for training and validation."""
    pytest.importorskip("pycocotools")

    def write(content=None):
        content = coco_content() if content is None else content
        (tmp_path / "annotations").mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for split in ("train2017", "val2017"):
            (tmp_path / split).mkdir(exist_ok=True)
            for i in range(3):
                Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(tmp_path / split / f"{i}.png")
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / "annotations" / f"instances_{split}.json").write_text(text)
        return tmp_path
    return write
