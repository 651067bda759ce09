"""The base classes of model, trainer and data loader, each imported on first use so that light imports stay fast."""
from importlib import import_module

_HOMES = {"BaseModel": "base_model", "BaseTrainer": "base_trainer", "BaseDataLoader": "base_data_loader"}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'base' has no attribute {name!r}")
    return getattr(import_module(f"base.{_HOMES[name]}"), name)
