"""What a run compiles (`trainer.compile`)."""
from __future__ import annotations

from typing import Any

import torch
from torch import nn

from logger.log import get_logger
from model.native.build import compiler, keeps_up
from model.native.winograd import compile_convolutions, suitable
from model.norm.act import compile_norms
from utils.device import bfloat16_unit

log = get_logger()
_MANY_CONVOLUTIONS = 10     # a network like those measured; others may gain nothing
_MANY_IMAGES = 5000         # with fewer, in all epochs, the compiler takes longer than is gained


def choose_compiled(options: dict[str, Any], model: nn.Module, device: torch.device, amp: str, images: int) -> Any:
    """What to compile: `trainer.compile`'s value, with "auto" settled; logs why.

    "auto" is what benchmarks.train_step has found faster on a CPU (docs/speed.md): in float32 with AVX2 or AVX-512 the
    norms and 3x3 convolutions ("layers"), in bfloat16 with instructions for it the norms, otherwise nothing. The choice
    depends on nothing that differs between a run and its continuation: not on what is frozen by now, nor on the epochs
    that are left.

    options: the config's `trainer`. amp: `off`, `bf16` or `fp16`. images: how many the whole training goes through.
    """
    wanted = options["compile"]
    if wanted not in ("auto", False):
        return wanted
    layers = suitable(model)
    trained = options["freeze"] is None and any(layer.weight.requires_grad for layer in layers)
    measured = trained and options["channels_last"] and len(layers) >= _MANY_CONVOLUTIONS
    faster = _faster(device, amp) if measured else None
    able = compiler() is not None and keeps_up()
    if wanted is False:
        if faster and able:
            what = f"{len(layers)} of the convolutions and the norms" if faster == "layers" else "the norms"
            log.info("faster: --set trainer.compile=%s has %s in C++ (docs/speed.md)", faster, what)
        return False
    why = None
    if not faster:
        why = "nothing is known to be faster with this processor, precision and network"
    elif images < _MANY_IMAGES:
        why = "training on so few images takes less time than the compiler"
    elif not able:
        why = f"it would be faster with {'OpenMP threads' if compiler() else 'g++ or clang++'}"
    if why is None:
        return faster
    log.info("nothing is compiled (trainer.compile auto): %s", why)
    return False


def compile_layers(model: nn.Module, wanted: Any) -> nn.Module:
    """The model with what `choose_compiled` returned compiled, in place; or, for True, torch.compile's of it. Raises
    ConfigError without a compiler."""
    if wanted is True:
        return torch.compile(model)
    if wanted in ("norms", "layers"):
        log.info("norms compiled: %d (used on a CPU, where an addition or ReLU follows)", compile_norms(model))
    if wanted == "layers":
        log.info("3x3 convolutions compiled: %d (used on a CPU, in channels_last; in bf16 unless it has AMX)",
                 compile_convolutions(model))
    return model


def _faster(device: torch.device, amp: str) -> str | None:
    """What is faster compiled on this processor in this precision, as far as it was measured."""
    if device.type != "cpu":
        return None
    if amp == "off":
        return "layers" if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else None
    return "norms" if amp == "bf16" and bfloat16_unit() else None
