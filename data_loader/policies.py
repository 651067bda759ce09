"""AutoAugment, RandAugment and TrivialAugment for small images, applied to whole batches.

Operations are those of Pillow, on eight-bit pixels, but applied at once to all images of a batch that drew them:
shifts, shears and rotations are one gather, tone curves one table look-up. The operation and strength for each image
are drawn for a whole epoch at once.

Sources: AutoAugment's CIFAR-10 policy (Cubuk et al., CVPR 2019), RandAugment (Cubuk et al., NeurIPS 2020),
TrivialAugment (Müller and Hutter, ICCV 2021), with torchvision's ranges of magnitudes.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OPERATIONS = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
              "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert")
_NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
_SIGNED = OPERATIONS[1:10]

#: The 25 sub-policies that AutoAugment found for CIFAR-10, each two steps (operation, probability, magnitude 0 to 9).
CIFAR10_POLICY = tuple(tuple((name, float(chance), int(level)) for name, chance, level
                             in map(str.split, pair.split(", "))) for pair in """
Invert .1 0, Contrast .2 6 | Rotate .7 2, TranslateX .3 9 | Sharpness .8 1, Sharpness .9 3
ShearY .5 8, TranslateY .7 9 | AutoContrast .5 0, Equalize .9 0 | ShearY .2 7, Posterize .3 7
Color .4 3, Brightness .6 7 | Sharpness .3 9, Brightness .7 9 | Equalize .6 0, Equalize .5 0
Contrast .6 7, Sharpness .6 5 | Color .7 7, TranslateX .5 8 | Equalize .3 0, AutoContrast .4 0
TranslateY .4 3, Sharpness .2 6 | Brightness .9 6, Color .2 8 | Solarize .5 2, Invert 0 0
Equalize .2 0, AutoContrast .6 0 | Equalize .2 0, Equalize .6 0 | Color .9 9, Equalize .6 0
AutoContrast .8 0, Solarize .2 8 | Brightness .1 3, Color .7 0 | Solarize .4 5, AutoContrast .9 0
TranslateY .9 9, TranslateY .7 9 | AutoContrast .9 0, Solarize .8 3 | Equalize .8 0, Invert .1 0
TranslateY .7 9, AutoContrast .9 0""".strip().replace("\n", " | ").split(" | "))


def magnitudes(bins: int, size: int, wide: bool = False) -> dict[str, Tensor]:
    """{operation: its strengths from weakest to strongest, float64 [bins]}, without operations that have no strength.

    Units: shears as a ratio, shifts in pixels, rotation in degrees; Brightness, Color, Contrast and Sharpness as the
    factor's difference from 1; Posterize as bits kept; Solarize as the level from which pixels are inverted.
    size: the images' side in pixels. wide: TrivialAugment's ranges.
    """
    def up_to(most: float) -> Tensor:
        return torch.linspace(0.0, most, bins).double()

    shear, shift, turn, tone, bits = (0.99, 32.0, 135.0, 0.99, 6) if wide else (0.3, 150 / 331 * size, 30.0, 0.9, 4)
    table = dict.fromkeys(("ShearX", "ShearY"), up_to(shear)) | {"Rotate": up_to(turn)}
    table |= dict.fromkeys(("TranslateX", "TranslateY"), up_to(shift))
    table |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), up_to(tone))
    steps = (torch.arange(bins) / ((bins - 1) / bits)).round()
    return table | {"Posterize": 8 - steps.double(), "Solarize": torch.linspace(255.0, 0.0, bins).double()}


def draw_operations(policy: str, count: int, size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the steps of `policy`, a key of DRAWS, for `count` images of `size` x `size` pixels.

    Returns (indices into OPERATIONS, int64 [count, steps]; signed strengths, float64 [count, steps]).
    """
    return DRAWS[policy](count, size, source)


