"""Which image sizes a network of timm's or torchvision's takes, found by trying."""
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from model.timm_net import HALVES, make_body
from model.weights.pretrained import input_of

STEPS = (32, 16, 14)     # sizes that fit go up by these: the strides of stages, the sides of patches


def size_problem(model_name: str, size: int) -> str | None:
    """Why images of `size` pixels can't be used, with the nearest size that can; None where they can.

    Many networks take one size only (fixed embeddings of places, mixing over places), others multiples of a patch or a
    window, and each says so in a way of its own; so one image goes through the network. The size that its weights were
    trained at is right without trying.
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

    Tried on torch's meta device, which costs no arithmetic: of a network of each of timm's families, at three sizes,
    it says what real numbers say. Networks that can't be tried there at their own size either are made for real.
    """
    own = input_of(model_name)["image_size"]
    return size == own or _passes(model_name, size, "meta") or (
        not _passes(model_name, own, "meta") and _passes(model_name, size, "cpu"))


@torch.no_grad()
def _passes(model_name: str, size: int, device: str) -> bool:
    try:
        body, kind = _body(model_name, device)
        HALVES[kind].pool(body, HALVES[kind].features(body, torch.zeros(1, 3, size, size, device=device)))
    except Exception:   # whatever a network of others' says of a size that doesn't fit
        return False
    return True


@lru_cache(maxsize=1)
def _body(model_name: str, device: str) -> tuple[Any, str]:
    """A body with random weights, for which nothing is drawn from the global generator."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        body, kind, _ = make_body(model_name)
    return body.eval(), kind
