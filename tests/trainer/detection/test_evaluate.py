"""Average precision: perfect is 1, nothing is 0, crowds are ignored, saved detections score the same elsewhere."""
import contextlib
import io
import json
import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image

from data_loader.detection.loaders import CocoDataLoader, DigitScenesDataLoader
from data_loader.detection.masks import decode, to_mask
from tests.scenes import SCENES, lvis_content
from trainer.detection.evaluate import (
    TASK,
    CocoEvaluator,
    class_groups,
    coco_results,
    evaluate_detector,
    format_detection,
    results_of,
    write_results,
)

pytest.importorskip("pycocotools")


@pytest.fixture(scope="module")
def split(scenes):
    return DigitScenesDataLoader(str(scenes), training=False, **{**SCENES, "n_val": 3})


def truth_as_detections(loader, noise=0.0, seed=0):
    """(image ids, detections): the annotations themselves, or moved, relabelled and dropped at random."""
    rng = np.random.default_rng(seed)
    ids, detections = [], []
    for image, found in zip(loader.split.images, loader.split.annotations, strict=True):
        kept = [a for a in found if not a["iscrowd"] and (not noise or rng.random() > 0.15)]
        boxes = np.array([[a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]]
                          for a in kept], dtype=np.float32).reshape(-1, 4)
        labels = [loader.split.labels[a["category_id"]] for a in kept]
        if noise:
            boxes += rng.normal(0, noise, boxes.shape)
            labels = [k if rng.random() > 0.1 else int(rng.integers(1, loader.num_classes + 1)) for k in labels]
        masks = np.zeros((len(kept), 1, image["height"], image["width"]), dtype=np.float32)
        for mask, a in zip(masks, kept, strict=True):
            shift = int(rng.integers(3)) if noise else 0
            mask[0] = np.roll(to_mask(a["segmentation"], image["height"], image["width"]), shift)
        detections.append({"boxes": torch.from_numpy(boxes), "labels": torch.tensor(labels, dtype=torch.long),
                           "scores": torch.from_numpy(rng.random(len(kept)).astype(np.float32)),
                           "masks": torch.from_numpy(masks)})
        ids.append(image["id"])
    return ids, detections


def score(loader, ids, detections, truth=None, **more):
    evaluator = CocoEvaluator(truth or loader.ground_truth(), loader.cls_num_list, **more)
    evaluator.update(ids, detections)
    evaluator.gather()
    return evaluator.compute(), evaluator.results


def test_a_perfect_detector_scores_one_and_an_empty_one_zero(split):
    ids, detections = truth_as_detections(split)
    perfect, _ = score(split, ids, detections)
    empty, results = score(split, ids, [{key: value[:0] for key, value in d.items()} for d in detections])
    assert results == []
    # pycocotools takes what a detection met for unmet where its id is 0.
    truth = split.ground_truth()
    truth["annotations"] = [{**a, "id": n} for n, a in enumerate(truth["annotations"])]
    assert score(split, ids, detections, truth)[0] == perfect
    for kind in ("bbox", "segm"):
        for name in ("AP", "AP50", "AP75", "APs", "AP_few"):
            assert perfect[f"{kind}_{name}"] == pytest.approx(1.0) and empty[f"{kind}_{name}"] == 0.0
        assert perfect[f"{kind}_APl"] is None  # no scene has an object that large
        assert perfect[f"{kind}_per_class_AP"] == pytest.approx([1.0] * 10)
    assert perfect["n_samples"] == len(ids) and perfect["n_detections"] == 30 and empty["n_detections"] == 0
    json.dumps(perfect, allow_nan=False)


