"""Arithmetic: mixed precision (what a run asks for and its hardware supports), TF32, repeatable kernels."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from utils.device import bfloat16_unit

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(amp: object, device: torch.device | str) -> tuple[str, str]:
    """(`bf16`, `fp16` or `off`, the reason as text) for a config's `trainer.amp`, which may be `auto`.

    `auto` is bfloat16 where the hardware can multiply it: x86 CPUs with AMX or AVX512-BF16, GPUs from Ampere (compute
    capability 8) on. Older GPUs from Volta on get float16, which needs a loss scaler. Elsewhere it is off: emulated
    half precision is slower than float32.
    """
    if amp in (None, False, "off"):
        return "off", "trainer.amp off"
    if amp != "auto":
        return str(amp), f"trainer.amp {amp}"
    device = torch.device(device)
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        name = torch.cuda.get_device_name(device)
        if major >= 8:
            return "bf16", f"{name} has bfloat16"
        return ("fp16", f"{name} has float16 only") if major >= 7 else ("off", f"{name} has no half precision")
    unit = bfloat16_unit() if device.type == "cpu" else None
    if unit:
        return "bf16", f"this CPU has {unit}"
    return "off", "this processor has no bfloat16 arithmetic"


def autocast(device: torch.device, amp: object) -> contextlib.AbstractContextManager:
    """The autocast context of a forward pass for `bf16` or `fp16`; for `off`, None and False one
    that changes nothing."""
    if amp in (None, False, "off"):
        return contextlib.nullcontext()
    return torch.autocast(device.type, AMP_TYPES[amp])


def allow_tf32(allowed: bool) -> bool:
    """Set whether cuDNN's float32 convolutions may round their inputs to TF32 (10 bits of mantissa), torch's default on
    GPUs from Ampere on; returns the previous setting."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, allowed
    return before


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """A context in which cuDNN's convolutions don't use TF32, so that reported figures agree on all hardware."""
    before = allow_tf32(False)
    try:
        yield
    finally:
        allow_tf32(before)


def set_determinism(config: dict[str, Any], device: torch.device) -> None:
    """`trainer.deterministic`: make runs with the same seed repeatable on a GPU, or let cuDNN search for its fastest
    algorithms instead, where maps keep their sizes from step to step.

    A detector's runs repeat only nearly: torchvision's RoIAlign has a deterministic backward pass in Python alone.
    """
    deterministic, detector = config["trainer"]["deterministic"], config["trainer"]["type"] == "DetectionTrainer"
    sizes_vary = detector or config["arch"]["type"].endswith("EAModel")
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic and not sizes_vary
    if not deterministic or detector or device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False     # passes over memory that nobody reads unwritten
    # Under warn_only these kernels of attention would run, and only their plain one repeats.
    for enable in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp,
                   torch.backends.cuda.enable_cudnn_sdp):
        enable(False)