def draw_autoaugment(count: int, size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw AutoAugment: one of the 25 sub-policies (two steps) for each image. Returns as `draw_operations`."""
    numbers = torch.tensor([[_NUMBER[step[0]] for step in pair] for pair in CIFAR10_POLICY])
    chance = torch.tensor([[step[1] for step in pair] for pair in CIFAR10_POLICY])
    level = torch.tensor([[step[2] for step in pair] for pair in CIFAR10_POLICY])
    chosen = torch.randint(len(CIFAR10_POLICY), (count,), generator=source)
    number = numbers[chosen].where(torch.rand(count, 2, generator=source) < chance[chosen], 0)
    return number, _strength(number, level[chosen], magnitudes(10, size), source)


def draw_randaugment(count: int, size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw RandAugment: two operations at magnitude 9 of 30, out of fourteen (all but Invert, which only AutoAugment
    has; Identity is one of them). Returns as `draw_operations`."""
    number = torch.randint(_NUMBER["Invert"], (count, 2), generator=source)
    return number, _strength(number, torch.full((count, 2), 9), magnitudes(31, size), source)


def draw_trivialaugment(count: int, size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw TrivialAugment: one operation at a random strength in the wide ranges. Returns as `draw_operations`."""
    number = torch.randint(_NUMBER["Invert"], (count, 1), generator=source)
    level = torch.randint(31, (count, 1), generator=source)
    return number, _strength(number, level, magnitudes(31, size, wide=True), source)


def _strength(number: Tensor, level: Tensor, ranges: dict[str, Tensor], source: torch.Generator) -> Tensor:
    """The strength of each operation at its level, with a random sign for operations that have two directions.
    number, level: [count, steps]."""
    table = torch.zeros(len(OPERATIONS), len(next(iter(ranges.values()))), dtype=torch.float64)
    for name, row in ranges.items():
        table[_NUMBER[name]] = row
    sign = torch.ones(len(OPERATIONS), 2, dtype=torch.float64)
    sign[[_NUMBER[name] for name in _SIGNED], 1] = -1
    return table[number, level] * sign[number, torch.randint(2, number.shape, generator=source)]


#: `data_loader.args.augment` -> the function that draws its operations.
DRAWS: dict[str, Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "autoaugment": draw_autoaugment, "randaugment": draw_randaugment, "trivialaugment": draw_trivialaugment}


def apply(images: Tensor, number: Tensor, strength: Tensor, turn: Tensor | None = None) -> Tensor:
    """Apply one step of a policy to images, uint8 [n, 3, S, S], in place; returns them.

    number, strength: [n], always on the CPU, so that no batch waits for the device. turn: the result of `warps` for
    them, [n, 6], if already known.
    """
    turn = warps(number, strength, images.shape[-1]) if turn is None else turn
    family_of = _FAMILY_OF[number]
    for index, family in enumerate(FAMILIES):
        chosen = (family_of == index).nonzero().view(-1)
        if len(chosen):
            there = chosen.to(images.device, non_blocking=True)
            some = images.index_select(0, there)
            which = there if turn.device == there.device else chosen
            some = _warp(some, turn.index_select(0, which)) if family is _warp else \
                family(some, number[chosen], strength[chosen])
            images.index_copy_(0, there, some)
    return images


# ---------------------------------------------------------------------- one gather

def affine(rows: Tensor) -> Tensor:
    """Inverse affine maps [n, 6] in Pillow's 16.16 fixed point, adjusted to pixel centres: int32 [n, 6].

    For a result row (a, b, c, d, e, f), output pixel (x, y) is taken from column (a x + b y + c) >> 16 and row
    (d x + e y + f) >> 16.
    """
    rows = rows.double().clone()
    rows[:, 2] += (rows[:, 0] + rows[:, 1]) * 0.5
    rows[:, 5] += (rows[:, 3] + rows[:, 4]) * 0.5
    return torch.floor(rows * 65536 + 0.5).to(torch.int32)


def rotation(angle: Tensor, size: int) -> Tensor:
    """The maps of Pillow's `Image.rotate(angle)` for square images of side `size`: angle in degrees [n] -> int32
    [n, 6], see `affine`."""
    radians = -torch.deg2rad(angle.double() % 360)
    cos, sin = torch.round(radians.cos(), decimals=15), torch.round(radians.sin(), decimals=15)
    half = size / 2
    offset_x, offset_y = cos * -half + sin * -half + half, -sin * -half + cos * -half + half
    return affine(torch.stack((cos, sin, offset_x, -sin, cos, offset_y), 1))


def sources(turn: Tensor, ramp: Tensor) -> tuple[Tensor, Tensor]:
    """The source of each output pixel: (column and row [2, n, S, S]; a mask [n, S, S] with all bits set where the
    source is inside the image and none where it is outside).

    turn: maps [n, 6], see `affine`; ramp: 0 to S - 1, in the integer dtype to compute in.
    """
    last = len(ramp) - 1
    turn = turn.to(ramp.dtype).t().contiguous().view(2, 3, -1, 1, 1)
    across, down, start = turn[:, 0], turn[:, 1], turn[:, 2]
    source = (ramp * across).add(down * ramp.view(-1, 1) + start).bitwise_right_shift_(16)
    # Inside where neither x, y, last - x nor last - y is negative: all bits set, or none, from their sign bits.
    signs = (last - source).bitwise_or_(source)
    sign_bit = torch.iinfo(ramp.dtype).bits - 1
    return source, signs[0].bitwise_or_(signs[1]).bitwise_right_shift_(sign_bit).bitwise_not_()


def warps(number: Tensor, strength: Tensor, size: int) -> Tensor:
    """The maps of shears, shifts and rotations (the identity for other operations) of size x size pixels, int32 [n, 6],
    see `affine`. number, strength: [n]."""
    shift = strength.trunc()
    rows = torch.zeros(len(number), 6, dtype=torch.float64)
    rows[:, 0] = rows[:, 4] = 1
    for name, column, value in (("ShearX", 1, strength), ("ShearY", 3, strength), ("TranslateX", 2, -shift),
                                ("TranslateY", 5, -shift)):
        rows[:, column] = value * (number == _NUMBER[name])
    return torch.where((number == _NUMBER["Rotate"]).view(-1, 1), rotation(strength, size), affine(rows))


def _warp(images: Tensor, turn: Tensor) -> Tensor:
    """Shear, shift or rotate with nearest-neighbour sampling; black outside the image."""
    n, channels, size = images.shape[:3]
    (x, y), inside = sources(turn, torch.arange(size, device=images.device))
    place = y.mul_(size).add_(x).bitwise_and_(inside).reshape(n, 1, -1)
    found = images.flatten(2).gather(2, place.expand(-1, channels, -1))
    return found.bitwise_and_(inside.reshape(n, 1, -1).to(torch.uint8)).view_as(images)


# ---------------------------------------------------------------------- one look-up

def _blend(low: Tensor, high: Tensor, factor: Tensor) -> Tensor:
    """low + factor (high - low), clipped to 0 to 255 and truncated to uint8, as in Pillow's `Image.blend`."""
    return (low + factor * (high - low)).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Pillow's luminance of uint8 [n, 3, S, S]: int32 [n, 1, S, S]."""
    red, green, blue = images.to(torch.int32).split(1, 1)
    return (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(0x8000).bitwise_right_shift_(16)


def _column(strength: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return strength.to(device, dtype, non_blocking=True).view(-1, 1, 1)


def _brightness(images: Tensor, strength: Tensor, ramp: Tensor) -> Tensor:
    return _blend(torch.zeros_like(ramp), ramp, 1 + _column(strength, ramp.device))


def _contrast(images: Tensor, strength: Tensor, ramp: Tensor) -> Tensor:
    mean = (_grey(images).double().mean((1, 2, 3)) + 0.5).floor().float().view(-1, 1, 1)
    return _blend(mean, ramp, 1 + _column(strength, ramp.device))


def _posterize(images: Tensor, strength: Tensor, ramp: Tensor) -> Tensor:
    step = 2 ** (8 - _column(strength, ramp.device))
    return (ramp / step).floor().mul(step).to(torch.uint8)


def _solarize(images: Tensor, strength: Tensor, ramp: Tensor) -> Tensor:
    return torch.where(ramp < _column(strength, ramp.device), ramp, 255 - ramp).to(torch.uint8)


def _invert(images: Tensor, strength: Tensor, ramp: Tensor) -> Tensor:
    return (255 - ramp).to(torch.uint8).expand(len(images), 1, -1)


def _auto_contrast(images: Tensor, strength: Tensor, ramp: Tensor) -> Tensor:
    low, high = (value.double().unsqueeze(2) for value in torch.aminmax(images.flatten(2), dim=2))
    scale = torch.full_like(low, 255).div_(high - low)  # torch computes `255 / x` as 255 times the rounded 1 / x
    table = (ramp.double() * scale - low * scale).clamp_(0, 255)
    return torch.where(high > low, table, ramp.double()).to(torch.uint8)


def _equalize(images: Tensor, strength: Tensor, ramp: Tensor) -> Tensor:
    pixels = images.flatten(2).long()
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))
    of_highest = counts.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - of_highest) // 255
    before = counts.cumsum(2) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, table, ramp.long()).to(torch.uint8)


