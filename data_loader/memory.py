"""Small images held in memory and augmented in batches: crop, flip and rotation in one gather, then a policy's
operations, then erasing.

Together, torchvision's `RandomCrop(S, pad)`, `RandomHorizontalFlip` and `RandomRotation(degrees)`, with rotation by
nearest neighbours, select one source pixel (or black) for each output pixel. The selection is computed in the 16.16
fixed point that Pillow uses, so that all pixels are identical.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch

from data_loader import policies
from data_loader.erasing import draw_boxes, erase
from data_loader.policies import rotation, sources
from data_loader.transforms import Normalise
from utils.seed import generator

_ON_HOST = ("operation", "strength")  # kept on the CPU, because they decide which kernels are launched


@dataclass
class Draws:
    """The random numbers for L images, each a tensor [L, ...]; `turn` is `angle` as `MemoryImages` uses it."""

    top: torch.Tensor        # int32, 0 to side - size: row of the crop's corner
    left: torch.Tensor       # int32, as top
    flip: torch.Tensor       # int32, 0 or 1
    angle: torch.Tensor      # float32, degrees counter-clockwise
    turn: torch.Tensor       # [L, 6], the inverse affine map in 16.16 fixed point
    operation: torch.Tensor  # int64 [L, steps], see `policies.draw_operations`; steps is 0 with `basic`
    strength: torch.Tensor   # float64 [L, steps]
    warp: torch.Tensor       # int32 [L, steps, 6], see `policies.warps`
    boxes: torch.Tensor      # int32 [L, boxes, 4], see `erasing.draw_boxes`

    def __getitem__(self, index: slice | torch.Tensor) -> Draws:
        """The draws of some images. A tensor `index` must be on the CPU; it is copied to the device once, without
        waiting."""
        there = index if isinstance(index, slice) else index.to(self.turn.device, non_blocking=True)
        return Draws(*(getattr(self, f.name)[index if f.name in _ON_HOST else there] for f in fields(self)))

    def to(self, device: torch.device) -> Draws:
        """A copy on `device`, except the parts that stay on the CPU."""
        return Draws(*(value if f.name in _ON_HOST else value.to(device)
                       for f in fields(self) for value in [getattr(self, f.name)]))


@dataclass(frozen=True)
class Recipe:
    """How small images are augmented: a crop of `size` x `size` pixels from the image with a black border of `border`
    pixels; a flip of half of the images; a rotation by up to `degrees` either way; the `policy`'s operations; then
    (x / 255 - mean) / std; then zeros in a square of side `cutout` and, in a share `erasing` (0 to 1) of the images, in
    a rectangle."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    border: int = 4
    degrees: float = 15.0
    flip: bool = True
    policy: str = "basic"
    cutout: int = 0
    erasing: float = 0.0

    def draw(self, count: int, span: int, *seeds: int) -> Draws:
        """Random numbers for `count` images, with `span` + 1 possible crop positions along each side. They depend on
        the seeds alone and are drawn on the CPU, so that they are the same for every device."""
        source = generator(*seeds)
        corner = torch.randint(0, span + 1, (2, count), generator=source, dtype=torch.int32)
        flip = torch.randint(0, 2, (count,), generator=source, dtype=torch.int32) * self.flip
        angle = (torch.rand(count, generator=source) * 2 - 1) * self.degrees
        if self.policy == "basic":
            number, strength = torch.zeros(count, 0, dtype=torch.long), torch.zeros(count, 0, dtype=torch.float64)
        else:
            number, strength = policies.draw_operations(self.policy, count, self.size, source)
        warp = policies.warps(number.flatten(), strength.flatten(), self.size).view(*number.shape, 6)
        boxes = draw_boxes(count, self.size, self.cutout, self.erasing, source)
        return Draws(*corner, flip, angle, rotation(angle, self.size), number, strength, warp, boxes)


