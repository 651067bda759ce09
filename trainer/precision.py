"""Mixed precision: what a run asks for, what its hardware supports, and the context of a forward pass."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

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
    for feature, name in (("_is_amx_tile_supported", "AMX"), ("_is_avx512_bf16_supported", "AVX512-BF16")):
        if device.type == "cpu" and getattr(torch.cpu, feature, bool)():
            return "bf16", f"this CPU has {name}"
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
