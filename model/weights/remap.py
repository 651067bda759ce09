"""Renaming other projects' weights to our keys: one function per origin, dict in, dict out.

Our keys are RIDE's (`backbone.layer3s.1.0.bn1.weight`), so files of RIDE and BatchFormer need next to no renaming. The
other origins are recognised by their layout: classifier-balancing has one dict for the features and one for the
classifier; NBN has no `backbone.` prefix and a `scale_factor` with one value per norm layer; MABN's classification demo
has buffers that its formal layer lacks; torchvision and timm call the classifier `fc`; and files of encoders (MoCo,
SimCLR, SupCon, Lightning modules, mmpretrain) have one prefix before the ResNet's keys and other parts beside it.
"""
from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from logger.log import get_logger
from model.norm import MABN2d
from model.weights.adapt import has_own_names, tell_apart, without_statistics
from model.weights.efficientnet import from_efficientnet
from model.weights.wrapped import find_trunk
from utils.checkpoint.store import find_weights, load_checkpoint, strip_module
from utils.errors import ConfigError

log = get_logger("remap")

Weights = dict[str, torch.Tensor]
PREFIX = "backbone."
# BatchFormer's block is only used in training, so a model without one may still load the rest of the file.
BLOCK = "backbone.encoder_layers."
_MABN_DEMO = ("sta_matrix", "pre_x2", "pre_gz")
_MABN_HISTORY = ("iters", "buffer_x2", "buffer_gz")


# ---- origins: weights without `module.` -> weights under our keys ---------------------------------------------------
_OLD_SPELLINGS = (
    ("backbone.fc.", "backbone.linear."), ("backbone.fcs.", "backbone.linears."),
    ("backbone.encoder_layer.", BLOCK), ("backbone.global_layers.", BLOCK), ("backbone.global_model.", BLOCK),
    ("model.backbone.", PREFIX), ("head.fc.", "backbone.linear."))


def from_ride(weights: Weights) -> Weights:
    """RIDE and BatchFormer: our keys, except older spellings."""
    return {_respelt(key, _OLD_SPELLINGS): value for key, value in weights.items()}


def from_resnet(weights: Weights) -> Weights:
    """A bare ResNet (torchvision, timm, LDAM-DRW, NBN's plain ones): no prefix, the classifier is `fc` or `linear`."""
    return from_ride({PREFIX + key: value for key, value in weights.items()})


def from_encoder(weights: Weights) -> Weights:
    """A ResNet under one prefix, with torchvision's names or numbered as in `nn.Sequential(*resnet.children())`.

    Other entries (a second encoder, a queue, a projection) keep their names.
    """
    prefix, parts = find_trunk(weights)
    inside = {key: key[len(prefix):].partition(".") for key in weights if key.startswith(prefix)}
    named = from_resnet({f"{parts.get(first, first)}.{rest}": weights[key] for key, (first, _, rest) in inside.items()})
    return named | {key: value for key, value in weights.items() if key not in inside}


def from_classifier_balancing(weights: dict[str, Weights]) -> Weights:
    """Kang et al.'s files: `feat_model` and `classifier`, whose `fc` is the linear layer and `scales` LWS's scales."""
    renamed = from_resnet(without_module(weights.get("feat_model", {})))
    for key, value in without_module(weights.get("classifier", {})).items():
        renamed[f"{PREFIX}linear.{key.removeprefix('fc.')}"] = value
    return renamed


def from_nbn(weights: Weights) -> Weights:
    """Bao et al.'s NBN files: a scale for every norm layer, of which only the first E, one per expert, are used."""
    experts = 1 + max((int(m[1]) for key in weights if (m := re.match(r"linears\.(\d+)\.", key))), default=0)
    renamed = from_resnet(weights)
    renamed[f"{PREFIX}scale_factor"] = weights["scale_factor"].reshape(-1)[:experts]
    return renamed


def from_mabn(weights: Weights) -> Weights:
    """Yan et al.'s MABN files: the demo's running sums follow from its buffers, so they are dropped."""
    kept = {key: value for key, value in weights.items() if key.rpartition(".")[2] not in _MABN_DEMO}
    return from_ride(kept) if any(key.startswith(PREFIX) for key in kept) else from_resnet(kept)


ORIGINS: dict[str, Callable[[Any], Weights]] = {
    "ours": lambda weights: weights, "RIDE": from_ride, "classifier-balancing": from_classifier_balancing,
    "NBN": from_nbn, "MABN": from_mabn, "ResNet": from_resnet,
    "encoder": from_encoder, "EfficientNet": from_efficientnet}


def _respelt(key: str, spellings: Iterable[tuple[str, str]]) -> str:
    for old, new in spellings:
        if key.startswith(old):
            return new + key[len(old):]
    return key


def without_module(weights: dict) -> Weights:
    """`weights` without data-parallel wrappers' key prefixes, NumPy arrays as tensors, other values dropped."""
    tensors = {str(key): torch.from_numpy(value) if isinstance(value, np.ndarray) else value
               for key, value in weights.items()}
    return {strip_module(key): value for key, value in tensors.items() if isinstance(value, torch.Tensor)}


