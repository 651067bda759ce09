"""Parameter-efficient fine-tuning: training parts added to a pretrained network, or a few of its own parameters.

`arch.args.tuning` names an entry of TUNINGS. Each keeps the network's own parameter names, so that its weights load as
usual; all but prompts change nothing at the start; `requires_grad` is left set on trained parameters only. The defaults
are those of LIFT (Shi et al., *Long-Tail Learning with Foundation Model: Heavy Fine-Tuning Hurts*, ICML 2024) where it
has any.

The peft library isn't used because it wraps the network, renames its parameters and lacks AdaptFormer.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from model.norm.facts import is_norm
from model.tuning_parts import BLOCK, AdaptedBlock, Adapter, LoRALinear, PromptedBlocks
from utils.config.build import build
from utils.errors import ConfigError

PATH = "arch.args.tuning"


def install_tuning(network: nn.Module, spec: str | Mapping[str, Any], num_classes: int,
                   tails: Iterable[nn.Module] = (), path: str = PATH) -> list[nn.Parameter]:
    """Freeze `network` except what a kind of tuning trains, after adding the parts that it needs, in place.

    Args:
        network: a network without its classifier: one of timm's vision transformers, or any for "bias" and "norm".
        spec: a name in TUNINGS or {"type": name, "args": {...}}.
        num_classes: C, which determines the default width of added parts.
        tails: end parts that were moved out of the network, one per expert, with the names that they had in it.
        path: the config key of `spec`, for error messages.
    Returns:
        the parameters that are trained.
    Raises:
        ConfigError: an unknown type or argument, or a network that the tuning doesn't suit.
    """
    spec = {"type": spec} if isinstance(spec, str) else spec
    parts = Parts(network, tuple(tails))
    trained = list(build(TUNINGS, spec, path, parts, num_classes))
    if not trained:
        raise ConfigError(f"{path}: {type(network).__name__} has nothing that {spec['type']} could train")
    for part in (network, *parts.tails):
        part.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


class Parts(NamedTuple):
    """A network, and the end parts that were moved out of it, one per expert."""

    body: nn.Module
    tails: tuple[nn.Module, ...] = ()

    def places(self) -> list[tuple[nn.Module, str]]:
        """(parent module, name) of each block of a plain vision transformer; [] for other networks."""
        holders = [getattr(part, "blocks", None) for part in (self.body, *self.tails)]
        found = [(holder, name) for holder in holders if holder is not None for name, block in holder.named_children()
                 if next(block.children(), None) is not None]     # an empty module replaces one that is in the tails
        whole = all(isinstance(getattr(getattr(getattr(*place), "attn", None), "qkv", None), nn.Linear)
                    for place in found)
        return found if whole and isinstance(self.body.blocks if found else None, nn.Sequential) else []

    def depth(self) -> int:
        """L, the number of blocks that an image passes through."""
        apart = max(len(self.tails), 1)
        inner = [holder is self.body.blocks for holder, _ in self.places()]
        return sum(inner) + (len(inner) - sum(inner)) // apart

    def trainable(self) -> list[nn.Module]:
        """The modules whose biases and norms are tuned: a vision transformer's blocks, or else everything."""
        return [getattr(*place) for place in self.places()] or [self.body, *self.tails]


def default_width(num_classes: int, depth: int) -> int:
    """LIFT's bottleneck width for adapters and rank for LoRA: 2^floor(log2(C / (2 L))), at least 1, for C classes and L
    = `depth` blocks. All added parts together then have about as many parameters as the classifier."""
    return 2 ** max(0, math.floor(math.log2(num_classes / (2 * depth))))


def vit_places(parts: Parts, kind: str, whole: bool = False) -> list[tuple[nn.Module, str]]:
    """(parent module, name) of a vision transformer's blocks. whole: their parts must be exactly `BLOCK`.

    Raises ConfigError, naming the tuning `kind`, for any other network.
    """
    places = parts.places()
    if not places or (whole and any({name for name, _ in getattr(*place).named_children()} != set(BLOCK)
                                    for place in places)):
        raise ConfigError(f"{PATH}: {kind} is for plain vision transformers (vit_*, deit_*); "
                          f"{type(parts.body).__name__} is none; use \"bias\" or \"norm\"")
    return places


def at_least_one(value: int | None, name: str) -> None:
    """Raises ValueError if `value` is below 1; None is accepted."""
    if value is not None and value < 1:
        raise ValueError(f"{name} must be 1 or more, not {value}")


