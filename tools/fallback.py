"""A config that wants a pretrained network and names another for where its weights can't be had."""
from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from logger.log import get_logger
from utils import dist
from utils.config.load import Override, load_config
from utils.config.read import leaves, read_config
from utils.errors import ConfigError

#: Where overrides begin that are meant for the pretrained network.
OF_THE_NETWORK = ("arch.", "trainer.freeze", "trainer.cache_features")
#: What a config says of its data and its run, whatever the network: the fallback is told it too.
CARRIED = ("seed", "n_gpu", "groups.", "data_loader.type", "data_loader.args.", "trainer.save_dir",
           "trainer.save_period", "trainer.keep_last", "trainer.verbosity", "trainer.tensorboard", "trainer.log_step",
           "trainer.progress", "trainer.report", "trainer.figures")
#: What belongs to a recipe, and is carried over only from a file that extends the one with the recipe and `fallback`.
OF_THE_RECIPE = ("data_loader.args.batch_size", "trainer.epochs")
#: The network's own, which the fallback finds out for itself.
OF_ITS_INPUT = "data_loader.args.image_size"


def settle_weights(config: dict[str, Any], overrides: list[Override] = (),
                   file: str | os.PathLike | None = None, brought: bool = False) -> dict[str, Any]:
    """The config to train with: itself, or its `fallback` under its own name, with one line that says so.

    The fallback is taken where `arch.args.weights` is true and the network's package isn't installed or its weights are
    in no cache and out of reach. Rank 0 looks, and all ranks follow it.

    brought: a file has all of the model's weights, so that the package's are not looked for. file: where the config was
    read; what it says of its data and its run holds for the fallback too, and the line names the rest of what it says.

    Raises ConfigError where nobody knows the network, where its weights are missing and `overrides` say something of it
    (that would be lost), and what the fallback's own check raises.
    """
    other, config = config.get("fallback"), {**config, "fallback": None}
    args = config["arch"].get("args") or {}
    if other is None or brought or not args.get("model_name") or args.get("weights", True) is not True:
        return config
    problem = dist.on_main(lambda: missing(config["arch"]))
    if problem is None:
        return config
    if any(item.path.startswith(OF_THE_NETWORK) for item in overrides):
        raise ConfigError(problem)
    settled, left = with_what_is_carried(other, config["name"], overrides, file)
    get_logger().info("%s\nuntil then, from scratch, as %s does%s", problem, other,
                      f"; not taken over from {file}: {', '.join(left)}" if left else "")
    return settled


def as_begun(config: dict[str, Any], before: dict[str, Any], overrides: list[Override] = (),
             file: str | os.PathLike | None = None) -> dict[str, Any]:
    """The config for a run that is there and was trained as `before` says: itself, or its `fallback`, as in
    `settle_weights`, where the run began with that, even if the network's weights can be had by now."""
    other, config = config.get("fallback"), {**config, "fallback": None}
    chosen = any(item.path.startswith(OF_THE_NETWORK) for item in overrides)
    if other is None or chosen or network(before) == network(config):
        return config
    settled, _ = with_what_is_carried(other, config["name"], overrides, file)
    if network(before) != network(settled):
        return config
    get_logger().info("the run began from scratch, as %s does, and goes on so", other)
    return settled


def network(config: dict[str, Any]) -> tuple[Any, Any]:
    """What tells a config's network from its fallback's."""
    return value_at(config, "arch.type"), value_at(config, "arch.args.model_name")


def with_what_is_carried(other: str, name: str, overrides: list[Override], file: str | os.PathLike | None
                         ) -> tuple[dict[str, Any], list[str]]:
    """(the config `other` under the name `name`, with what `file` says of its data and its run; the keys of what else
    it says)."""
    said = [] if file is None else list(statements(file))
    taken = [Override(key, value, str(file)) for key, value, own in said if is_carried(key, own)]
    settled = {**load_config(other, [*taken, *overrides]), "name": name}
    return settled, [key for key, value, own in said if own is not False and value != value_at(settled, key)
                     and not any(f"{key}.".startswith(f"{item.path}.") for item in overrides)]


def statements(file: str | os.PathLike) -> Iterator[tuple[str, Any, bool | None]]:
    """(key, value, own) of what a config file says, sections of classes apart from the loader's as a whole. own: None
    where the file names its `fallback` itself, else whether the key is of a file that extends the one that names it."""
    config, inherited = read_config(file)
    base = inherited.get("fallback")
    recipe = set() if base is None else {base, *read_config(base)[1].values()}
    own: dict[str, bool | None] = {}
    for leaf in leaves(config):
        key = key_of(leaf)
        own[key] = None if base is None else own.get(key, False) or inherited.get(leaf) not in recipe
    for key in own:
        if key not in ("name", "fallback"):
            yield key, value_at(config, key), own[key]


def key_of(leaf: str) -> str:
    """The key that is carried over or not: an argument of the loader's, a key of `trainer` or `groups`, or a section.
    """
    parts = leaf.split(".")
    return ".".join(parts[:{"data_loader": 3, "trainer": 2, "groups": 2}.get(parts[0], 1)])


def value_at(config: dict[str, Any], key: str) -> Any:
    """What a config has at a dotted key; None where it has nothing."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def is_carried(key: str, own: bool | None) -> bool:
    """Whether a key holds for the fallback too."""
    if key in OF_THE_RECIPE:
        return own is True
    return key.startswith(CARRIED) and key != OF_ITS_INPUT


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
