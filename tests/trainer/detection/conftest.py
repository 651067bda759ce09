"""Scenes and a small COCO folder."""
from tests.scenes import coco_folder, scenes  # noqa: F401 (fixtures)
