"""Fine-tuning with few parameters: what is added to a pretrained network, or left free in it, while the rest is frozen.

`arch.args.tuning` names a line of TUNINGS. Each keeps the network's own names, so that its weights load as ever, adds
parts that change nothing at the start, and leaves `requires_grad` set on what is trained. The settings are those of
LIFT (Shi et al., *Long-Tail Learning with Foundation Model: Heavy Fine-Tuning Hurts*, ICML 2024) where it has any.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from model.norm.facts import is_norm
from utils.config.build import build
from utils.errors import ConfigError

#: What a block of a plain vision transformer is made of; one with other parts computes something else.
PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
PATH = "arch.args.tuning"


def install_tuning(network: nn.Module, spec: str | Mapping[str, Any], num_classes: int, path: str = PATH) -> list[str]:
    """Freeze `network` but for what a kind of tuning trains, which is added where the network has it not.

    Args:
        network: without its classifier; one of timm's vision transformers, or for "bias" and "norm" any.
        spec: a name of TUNINGS or {"type": name, "args": {...}}.
        num_classes: C, which the default width of what is added follows.
    Returns:
        the names of the parameters that are trained.
    Raises:
        ConfigError: unknown type or arguments, or a network that has no place for it.
    """
    spec = {"type": spec} if isinstance(spec, str) else spec
    chosen = {id(p) for p in build(TUNINGS, spec, path, network, num_classes)}
    names = []
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(id(parameter) in chosen)
        names += [name] * parameter.requires_grad
    if not names:
        raise ConfigError(f"{path}: {type(network).__name__} has nothing that {spec['type']} could train")
    return names


def default_width(num_classes: int, depth: int) -> int:
    """LIFT's bottleneck of adapters and rank of LoRA: 2^floor(log2(C / (2 L))), at least 1, for L blocks. The parts
    then have about as many parameters together as the classifier."""
    return 2 ** max(0, math.floor(math.log2(num_classes / (2 * depth))))


def vit_blocks(network: nn.Module, kind: str, whole: bool = False) -> nn.Sequential:
    """A vision transformer's blocks; ConfigError for another network. whole: the blocks' insides must be as usual."""
    blocks = getattr(network, "blocks", None)
    fits = isinstance(blocks, nn.Sequential) and len(blocks) and all(
        isinstance(getattr(getattr(block, "attn", None), "qkv", None), nn.Linear)
        and (not whole or {name for name, _ in block.named_children()} == set(PARTS)) for block in blocks)
    if not fits:
        raise ConfigError(f"{PATH}: {kind} is for plain vision transformers (vit_*, deit_*); {type(network).__name__} "
                          "is none; use \"bias\" or \"norm\"")
    return blocks


def at_least_one(value: int | None, name: str) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be 1 or more, not {value}")


# ---------------------------------------------------------------------- AdaptFormer

class Adapter(nn.Module):
    """A bottleneck beside a block's MLP: scale · up(relu(down(norm(x)))), x [N, T, D].

    `up` starts at 0. scale: None for a learned one that starts at 1.
    """

    def __init__(self, features: int, width: int, scale: float | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, features)
        self.scale = nn.Parameter(torch.ones(1)) if scale is None else scale
        nn.init.kaiming_normal_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.up(F.relu(self.down(self.norm(x))))


class AdaptedBlock(nn.Module):
    """A transformer block with an Adapter beside its MLP (Chen et al., NeurIPS 2022). The block's parts keep their
    names, and the adapter is `adapter`."""

    def __init__(self, block: nn.Module, adapter: Adapter):
        super().__init__()
        for name in PARTS:
            setattr(self, name, getattr(block, name))
        self.adapter = adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) + self.adapter(x)


def adaptformer(network: nn.Module, num_classes: int, dim: int | None = None,
                scale: float | None = None) -> Iterable[nn.Parameter]:
    """AdaptFormer: an adapter of width `dim` (None: see default_width) beside each MLP, times `scale` (None: learned).
    2 D dim + 3 D + dim + 1 parameters a block with a learned scale."""
    at_least_one(dim, "dim")
    blocks = vit_blocks(network, "adaptformer", whole=True)
    dim = dim or default_width(num_classes, len(blocks))
    for i, block in enumerate(blocks):
        blocks[i] = AdaptedBlock(block, Adapter(block.attn.qkv.in_features, dim, scale))
    return [p for block in blocks for p in block.adapter.parameters()]


# ---------------------------------------------------------------------- LoRA

class LoRALinear(nn.Linear):
    """W x + b with a low-rank update of some of W's rows: part p gets (alpha / rank) · B_p A_p x.

    Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022. `weight` and `bias` are the linear
    layer's own. parts: name -> (first row, number of rows); A_p [rank, D] starts Kaiming-uniform, B_p [rows, rank] at
    0.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, parts: Mapping[str, tuple[int, int]]):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.factor, self.parts = alpha / rank, dict(sorted(parts.items(), key=lambda item: item[1]))
        self.lora_a = nn.ParameterDict({name: torch.empty(rank, linear.in_features) for name in self.parts})
        self.lora_b = nn.ParameterDict({name: torch.zeros(rows, rank) for name, (_, rows) in self.parts.items()})
        for a in self.lora_a.values():
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, at, updates = super().forward(x), 0, []
        for name, (first, rows) in self.parts.items():
            updates += [out.new_zeros(*out.shape[:-1], first - at)] if first > at else []
            updates.append(self.factor * F.linear(F.linear(x, self.lora_a[name]), self.lora_b[name]))
            at = first + rows
        updates += [out.new_zeros(*out.shape[:-1], self.out_features - at)] if at < self.out_features else []
        return out + torch.cat(updates, -1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear layer that computes the same."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None,
                           device=self.weight.device, dtype=self.weight.dtype)
        linear.weight.copy_(self.weight)
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        for name, (first, rows) in self.parts.items():
            linear.weight[first:first + rows] += self.factor * self.lora_b[name] @ self.lora_a[name]
        return linear.train(self.training)


