"""Opens a finished run, for test.py and the tools."""
from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.base_data_loader import BaseDataLoader
from base.run_paths import RunPaths, run_of
from data_loader.held_out import check_held_out, of_same_data, other_files
from logger.log import get_logger
from model.weights.remap import load_weights
from tools.calibration import JOINT, kept_temperatures
from tools.fallback import value_at
from tools.parts import check_size, make_loader, make_model, settled
from tools.session import config_of, data_facts, facts_of_checkpoint
from trainer.precision import allow_tf32
from utils.checkpoint.store import load_checkpoint, recover_config
from utils.config.check import constructor
from utils.config.load import check_config, load_config
from utils.config.outside import outside_names, short_name
from utils.config.read import flat
from utils.config.schema import SECTIONS
from utils.errors import ConfigError

log = get_logger()
#: What a model answers depends on: the network, and how a test image is seen; not on IDLE, which a training reads.
MODEL = ("arch", *(f"data_loader.args.{key}" for key in ("image_size", "crops", "expand")))
IDLE = ("arch.args.num_classes", "arch.args.weights")


@dataclass
class Run:
    """A checkpoint with its config and its model, ready to evaluate."""

    path: Path
    config: dict[str, Any]
    checkpoint: dict[str, Any]
    model: nn.Module
    device: torch.device
    #: What the command line set in the config, as (dotted path, value, ...).
    overrides: Sequence[tuple] = ()
    _loaders: dict[str, BaseDataLoader] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any] | None:
        """What the checkpoint says of its data (see tools.session.data_facts), or None."""
        return facts_of_checkpoint(self.checkpoint)

    @property
    def is_own_data(self) -> bool:
        """Whether the config's data are those that the model was trained on, wherever they lie."""
        return of_same_data(*self._loader_specs(), self.facts, doubt=False)     # if in doubt, no

    def _loader_specs(self) -> list[dict[str, Any]]:
        """`data_loader` as the checkpoint has it (empty where it has no config), and as it is now."""
        return [config.get("data_loader") or {} for config in (recover_config(self.checkpoint) or {}, self.config)]

    @property
    def data(self) -> dict[str, Any]:
        """num_classes, cls_num_list, class_names, preprocess: from the checkpoint, else from the data."""
        return self.facts or data_facts(self.loader("test"))

    @cached_property
    def temperatures(self) -> dict[str, float]:
        """What `test.py --calibrate` found for these weights, by classifier (see tools.calibration.classifier_name)."""
        return kept_temperatures(self.path, self.model)

    @cached_property
    def temperature(self) -> float:
        """`temperature_for` the trained classifier."""
        return self.temperature_for()

    def temperature_for(self, classifier: str = JOINT, flags: Sequence[str] = ()) -> float:
        """What a classifier's logits are divided by for probabilities: `test.py --calibrate`'s, else 1. Also 1, with a
        warning, if model or images are other ones than those that it was found with: by the config, or by `flags` of a
        command (`--crops 5`)."""
        found = self.temperatures.get(classifier, 1.0)
        changes = [*self.changes(), *flags] if found != 1 else []
        if changes:
            log.warning("the temperature %.3f that test.py --calibrate found for %s isn't applied, as it was found "
                        "without %s", found, self.path, ", ".join(changes))
        return 1.0 if changes else found

    def changes(self, *more: str) -> list[str]:
        """How the config differs from the checkpoint's in MODEL and in the keys or sections `more`: `use_experts=2`.
        For a checkpoint that holds no config: what the command line sets of these."""
        own = recover_config(self.checkpoint) or {}
        holds_config = "arch" in own
        with contextlib.suppress(ConfigError):  # with its defaults; one of an old version may lack what it needs now
            own = check_config(own, allowed=[name for _, name, _ in outside_names(self.config)])
        trained = ((self.facts or {}).get("preprocess") or {}).get("image_size")
        size = value_at(own, "data_loader.args.image_size")
        size = size if isinstance(size, int) else trained
        before = with_images(own, size)
        now = with_images(self.config, size and getattr(self._loaders.get("test"), "image_size", size))
        paths = [path for path in dict.fromkeys([*flat(now), *flat(before)])
                 if is_within(path, (*MODEL, *more)) and path not in IDLE
                 and (holds_config or is_within(path, [item[0] for item in self.overrides]))]
        # Where one of the two has an object and the other a value, that value or the object's are named, not both.
        return [f"{path.rpartition('.')[2]}={value}" for path in paths
                if (value := value_at(now, path)) != value_at(before, path) and not isinstance(value, dict)
                and isinstance(value_at(now, path.rpartition(".")[0]), dict)]

    def note_of_choice(self, chosen: str) -> dict[str, str]:
        """What to add to figures if something, named `chosen`, was chosen on the validation images: nothing, unless
        those are the test images; then {"chosen_on": "test"}, with a warning."""
        loader = self.loader("train")
        if not getattr(loader, "validates_on_test", False):
            return {}
        instead = "add --set data_loader.args.validation=holdout" if loader.has_spare else \
            "there are no others that the model wasn't trained on, unless you give some (val/, a list)"
        log.warning("%s is chosen on the test images (data_loader.args.validation is \"test\"), so that figures on "
                    "them are too good; %s", chosen, instead)
        return {"chosen_on": "test"}

    def about(self) -> list[str]:
        """What the names of files about this run must contain: [] for the newest or best weights on the run's own data,
        else the other data (its folder, and files that it reads in place of the run's) and the checkpoint."""
        parts = []
        if not self.is_own_data:
            data = self.config["data_loader"]
            folder = (data.get("args") or {}).get("data_dir")
            parts.append(Path(folder).resolve().name if folder else short_name(data["type"]))
        if before := (recover_config(self.checkpoint) or {}).get("data_loader"):
            now = self.config["data_loader"]
            kind = constructor(SECTIONS["data_loader"], now["type"], "data_loader.type")
            parts += other_files(kind, *(spec.get("args") or {} for spec in (before, now)))
        newest = max(map(RunPaths.epoch_of, run_of(self.path).checkpoints()), default=0)
        older = self.path.name.startswith("checkpoint-epoch") and (self.checkpoint.get("epoch") or 0) < newest
        return [*parts, self.path.stem] if older or parts else []

    def loader(self, split: str = "test") -> BaseDataLoader:
        """The "test", "train" (augmented), "train_eval" (in order, plain) or "val" split's loader, made once. Raises
        ConfigError, e.g. where there is no validation split or the model was trained on some of its images."""
        if split not in self._loaders:
            if split in ("test", "train"):
                self._loaders[split] = make_loader(self.config, self.device, training=split == "train",
                                                   facts=self.facts)
                self.config = settled(self.config, self._loaders[split])
            elif split == "train_eval":
                self._loaders[split] = self.loader("train").train_eval_loader()
            else:
                loader = self.loader("train")
                specs = self._loader_specs()
                if self.facts is not None and specs[0]:
                    before, now = (spec.get("args") or {} for spec in specs)
                    check_held_out(loader, self.facts, before if of_same_data(*specs, self.facts) else None, now)
                found = loader.split_validation()
                if found is None:
                    why = "no class has the images that \"holdout\" takes; give some (val/, a list)" \
                        if loader.validation == "holdout" else "this run has no validation split; use \"holdout\""
                    raise ConfigError(f"data_loader.args.validation: {why}")
                self._loaders[split] = found
        return self._loaders[split]


