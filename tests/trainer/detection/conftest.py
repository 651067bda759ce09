"""Scenes and a small COCO folder; detectors of a block a stage."""
import pytest

from tests.scenes import coco_folder, scenes, shallow_resnet50  # noqa: F401 (fixtures)


@pytest.fixture(autouse=True)
def detectors_are_shallow(shallow_resnet50):  # noqa: F811
    pass
