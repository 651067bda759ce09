"""Parses `trainer.monitor`."""
from __future__ import annotations

from logger.log import get_logger
from utils.config.check import monitored
from utils.config.schema import COUNTED, DETECTED
from utils.errors import ConfigError

#: Our own figures, and the direction in which they get better.
BETTER = dict.fromkeys(("accuracy", "top_k_acc", "auc", *COUNTED, *DETECTED), "max") | {"loss": "min", "ece": "min"}


def parse_monitor(monitor: str, early_stop: int | None = None) -> tuple[str, str]:
    """("min" or "max", the figure's name) from `trainer.monitor`; ("off", "") if nothing is monitored.

    early_stop: `trainer.early_stop`; a warning says that it has no effect if nothing is monitored. Raises ConfigError
    for an invalid value and for a direction that would keep the worst epoch.
    """
    mode, name = monitored(monitor)
    better = BETTER.get(name.removeprefix("val_"), mode)
    if mode != better:
        raise ConfigError(f"trainer.monitor: \"{monitor}\" would keep the worst epoch; write \"{better} {name}\"")
    if mode == "off" and early_stop:
        get_logger().warning("trainer.early_stop: trainer.monitor is \"off\", so the run won't stop early; name a "
                             "figure, e.g. \"max val_accuracy\"")
    return mode, name
