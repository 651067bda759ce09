"""Open-set testing: images of no known class among the test images (OLTR; Liu et al., CVPR 2019)."""
from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np

from logger.log import get_logger
from model.metric import open_set_f_measure
from tools.classify import classify_list


def open_set(args: Namespace, run: Any, head: Any, result: dict[str, Any]) -> dict[str, Any]:
    """The F-measure (0 to 1) with the images in the list `args.open_set`, of no known class, among the test images.

    result: what `evaluate` returned with keep=True. Raises ConfigError for a wrong list or an unreadable image.
    """
    loader = run.loader(args.split)
    preds, probs = classify_list(run, args.open_set, getattr(loader, "views", loader.preprocess), head)
    labels = np.concatenate([result["labels"], np.full(len(preds), -1)])
    value = open_set_f_measure(np.concatenate([result["predictions"], preds]), labels,
                               np.concatenate([result["confidences"], probs]), args.open_threshold)
    get_logger().info("open set: F-measure %.4f over %d known and %d unknown images, threshold %g", value,
                      len(result["labels"]), len(preds), args.open_threshold)
    return {"f_measure": value, "threshold": args.open_threshold, "unknown_images": len(preds)}