def merge_lora(module: nn.Module) -> nn.Module:
    """A copy with every LoRA update added into the weights that it belongs to; `module` stays as it is."""
    merged = copy.deepcopy(module)
    for name, layer in list(merged.named_modules()):
        if isinstance(layer, LoRALinear):
            where, _, last = name.rpartition(".")
            setattr(merged.get_submodule(where), last, layer.merged())
    return merged


def lora(network: nn.Module, num_classes: int, rank: int | None = None, alpha: float = 1.0,
         parts: list[Literal["q", "k", "v", "proj", "fc1", "fc2"]] = ("q", "v")) -> Iterable[nn.Parameter]:
    """LoRA of the attention's queries, keys, values and output (`proj`) and the MLP's layers, of `rank` (None: see
    default_width), times alpha / rank. rank (D + rows) parameters a part and block."""
    at_least_one(rank, "rank")
    if not parts:
        raise ValueError("parts must name one of q, k, v, proj, fc1, fc2")
    blocks = vit_blocks(network, "lora", whole=True)
    rank = rank or default_width(num_classes, len(blocks))
    trained: list[nn.Parameter] = []
    for block in blocks:
        third = block.attn.qkv.out_features // 3
        rows = {"qkv": {name: (i * third, third) for i, name in enumerate("qkv") if name in parts}}
        places = [(block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")]
        for owner, name in places:
            linear = getattr(owner, name, None)
            chosen = rows.get(name, {name: (0, getattr(linear, "out_features", 0))} if name in parts else {})
            if chosen:
                if not isinstance(linear, nn.Linear):
                    raise ConfigError(f"{PATH}.args.parts: {type(network).__name__}'s blocks have no layer {name}")
                layer = LoRALinear(linear, rank, alpha, chosen)
                setattr(owner, name, layer)
                trained += [*layer.lora_a.values(), *layer.lora_b.values()]
    return trained


# ---------------------------------------------------------------------- prompts

class PromptedBlocks(nn.Sequential):
    """A vision transformer's blocks with learned tokens behind the image's (Jia et al., ECCV 2022).

    `prompts` [L or 1, P, D]: shallow, P tokens join before the first block; deep, each block gets P of its own in place
    of those before. What comes out has the image's tokens only.
    """

    def __init__(self, blocks: nn.Sequential, prompts: torch.Tensor):
        super().__init__(*blocks)
        self.prompts = nn.Parameter(prompts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = x.shape[1]
        for i, block in enumerate(self):
            if i < len(self.prompts):
                x = torch.cat([x[:, :own], self.prompts[i].expand(len(x), -1, -1).to(x.dtype)], 1)
            x = block(x)
        return x[:, :own]


def prompt(network: nn.Module, num_classes: int, tokens: int = 10, deep: bool = True) -> Iterable[nn.Parameter]:
    """Visual prompt tuning: `tokens` learned tokens, before every block or (`deep` false) before the first only."""
    at_least_one(tokens, "tokens")
    blocks = vit_blocks(network, "prompt")
    features = blocks[0].attn.qkv.in_features
    patch = getattr(network.patch_embed, "proj", None)
    area = math.prod(patch.weight.shape[1:]) if patch is not None else features
    bound = math.sqrt(6 / (area + features))        # Xavier's of the patch embedding, as VPT has it
    prompts = torch.empty(len(blocks) if deep else 1, tokens, features).uniform_(-bound, bound)
    network.blocks = PromptedBlocks(blocks, prompts)
    return [network.blocks.prompts]


# ---------------------------------------------------------------------- what is there already

def bias(network: nn.Module, num_classes: int) -> Iterable[nn.Parameter]:
    """BitFit (Ben Zaken et al., ACL 2022): every bias, of a vision transformer those of its blocks."""
    scope = getattr(network, "blocks", network)
    return [p for name, p in scope.named_parameters() if name.rpartition(".")[2] == "bias"]


def norm(network: nn.Module, num_classes: int) -> Iterable[nn.Parameter]:
    """The norms' weights and biases, of a vision transformer those of its blocks. Batch norms' statistics move with
    the training images."""
    scope = getattr(network, "blocks", network)
    return [p for layer in scope.modules() if is_norm(layer) or "norm" in type(layer).__name__.lower()
            for p in layer.parameters(recurse=False)]


#: What `arch.args.tuning` may name: (network, num_classes, **args) -> the parameters that are trained.
TUNINGS = {"adaptformer": adaptformer, "lora": lora, "prompt": prompt, "bias": bias, "norm": norm}