class MemoryImages:
    """N square images on `device`, stored with the recipe's border and four bytes per pixel (red, green, blue, 0).

    pixels: uint8 [N, P, P, 3], P + 2 border >= size. Four bytes are read as one int32 word, so that a 32 x 32 image is
    a gather of 1,024 numbers, not 3,072. Word 0 is black, for output pixels that rotation takes from outside.
    """

    def __init__(self, pixels: np.ndarray | torch.Tensor, recipe: Recipe, device: str | torch.device = "cpu",
                 normalise: Normalise | None = None):
        pixels = torch.as_tensor(pixels)
        n, inner, width, channels = pixels.shape
        border = recipe.border
        self.side = side = inner + 2 * border
        assert pixels.dtype == torch.uint8 and inner == width and channels == 3 and side >= recipe.size
        self.n, self.inner, self.recipe, self.device = n, inner, recipe, torch.device(device)
        store = torch.zeros(1 + n * side * side, 4, dtype=torch.uint8, device=pixels.device)
        store[1:].view(n, side, side, 4)[:, border:border + inner, border:border + inner, :3] = pixels
        self.words = store.view(torch.int32).view(-1).to(self.device)
        self.index_dtype = torch.int32 if len(self.words) < 2**31 else torch.int64
        normalise = normalise or Normalise(recipe.mean, recipe.std, self.device)
        self.scale, self.shift = normalise.scale, normalise.shift
        self.ramp = torch.arange(recipe.size, dtype=self.index_dtype, device=self.device)

    def __len__(self) -> int:
        return self.n

    def raw(self, index: int) -> np.ndarray:
        """The original image `index`, uint8 [P, P, 3]."""
        area, border = self.side ** 2, self.recipe.border
        words = self.words[1 + index * area: 1 + (index + 1) * area].cpu()
        image = words.view(torch.uint8).view(self.side, self.side, 4)
        return image[border:border + self.inner, border:border + self.inner, :3].numpy()

    def draw(self, count: int, *seeds: int) -> Draws:
        """Random numbers for `count` of these images (see `Recipe.draw`), on their device."""
        return self.recipe.draw(count, self.side - self.recipe.size, *seeds).to(self.device)

    def plain(self, index: torch.Tensor) -> torch.Tensor:
        """The centres of images `index` [n], normalised: float [n, 3, size, size]."""
        corner = int(round((self.side - self.recipe.size) / 2))  # as torchvision's CenterCrop rounds
        base = self._first_word(index) + corner * (self.side + 1)
        with _one_thread():
            return self._normalised(base + self.ramp.view(-1, 1) * self.side + self.ramp)

    def augmented(self, index: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Images `index` [n], each with its crop, flip, rotation and the recipe's other steps, normalised:
        float [n, 3, size, size]."""
        with _one_thread():
            place = self._places(index, draws)
            images = self._normalised(place) if self.recipe.policy == "basic" else self._operated(place, draws)
            return erase(images, draws.boxes)

    def _operated(self, place: torch.Tensor, draws: Draws) -> torch.Tensor:
        """The pixels at `place` after the policy's operations, normalised."""
        n, size = len(place), self.recipe.size
        words = torch.index_select(self.words, 0, place.reshape(-1))
        images = words.view(torch.uint8).view(n, size, size, 4)[..., :3].permute(0, 3, 1, 2).contiguous()
        for number, strength, warp in zip(draws.operation.t(), draws.strength.t(), draws.warp.unbind(1)):
            policies.apply(images, number, strength, warp)
        return images.float().mul_(self.scale).add_(self.shift)

    def _places(self, index: torch.Tensor, draws: Draws) -> torch.Tensor:
        """The index of each output pixel's word, [n, size, size]."""
        last, side = self.recipe.size - 1, self.side
        (x, y), inside = sources(draws.turn, self.ramp)  # in the cropped and flipped image
        flip, top, left = (t.to(self.index_dtype).view(-1, 1, 1) for t in (draws.flip, draws.top, draws.left))
        base = self._first_word(index) + top * side + left + flip * last
        place = x.mul_(1 - 2 * flip).add_(y, alpha=side).add_(base)
        return place.bitwise_and_(inside)

    def _first_word(self, index: torch.Tensor) -> torch.Tensor:
        return 1 + index.to(self.index_dtype).view(-1, 1, 1) * self.side ** 2

    def _normalised(self, place: torch.Tensor) -> torch.Tensor:
        n, size = len(place), self.recipe.size
        words = torch.index_select(self.words, 0, place.reshape(-1)).view(n, size, size)
        images = torch.empty(n, 3, size, size, device=self.device)
        byte = torch.empty_like(words)
        for channel in range(3):  # plane by plane with whole words: every operation runs over contiguous memory
            images[:, channel] = torch.bitwise_and(words, 255, out=byte)
            words.bitwise_right_shift_(8)
        return images.mul_(self.scale).add_(self.shift)  # addcmul isn't vectorised for broadcast factors


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch's CPU operators on this thread only.

    They take microseconds each, so that more threads gain little; and if other programs use the cores, waiting for
    these threads at the end of every operator takes a hundred times as long as the work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