def test_saved_detections_score_the_same_with_pycocotools_alone(split, tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    figures, results = score(split, *truth_as_detections(split, noise=1.0))
    assert 0.05 < figures["bbox_AP"] < 0.9 and 0.05 < figures["segm_AP"] < 0.95
    (tmp_path / "truth.json").write_text(json.dumps(split.ground_truth()))
    written = write_results(tmp_path / "test_metrics.json", {"detections": results})
    for kind, path in zip(("bbox", "segm"), written, strict=True):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(tmp_path / "truth.json"))
            evaluation = COCOeval(truth, truth.loadRes(str(path)), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        ours = [figures[f"{kind}_{name}"] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
        assert [-1.0 if value is None else value for value in ours] == pytest.approx(evaluation.stats[:6].tolist())


@pytest.mark.parametrize("figures, bbox", [
    ("test_metrics.json", "detections_bbox.json"), ("val_metrics.json", "val_detections_bbox.json"),
    ("test_metrics.other.model_best.json", "detections_bbox.other.model_best.json"),
    ("val_metrics.a_metrics.v1.2.json", "val_detections_bbox.a_metrics.v1.2.json")])
def test_detections_are_named_as_their_figures_are(figures, bbox, tmp_path):
    paths = write_results(tmp_path / figures, {"detections": []})
    assert [path.name for path in paths] == [bbox, bbox.replace("bbox", "segm")] and all(p.is_file() for p in paths)


def test_a_class_keeps_its_figures_in_whatever_order_classes_are(coco_folder):
    """pycocotools sorts categories by id; a checkpoint's order may be another."""
    root, found = str(coco_folder()), []
    for facts in (None, {"class_names": ["cat", "dog"], "cls_num_list": [200, 5]},
                  {"class_names": ["Cat", "cow", "dog"], "cls_num_list": [200, 50, 5]}):
        loader = CocoDataLoader(root, training=False, facts=facts)
        ids, detections = truth_as_detections(loader)
        cat = loader.split.labels[7]
        cats = [{key: value[d["labels"] == cat] for key, value in d.items()} for d in detections]
        found.append(score(loader, ids, cats)[0])
    assert [figures["bbox_per_class_AP"] for figures in found] == [
        [0, pytest.approx(1)], [pytest.approx(1), 0], [pytest.approx(1), None, 0]]
    assert (found[1]["bbox_AP_many"], found[1]["segm_AP_few"]) == (pytest.approx(1), 0)     # the checkpoint's counts
    assert found[2]["bbox_AP"] == pytest.approx(0.5) and found[2]["medium_class_num"] == 1


def test_crowds_count_neither_way(coco_folder):
    loader = CocoDataLoader(str(coco_folder()), training=False)
    ids, detections = truth_as_detections(loader)
    crowd = {"boxes": torch.tensor([[40.0, 10, 55, 30]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.99]),
             "masks": torch.zeros(1, 1, 48, 64)}
    crowd["masks"][0, 0, 10:30, 40:55] = 1
    in_crowd = [detections[0], {k: torch.cat([crowd[k], detections[1][k]]) for k in crowd}, detections[2]]
    assert score(loader, ids, in_crowd)[0]["bbox_AP"] == pytest.approx(1.0)
    elsewhere = [{k: torch.cat([crowd[k], detections[0][k]]) for k in crowd}, *detections[1:]]
    assert score(loader, ids, elsewhere)[0]["bbox_AP"] < 0.9


@pytest.mark.parametrize("kind", ["not annotated", "known to be absent", "incomplete"])
def test_classes_count_where_an_image_is_annotated_for_them(kind, coco_folder):
    """LVIS: image 12 has nothing annotated; a detection in it is wrong if its class is known not to be there."""
    content = lvis_content()
    content["images"][2]["neg_category_ids"] = [] if kind == "not annotated" else [7]
    content["images"][2]["not_exhaustive_category_ids"] = [7] if kind == "incomplete" else []
    loader = CocoDataLoader(str(coco_folder(content)), training=False)
    ids, detections = truth_as_detections(loader)
    cat = loader.split.labels[7]
    wrong = {"boxes": torch.tensor([[40.0, 10, 55, 30]]), "labels": torch.tensor([cat]), "scores": torch.tensor([2.0]),
             "masks": torch.zeros(1, 1, 48, 64)}
    wrong["masks"][0, 0, 10:30, 40:55] = 1
    figures, results = score(loader, ids, [*detections[:2], wrong])
    assert len(results) == figures["n_detections"] == 4         # what is saved is all of them
    perfect = kind != "known to be absent"
    for name in ("bbox", "segm"):
        assert figures[f"{name}_per_class_AP"][2 - cat] == pytest.approx(1)
        assert (figures[f"{name}_per_class_AP"][cat - 1] == pytest.approx(1)) is perfect


def test_groups_are_by_training_instances(split):
    groups = class_groups([101, 100, 20, 19, 0], {"many": 100, "few": 20})
    assert groups == {"many": [0], "medium": [1, 2], "few": [3, 4]}
    assert class_groups(None, {"many": 1, "few": 1}) == {"many": [], "medium": [], "few": []}
    figures, _ = score(split, *truth_as_detections(split, noise=1.0), groups={"many": 5, "few": 3})
    counts, per_class = split.cls_num_list, figures["bbox_per_class_AP"]
    few = [ap for ap, n in zip(per_class, counts, strict=True) if n < 3]
    assert figures["few_class_num"] == len(few) and figures["bbox_AP_few"] == pytest.approx(sum(few) / len(few))
    assert figures["many_class_num"] + figures["medium_class_num"] + len(few) == 10


def test_results_are_in_cocos_format():
    found = {"boxes": torch.tensor([[1.0, 2, 4, 8]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.5]),
             "masks": torch.zeros(1, 1, 10, 12)}
    found["masks"][0, 0, 2:8, 1:4] = 0.7
    entry, = coco_results([5], [found], category_ids=[3, 7])
    assert (entry["image_id"], entry["category_id"], entry["bbox"], entry["score"]) == (5, 7, [1, 2, 3, 6], 0.5)
    assert decode(entry["segmentation"], 10, 12).sum() == 18 and entry["segmentation"]["size"] == [10, 12]
    assert "segmentation" not in results_of([entry], "bbox")[0] and "bbox" not in results_of([entry], "segm")[0]


@pytest.mark.parametrize("orientation", [3, 6])
def test_detections_are_saved_and_scored_on_the_annotations_own_pixels(orientation, coco_folder):
    """A detector that finds what training shows it, on upright photos, is right about annotations of stored pixels."""
    root = coco_folder()
    for path in root.glob("*2017/*.png"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.open(path).save(path, exif=exif)
    args = {"batch_size": 3, "shuffle": False, "min_size": 48, "flip": 0.0, "keep_empty": True,
            "annotated_on": "stored"}
    (images, targets), = CocoDataLoader(str(root), **args)

    class Oracle(torch.nn.Linear):
        def forward(self, seen):
            assert [image.shape for image in seen] == [image.shape for image in images]
            return {"detections": [{"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(len(t["labels"])),
                                    "masks": t["masks"][:, None].float()} for t in targets]}
    loader = CocoDataLoader(str(root), training=False, **args)
    figures = evaluate_detector(Oracle(1, 1), loader, keep=True)
    assert figures["bbox_AP"] == figures["segm_AP"] == pytest.approx(1.0)
    assert [entry["bbox"] for entry in figures["detections"]] == [[4, 5, 20, 30], [30, 8, 16, 16], [2, 2, 24, 24]]


def test_the_time_grows_with_the_images_not_with_their_square(split):
    class Ids(list):
        walks = 0

        def __iter__(self):
            Ids.walks += 1
            return super().__iter__()
    evaluator = CocoEvaluator(split.ground_truth())
    evaluator.update(*truth_as_detections(split))
    evaluator.image_ids = Ids(evaluator.image_ids)
    evaluator.compute()
    assert 0 < Ids.walks <= 4 < len(evaluator.image_ids)


def test_masks_are_kept_as_run_lengths(split):
    """Batch by batch: the masks of all images would fill the memory."""
    evaluator = CocoEvaluator(split.ground_truth())
    evaluator.update(*truth_as_detections(split))
    assert all(isinstance(entry["segmentation"]["counts"], str) for entry in evaluator.results)
    assert not any(isinstance(value, torch.Tensor | np.ndarray) for e in evaluator.results for value in e.values())


def test_the_table_is_in_percent(split):
    figures, _ = score(split, *truth_as_detections(split))
    assert "100.0" in format_detection(figures, "test") and TASK.format_result(figures, "test") == format_detection(
        figures, "test")


def _rank(rank, port, scenes, queue):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="localhost",
                      MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    from utils import dist
    dist.setup("cpu")
    loader = DigitScenesDataLoader(scenes, training=False, **{**SCENES, "n_val": 3})
    ids, detections = truth_as_detections(loader, noise=1.0)
    evaluator = CocoEvaluator(loader.ground_truth(), loader.cls_num_list)
    # One image is on both ranks, as where a rank is lent one.
    mine = [i for i in range(len(ids)) if i % 2 == rank or i == 0]
    evaluator.update([ids[i] for i in mine], [detections[i] for i in mine])
    evaluator.gather()
    queue.put(evaluator.compute())
    dist.cleanup()


def test_two_ranks_get_the_figures_of_one(split, scenes):
    import socket
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_rank, args=(rank, port, str(scenes), queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    figures = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(30)
    alone, _ = score(split, *truth_as_detections(split, noise=1.0))
    assert figures[0] == figures[1] == alone
