"""Adapting initial weights to a model with more experts, or with norms that have no running statistics."""
from __future__ import annotations

import re

import torch

from logger.log import get_logger
from utils.seed import generator

log = get_logger("remap")

OWN_PARTS = re.compile(r"backbone\.(?:experts|layer\ds|linears)\.([1-9]\d*)\.")
STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")
SHARE = 0.02     # noise, relative to a filter's own standard deviation


def tell_apart(weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Break the symmetry of experts that share the first expert's tensors in `weights` (under our keys); returns a new
    dict.

    Equal experts get equal gradients and would stay equal for ever; the gradient of RIDE's diversity term is 0 there
    too. So each filter (first dimension of convolutions, matrices and classifiers) of every expert after the first gets
    Gaussian noise of `SHARE` times its own standard deviation: too little to harm what it has learned, enough for
    the losses to drive the experts apart. Norms, biases and running statistics don't change, nor does the first expert
    or an expert that has weights of its own in the file.

    The noise depends only on the run's seed (`torch.initial_seed()`), the expert and the order of the keys; nothing is
    drawn from the global generator. name: the file's, for the log.
    """
    told, streams = dict(weights), {}
    for key, value in weights.items():
        match = OWN_PARTS.match(key)
        first = match and weights.get(key[:match.start(1)] + "0" + key[match.end(1):])
        if first is not value or value.dim() < 2 or not value.is_floating_point():
            continue
        expert = int(match[1])
        stream = streams.setdefault(expert, generator(torch.initial_seed(), expert))
        deviation = value.flatten(1).float().std(1, correction=0).view(-1, *[1] * (value.dim() - 1))
        noise = torch.randn(value.shape, generator=stream).to(value.device)
        told[key] = (value.float() + SHARE * deviation * noise).to(value.dtype)
    if streams:
        log.info("%s: experts 2 to %d start from the first one's weights, each filter moved by %g %% of its deviation",
                 name, max(streams) + 1, 100 * SHARE)
    return told


def without_statistics(weights: dict[str, torch.Tensor], own: dict[str, torch.Tensor],
                       name: str) -> dict[str, torch.Tensor]:
    """`weights` without batch norms' running statistics where the model's norm has none (GroupNorm, InstanceNorm,
    LayerNorm); weights and biases stay. Logged, because it changes what is computed.

    own: the model's state_dict. name: the file's, for the log.
    """
    left = {key for key in weights if key.endswith(STATISTICS) and key not in own
            and key.rpartition(".")[0] + ".weight" in own}
    norms = {key.rpartition(".")[0] for key in left}
    if norms:
        log.info("%s: the running statistics of %d batch norms are left out, as the model's norms keep none; their "
                 "weights and biases are taken", name, len(norms))
    return {key: value for key, value in weights.items() if key not in left}


def has_own_names(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    """Whether `weights` need no renaming for `model`: they have exactly its keys (even if these look like another
    project's, as a detector's do), or the model is a custom backbone without our keys that shares more than half of
    the file's keys (the head may differ)."""
    own = model.state_dict().keys()
    ours = any(key.startswith("backbone.") for key in own)
    return weights.keys() == own or (not ours and len(weights.keys() & own) > len(weights) / 2)
