"""Numbers as readers read them."""
from __future__ import annotations

from collections.abc import Sequence


def count_of(number: int, one: str, several: str) -> str:
    """A number with its noun in the singular or plural: 1 class, 5 classes.

    >>> count_of(1, "class has", "classes have"), count_of(1200, "image", "images")
    ('1 class has', '1,200 images')
    """
    return f"{number:,} {one if number == 1 else several}"


def percent(value: float | None, none: str = "-") -> str:
    """A fraction in percent, with one decimal; `none` for None.

    >>> percent(0.4567), percent(None)
    ('45.7', '-')
    """
    return none if value is None else f"{100 * value:.1f}"


def in_percent(value: float | None, none: str = "–") -> str:
    """The same with the unit.

    >>> in_percent(0.4567), in_percent(None, "untested")
    ('45.7 %', 'untested')
    """
    return none if value is None else f"{percent(value)} %"


def duration(seconds: float) -> str:
    """Seconds as a readable text.

    >>> duration(8.34), duration(245), duration(7630)
    ('8.3 s', '4 min 05 s', '2 h 07 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def first_of(names: Sequence[str]) -> str:
    """The first five names, and how many more there are.

    >>> first_of(list("abcdefg"))
    'a, b, c, d, e and 2 more'
    """
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