def recognise(checkpoint: dict) -> str:
    """The origin of a checkpoint: a key of `ORIGINS`. Raises ConfigError if it holds no weights."""
    return _read(checkpoint)[0]


def _read(checkpoint: dict) -> tuple[str, dict]:
    """(origin, weights) of a checkpoint, or of a bare dict of weights."""
    found = find_weights(checkpoint)
    if found is None or not isinstance(found[1], dict):
        raise ConfigError("the checkpoint holds no weights (a dict with a state_dict was expected)")
    raw = found[1]
    if isinstance(raw.get("feat_model"), dict):
        return "classifier-balancing", raw
    weights = without_module(raw)
    ends = {key.rpartition(".")[2] for key in weights}
    if "scale_factor" in weights:
        return "NBN", weights
    if ends & set(_MABN_DEMO) or ("buffer_x2" in ends and not any(key.startswith(PREFIX) for key in weights)):
        return "MABN", weights
    if "_conv_stem.weight" in weights:
        return "EfficientNet", weights
    trunk = find_trunk(weights)
    if trunk and (trunk[1] or trunk[0] not in ("", PREFIX, "model." + PREFIX, "backbone.body.")):  # the last: detectors
        return "encoder", weights
    if not any(key.startswith((PREFIX, "model." + PREFIX)) for key in weights):
        return "ResNet", weights
    ours = list(weights) == list(raw) and not any(key.startswith(old) for key in weights for old, _ in _OLD_SPELLINGS)
    return ("ours" if ours else "RIDE"), weights


def to_ours(checkpoint: dict, model: nn.Module | None = None, spread: bool = False) -> Weights:
    """The weights of a checkpoint of any known origin, under our keys. Raises ConfigError if it holds none.

    model: adapt the keys to its number of experts: a file with lists of one expert fits a model with one. spread: copy
    a single expert's weights to every expert of a model with several.
    """
    origin, weights = _read(checkpoint)
    if model is not None and has_own_names(model, weights):
        return weights
    weights = model.own_names(weights, origin, spread) if hasattr(model, "own_names") else ORIGINS[origin](weights)
    return weights if model is None else _fit_experts(weights, model, spread)


def _fit_experts(weights: Weights, model: nn.Module, spread: bool) -> Weights:
    """Rename between `layer3.` and `layer3s.N.`, `linear.` and `linears.N.`, to match the model's keys."""
    own = {match[0] for key in model.state_dict() if (match := re.match(r"backbone\.\w+?s?\.", key))}
    experts = getattr(model, "num_experts", 1)
    fitted: Weights = {}
    lone = experts == 1 and not any(re.match(r"backbone\.(layer\d|linear)s\.[1-9]", key) for key in weights)
    for key, value in weights.items():
        match = re.match(r"backbone\.(layer\d|linear)(s\.0)?\.(.*)", key)
        name, listed, rest = match.groups() if match else ("", None, "")
        if listed and lone and f"backbone.{name}." in own:
            fitted[f"backbone.{name}.{rest}"] = value
        elif match and not listed and spread and f"backbone.{name}s." in own:
            fitted.update((f"backbone.{name}s.{i}.{rest}", value) for i in range(experts))
        else:
            fitted[key] = value
    return fitted


# ---- loading --------------------------------------------------------------------------------------------------------
@dataclass
class LoadReport:
    """What `load_weights` did, as lists of our keys; entries of `mismatched` also give both shapes."""

    origin: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether all keys and shapes matched."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.mismatched)]
        return "; ".join(f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
                         for what, keys in parts if keys)