# ---------------------------------------------------------------------- AdaptFormer

def adaptformer(parts: Parts, num_classes: int, dim: int | None = None,
                scale: float | None = None) -> Iterable[nn.Parameter]:
    """AdaptFormer (Chen et al., NeurIPS 2022): an adapter of width `dim` (None: see default_width) beside each MLP,
    times `scale` (None: learned). 2 D dim + 3 D + dim + 1 parameters per block with a learned scale."""
    at_least_one(dim, "dim")
    places = vit_places(parts, "adaptformer", whole=True)
    dim = dim or default_width(num_classes, parts.depth())
    trained: list[nn.Parameter] = []
    for holder, name in places:
        block = getattr(holder, name)
        adapted = AdaptedBlock(block, Adapter(block.attn.qkv.in_features, dim, scale))
        setattr(holder, name, adapted)
        trained += adapted.adapter.parameters()
    return trained


# ---------------------------------------------------------------------- LoRA

def lora(parts: Parts, num_classes: int, rank: int | None = None, alpha: float = 1.0,
         targets: list[Literal["q", "k", "v", "proj", "fc1", "fc2"]] = ("q", "v")) -> Iterable[nn.Parameter]:
    """LoRA of `rank` (None: see default_width), times alpha / rank, on the `targets`: the attention's queries, keys,
    values and output (`proj`), and the MLP's layers. rank (D_in + D_out) parameters per target and block."""
    at_least_one(rank, "rank")
    if not targets:
        raise ValueError("targets must name one of q, k, v, proj, fc1, fc2")
    places = vit_places(parts, "lora", whole=True)
    rank = rank or default_width(num_classes, parts.depth())
    trained: list[nn.Parameter] = []
    for place in places:
        block = getattr(*place)
        third = block.attn.qkv.out_features // 3
        inside = {name: (i * third, third) for i, name in enumerate("qkv") if name in targets}
        for owner, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
            linear = getattr(owner, name, None)
            if name not in targets and not (name == "qkv" and inside):
                continue
            if not isinstance(linear, nn.Linear):
                raise ConfigError(f"{PATH}.args.targets: {type(parts.body).__name__}'s blocks have no layer {name}")
            layer = LoRALinear(linear, rank, alpha, inside if name == "qkv" else {name: (0, linear.out_features)})
            setattr(owner, name, layer)
            trained += [*layer.lora_a.values(), *layer.lora_b.values()]
    return trained


# ---------------------------------------------------------------------- prompts

def prompt(parts: Parts, num_classes: int, tokens: int = 10, deep: bool = True) -> Iterable[nn.Parameter]:
    """Visual prompt tuning (Jia et al., ECCV 2022): `tokens` learned tokens added before every block, or (`deep` false)
    before the first only. Experts' own blocks get none."""
    at_least_one(tokens, "tokens")
    shared = [place for place in vit_places(parts, "prompt") if place[0] is parts.body.blocks]
    features = getattr(*shared[0]).attn.qkv.in_features
    patch = getattr(parts.body.patch_embed, "proj", None)
    area = math.prod(patch.weight.shape[1:]) if patch is not None else features
    bound = math.sqrt(6 / (area + features))        # Xavier-uniform bound of the patch embedding, as in VPT
    prompts = torch.empty(len(shared) if deep else 1, tokens, features).uniform_(-bound, bound)
    parts.body.blocks = PromptedBlocks(parts.body.blocks, prompts)
    return [parts.body.blocks.prompts]


# ---------------------------------------------------------------------- the network's own parameters

def bias(parts: Parts, num_classes: int) -> Iterable[nn.Parameter]:
    """BitFit (Ben Zaken et al., ACL 2022): all biases; in a vision transformer, those in its blocks only."""
    return [p for part in parts.trainable() for name, p in part.named_parameters()
            if name.rpartition(".")[2] == "bias"]


def norm(parts: Parts, num_classes: int) -> Iterable[nn.Parameter]:
    """The norms' weights and biases; in a vision transformer, those in its blocks only. Batch norms' running statistics
    are updated too."""
    return [p for part in parts.trainable() for layer in part.modules()
            if is_norm(layer) or "norm" in type(layer).__name__.lower() for p in layer.parameters(recurse=False)]


#: What `arch.args.tuning` may name: (parts, num_classes, **args) -> the parameters that are trained.
TUNINGS = {"adaptformer": adaptformer, "lora": lora, "prompt": prompt, "bias": bias, "norm": norm}
