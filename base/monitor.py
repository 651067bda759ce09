"""What `trainer.monitor` asks for."""
from __future__ import annotations

from logger.log import get_logger
from utils.errors import ConfigError


def parse_monitor(monitor: str, early_stop: int | None = None) -> tuple[str, str]:
    """("min" or "max", the figure's name) of `trainer.monitor`, or ("off", ""). Raises ConfigError.

    early_stop: `trainer.early_stop`, of which a warning says that it has no figure to go by where nothing is monitored.
    """
    if monitor in ("off", "", None):
        if early_stop:
            get_logger().warning("trainer.early_stop: trainer.monitor is \"off\", so the run won't stop early; name a "
                                 "figure, e.g. \"max val_accuracy\"")
        return "off", ""
    mode, _, name = monitor.partition(" ")
    if mode not in ("min", "max") or not name:
        raise ConfigError(f"trainer.monitor: {monitor!r}; write \"off\", \"max val_accuracy\" or \"min val_loss\"")
    return mode, name.strip()
