"""Numbers in sentences."""
from __future__ import annotations


def count_of(number: int, one: str, several: str) -> str:
    """A number with its noun in the singular or plural: 1 class, 5 classes.

    >>> count_of(1, "class has", "classes have"), count_of(1200, "image", "images")
    ('1 class has', '1,200 images')
    """
    return f"{number:,} {one if number == 1 else several}"
