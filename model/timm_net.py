"""Networks of timm and torchvision as a body with experts, each with its own last stage."""
from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn

from model.experts import ExpertNet, nbn_stages
from model.norm.facts import is_norm
from model.timm_stages import find_stages, parents_of, tail_of
from utils.errors import ConfigError, closest

TORCHVISION = "torchvision/"
PATH = "arch.args.model_name"


class Halves(NamedTuple):
    """A body's forward pass in two halves: images `[N, 3, H, W]` -> maps or tokens -> pooled features `[N, D]`."""

    features: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    pool: Callable[[nn.Module, torch.Tensor], torch.Tensor]


def _resnet_features(body: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = body.maxpool(body.relu(body.bn1(body.conv1(x))))
    return body.layer4(body.layer3(body.layer2(body.layer1(x))))


def _regnet_features(body: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return body.trunk_output(body.stem(x))


def _shufflenet_features(body: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return body.conv5(body.stage4(body.stage3(body.stage2(body.maxpool(body.conv1(x))))))


def _vit_features(body: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = body._process_input(x)
    return body.encoder(torch.cat([body.class_token.expand(x.shape[0], -1, -1), x], 1))


#: Each kind of body's forward pass; other torchvision networks run "whole", as the first half.
HALVES = {
    "timm": Halves(lambda body, x: body.forward_features(x), lambda body, x: body.forward_head(x, pre_logits=True)),
    "ResNet": Halves(_resnet_features, lambda body, x: body.avgpool(x).flatten(1)),
    "EfficientNet": Halves(lambda body, x: body.features(x),
                           lambda body, x: body.classifier(body.avgpool(x).flatten(1))),
    "ConvNeXt": Halves(lambda body, x: body.features(x), lambda body, x: body.classifier(body.avgpool(x))),
    "MobileNetV2": Halves(lambda body, x: body.features(x), lambda body, x: body.classifier(x.mean((2, 3)))),
    "DenseNet": Halves(lambda body, x: body.features(x),
                       lambda body, x: nn.functional.adaptive_avg_pool2d(nn.functional.relu(x), 1).flatten(1)),
    "RegNet": Halves(_regnet_features, lambda body, x: body.avgpool(x).flatten(1)),
    "ShuffleNetV2": Halves(_shufflenet_features, lambda body, x: x.mean((2, 3))),
    "VisionTransformer": Halves(_vit_features, lambda body, x: body.heads(x[:, 0])),
    "SwinTransformer": Halves(lambda body, x: body.features(x),
                              lambda body, x: body.avgpool(body.permute(body.norm(x))).flatten(1)),
    "whole": Halves(lambda body, x: body(x), lambda body, x: x),
}
HALVES["MobileNetV3"] = HALVES["EfficientNet"]


# ---- bodies ----------------------------------------------------------------------------------------------------------

def make_body(name: str) -> tuple[nn.Module, str, int]:
    """(a network without its classifier and with initial weights, its key in HALVES, its number of features D).

    Raises ConfigError if the package is missing, the network unknown, or a classifier can't be put on its features.
    """
    return _torchvision_body(name) if name.startswith(TORCHVISION) else _timm_body(name)


class MissingPackage(ConfigError):
    """The package that a network comes from isn't installed."""


def check_package(name: str) -> Any:
    """The imported package of network `name`: timm or torchvision.models. Raises MissingPackage, naming the command
    that installs it."""
    package = "torchvision" if name.startswith(TORCHVISION) else "timm"
    if find_spec(package) is None:
        raise MissingPackage(f"{PATH}: {name} needs the package {package}; pip install {package}")
    if package == "torchvision":
        import torchvision.models
        return torchvision.models
    import timm
    return timm


def check_name(name: str) -> None:
    """Raises ConfigError if the package that `name` refers to doesn't know the network."""
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
    # Let a transformer take other image sizes than it was trained with, by resampling its position embedding.
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
    """The name of a torchvision network's last linear layer. Raises ConfigError if it has none."""
    linear = [name for name, module in body.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError(f"{PATH}: torchvision's {type(body).__name__} doesn't end in a linear layer; take timm's")
    return linear[-1]


# ---- experts' own parts ----------------------------------------------------------------------------------------------

class Tail(nn.Module):
    """An expert's own end of a body: the modules `names`, under the names they have in `body`, run in sequence."""

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
    `experts.{i}`, under the names that they have in the body, which holds identities there instead. If the body's last
    stage can't be identified, each expert has its own block on the pooled features (`OwnBlock`). Layers that are part
    of the pooling (a norm, a layer before the classifier) are shared.

    Args:
        model_name: timm's name, or torchvision's after "torchvision/".
        size: side in pixels of the trial image used to find the last stage.
        Others: see `model.expert_model.check_common`.
    Raises:
        ConfigError: an unknown network, or one whose features BatchFormer's heads can't split.
    """

    def __init__(self, *, model_name: str, size: int, num_classes: int, num_experts: int = 1,
                 classifier: str = "linear", s: float = 30.0, use_experts: list[int] | str | None = None,
                 dropout: float = 0.0, add_bt: int = 0, eval_bt: bool = False, shared_classifier: bool = False,
                 bt_gather: bool = False, bt_weights: tuple[float, float] = (1.0, 1.0)):
        body, kind, width = make_body(model_name)
        if add_bt and width > 128 and width % 4:
            raise ConfigError(f"arch.args.add_bt: {model_name}'s {width} features can't be split among BatchFormer's "
                              "four heads; use add_bt 0 or another network")
        super().__init__(num_classes=num_classes, feat_dim=width, num_experts=num_experts, use_experts=use_experts,
                         eval_bt=eval_bt, shared_classifier=shared_classifier, bt_gather=bt_gather,
                         bt_weights=bt_weights)
        self.kind = kind
        self.places = find_stages(body)
        self.private: list[str] = tail_of(body, HALVES[kind].features, size, self.places) if num_experts > 1 else []
        self.body = body
        if num_experts > 1:
            # Each tail from a newly initialised network: experts with equal weights would learn the same.
            sources = [body, *(make_body(model_name)[0] for _ in range(num_experts - 1 if self.private else 0))]
            self.experts = nn.ModuleList([Tail(source, self.private) for source in sources] if self.private else
                                         [OwnBlock(width) for _ in range(num_experts)])
            for name in self.private:
                body.set_submodule(name, nn.Identity())
        self.add_heads(classifier, s, dropout, add_bt)

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
