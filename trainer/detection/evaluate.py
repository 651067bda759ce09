"""Average precision of boxes and masks as COCO defines it, over all classes, by size, by class and by shots.

The figures come from pycocotools; this file gathers detections, passes them on and reads the result. Detections are
kept in COCO's results format, in the annotations' own pixel coordinates, so any other tool can score the saved file.
"""
from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_loader.detection import masks
from data_loader.detection.lvis import is_federated
from logger.text import percent
from trainer.detection.federated import judged, unjudged
from trainer.precision import autocast
from trainer.tasks import Task
from utils import dist
from utils.class_counts import GROUPS, group_limits, shot_group
from utils.files import write_text

KINDS = ("bbox", "segm")
#: Name, IoU threshold (None: the mean over 0.5, 0.55, ..., 0.95), area range.
FIGURES = (("AP", None, "all"), ("AP50", 0.5, "all"), ("AP75", 0.75, "all"), ("APs", None, "small"),
           ("APm", None, "medium"), ("APl", None, "large"))


def coco_results(image_ids: Sequence[int], detections: Sequence[dict[str, torch.Tensor]],
                 category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """A model's detections in COCO's results format: one entry each, with bbox [x, y, width, height], score and, if
    there are masks, the run-length encoded mask.

    detections: per image `boxes` [n, 4] corners, `labels` [n] (1 to C), `scores` [n] and `masks` [n, 1, H, W]
    (thresholded at 0.5), in the image's own pixels. category_ids: COCO's ids of the classes 1 to C.
    """
    results = []
    for image_id, found in zip(image_ids, detections, strict=True):
        boxes = found["boxes"].float().cpu().numpy().astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        shapes = (found["masks"][:, 0] > 0.5).cpu().numpy() if "masks" in found else [None] * len(boxes)
        for box, label, score, mask in zip(boxes.tolist(), found["labels"].tolist(), found["scores"].tolist(), shapes):
            entry = {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
            if mask is not None:
                entry["segmentation"] = masks.encode(mask)
            results.append(entry)
    return results


def as_annotated(found: dict[str, torch.Tensor], orientation: int, width: int, height: int) -> dict[str, torch.Tensor]:
    """Detections in an upright photo, width x height, mapped to the stored pixels to which its annotations refer.

    orientation: the EXIF orientation; 1 if the annotations refer to the upright photo (nothing changes).
    """
    if orientation == 1:
        return found
    back = masks.undone(orientation)
    boxes = masks.turn_boxes(found["boxes"].float().cpu().numpy(), back, width, height)
    shapes = {"masks": torch.from_numpy(masks.turn_mask(found["masks"].cpu().numpy(), back).copy())} \
        if "masks" in found else {}
    return {**found, "boxes": torch.from_numpy(boxes), **shapes}


class CocoEvaluator:
    """Collects detections, image by image and over all ranks, and computes AP.

    Args:
        ground_truth: a COCO dict (images, annotations, categories); its crowd regions count neither for nor against.
        cls_num_list: training instances of each class, for the groups; None if they aren't known.
        groups: {"many": 100, "few": 20}: many has more instances than the first, few has fewer than the second.
    """

    def __init__(self, ground_truth: dict[str, Any], cls_num_list: list[int] | None = None,
                 groups: dict[str, int] | None = None):
        self.ground_truth, self.cls_num_list = ground_truth, cls_num_list
        self.limits = group_limits(groups)
        self.category_ids = [category["id"] for category in ground_truth["categories"]]
        self.image_ids: list[int] = []
        self.results: list[dict[str, Any]] = []

    def update(self, image_ids: Sequence[int], detections: Sequence[dict[str, torch.Tensor]]) -> None:
        """Add some images' detections (see `coco_results`)."""
        self.image_ids += image_ids
        self.results += coco_results(image_ids, detections, self.category_ids)

    def gather(self) -> None:
        """Merge the detections of all ranks; afterwards every rank has all of them, each image once. Every
        rank must call it."""
        parts = dist.gather_objects((self.image_ids, self.results))
        seen: set[int] = set()
        self.image_ids, self.results = [], []
        for ids, results in parts:
            new = set(ids) - seen
            seen |= new
            self.image_ids += [i for i in ids if i in new]
            self.results += [entry for entry in results if entry["image_id"] in new]
        # A fixed order, whatever the number of ranks: it breaks ties between equal scores.
        self.image_ids.sort()
        self.results.sort(key=lambda entry: (entry["image_id"], -entry["score"]))

    def compute(self) -> dict[str, Any]:
        """The figures, from 0 to 1, None if there is nothing to score: for each of `bbox` and `segm`

        `<kind>_AP`, `_AP50`, `_AP75`, `_APs`, `_APm`, `_APl`, `_AP_many`, `_AP_medium`, `_AP_few` (means over the
        group's classes) and `_per_class_AP` (a list); also `n_samples`, `n_detections`, and each group's number of
        classes, `many_class_num` ...
        """
        figures: dict[str, Any] = {}
        groups = class_groups(self.cls_num_list, self.limits)
        for kind in KINDS:
            precision, parameters = self._precision(kind)
            for name, threshold, area in FIGURES:
                at = slice(None) if threshold is None else np.isclose(parameters["iou"], threshold)
                figures[f"{kind}_{name}"] = mean_known(precision[at, :, :, parameters["areas"].index(area)])
            every = parameters["areas"].index("all")
            per_class = [mean_known(precision[:, :, k, every]) for k in range(len(self.category_ids))]
            for group, members in groups.items():
                known = [per_class[k] for k in members if per_class[k] is not None]
                figures[f"{kind}_AP_{group}"] = sum(known) / len(known) if known else None
            figures[f"{kind}_per_class_AP"] = per_class
        figures.update({f"{group}_class_num": len(members) for group, members in groups.items()})
        figures["n_samples"], figures["n_detections"] = len(self.image_ids), len(self.results)
        return figures

    def _precision(self, kind: str) -> tuple[np.ndarray, dict[str, Any]]:
        """Precision [IoU thresholds, recalls, classes, areas] with at most 100 detections per
        image (LVIS: 300), -1 where unknown."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
        scored = set(self.image_ids)
        images = [image for image in self.ground_truth["images"] if image["id"] in scored]
        truth = {**self.ground_truth, "images": images}
        truth["annotations"] = truth["annotations"] + unjudged(truth)
        # What pycocotools makes of a results file; it can't read one without results.
        area = box_area if kind == "bbox" else mask_area
        found = [{**entry, "iscrowd": 0, "area": area(entry)} for entry in
                 results_of(judged(self.ground_truth, self.results), kind)]
        with contextlib.redirect_stdout(io.StringIO()):
            pair = []
            for content in (truth, {**truth, "annotations": found}):
                coco = COCO()
                # pycocotools changes the entries it is given, and treats an object with the id 0 as one that no
                # detection matched: so it gets copies, with ids from 1.
                coco.dataset = {**content, "annotations": [{**a, "id": n} for n, a in
                                                           enumerate(content["annotations"], 1)]}
                coco.createIndex()
                pair.append(coco)
            evaluation = COCOeval(*pair, kind)
            evaluation.params.imgIds = sorted(image["id"] for image in images)
            evaluation.params.catIds = self.category_ids
            if is_federated(images):
                evaluation.params.maxDets = [1, 10, 300]        # as LVIS's own tool has it
            evaluation.evaluate()
            evaluation.accumulate()
        # pycocotools sorts the ids; the classes may be in a checkpoint's order.
        columns = [evaluation.params.catIds.index(category) for category in self.category_ids]
        parameters = {"iou": np.asarray(evaluation.params.iouThrs), "areas": list(evaluation.params.areaRngLbl)}
        return np.asarray(evaluation.eval["precision"])[..., -1][:, :, columns], parameters


def results_of(results: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The results for one kind of score, `bbox` or `segm`, as they are written to its file: without
    masks or without boxes.

    Given boxes, pycocotools takes an object's size from its box even when it scores masks, whose size
    is their own area.
    """
    dropped = "segmentation" if kind == "bbox" else "bbox"
    return [{key: value for key, value in entry.items() if key != dropped} for entry in results]


def box_area(entry: dict[str, Any]) -> float:
    """The area of a result's box, in pixels."""
    return entry["bbox"][2] * entry["bbox"][3]


def mask_area(entry: dict[str, Any]) -> int:
    """The area of a result's mask, in pixels."""
    return masks.area(entry["segmentation"], *entry["segmentation"]["size"])


def mean_known(precision: np.ndarray) -> float | None:
    """The mean of the values that aren't -1; None if there are none."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def class_groups(cls_num_list: list[int] | None, limits: dict[str, int]) -> dict[str, list[int]]:
    """Indices of the many-, medium- and few-shot classes by their training instances (empty if these aren't known)."""
    groups: dict[str, list[int]] = {name: [] for name in GROUPS}
    for k, n in enumerate(cls_num_list or []):
        groups[shot_group(n, **limits)].append(k)
    return groups


@torch.no_grad()
def evaluate_detector(model: torch.nn.Module, loader: Any, *, groups: dict[str, int] | None = None, amp: object = None,
                      cls_num_list: list[int] | None = None, max_batches: int | None = None, keep: bool = False,
                      stop: Callable[[int], bool] | None = None) -> dict[str, Any] | None:
    """The figures of `model` on `loader`'s split (see `CocoEvaluator.compute`); all ranks return the same.

    Args:
        cls_num_list: training instances of each class, for the groups; by default the loader's.
        amp: `bf16`, `fp16` or `off` (None).
        max_batches: stop early (a dry run).
        keep: also return `detections`, in COCO's results format.
        stop: called before each batch, on every rank; if it returns True, evaluation ends and returns None.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    began = time.monotonic()
    evaluator = CocoEvaluator(loader.ground_truth(), cls_num_list or loader.cls_num_list, groups)
    for batch, (images, targets) in enumerate(loader):
        if max_batches is not None and batch >= max_batches:
            break
        if stop is not None and stop(batch):
            model.train(was_training)
            return None
        n, _ = loader.share(batch)
        if n:
            with autocast(device, amp):
                detections = model(images[:n])["detections"]
            found = [as_annotated(detection, target["orientation"], image.shape[2], image.shape[1])
                     for detection, target, image in zip(detections, targets, images[:n])]
            evaluator.update([target["image_id"] for target in targets[:n]], found)
    evaluator.gather()
    model.train(was_training)
    figures = evaluator.compute()
    figures["seconds"] = time.monotonic() - began
    if keep:
        figures["detections"] = evaluator.results
    return figures


def write_results(target: Path, figures: dict[str, Any]) -> list[Path]:
    """Write the detections to files that COCO tools can score, and remove `detections` from `figures`;
    returns the paths.

    The files are named after `target`, the figures' file, so that different splits and data sets don't overwrite each
    other: beside test_metrics.json detections_bbox.json and detections_segm.json, beside val_metrics.json
    val_detections_bbox.json, beside test_metrics.DATA.CHECKPOINT.json detections_bbox.DATA.CHECKPOINT.json.
    """
    results = figures.pop("detections")
    split, _, about = target.stem.partition("_metrics")
    prefix = "" if split == "test" else f"{split}_"
    paths = []
    for kind in KINDS:
        paths.append(target.with_name(f"{prefix}detections_{kind}{about}.json"))
        write_text(paths[-1], json.dumps(results_of(results, kind), allow_nan=False))
    return paths


def format_detection(figures: dict[str, Any], title: str = "") -> str:
    """A table of box and mask AP in percent."""
    columns = [*(name for name, _, _ in FIGURES), *(f"AP_{group}" for group in GROUPS)]
    lines = [f"{title:<8}" + "".join(f"{column:>11}" for column in columns)]
    for kind in KINDS:
        values = [figures.get(f"{kind}_{column}") for column in columns]
        lines.append(f"{kind:<8}" + "".join(f"{percent(v):>11}" for v in values))
    return "\n".join(lines)


TASK = Task("detection", evaluate_detector, format_detection, write_results, keeps=True, classifies=False)
