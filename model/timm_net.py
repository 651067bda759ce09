"""Networks of timm and torchvision as a body with experts: which part of them each expert has for itself."""
from __future__ import annotations

import copy
import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn

from model.experts import ExpertNet
from model.norm.facts import is_norm
from utils.errors import ConfigError, closest

TORCHVISION = "torchvision/"
PATH = "arch.args.model_name"
#: Names that hold a network's stages, one child each; and of stages that stand beside one another.
CONTAINERS = ("stages", "blocks", "layers", "features")
NUMBERED = re.compile(r"(layer|stage|s)_?\d+")
LEAST_SHARE = 0.02     # of the body's parameters that a stage has: a norm at the end of a container is none


class Halves(NamedTuple):
    """A body's forward pass in two: images -> maps or tokens -> pooled features `[N, D]`."""

    features: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    pool: Callable[[nn.Module, torch.Tensor], torch.Tensor]


def _resnet_features(body: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = body.maxpool(body.relu(body.bn1(body.conv1(x))))
    return body.layer4(body.layer3(body.layer2(body.layer1(x))))


#: How each kind of body goes; torchvision's others have one half only.
HALVES = {
    "timm": Halves(lambda body, x: body.forward_features(x), lambda body, x: body.forward_head(x, pre_logits=True)),
    "ResNet": Halves(_resnet_features, lambda body, x: body.avgpool(x).flatten(1)),
    "EfficientNet": Halves(lambda body, x: body.features(x),
                           lambda body, x: body.classifier(body.avgpool(x).flatten(1))),
    "ConvNeXt": Halves(lambda body, x: body.features(x), lambda body, x: body.classifier(body.avgpool(x))),
    "MobileNetV2": Halves(lambda body, x: body.features(x), lambda body, x: body.classifier(x.mean((2, 3)))),
    "whole": Halves(lambda body, x: body(x), lambda body, x: x),
}
HALVES["MobileNetV3"] = HALVES["EfficientNet"]


# ---- bodies ----------------------------------------------------------------------------------------------------------

def make_body(name: str) -> tuple[nn.Module, str, int]:
    """(a network without its classifier, its key in HALVES, its number of features D), with initial weights.

    Raises ConfigError: the package is missing, no such network, or one that gives more than features.
    """
    return _torchvision_body(name) if name.startswith(TORCHVISION) else _timm_body(name)


class MissingPackage(ConfigError):
    """The package that a network is of isn't installed."""


def check_package(name: str) -> Any:
    """The package that `name` is of, imported. Raises MissingPackage with the line that installs it."""
    package = "torchvision" if name.startswith(TORCHVISION) else "timm"
    if find_spec(package) is None:
        raise MissingPackage(f"{PATH}: {name} needs the package {package}; pip install {package}")
    if package == "torchvision":
        import torchvision.models
        return torchvision.models
    import timm
    return timm


def check_name(name: str) -> None:
    """Raises ConfigError where neither package knows the network."""
    package = check_package(name)
    names, known, what = None, False, "timm"
    if name.startswith(TORCHVISION):
        names, what = [TORCHVISION + key for key in package.list_models(module=package)], "torchvision"
        known = name in names
    else:
        arch, _, tag = name.partition(".")
        known = package.is_model(arch) and (not tag or name in package.list_pretrained(f"{arch}.*"))
        if not known:
            names = package.list_pretrained(f"{arch}.*") if package.is_model(arch) else package.list_models()
    if not known:
        near = closest(name, names)
        hint = f" did you mean {near!r}?" if near else ""
        raise ConfigError(f"{PATH}: {what} has no network {name[:80]!r};{hint} (see {what}'s list_models())")


def _timm_body(name: str) -> tuple[nn.Module, str, int]:
    check_name(name)
    timm = check_package(name)
    # Images of another size than a transformer was trained with: its position embedding is resampled.
    for sizes in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):
        try:
            body = timm.create_model(name, pretrained=False, num_classes=0, **sizes)
            break
        except TypeError:
            if not sizes:
                raise
    width = getattr(body, "head_hidden_size", None) or body.num_features
    if not hasattr(body, "forward_features") or not hasattr(body, "forward_head"):
        raise ConfigError(f"{PATH}: {name} has no features to put a classifier on; take another network")
    return body, "timm", int(width)


