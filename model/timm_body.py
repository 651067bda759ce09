"""The networks of timm and torchvision, without their classifiers: found by name, made, run in two halves."""
from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn

from utils.errors import ConfigError, closest

TORCHVISION = "torchvision/"
PATH = "arch.args.model_name"
ARGS = "arch.args.model_args"
CHECKPOINTING = "arch.args.grad_checkpointing"
#: Arguments of a network's constructor that other keys set.
SET_ELSEWHERE = {
    "num_classes": "arch.args.num_classes", "pretrained": "arch.args.weights", "weights": "arch.args.weights",
    "checkpoint_path": "arch.args.weights", "pretrained_cfg": "arch.args.weights",
    "pretrained_cfg_overlay": "arch.args.weights", "cache_dir": "arch.args.weights", "progress": "arch.args.weights",
    "model_name": PATH, "img_size": "data_loader.args.image_size", "image_size": "data_loader.args.image_size",
    "dynamic_img_size": "data_loader.args.image_size", "strict_img_size": "data_loader.args.image_size"}
FIXED = ("in_chans", "features_only", "out_indices")


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


def make_body(name: str, model_args: dict[str, Any] | None = None) -> tuple[nn.Module, str, int]:
    """(a network without its classifier and with initial weights, its key in HALVES, its number of features D).

    model_args: further arguments of the network's constructor (`drop_path_rate`).

    Raises ConfigError if the package is missing, the network unknown or without such arguments, or a classifier can't
    be put on its features.
    """
    check_name(name)
    check_args(name, model_args)
    make = _torchvision_body if name.startswith(TORCHVISION) else _timm_body
    if not model_args:
        return make(name, {})
    try:
        return make(name, model_args)
    except ConfigError:
        raise
    except Exception as error:      # third-party constructors raise anything for arguments that don't fit
        raise ConfigError(f"{ARGS}: {name} doesn't take them: {' '.join(str(error).split())[:200]}") from None


def check_args(name: str, model_args: Any) -> None:
    """Raises ConfigError if `model_args` isn't a dict or None, or has an argument that another key sets."""
    if model_args is not None and not isinstance(model_args, dict):
        raise ConfigError(f'{ARGS}: {model_args!r} should be arguments by name, like {{"drop_path_rate": 0.1}}')
    for key in model_args or ():
        if key in SET_ELSEWHERE:
            raise ConfigError(f"{ARGS}: {key} is set by {SET_ELSEWHERE[key]}")
        if key in FIXED:
            raise ConfigError(f"{ARGS}: {key} can't be changed: {name} must take images of 3 channels and have one "
                              "vector of features for each")


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


def _timm_body(name: str, model_args: dict[str, Any]) -> tuple[nn.Module, str, int]:
    timm = check_package(name)
    # Let a transformer take other image sizes than it was trained with, by resampling its position embedding.
    for sizes in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):
        try:
            body = timm.create_model(name, pretrained=False, num_classes=0, **sizes, **model_args)
            break
        except TypeError:
            if not sizes:
                raise
    width = getattr(body, "head_hidden_size", None) or body.num_features
    if not hasattr(body, "forward_features") or not hasattr(body, "forward_head"):
        raise ConfigError(f"{PATH}: {name} has no features to put a classifier on; take another network")
    return body, "timm", int(width)


def _torchvision_body(name: str, model_args: dict[str, Any]) -> tuple[nn.Module, str, int]:
    body = check_package(name).get_model(name.removeprefix(TORCHVISION), weights=None, **model_args)
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


def check_features(body: nn.Module, kind: str, width: int, size: int) -> None:
    """Raises ConfigError if a body made with `model_args` gives something else than `[N, width]` pooled features."""
    trial = copy.deepcopy(body).to("meta").eval()
    try:
        with torch.no_grad():
            feats = HALVES[kind].pool(trial, HALVES[kind].features(trial, torch.empty(2, 3, size, size, device="meta")))
    except Exception:       # third-party networks may raise anything on the meta device
        return
    if tuple(feats.shape) != (2, width):
        raise ConfigError(f"{ARGS}: with them, the features of N images have the shape "
                          f"{['N', *feats.shape[1:]]}, but a classifier needs ['N', {width}]")


def set_checkpointing(body: nn.Module, on: bool) -> None:
    """Switch timm's gradient checkpointing. Raises ConfigError if the network has none and `on`."""
    try:
        body.set_grad_checkpointing(on)
    except (AttributeError, AssertionError):
        if on:
            raise ConfigError(f"{CHECKPOINTING}: {type(body).__name__} has no gradient checkpointing; leave it out, "
                              "or take another of timm's networks") from None