def load_weights(model: nn.Module, checkpoint: dict | str | os.PathLike, *, name: str | None = None,
                 skip_prefixes: Iterable[str] = (), allow_partial: bool = False, new_head: bool = False,
                 exact: bool = False) -> LoadReport:
    """Copy the weights of a checkpoint of any known origin into `model`; nothing is copied unless they fit.

    Args:
        checkpoint: a file's path, the result of `load_checkpoint`, or a bare state_dict.
        name: the checkpoint's name in errors and logs; by default its path.
        skip_prefixes: model keys with these prefixes are neither loaded nor reported as missing.
        allow_partial: leave out and log keys that don't fit, instead of refusing the file.
        new_head: the weights initialise a new training. A classifier of another kind or number of classes keeps its
            initialisation, as do NBN's scale, BatchFormer's block and parts added by tuning if the file has none; one
            expert's weights are copied to all experts (`tell_apart`).
        exact: the model must compute what the file's model did, so MABN, which subtracts no mean, refuses batch norm's
            statistics.
    Raises:
        ConfigError: an unreadable file, or keys that don't fit (missing, unexpected, of another shape).
    """
    if not isinstance(checkpoint, dict):
        name = name or str(checkpoint)
        checkpoint = load_checkpoint(checkpoint)
    name = name or "checkpoint"
    try:
        report = LoadReport(recognise(checkpoint))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    averaged = [key for key in ("state_dict_ema", "model_ema") if key in checkpoint and len(checkpoint) > 1]
    if averaged and {"state_dict", "model"} & set(checkpoint):
        log.info("%s: its weights as they were trained are taken, not their average (%s)", name, averaged[0])
    weights = to_ours(checkpoint, model, spread=new_head)
    skip = tuple(skip_prefixes)
    weights = {key: value for key, value in weights.items() if not key.startswith(skip)}
    own = model.state_dict()
    if not any(key.startswith(BLOCK) for key in own) and any(key.startswith(BLOCK) for key in weights):
        log.info("%s: its BatchFormer block is left out (add_bt is off)", name)
        weights = {key: value for key, value in weights.items() if not key.startswith(BLOCK)}
    optional = _optional(model, exact)
    weights = without_statistics(weights, own | dict.fromkeys(optional), name) if new_head else weights

    report.mismatched = [f"{key} {_shape(value)} in the file, {_shape(own[key])} in the model"
                         for key, value in weights.items()
                         if key in own and value.shape != own[key].shape and key not in optional]
    wrong = {text.split(" ", 1)[0] for text in report.mismatched}
    report.unexpected = [key for key in weights if key not in own and key not in optional]
    report.missing = [key for key in own if key not in weights and key not in optional and not key.startswith(skip)]
    fitting = {key: value for key, value in weights.items() if key not in wrong and (key in own or key in optional)}
    report.loaded = [key for key in fitting if key in own]
    if new_head:
        _leave_new(report, model, name)
    if (not report.fits and not allow_partial) or not report.loaded:
        network = getattr(model, "model_name", type(model).__name__)
        raise ConfigError(f"{name}: the weights don't fit {network} ({str(report) or 'nothing to load'}); give the "
                          "arch that they were trained with")
    if not report.fits:
        log.warning("%s: loaded in part (%s)", name, report)
    given = OrderedDict(tell_apart(fitting, name) if new_head else fitting)
    given._metadata = own._metadata     # versions of its layers, without which torchvision's MNASNet refuses to load
    model.load_state_dict(given, strict=False)
    return report


def _leave_new(report: LoadReport, model: nn.Module, name: str) -> None:
    """Remove the parts that may keep their initialisation from the report, and log them."""
    heads = tuple(model.classifier_prefixes()) if hasattr(model, "classifier_prefixes") else ("backbone.linear",)
    optional = (f"{PREFIX}scale_factor", BLOCK, *getattr(model, "new_prefixes", ()))
    fresh = [key for key in (*report.missing, *report.mismatched) if key.startswith(heads)]
    # Parts added by tuning are new only as a whole: a file that has some must have all of them, with the same shapes.
    there = {*report.loaded, *(text.split(" ", 1)[0] for text in report.mismatched)}
    added = getattr(model, "added_names", set())
    added = added if added.isdisjoint(there) else set()
    tuned = [key for key in report.missing if key in added]
    fresh += [key for key in report.missing if key.startswith(optional)]
    report.missing = [key for key in report.missing if not key.startswith(heads + optional) and key not in added]
    report.mismatched = [key for key in report.mismatched if not key.startswith(heads)]
    report.unexpected = [key for key in report.unexpected if not key.startswith((f"{PREFIX}linear", *heads))]
    # Entries beside the network (a projection, a queue, another network) are ignored; its own parts must fit.
    own = re.compile(re.escape(PREFIX) + r"(body|experts|conv|bn|layer|encoder|scale_factor)")
    beside = [key for key in report.unexpected if not own.match(key)]
    report.unexpected = [key for key in report.unexpected if own.match(key)]
    anew = [key.split(" ", 1)[0] for key in fresh[:4]] + (["..."] if len(fresh) > 4 else [])
    anew += [f"what tuning adds ({len(tuned)} tensors)"] if tuned else []
    said = [f"these start anew: {', '.join(anew)}"] if anew else []
    if beside:
        parts = list(dict.fromkeys(key.removeprefix(PREFIX).partition(".")[0] for key in beside))
        said.append(f"left out of the file: {', '.join(parts[:4])}{', ...' if len(parts) > 4 else ''}")
    if said:
        log.info("%s: %s", name, "; ".join(said))


def _optional(model: nn.Module, exact: bool) -> set[str]:
    """Keys that may be missing, extra or of another shape, as modules handle that when they load: old files have no
    `num_batches_tracked`; `MABN2d` fills its history and, unless `exact`, accepts batch norm's statistics."""
    keys = {key for key in model.state_dict() if key.endswith(".num_batches_tracked")}
    for prefix, module in model.named_modules():
        if isinstance(module, MABN2d):
            buffers = ("running_var", "num_batches_tracked", *_MABN_HISTORY, *_MABN_DEMO)
            keys |= {f"{prefix}.{name}" for name in (buffers if exact else ("running_mean", *buffers))}
    return keys


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))
