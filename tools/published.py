"""Figures as the papers' authors publish them, for rows to compare with. Quoted, not measured here.

Percent of the test split: all, many, medium, few; None where the source gives none.
"""
from __future__ import annotations

from typing import NamedTuple

SOURCES = {
    "RIDE": "Wang et al., ICLR 2021: MODEL_ZOO.md of frank-xwang/RIDE-LongTailRecognition",
    "BatchFormer": "Hou et al., CVPR 2022: README.md of zhihou7/BatchFormer",
    "Decoupling": "Kang et al., ICLR 2020: README.md of facebookresearch/classifier-balancing",
    "LDAM": "Cao et al., NeurIPS 2019: table 2 (100 minus the error)",
    "SADE": "Zhang et al., NeurIPS 2022",
    "BalPoE": "Aimar et al., CVPR 2023",
    "MABN": "Yan et al., ICLR 2020: README.md of the MABN repository (100 minus the error)",
}


class Published(NamedTuple):
    """One row of a published table."""

    data: str       # as tools.runs.data_of names it
    model: str      # as tools.runs.model_of names it
    method: str
    experts: int
    epochs: int | None
    all: float
    many: float | None
    medium: float | None
    few: float | None
    source: str     # a key of SOURCES


PUBLISHED = tuple(Published(*row) for row in (
    ("CIFAR-100-LT", "ResNet32", "CE", 1, 100, 39.1, 66.1, 37.3, 10.6, "RIDE"),
    ("CIFAR-100-LT", "ResNet32", "CE + the best of cRT, LWS, tau", 1, 100, 43.3, 64.0, 44.8, 18.1, "RIDE"),
    ("CIFAR-100-LT", "ResNet32", "RIDE + EA, 3 experts", 3, 100, 48.6, 67.0, 49.9, 25.7, "RIDE"),
    ("CIFAR-100-LT", "ResNet32", "RIDE + distillation + EA, 3 experts", 3, 100, 49.0, 67.6, 50.9, 25.2, "RIDE"),
    ("CIFAR-100-LT", "ResNet32", "RIDE + distillation + EA, 4 experts", 4, 100, 49.4, 67.7, 51.3, 25.7, "RIDE"),
    ("CIFAR-100-LT", "ResNet32", "RIDE, 6 experts (teacher)", 6, 100, 50.2, 69.3, 52.1, 25.8, "RIDE"),
    ("CIFAR-100-LT", "ResNet32", "CE", 1, 200, 38.32, None, None, None, "LDAM"),
    ("CIFAR-100-LT", "ResNet32", "LDAM-DRW", 1, 200, 42.04, None, None, None, "LDAM"),
    ("CIFAR-100-LT", "ResNet32", "balanced softmax", 1, 200, 46.1, None, None, None, "SADE"),
    ("CIFAR-100-LT", "ResNet32", "SADE, 3 experts", 3, 200, 49.8, None, None, None, "SADE"),
    ("CIFAR-100-LT", "ResNet32", "BalPoE, 3 experts + mixup", 3, 200, 52.0, None, None, None, "BalPoE"),
    ("CIFAR-100-LT", "ResNet32", "BalPoE, 3 experts + mixup + AutoAugment", 3, 200, 54.7, None, None, None, "BalPoE"),
    ("CIFAR-10-LT", "ResNet32", "CE", 1, 200, 70.36, None, None, None, "LDAM"),
    ("CIFAR-10-LT", "ResNet32", "LDAM-DRW", 1, 200, 77.03, None, None, None, "LDAM"),
    ("ImageNet-LT", "ResNet10", "RIDE, 3 experts", 3, None, 44.7, 57.0, 40.3, 25.5, "BatchFormer"),
    ("ImageNet-LT", "ResNet10", "RIDE, 3 experts + BatchFormer", 3, None, 45.7, 56.3, 42.1, 28.3, "BatchFormer"),
    ("ImageNet-LT", "ResNet50", "RIDE, 3 experts", 3, None, 53.6, 64.9, 50.4, 33.2, "BatchFormer"),
    ("ImageNet-LT", "ResNet50", "RIDE, 3 experts + BatchFormer", 3, None, 54.1, 64.3, 51.4, 35.1, "BatchFormer"),
    ("ImageNet-LT", "ResNeXt50", "CE", 1, 90, 44.4, 65.9, 37.5, 7.7, "Decoupling"),
    ("ImageNet-LT", "ResNeXt50", "CE + class-balanced sampling", 1, 90, 45.1, 61.8, 40.1, 15.5, "Decoupling"),
    ("ImageNet-LT", "ResNeXt50", "CE + square-root sampling", 1, 90, 46.8, 64.3, 41.2, 17.0, "Decoupling"),
    ("ImageNet-LT", "ResNeXt50", "CE + progressively balanced sampling", 1, 90, 47.2, 61.9, 43.2, 19.4, "Decoupling"),
    ("ImageNet-LT", "ResNeXt50", "CE, NCM", 1, 90, 47.3, 56.6, 45.3, 28.1, "Decoupling"),
    ("ImageNet-LT", "ResNeXt50", "CE + cRT", 1, 90, 49.6, 61.8, 46.2, 27.4, "Decoupling"),
    ("ImageNet-LT", "ResNeXt50", "CE, tau-normalised", 1, 90, 49.4, 59.1, 46.9, 30.7, "Decoupling"),
    ("ImageNet-LT", "ResNeXt50", "CE + LWS", 1, 90, 49.9, 60.2, 47.2, 30.3, "Decoupling"),
    ("ImageNet-LT", "ResNeXt50", "RIDE + EA, 3 experts", 3, 100, 55.7, 67.0, 52.2, 36.0, "RIDE"),
    ("ImageNet-LT", "ResNeXt50", "RIDE + distillation + EA, 4 experts", 4, 100, 56.8, 68.3, 53.5, 35.9, "RIDE"),
    ("ImageNet-LT", "ResNeXt50", "RIDE, 6 experts (teacher)", 6, 100, 57.5, 68.9, 54.3, 36.5, "RIDE"),
    ("iNaturalist 2018", "ResNet50", "CE", 1, 100, 61.7, 72.2, 63.0, 57.2, "RIDE"),
    ("iNaturalist 2018", "ResNet50", "CE + the best of cRT, LWS, tau", 1, 100, 65.9, 65.0, 66.3, 65.5, "RIDE"),
    ("iNaturalist 2018", "ResNet50", "RIDE + EA, 3 experts", 3, 100, 71.2, 70.2, 71.2, 71.6, "RIDE"),
    ("iNaturalist 2018", "ResNet50", "RIDE + distillation + EA, 4 experts", 4, 100, 72.6, 70.9, 72.5, 73.1, "RIDE"),
    ("iNaturalist 2018", "ResNet50", "RIDE, 6 experts (teacher)", 6, 100, 72.9, 71.1, 72.9, 73.3, "RIDE"),
    ("iNaturalist 2018", "ResNet50", "RIDE, 3 experts", 3, None, 72.5, 68.1, 72.7, 73.2, "BatchFormer"),
    ("iNaturalist 2018", "ResNet50", "RIDE, 3 experts + BatchFormer", 3, None, 74.1, 65.5, 74.5, 75.8, "BatchFormer"),
    ("ImageNet", "ResNet50", "CE, label smoothing + BN by 32", 1, 120, 76.59, None, None, None, "MABN"),
    ("ImageNet", "ResNet50", "CE, label smoothing + BN by 2", 1, 120, 64.78, None, None, None, "MABN"),
    ("ImageNet", "ResNet50", "CE, label smoothing + BatchRenorm by 2", 1, 120, 69.71, None, None, None, "MABN"),
    ("ImageNet", "ResNet50", "CE, label smoothing + MABN by 2", 1, 120, 76.33, None, None, None, "MABN"),
))
