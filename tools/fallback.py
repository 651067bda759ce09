"""Configs that want a pretrained network and name a `fallback` config for where its weights can't be had."""
from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from logger.log import get_logger
from utils import dist
from utils.config.load import Override, load_config
from utils.config.read import flat, read_config
from utils.errors import ConfigError

#: Prefixes of overrides that are meant for the pretrained network.
OF_THE_NETWORK = ("arch.", "trainer.freeze", "trainer.cache_features")
#: Keys and prefixes that concern the data and the run, whatever the network: the fallback takes them over.
CARRIED = ("seed", "n_gpu", "groups.", "data_loader.type", "data_loader.args.", "trainer.save_dir",
           "trainer.save_period", "trainer.keep_last", "trainer.verbosity", "trainer.tensorboard", "trainer.log_step",
           "trainer.progress", "trainer.report", "trainer.figures")
#: Keys of a training recipe, taken over only from a file that extends the one with the recipe and `fallback`.
OF_THE_RECIPE = ("data_loader.args.batch_size", "trainer.epochs")
#: Depends on the network; the fallback determines its own.
OF_ITS_INPUT = "data_loader.args.image_size"


def settle_weights(config: dict[str, Any], overrides: list[Override] = (),
                   file: str | os.PathLike | None = None, brought: bool = False) -> dict[str, Any]:
    """The config to train with: itself or, with a log message, its `fallback` under the config's name.

    The fallback is taken where `arch.args.weights` is true and the network's package isn't installed, or its weights
    are neither cached nor downloadable. Rank 0 looks, and all ranks follow it.

    brought: a file has all of the model's weights, so that the package's aren't looked for. file: the config's file;
    what it says of the data and the run is taken over, and the log names its other keys.

    Raises ConfigError where the network is unknown, where its weights are missing and `overrides` concern it (they
    would be lost), and where the fallback itself is wrong.
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
    """The config to go on with in an existing run, whose config is `before`: itself, or its `fallback` (as in
    `settle_weights`) where the run began with that, even if the network's weights can be had by now."""
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
    """(arch.type, model_name): what tells a config's network from its fallback's."""
    return value_at(config, "arch.type"), value_at(config, "arch.args.model_name")


def with_what_is_carried(other: str, name: str, overrides: list[Override], file: str | os.PathLike | None
                         ) -> tuple[dict[str, Any], list[str]]:
    """(the config `other`, named `name`, with what `file` says of the data and the run; the keys of `file` that it
    doesn't take over)."""
    said = [] if file is None else list(statements(file))
    taken = [Override(key, value, str(file)) for key, value, own in said if is_carried(key, own)]
    settled = {**load_config(other, [*taken, *overrides]), "name": name}
    return settled, [key for key, value, own in said if own is not False and value != value_at(settled, key)
                     and not any(f"{key}.".startswith(f"{item.path}.") for item in overrides)]


def statements(file: str | os.PathLike) -> Iterator[tuple[str, Any, bool | None]]:
    """(key, value, own) of each key that a config file sets (see `key_of`). own: None where the file itself names the
    `fallback`, else whether the key comes from a file that extends the one which does."""
    config, inherited = read_config(file)
    base = inherited.get("fallback")
    recipe = set() if base is None else {base, *read_config(base)[1].values()}
    own: dict[str, bool | None] = {}
    for leaf in flat(config):
        key = key_of(leaf)
        own[key] = None if base is None else own.get(key, False) or inherited.get(leaf) not in recipe
    for key in own:
        if key not in ("name", "fallback"):
            yield key, value_at(config, key), own[key]


def key_of(leaf: str) -> str:
    """The key that is taken over or left: a loader's argument, a key of `trainer` or `groups`, or a whole section."""
    parts = leaf.split(".")
    return ".".join(parts[:{"data_loader": 3, "trainer": 2, "groups": 2}.get(parts[0], 1)])


def value_at(config: dict[str, Any], key: str) -> Any:
    """What a config has at a dotted key; None where it has nothing."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def is_carried(key: str, own: bool | None) -> bool:
    """Whether the fallback takes over a key; own: see `statements`."""
    if key in OF_THE_RECIPE:
        return own is True
    return key.startswith(CARRIED) and key != OF_ITS_INPUT


def missing(arch: dict[str, Any]) -> str | None:
    """Why a network's pretrained weights can't be had; None if they can. Raises ConfigError for an unknown network."""
    from model.timm_body import MissingPackage, check_name
    from model.weights.pretrained import MissingWeights, own_file
    try:
        check_name(arch["args"]["model_name"])
        own_file(arch["args"]["model_name"])
    except (MissingPackage, MissingWeights) as error:
        return str(error)
    return None
