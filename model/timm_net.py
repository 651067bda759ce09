"""Networks of timm and torchvision as a body with experts, each with its own last stage."""
from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.experts import ExpertNet, nbn_stages
from model.norm.facts import is_norm
from model.timm_body import HALVES, check_features, make_body, set_checkpointing
from model.timm_stages import find_stages, parents_of, tail_of
from utils.errors import ConfigError


class Tail(nn.Module):
    """An expert's own end of a body: the modules `names`, under the names they have in `body`, run in sequence; with
    `checkpointed`, training stores only the input of each and computes the rest again in the backward pass."""

    def __init__(self, body: nn.Module, names: list[str], checkpointed: bool = False):
        super().__init__()
        self.names, self.checkpointed = names, checkpointed
        for name in names:
            *parents, last = name.split(".")
            place: nn.Module = self
            for part in parents:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.add_module(last, body.get_submodule(name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        again = self.checkpointed and self.training
        for name in self.names:
            module = self.get_submodule(name)
            x = checkpoint(module, x, use_reentrant=False) if again else module(x)
        return x


class OwnBlock(nn.Module):
    """An expert's own block on pooled features, for bodies without a stage that can be copied: x + MLP(norm(x)).

    x `[N, width]` -> the same shape.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(nn.functional.relu(self.fc1(self.norm(x))))


class TimmNet(ExpertNet):
    """A timm or torchvision network, `body`, with experts; inputs and outputs: see `ExpertNet`.

    With one expert `body` is the whole network. With several, each has its own last stage and all after it in
    `experts.{i}`, under the names that they have in the body, which holds empty modules there. If the body's last
    stage can't be identified, each expert has its own block on the pooled features (`OwnBlock`). Layers that are part
    of the pooling (a norm, a layer before the classifier) are shared.

    Args:
        model_name: timm's name, or torchvision's after "torchvision/".
        size: side in pixels of the trial image used to find the last stage.
        model_args: see `TimmModel`.
        grad_checkpointing: see `TimmModel`.
        Others: see `model.expert_model.check_common`.
    Raises:
        ConfigError: an unknown network, or one whose features BatchFormer's heads can't split.
    """

    def __init__(self, *, model_name: str, size: int, num_classes: int, model_args: dict[str, Any] | None = None,
                 grad_checkpointing: bool = False, num_experts: int = 1,
                 classifier: str = "linear", s: float = 30.0, use_experts: list[int] | str | None = None,
                 dropout: float = 0.0, add_bt: int = 0, eval_bt: bool = False, shared_classifier: bool = False,
                 bt_gather: bool = False, bt_weights: tuple[float, float] = (1.0, 1.0)):
        body, kind, width = make_body(model_name, model_args)
        if model_args:
            check_features(body, kind, width, size)
        if add_bt and width > 128 and width % 4:
            raise ConfigError(f"arch.args.add_bt: {model_name}'s {width} features can't be split among BatchFormer's "
                              "four heads; use add_bt 0 or another network")
        super().__init__(num_classes=num_classes, feat_dim=width, num_experts=num_experts, use_experts=use_experts,
                         eval_bt=eval_bt, shared_classifier=shared_classifier, bt_gather=bt_gather,
                         bt_weights=bt_weights)
        self.kind, self.grad_checkpointing = kind, grad_checkpointing
        self.places = find_stages(body)
        self.private: list[str] = tail_of(body, HALVES[kind].features, size, self.places) if num_experts > 1 else []
        self.body = body
        if num_experts > 1:
            # Each tail from a newly initialised network: experts with equal weights would learn the same.
            others = range(num_experts - 1 if self.private else 0)
            sources = [body, *(make_body(model_name, model_args)[0] for _ in others)]
            self.experts = nn.ModuleList(
                [Tail(source, self.private, grad_checkpointing) for source in sources] if self.private else
                [OwnBlock(width) for _ in range(num_experts)])
            for name in self.private:
                body.set_submodule(name, nn.Sequential())   # an identity that timm's checkpointing can iterate over
        set_checkpointing(body, grad_checkpointing)         # after `tail_of`, which it would hide the stages from
        self.add_heads(classifier, s, dropout, add_bt)

    def train(self, mode: bool = True) -> TimmNet:
        if self.grad_checkpointing:     # timm's networks would keep it in evaluation, and in what is exported
            set_checkpointing(self.body, mode)
        return super().train(mode)

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        """The part that all experts share: x `[N, 3, H, W]` -> maps or tokens; if experts have an `OwnBlock` instead of
        a stage, pooled features `[N, D]`."""
        shared = HALVES[self.kind].features(self.body, x)
        return self._pooled(shared) if self.num_experts > 1 and not self.private else shared

    def expert_feat(self, shared: torch.Tensor, expert: int) -> torch.Tensor:
        """The pooled features of one expert (index from 0): output of `trunk` -> `[N, D]`."""
        if self.num_experts > 1:
            shared = self.experts[expert](shared)
        return self._pooled(shared) if self.num_experts == 1 or self.private else shared

    def _pooled(self, maps: torch.Tensor) -> torch.Tensor:
        return HALVES[self.kind].pool(self.body, maps)

    def stages(self) -> list[tuple[str, ...]]:
        """Names of the backbone's modules and parameters, stage by stage from the stem on (`find_stages`). Parts added
        later (prompts) belong to the stage of the part before them. Experts' own parts are named `experts.{i}.*`."""
        found: dict[int, list[str]] = {}
        parents = parents_of(self.places)
        number = 0

        def visit(module: nn.Module, prefix: str) -> None:
            nonlocal number
            for name, _ in module.named_parameters(recurse=False):
                found.setdefault(self.places.get(prefix + name, number), []).append(f"body.{prefix}{name}")
            for name, child in module.named_children():
                place = prefix + name
                if place in parents:
                    visit(child, f"{place}.")
                    continue
                number = self.places.get(place, number)
                if place in self.private:
                    found.setdefault(number, []).extend(f"experts.{i}.{place}" for i in range(self.num_experts))
                elif any(True for _ in child.parameters()):
                    found.setdefault(number, []).append(f"body.{place}")
        visit(self.body, "")
        stages = [tuple(found[number]) for number in sorted(found)]
        return stages if self.num_experts == 1 or self.private else [*stages, ("experts",)]

    def nbn_scope(self, where: str | list[int] = "last") -> list[list[nn.Module]]:
        """The norms that NBN replaces, one list per expert: all norms in the stages that `where` selects ("last", a
        list of numbers from 1, or "all", which includes the stem). Raises ConfigError for any other `where`."""
        stages = self.stages()[1:] or self.stages()
        chosen = nbn_stages(where, list(range(1, len(stages) + 1)))
        names = [*(self.stages()[0] if where == "all" else ()), *(name for n in chosen for name in stages[n - 1])]
        modules = dict(self.named_modules())
        scope: list[list[nn.Module]] = [[] for _ in range(self.num_experts)]
        for name in dict.fromkeys(names):
            if name in modules:
                found = re.match(r"experts\.(\d+)\.", name)
                scope[int(found[1]) if found else 0] += [m for m in modules[name].modules() if is_norm(m)]
        return scope
