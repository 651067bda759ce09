"""Weights to start from, for a model that isn't quite theirs: several experts, norms without running statistics."""
from __future__ import annotations

import re

import torch

from logger.log import get_logger
from utils.seed import generator

log = get_logger("remap")

OWN_PARTS = re.compile(r"backbone\.(?:experts|layer\ds|linears)\.([1-9]\d*)\.")
STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")
SHARE = 0.02     # of a filter's own deviation


def tell_apart(weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """`weights` under our keys, in which experts that share one tensor with the first get one of their own.

    Equal experts have equal gradients, so they would stay one expert for ever, and where they agree the gradient of
    RIDE's diversity is 0, too. So each filter (the first dimension of convolutions, matrices and classifiers) of the
    experts from the second on is moved by Gaussian noise of `SHARE` of its own standard deviation: too little to harm
    what it knows, enough for the losses to drive them apart. Norms, biases and running statistics stay. The first
    expert, and what a file has for each expert itself, stays exact.

    The noise depends on the run's seed (the one that torch's global generator was given last), the expert and the
    order of the keys alone; the global generator isn't drawn from. name: of the file, for the log.
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
    """`weights` without batch norms' running statistics where the model's norm keeps none (GroupNorm, InstanceNorm,
    LayerNorm); its weights and biases stay. own: the model's state. Said in the log, as it changes what is computed."""
    left = {key for key in weights if key.endswith(STATISTICS) and key not in own
            and key.rpartition(".")[0] + ".weight" in own}
    norms = {key.rpartition(".")[0] for key in left}
    if norms:
        log.info("%s: the running statistics of %d batch norms are left out, as the model's norms keep none; their "
                 "weights and biases are taken", name, len(norms))
    return {key: value for key, value in weights.items() if key not in left}


def has_own_names(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    """Whether weights need no renaming for a model: they have all its names, whatever those look like (a detector's
    encoder isn't a file of others), or are of somebody's own backbone with another head, perhaps, since it has none of
    our names and they are most of its."""
    own = model.state_dict().keys()
    ours = any(key.startswith("backbone.") for key in own)
    return weights.keys() == own or (not ours and len(weights.keys() & own) > len(weights) / 2)
