"""A config that wants a pretrained network and names another for where its weights can't be had."""
from __future__ import annotations

from typing import Any

from logger.log import get_logger
from utils import dist
from utils.config.load import Override, load_config
from utils.errors import ConfigError

#: Where overrides begin that are meant for the pretrained network.
OF_THE_NETWORK = ("arch.", "trainer.freeze", "trainer.cache_features")


def settle_weights(config: dict[str, Any], overrides: list[Override] = ()) -> dict[str, Any]:
    """The config to train with: itself, or its `fallback` under its own name, with one line that says so.

    The fallback is taken where `arch.args.weights` is true, no `pretrained` file is given, and the network's package
    isn't installed or its weights are in no cache and out of reach. Rank 0 looks, and all ranks follow it.

    Raises ConfigError where nobody knows the network, where its weights are missing and `overrides` say something of it
    (that would be lost), and what the fallback's own check raises.
    """
    other, config = config.get("fallback"), {**config, "fallback": None}
    if other is None or config.get("pretrained") or (config["arch"].get("args") or {}).get("weights", True) is not True:
        return config
    problem = dist.on_main(lambda: missing(config["arch"]))
    if problem is None:
        return config
    if any(item.path.startswith(OF_THE_NETWORK) for item in overrides):
        raise ConfigError(problem)
    get_logger().info("%s\nuntil then, from scratch, as %s does", problem, other)
    return {**load_config(other, overrides), "name": config["name"]}


def missing(arch: dict[str, Any]) -> str | None:
    """Why a network's own weights can't be had; None where they are there now. ConfigError where nobody knows it."""
    from model.timm_net import MissingPackage, check_name
    from model.weights.pretrained import MissingWeights, own_file
    try:
        check_name(arch["args"]["model_name"])
        own_file(arch["args"]["model_name"])
    except (MissingPackage, MissingWeights) as error:
        return str(error)
    return None
