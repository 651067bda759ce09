"""Which image sizes a timm or torchvision network accepts, found by trying."""
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from model.timm_body import HALVES, make_body
from model.weights.pretrained import input_of

STEPS = (32, 16, 14)     # usable sizes tend to be multiples of these: total strides, patch sizes


def size_problem(model_name: str, size: int) -> str | None:
    """Why square images of `size` pixels can't be used, with the nearest size that can; None if they can.

    Many networks accept one size only (fixed position embeddings, mixing over positions), others multiples of a patch
    or window, and each fails in its own way; so one image is passed through the network. The size that its weights
    were trained at is accepted without trying.
    """
    own = input_of(model_name)["image_size"]
    if takes(model_name, size):
        return None
    near = [step * max(round(size / step), 1) for step in STEPS]
    fitting = [other for other in sorted(set(near), key=lambda other: abs(other - size)) if takes(model_name, other)]
    other = f"{fitting[0]}, or " if fitting and fitting[0] != own else ""
    return f"{model_name} can't take images of {size} pixels; use {other}{own}, which it was made for"


@lru_cache(maxsize=64)
def takes(model_name: str, size: int) -> bool:
    """Whether a square image of `size` pixels passes through the network.

    Tried on torch's meta device, which computes nothing: for one network of each timm family, at three sizes, the
    answers were those of a real pass. A network that fails there even at its own size is run on the CPU instead.
    """
    own = input_of(model_name)["image_size"]
    return size == own or _passes(model_name, size, "meta") or (
        not _passes(model_name, own, "meta") and _passes(model_name, size, "cpu"))


@torch.no_grad()
def _passes(model_name: str, size: int, device: str) -> bool:
    try:
        body, kind = _body(model_name, device)
        HALVES[kind].pool(body, HALVES[kind].features(body, torch.zeros(1, 3, size, size, device=device)))
    except Exception:   # third-party networks raise anything for a size that doesn't fit
        return False
    return True


@lru_cache(maxsize=1)
def _body(model_name: str, device: str) -> tuple[Any, str]:
    """A body with random weights, made without drawing from the global generator."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        body, kind, _ = make_body(model_name)
    return body.eval(), kind
