"""The parts that `model.tuning` adds to a vision transformer: adapters, low-rank updates, prompt tokens."""
from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

#: The parts of a plain vision transformer's block; a block with other parts has another forward pass.
BLOCK = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")


class Adapter(nn.Module):
    """A bottleneck beside a block's MLP: scale · up(relu(down(norm(x)))), x [N, T, D] -> the same shape.

    `up` starts at 0, so the block is unchanged at first. scale: a fixed factor; None: learned, from 1.
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
    """A transformer block with an Adapter beside its MLP (AdaptFormer; Chen et al., NeurIPS 2022), named `adapter`.

    The block's other parts keep their names. x [N, T, D] -> the same shape.
    """

    def __init__(self, block: nn.Module, adapter: Adapter):
        super().__init__()
        for name in BLOCK:
            setattr(self, name, getattr(block, name))
        self.adapter = adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) + self.adapter(x)


class LoRALinear(nn.Linear):
    """W x + b with a low-rank update of some rows of W: the rows of part p get (alpha / rank) · B_p A_p x in addition.

    Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022. `weight` and `bias` are those of
    `linear`. parts: name -> (first row, number of rows). A_p [rank, D_in] starts Kaiming-uniform, B_p [rows, rank] as
    zeros. x [..., D_in] -> [..., D_out].
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
    """A copy of `module` in which every LoRA update is added to its layer's weights; `module` is unchanged."""
    merged = copy.deepcopy(module)
    for name, layer in list(merged.named_modules()):
        if isinstance(layer, LoRALinear):
            where, _, last = name.rpartition(".")
            setattr(merged.get_submodule(where), last, layer.merged())
    return merged


class PromptedBlocks(nn.Sequential):
    """A vision transformer's blocks with learned prompt tokens appended to the image's (VPT; Jia et al., ECCV 2022).

    x [N, T, D] -> [N, T, D], without prompt tokens. `prompts` [1, P, D] (shallow): P tokens are appended before the
    first block; [L, P, D] (deep): before each block, P of its own replace the previous ones.
    """

    def __init__(self, blocks: nn.Sequential, prompts: torch.Tensor):
        super().__init__(*blocks)
        self.prompts = nn.Parameter(prompts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = x.shape[1]
        for i, block in enumerate(self):
            if i < len(self.prompts):
                x = torch.cat([x[:, :own], self.prompts[i].expand(x.shape[0], -1, -1).to(x.dtype)], 1)
            x = block(x)
        return x[:, :own]


#: Name prefixes of the tensors that each of these parts adds to the network's own.
_ADDED = {AdaptedBlock: ("adapter.",), LoRALinear: ("lora_a.", "lora_b."), PromptedBlocks: ("prompts",)}


def added_names(network: nn.Module) -> set[str]:
    """The state_dict names of tensors that tuning has added, which the network's pretrained weights don't have."""
    return {f"{place}.{name}" for place, part in network.named_modules() if type(part) in _ADDED
            for name in part.state_dict() if name.startswith(_ADDED[type(part)])}
