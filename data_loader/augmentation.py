"""A loader's augmentation arguments, checked in one place for the code that draws random numbers and decodes images."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_loader.policies import DRAWS
from utils.errors import ConfigError, unknown

PATH = "data_loader.args"


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented. Raises ConfigError, naming the argument, for a value out of range.

    Args:
        augment: "basic" or one of `data_loader.policies.DRAWS`.
        rotation: maximum rotation in degrees, either way, 0 to 180; None: the data set's default with "basic", else 0.
        cutout: side in pixels of a square that is set to 0; 0: none.
        random_erasing: the share of images, 0 to 1, in which a rectangle is set to 0.
        jitter: strength of brightness, contrast and saturation jitter, 0 to 1; only for large images with "basic".
        flip: True (half of the images at random), False, or "alternate": a fixed half in odd epochs, the other half in
            even ones.
        given: names of the arguments that differ from their defaults (for `jitter`: that were given), without `flip`.
    """

    augment: str = "basic"
    rotation: float | None = None
    cutout: int = 0
    random_erasing: float = 0.0
    jitter: float = 0.0
    flip: bool | str = True
    given: tuple[str, ...] = ()

    @classmethod
    def of(cls, jitter: float | None, flip: bool | str | None, own_jitter: float, own_flip: bool,
           **more: Any) -> Augmentation:
        """From a loader's arguments; None for jitter or flip means the data set's default (own_jitter, own_flip)."""
        given = [key for key, value in more.items() if value != cls.__dataclass_fields__[key].default]
        return cls(**more, jitter=own_jitter if jitter is None else jitter, flip=own_flip if flip is None else flip,
                   given=(*given, *["jitter"] * (jitter is not None)))

    def __post_init__(self) -> None:
        if self.augment not in ("basic", *DRAWS):
            raise unknown(f"{PATH}.augment", self.augment, ("basic", *DRAWS), "policy")
        for key, right, wanted in (
                ("flip", self.flip in (True, False, "alternate"), 'true, false or "alternate"'),
                ("rotation", self.rotation is None or 0 <= self.rotation <= 180, "0 to 180"),
                ("cutout", self.cutout >= 0, "0 or more"),
                ("random_erasing", 0 <= self.random_erasing <= 1, "0 to 1"),
                ("jitter", 0 <= self.jitter <= 1, "0 to 1")):
            if not right:
                raise ConfigError(f"{PATH}.{key}: must be {wanted}, not {getattr(self, key)!r}")

    def degrees(self, own: float) -> float:
        """The maximum rotation in degrees. own: the data set's default, used with "basic"."""
        return float(self.rotation) if self.rotation is not None else own if self.augment == "basic" else 0.0

    def notes(self, small: bool) -> Iterator[str]:
        """Log lines about arguments that have no effect. small: whether images are small enough to be augmented in
        batches."""
        if "jitter" in self.given and self.jitter and (small or self.augment != "basic"):
            yield "jitter has no effect " + ("on images this small" if small else f"beside augment {self.augment}")