def _torchvision_body(name: str) -> tuple[nn.Module, str, int]:
    check_name(name)
    body = check_package(name).get_model(name.removeprefix(TORCHVISION), weights=None)
    if hasattr(body, "aux_logits"):
        raise ConfigError(f"{PATH}: {name} has classifiers in its middle too; take timm's, without {TORCHVISION!r}")
    place = classifier_of(body)
    width = body.get_submodule(place).in_features
    body.set_submodule(place, nn.Identity())
    kind = type(body).__name__
    return body, kind if kind in HALVES else "whole", width


def classifier_of(body: nn.Module) -> str:
    """The name of a torchvision network's last linear layer. Raises ConfigError where it ends otherwise."""
    linear = [name for name, module in body.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(f"{PATH}: torchvision's {type(body).__name__} doesn't end in a linear layer; take timm's")
    return linear[-1]


# ---- what each expert has --------------------------------------------------------------------------------------------

class Tail(nn.Module):
    """An expert's own end of a body: its modules, under the names they have in the body, one after another."""

    def __init__(self, body: nn.Module, names: list[str]):
        super().__init__()
        self.names = names
        for name in names:
            *parents, last = name.split(".")
            place: nn.Module = self
            for part in parents:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.add_module(last, body.get_submodule(name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x


class OwnBlock(nn.Module):
    """An expert's own block on pooled features, where a body has no stage that could be copied: x + MLP(norm(x))."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(nn.functional.relu(self.fc1(self.norm(x))))


def is_stage(body: nn.Module, name: str) -> bool:
    """Whether a module of that name is a stage: a child of a container of stages, or one of a numbered row."""
    parent, _, _ = name.rpartition(".")
    if parent.rpartition(".")[2] not in CONTAINERS and not NUMBERED.fullmatch(name):
        return False
    total = sum(p.numel() for p in body.parameters())
    return sum(p.numel() for p in body.get_submodule(name).parameters()) >= LEAST_SHARE * total


def tail_of(body: nn.Module, kind: str, size: int) -> list[str]:
    """The names of the modules from the last stage to the end of a body's first half, in the order of the pass.

    Read off one pass without numbers (on torch's meta device): each must be called once, with one tensor, which is
    what the one before it gave, and the last gives what the half gives. Empty where that isn't so.
    """
    trial = copy.deepcopy(body).to("meta").eval()
    parents = {"", *(name for name, child in trial.named_children() if name in CONTAINERS)}
    names = {name: module for name, module in trial.named_modules()
             if name and name.rpartition(".")[0] in parents and name not in parents}
    calls: list[tuple[str, Any, Any]] = []
    for name, module in names.items():
        module.register_forward_hook(
            lambda _, args, kwargs, out, name=name: calls.append(
                (name, args[0] if len(args) == 1 and not kwargs else None, out)), with_kwargs=True)
    try:
        with torch.no_grad():
            wanted = HALVES[kind].features(trial, torch.empty(2, 3, size, size, device="meta"))
    except Exception:  # whatever a network of others' does with a tensor without numbers
        return []
    called = [name for name, _, _ in calls]
    tail: list[str] = []
    for name, given, out in reversed(calls):
        if out is not wanted or given is None or called.count(name) > 1:
            return []
        tail.insert(0, name)
        if is_stage(trial, name):
            return tail if len(tail) < len(called) else []
        wanted = given
    return []


class TimmNet(ExpertNet):
    """A network of timm's or torchvision's, `body`, with experts: see `ExpertNet`.

    With one expert `body` is whole. With several each has its own last stage and what follows it, `experts.{i}`, under
    the names that they have in the body, where identities take their places; a body whose last stage can't be told
    leaves each expert a block on its pooled features (`OwnBlock`). What belongs to the pooling (a norm, a layer before
    the classifier) is shared.

    Args:
        model_name: timm's name, or torchvision's after "torchvision/".
        size: of the images that the last stage is found with.
    """

    def __init__(self, *, model_name: str, size: int, num_classes: int, num_experts: int = 1,
                 classifier: str = "linear", s: float = 30.0, use_experts: list[int] | str | None = None,
                 dropout: float = 0.0, add_bt: int = 0, eval_bt: bool = False, shared_classifier: bool = False,
                 bt_gather: bool = False):
        body, kind, width = make_body(model_name)
        if add_bt and width > 128 and width % 4:
            raise ConfigError(f"arch.args.add_bt: {model_name}'s {width} features can't be split among BatchFormer's "
                              "four heads; use add_bt 0 or another network")
        super().__init__(num_classes=num_classes, feat_dim=width, num_experts=num_experts, use_experts=use_experts,
                         add_bt=add_bt, eval_bt=eval_bt, shared_classifier=shared_classifier, bt_gather=bt_gather)
        self.kind = kind
        self.private: list[str] = tail_of(body, kind, size) if num_experts > 1 else []
        self.body = body
        if num_experts > 1:
            # Each from a network of its own: copies of random weights would learn the same.
            sources = [body, *(make_body(model_name)[0] for _ in range(num_experts - 1 if self.private else 0))]
            self.experts = nn.ModuleList([Tail(source, self.private) for source in sources] if self.private else
                                         [OwnBlock(width) for _ in range(num_experts)])
            for name in self.private:
                body.set_submodule(name, nn.Identity())
        self.add_heads(classifier, s, dropout, add_bt)

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        """What all experts share: x `[N, 3, H, W]` -> maps or tokens, or pooled features where no stage is private."""
        shared = HALVES[self.kind].features(self.body, x)
        return self._pooled(shared) if self.num_experts > 1 and not self.private else shared

    def expert_feat(self, shared: torch.Tensor, expert: int) -> torch.Tensor:
        """The pooled features of one expert: what `trunk` gave -> `[N, D]`."""
        if self.num_experts > 1:
            shared = self.experts[expert](shared)
        return self._pooled(shared) if self.num_experts == 1 or self.private else shared

    def _pooled(self, maps: torch.Tensor) -> torch.Tensor:
        return HALVES[self.kind].pool(self.body, maps)

    def stages(self) -> list[tuple[str, ...]]:
        """Names of modules and parameters of the backbone, stage by stage from the stem on; what follows a stage and
        is none belongs to it. An expert's own are in `experts.{i}`."""
        found: list[list[str]] = [[f"body.{name}" for name, _ in self.body.named_parameters(recurse=False)]]
        for name, child in self.body.named_children():
            inside = [f"{name}.{part}" for part, _ in child.named_children()] if name in CONTAINERS else [name]
            for place in inside:
                private = place in self.private
                at = self.experts[0] if private else self.body
                names = [f"experts.{i}.{place}" for i in range(self.num_experts)] if private else [f"body.{place}"]
                if any(True for _ in at.get_submodule(place).parameters()):
                    found += [names] if name in CONTAINERS or NUMBERED.fullmatch(place) else []
                    found[-1] += names if names is not found[-1] else []
        if self.num_experts > 1 and not self.private:
            found.append(["experts"])
        return [tuple(names) for names in found if names]

    def nbn_scope(self, where: str | list[int] = "last") -> list[list[nn.Module]]:
        """Which norms NBN replaces, a list an expert: all those of the `where` stages ("last", a list of numbers from
        1, or "all", the stem's too). Raises ConfigError for any other `where`."""
        stages = self.stages()[1:] or self.stages()
        numbers = list(range(1, len(stages) + 1))
        chosen = {"last": numbers[-1:], "all": numbers}.get(where) if isinstance(where, str) else where
        if not isinstance(chosen, list | tuple) or not chosen or not set(chosen) <= set(numbers):
            raise ConfigError(f"arch.args.norm.args.where: {where!r} should be 'last', 'all' or a list of stages "
                              f"out of {numbers}")
        names = [name for n in sorted(set(chosen)) for name in stages[n - 1]]
        names = [*(self.stages()[0] if where == "all" else ()), *(name for name in names)]
        scope: list[list[nn.Module]] = [[] for _ in range(self.num_experts)]
        for name in dict.fromkeys(names):
            if name in dict(self.named_modules()):
                found = re.match(r"experts\.(\d+)\.", name)
                scope[int(found[1]) if found else 0] += [m for m in self.get_submodule(name).modules() if is_norm(m)]
        return scope