def is_within(path: str, keys: Sequence[str]) -> bool:
    """Whether a dotted path is one of `keys` or within one."""
    return any(f"{path}.".startswith(f"{key}.") for key in keys)


def with_images(config: dict[str, Any], size: int | None) -> dict[str, Any]:
    """A config in which `crops` and the size of test images are given: `size`, unless it names a number."""
    args = (config.get("data_loader") or {}).get("args") or {}
    named = args.get("image_size")
    return {**config, "data_loader": {"args": {**args, "image_size": named if isinstance(named, int) else size,
                                               "crops": args.get("crops") or 1}}}


def open_run(path: str | Path, config: str | Path | None = None, overrides: list[tuple] = (),
             device: torch.device | str = "cpu", *, allow_partial: bool = False, weights: str = "ema") -> Run:
    """Read a checkpoint (ours or another project's), build its model and load the weights.

    Args:
        path: a checkpoint file.
        config: a config to use in place of the checkpoint's own.
        overrides: (dotted path, value, flag) as the command line gives them.
        allow_partial: load the weights that fit and leave the others as they were initialised.
        weights: "ema", those that the file is for (the average, where one was kept), or "raw", those in training.
    Raises:
        ConfigError: unreadable or refused file, no config, weights that don't fit.
    """
    allow_tf32(False)     # runs are opened to be evaluated: the same figures on every processor
    path = Path(path)
    checkpoint = load_checkpoint(path)
    if weights == "raw":
        if "raw_state_dict" not in checkpoint:
            raise ConfigError(f"--weights raw: {path} holds one set of weights only, as trainer.ema was off; leave it "
                              "out")
        checkpoint["state_dict"] = checkpoint["raw_state_dict"]
    effective = load_config(config, overrides) if config else config_of(checkpoint, path, overrides)
    device = torch.device(device)
    run = Run(path, effective, checkpoint, nn.Identity(), device, overrides)
    num_classes = effective["arch"].get("args", {}).get("num_classes") or (run.facts or {}).get("num_classes")
    if num_classes is None:
        num_classes = run.loader("test").num_classes
    size = (effective["data_loader"].get("args") or {}).get("image_size")
    if isinstance(size, int) and size != ((run.facts or {}).get("preprocess") or {}).get("image_size"):
        check_size(effective, size)
    model = make_model(effective, num_classes, bare=True)
    load_weights(model, checkpoint, name=str(path), allow_partial=allow_partial, exact=True)
    run.model = model.to(device, memory_format=torch.channels_last).eval()
    return run
