"""Scoring on data whose images are annotated for some of the classes only, as LVIS's (Gupta et al., CVPR 2019).

As in LVIS's own tool, a class is scored on the images that are known to have it or not to have it; where an image's
instances of it may be incomplete, detections that match none count neither for nor against.
"""
from __future__ import annotations

from typing import Any

from data_loader.detection.lvis import INCOMPLETE, NEGATIVE, is_federated


def judged(truth: dict[str, Any], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The detections, in COCO's results format, of classes for which their image is annotated; all of them if `truth`,
    a COCO dict, isn't federated."""
    if not is_federated(truth["images"]):
        return found
    known = {(image["id"], category) for image in truth["images"] for category in image.get(NEGATIVE, ())}
    known |= {(a["image_id"], a["category_id"]) for a in truth["annotations"]}
    return [entry for entry in found if (entry["image_id"], entry["category_id"]) in known]


def unjudged(truth: dict[str, Any]) -> list[dict[str, Any]]:
    """A crowd region, an annotation over the whole image, for each class whose instances in an image may be incomplete:
    in it, detections that match no instance are ignored."""
    regions = []
    for image in truth["images"]:
        width, height = image["width"], image["height"]
        whole = {"size": [height, width], "counts": [0, height * width]}
        regions += [{"image_id": image["id"], "category_id": category, "bbox": [0, 0, width, height],
                     "segmentation": whole, "area": width * height, "iscrowd": 1}
                    for category in image.get(INCOMPLETE, ())]
    return regions
