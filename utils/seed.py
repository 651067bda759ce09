"""Randomness: global seeds once per process; elsewhere generators that are functions of (seed, epoch, ...)."""
from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch


def mix(seed: int, *more: int) -> int:
    """One 63-bit seed out of several integers; near inputs give unrelated seeds."""
    digest = hashlib.blake2b(repr((seed, *more)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed python's, numpy's and torch's global generators, differently on each rank."""
    value = seed if rank == 0 else mix(seed, rank)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def generator(seed: int, *more: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator whose stream depends on nothing but (seed, *more)."""
    return torch.Generator(device=device).manual_seed(mix(seed, *more))


def numpy_rng(seed: int, *more: int) -> np.random.Generator:
    """A numpy generator whose stream depends on nothing but (seed, *more)."""
    return np.random.default_rng(mix(seed, *more))


def rng_state() -> dict[str, Any]:
    """The global generators' states as tensors and plain data."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    state = {"torch": torch.get_rng_state(),
             "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
             "python": [version, list(internal), gauss_next]}
    if torch.cuda.is_initialized():     # a run on the CPU leaves the machine's GPUs alone
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; GPUs' states only where there are as many GPUs as then."""
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
