"""AutoAugment, RandAugment and TrivialAugment for small images, by the batch.

An operation is Pillow's, on eight-bit pixels, but done to all images of a batch that drew it together: shifts, shears
and rotations are one gather, tone curves one look-up. Which image gets which operation how strongly is drawn for a
whole epoch at once.

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

#: The 25 sub-policies that AutoAugment found for CIFAR-10: twice (operation, probability, magnitude 0 to 9).
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
    """Each operation's strengths from none to most, float64 [bins]; operations without one are left out.

    Shears as a ratio, shifts in pixels, rotation in degrees, Brightness to Sharpness as what is added to or taken from
    1, Posterize in bits kept, Solarize as the level from which pixels are inverted.
    size: of the images in pixels. wide: TrivialAugment's ranges.
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
    """What happens to `count` images of `size` pixels one step after the other: numbers into OPERATIONS, int64
    [count, steps], and signed strengths, float64 [count, steps]."""
    return DRAWS[policy](count, size, source)


def draw_autoaugment(count: int, size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """One of the 25 sub-policies for each image."""
    numbers = torch.tensor([[_NUMBER[step[0]] for step in pair] for pair in CIFAR10_POLICY])
    chance = torch.tensor([[step[1] for step in pair] for pair in CIFAR10_POLICY])
    level = torch.tensor([[step[2] for step in pair] for pair in CIFAR10_POLICY])
    chosen = torch.randint(len(CIFAR10_POLICY), (count,), generator=source)
    number = numbers[chosen].where(torch.rand(count, 2, generator=source) < chance[chosen], 0)
    return number, _strength(number, level[chosen], magnitudes(10, size), source)


def draw_randaugment(count: int, size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two operations, each at 9 of 30. Fourteen to choose from, of which one is none; Invert is AutoAugment's alone."""
    number = torch.randint(_NUMBER["Invert"], (count, 2), generator=source)
    return number, _strength(number, torch.full((count, 2), 9), magnitudes(31, size), source)


def draw_trivialaugment(count: int, size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """One operation at any strength of the wide ranges."""
    number = torch.randint(_NUMBER["Invert"], (count, 1), generator=source)
    level = torch.randint(31, (count, 1), generator=source)
    return number, _strength(number, level, magnitudes(31, size, wide=True), source)


def _strength(number: Tensor, level: Tensor, ranges: dict[str, Tensor], source: torch.Generator) -> Tensor:
    """The strength of each operation at its level, either way where it has two. number, level: [count, steps]."""
    table = torch.zeros(len(OPERATIONS), len(next(iter(ranges.values()))), dtype=torch.float64)
    for name, row in ranges.items():
        table[_NUMBER[name]] = row
    sign = torch.ones(len(OPERATIONS), 2, dtype=torch.float64)
    sign[[_NUMBER[name] for name in _SIGNED], 1] = -1
    return table[number, level] * sign[number, torch.randint(2, number.shape, generator=source)]


#: `data_loader.args.augment` -> what it draws.
DRAWS: dict[str, Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "autoaugment": draw_autoaugment, "randaugment": draw_randaugment, "trivialaugment": draw_trivialaugment}


def apply(images: Tensor, number: Tensor, strength: Tensor, turn: Tensor | None = None) -> Tensor:
    """One step of a policy, in place.

    images: uint8 [n, 3, S, S]. number, strength: [n], on the CPU whatever the images are on, so that no batch waits for
    the device. turn: what `warps` gives for them, [n, 6], where it is known already.
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
    """Pillow's 16.16 fixed point of inverse affine maps [n, 6], for pixel centres: int32 [n, 6].

    Row (a, b, c, d, e, f): output pixel (x, y) comes from column (a x + b y + c) >> 16, row (d x + e y + f) >> 16.
    """
    rows = rows.double().clone()
    rows[:, 2] += (rows[:, 0] + rows[:, 1]) * 0.5
    rows[:, 5] += (rows[:, 3] + rows[:, 4]) * 0.5
    return torch.floor(rows * 65536 + 0.5).to(torch.int32)


def rotation(angle: Tensor, size: int) -> Tensor:
    """The map of Pillow's `Image.rotate(angle)` of a square image, see `affine`. angle: degrees [n] -> int32 [n, 6]."""
    radians = -torch.deg2rad(angle.double() % 360)
    cos, sin = torch.round(radians.cos(), decimals=15), torch.round(radians.sin(), decimals=15)
    half = size / 2
    offset_x, offset_y = cos * -half + sin * -half + half, -sin * -half + cos * -half + half
    return affine(torch.stack((cos, sin, offset_x, -sin, cos, offset_y), 1))


def sources(turn: Tensor, ramp: Tensor) -> tuple[Tensor, Tensor]:
    """Where each output pixel of a map comes from: (column and row, [2, n, S, S]; all bits set inside the picture and
    none outside, [n, S, S]). turn: see `affine`; ramp: 0 to S - 1, of the integer type to compute in."""
    last = len(ramp) - 1
    turn = turn.to(ramp.dtype).t().contiguous().view(2, 3, -1, 1, 1)
    across, down, start = turn[:, 0], turn[:, 1], turn[:, 2]
    source = (ramp * across).add(down * ramp.view(-1, 1) + start).bitwise_right_shift_(16)
    # Inside where neither x, y, last - x nor last - y is negative: all bits set, or none, from their sign bits.
    signs = (last - source).bitwise_or_(source)
    sign_bit = torch.iinfo(ramp.dtype).bits - 1
    return source, signs[0].bitwise_or_(signs[1]).bitwise_right_shift_(sign_bit).bitwise_not_()


def warps(number: Tensor, strength: Tensor, size: int) -> Tensor:
    """The maps of shears, shifts and rotations [n] of size x size pixels, see `affine`; of other operations the map
    that changes nothing."""
    shift = strength.trunc()
    rows = torch.zeros(len(number), 6, dtype=torch.float64)
    rows[:, 0] = rows[:, 4] = 1
    for name, column, value in (("ShearX", 1, strength), ("ShearY", 3, strength), ("TranslateX", 2, -shift),
                                ("TranslateY", 5, -shift)):
        rows[:, column] = value * (number == _NUMBER[name])
    return torch.where((number == _NUMBER["Rotate"]).view(-1, 1), rotation(strength, size), affine(rows))


def _warp(images: Tensor, turn: Tensor) -> Tensor:
    """Shear, shift or turn: the nearest pixel, black from outside."""
    n, channels, size = images.shape[:3]
    (x, y), inside = sources(turn, torch.arange(size, device=images.device))
    place = y.mul_(size).add_(x).bitwise_and_(inside).reshape(n, 1, -1)
    found = images.flatten(2).gather(2, place.expand(-1, channels, -1))
    return found.bitwise_and_(inside.reshape(n, 1, -1).to(torch.uint8)).view_as(images)


# ---------------------------------------------------------------------- one look-up

def _blend(low: Tensor, high: Tensor, factor: Tensor) -> Tensor:
    """low + factor (high - low), cut to 0 to 255 and then to whole levels, as Pillow's `Image.blend` does."""
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
    scale = torch.full_like(low, 255).div_(high - low)  # 255 / x is 255 times the rounded 1 / x to torch
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


#: Operations that give each level another: (images [n, 3, S, S], strength [n], levels 0 to 255) -> uint8
#: [n, 1 or 3, 256].
_TABLES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "Brightness": _brightness, "Contrast": _contrast, "Posterize": _posterize, "Solarize": _solarize,
    "AutoContrast": _auto_contrast, "Equalize": _equalize, "Invert": _invert}


def _tones(images: Tensor, number: Tensor, strength: Tensor) -> Tensor:
    """Another level for each level, of the whole image or of each channel."""
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
    """Towards its grey, or away from it."""
    return _blend(_grey(images).float(), images.float(), 1 + _column(strength, images.device).unsqueeze(3))


def _sharpness(images: Tensor, number: Tensor, strength: Tensor) -> Tensor:
    """Towards the mean of its neighbourhood (the pixel itself counted five times), or away from it; not at the edge."""
    wide = images.to(torch.int32)
    total = wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]
    total = total[..., :-2, :] + total[..., 1:-1, :] + total[..., 2:, :] + 4 * wide[..., 1:-1, 1:-1]
    wide[..., 1:-1, 1:-1] = (2 * total + 13) // 26
    return _blend(wide.float(), images.float(), 1 + _column(strength, images.device).unsqueeze(3))


#: What does each operation; those of a family are done together.
FAMILIES: dict[Callable[..., Tensor], tuple[str, ...]] = {
    _warp: ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"), _tones: tuple(_TABLES), _colour: ("Color",),
    _sharpness: ("Sharpness",)}
_FAMILY_OF = torch.tensor([next((i for i, names in enumerate(FAMILIES.values()) if name in names), -1)
                           for name in OPERATIONS])