#: Operations that map each level to another: (images [n, 3, S, S], strength [n], levels 0 to 255) -> table, uint8
#: [n, 1 or 3, 256].
_TABLES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "Brightness": _brightness, "Contrast": _contrast, "Posterize": _posterize, "Solarize": _solarize,
    "AutoContrast": _auto_contrast, "Equalize": _equalize, "Invert": _invert}


def _tones(images: Tensor, number: Tensor, strength: Tensor) -> Tensor:
    """Apply operations that map levels to levels, by one table for the whole image or one per channel."""
    ramp = torch.arange(256, dtype=torch.float32, device=images.device)
    tables = torch.empty(len(images), 3, 256, dtype=torch.uint8, device=images.device)
    for name, table in _TABLES.items():
        chosen = (number == _NUMBER[name]).nonzero().view(-1)
        if len(chosen):
            there = chosen.to(images.device, non_blocking=True)
            tables[there] = table(images[there], strength[chosen], ramp)
    return tables.gather(2, images.flatten(2).long()).view_as(images)


# ---------------------------------------------------------------------- blends of each pixel

def _colour(images: Tensor, number: Tensor, strength: Tensor) -> Tensor:
    """Blend each pixel with its grey value, or away from it."""
    return _blend(_grey(images).float(), images.float(), 1 + _column(strength, images.device).unsqueeze(3))


def _sharpness(images: Tensor, number: Tensor, strength: Tensor) -> Tensor:
    """Blend each pixel with the mean of its 3x3 neighbourhood (itself weighted 5), or away from it; edges stay."""
    wide = images.to(torch.int32)
    total = wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]
    total = total[..., :-2, :] + total[..., 1:-1, :] + total[..., 2:, :] + 4 * wide[..., 1:-1, 1:-1]
    wide[..., 1:-1, 1:-1] = (2 * total + 13) // 26
    return _blend(wide.float(), images.float(), 1 + _column(strength, images.device).unsqueeze(3))


#: The function for each family of operations, which are applied together.
FAMILIES: dict[Callable[..., Tensor], tuple[str, ...]] = {
    _warp: ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"), _tones: tuple(_TABLES), _colour: ("Color",),
    _sharpness: ("Sharpness",)}
_FAMILY_OF = torch.tensor([next((i for i, names in enumerate(FAMILIES.values()) if name in names), -1)
                           for name in OPERATIONS])
