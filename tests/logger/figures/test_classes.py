"""Figures of a split's classes: what their axes say."""
import numpy as np
import pytest

from logger.figures.classes import class_accuracy
from logger.figures.experts import experts


@pytest.mark.parametrize("split", ["test", "validation"])
def test_axes_name_the_split(split):
    axes = class_accuracy([120, 3], [0.5, 0.25], ["many", "few"], split=split).axes[0]
    assert axes.get_ylabel() == f"{split} accuracy, %"
    axes = experts({"all": [0.5, 0.4]}, {"all": 0.6}, np.eye(2), split).axes[0]
    assert axes.get_xlabel().startswith(f"{split} accuracy, %")
