"""Writing checkpoints and resuming from them, even in the middle of an epoch, bit for bit on CPU."""
from __future__ import annotations

import zlib
from abc import ABC
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.changes import missing_memory, optimizer_kinds, place_steps, regrouped, tell_changes
from base.epoch_clock import EpochClock
from base.run_paths import RunPaths, absolute
from logger.log import get_logger
from utils import dist
from utils.checkpoint.store import load_checkpoint, save_checkpoint
from utils.errors import ConfigError, RunError
from utils.seed import rng_state, set_rng_state

log = get_logger()


class Resumable(ABC):
    """The part of a trainer that writes checkpoints, deletes old ones and resumes; see `BaseTrainer` for the fields."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    scaler: Any
    config: dict[str, Any]
    options: dict[str, Any]
    data_facts: dict[str, Any]
    train_loader: Any
    paths: RunPaths | None
    is_main: bool
    keep_last: int | None
    monitor: str
    best: float | None
    not_improved: int
    start_epoch: int
    start_batch: int
    start_offset: int
    last_epoch: int
    global_step: int
    epoch_lr: float | None
    clock: EpochClock
    resumed_inside: bool
    resumed_from: Path | None

    def extra_state(self) -> dict[str, Any]:
        """Further state of the subclass for the checkpoint (tensors and plain data); called on every rank."""
        return {}

    def load_extra_state(self, state: dict[str, Any], checkpoint: dict[str, Any]) -> None:  # noqa: B027
        """Restore what `extra_state` returned; `checkpoint` is the whole checkpoint."""

    @property
    def judged_model(self) -> nn.Module:
        """The model that is validated and saved as `state_dict`: the one that is trained, unless its weights are
        averaged."""
        return self.model

    def state(self, epoch: int, batch: int | None) -> dict[str, Any]:
        """Everything a run needs to resume, as tensors and plain data.

        Args:
            epoch: the epoch that the state belongs to.
            batch: how many of its batches are done, or None if the epoch is complete.
        """
        position = None if batch is None else {"images": self.train_loader.images_done(batch),
                                               "order": self._order_of(epoch)}
        judged = self.judged_model
        raw = {} if judged is self.model else {"raw_state_dict": self.model.state_dict()}
        seconds = {} if batch is None or self.clock.earlier is None else {"seconds": self.clock.spent}
        return {"arch": self.config["arch"]["type"], "epoch": epoch, "batch": batch, "position": position, **seconds,
                "global_step": self.global_step, "state_dict": judged.state_dict(), **raw,
                "optimizer": self.optimizer.state_dict(), "lr_scheduler": plain_state(self.lr_scheduler),
                "epoch_lr": self.epoch_lr, "scaler": self.scaler and self.scaler.state_dict(),
                "monitor": self.options["monitor"], "monitor_best": self.best, "not_improved": self.not_improved,
                "rng": self._all_rng(), "config": self.config, "data": self.data_facts, "extra": self.extra_state()}

    def _all_rng(self) -> list[dict[str, Any]]:
        """Every rank's random generator states, so that dropout continues as it would have without a stop."""
        return dist.gather_objects(rng_state())

    def save(self, epoch: int, path: Path | None = None, batch: int | None = None) -> Path:
        """Write a checkpoint (by default the epoch's own), whole or not at all; all ranks call it, rank 0 writes.

        batch: see `state`. Returns the path. Raises RunError, on every rank, if it can't be written; older files stay.
        """
        path = path or self.paths.checkpoint(epoch)
        self._write(path, self.state(epoch, batch))
        return path

    def save_weights(self, path: Path, model: nn.Module) -> None:
        """Write a checkpoint of `model`'s weights alone, for test.py and the tools; a run can't resume from it."""
        self._write(path, {"arch": self.config["arch"]["type"], "epoch": self.last_epoch,
                           "state_dict": model.state_dict(), "config": self.config, "data": self.data_facts})

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        def write() -> None:
            try:
                save_checkpoint(path, state)
            except OSError as error:
                raise RunError(f"can't write the checkpoint {path}: {error.strerror}; earlier checkpoints are intact, "
                               f"the newest is {self._newest()}") from None
        dist.on_main(write)

    def _newest(self) -> str:
        kept = self.paths.saved() if self.paths else []
        return str(kept[-1]) if kept else "none yet"

    def _drop_old(self, epoch: int) -> None:
        """Delete all but the newest `keep_last` of the checkpoints up to `epoch`."""
        if self.is_main and self.keep_last:
            kept = [path for path in self.paths.checkpoints() if self.paths.epoch_of(path) <= epoch]
            for old in kept[:-self.keep_last]:
                old.unlink(missing_ok=True)

    def _leave_course(self, rows: list[dict[str, Any]]) -> bool:
        """Rename what was saved after the point from which the run resumes (rank 0): `-r auto`, `keep_last` and users
        of the best checkpoint would take it for this run's.

        `model_best.pth` becomes the best epoch before that point, if that epoch's checkpoint exists. Returns True if
        not: the best figure must start over, as its weights are gone. Raises OSError.

        rows: those of metrics.csv up to that point.
        """
        best = self.paths.best
        later = [path for path in reversed(self.paths.checkpoints()) if self.paths.epoch_of(path) >= self.start_epoch]
        best_epoch = _readable(best).get("epoch")
        if isinstance(best_epoch, int) and best_epoch >= self.start_epoch:
            later.insert(0, best)
        later = [path for path in later if absolute(path) != self.resumed_from]
        later += self.paths.figures_of(later, self.start_epoch + self.resumed_inside)
        self.paths.set_aside(later)
        if later:
            log.info("renamed superseded-..., as the run goes on from before them: %s",
                     ", ".join(path.name for path in later))
        if self.best is None or best.is_file():
            return False
        of_best = [row["epoch"] for row in rows if row.get(self.monitor) and float(row[self.monitor]) == self.best]
        kept = _readable(self.paths.checkpoint(of_best[-1])) if of_best else {}
        if kept.get("monitor_best") == self.best:
            save_checkpoint(best, kept)
            return False
        log.info("trainer.monitor: the weights of the best epoch so far, %s %g, are no longer there: the best so far "
                 "begins anew", self.monitor, self.best)
        return True

    def resume(self, checkpoint: dict[str, Any], path: Path | None = None) -> None:
        """Resume from where `checkpoint` was written: mid-epoch if need be, bit for bit on CPU. path: its file.

        Raises ConfigError if it holds weights only, or if its optimizer state or its place in the epoch doesn't fit.
        """
        name = str(path or "the checkpoint")
        self.resumed_from = path and absolute(path)
        if "optimizer" not in checkpoint or not isinstance(checkpoint.get("epoch"), int):
            raise ConfigError(f"{name}: holds weights only; start a new run from them with --pretrained {name}")
        saved_config = checkpoint.get("config") if isinstance(checkpoint.get("config"), dict) else {}
        self._load_optimizer(checkpoint["optimizer"], saved_config, name)
        if self.scaler is not None and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        same_figure = self._load_best(checkpoint, saved_config.get("trainer") or {})
        self.epoch_lr = checkpoint.get("epoch_lr")
        batch = checkpoint.get("batch")
        self.resumed_inside = batch is not None
        self.start_epoch = checkpoint["epoch"] + (batch is None)
        self.last_epoch = self.start_epoch - 1
        if batch is not None:
            self.clock.earlier = checkpoint.get("seconds")
            self._find_position(checkpoint, batch, saved_config, name)
        if self.lr_scheduler is not None:
            self.bring_schedule_to(self._schedule_calls(), checkpoint.get("lr_scheduler") if same_figure else None)
        step = checkpoint.get("global_step")
        self.global_step = checkpoint["epoch"] * len(self.train_loader) if step is None else step
        if "raw_state_dict" in checkpoint:  # `state_dict` is averaged
            self.model.load_state_dict(checkpoint["raw_state_dict"])
        if checkpoint.get("extra"):
            self.load_extra_state(checkpoint["extra"], checkpoint)
        states = checkpoint.get("rng")
        if isinstance(states, list) and len(states) == dist.world_size():
            set_rng_state(states[dist.rank()])
        elif states:
            log.warning("the run was saved by %d processes and goes on with %d: dropout will differ", len(states),
                        dist.world_size())
        tell_changes(saved_config, self.config, bool(self._epochs_left()))

    def _load_optimizer(self, state: Any, saved_config: dict[str, Any], name: str) -> None:
        """Load the optimizer's state (momentum etc.); its hyperparameters (learning rate, weight decay) stay the
        config's. Raises ConfigError if it doesn't fit."""
        kind, before = (optimizer_kinds(config.get("optimizer") or {}) for config in (self.config, saved_config))
        schedule_was = (saved_config.get("lr_scheduler") or {}).get("type")
        base_was = ((saved_config.get("optimizer") or {}).get("args") or {}).get("lr")
        if before is not None and before != kind:
            raise ConfigError(f"optimizer.type: {name} was trained with {before}, whose state {kind} can't go on with; "
                              f"start a new run from its weights with --pretrained {name}")
        moved = regrouped(saved_config.get("trainer") or self.options, self.options)
        if moved:
            raise ConfigError(f"{moved[0]}: divides the parameters otherwise than {name}, so its optimizer state "
                              f"can't be told apart; start a new run from its weights with --pretrained {name}")
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{name}: its optimizer state doesn't fit this config ({error}); start a new run from "
                              f"its weights with --pretrained {name}") from None
        for group, numbers in zip(self.optimizer.param_groups, own):
            rate, base = group["lr"], group.get("initial_lr", base_was or numbers["lr"])
            group.update(numbers)
            if getattr(self.lr_scheduler, "unit", None) == "figure" and schedule_was in (
                    None, self.config["lr_scheduler"]["type"]):
                # A plateau schedule's rate depends on the past: keep its ratio to the base rate, which may be new.
                group["lr"] = rate * (numbers["lr"] / base)
        place_steps(self.optimizer)
        missing = missing_memory(self.optimizer)
        if missing:
            raise ConfigError(f"optimizer.args: what is asked needs {', '.join(missing)}, which {name} doesn't hold; "
                              f"start a new run from its weights with --pretrained {name}")

    def _load_best(self, checkpoint: dict[str, Any], saved: dict[str, Any]) -> bool:
        """Restore the best figure so far if the run still monitors the same figure; returns whether it does."""
        best, monitor = checkpoint.get("monitor_best"), checkpoint.get("monitor") or saved.get("monitor")
        if monitor is not None and monitor != self.options["monitor"]:
            log.info("trainer.monitor: %s instead of %s: the best so far begins anew", self.options["monitor"], monitor)
            return False
        self.best = best.item() if isinstance(best, torch.Tensor) else best
        self.not_improved = checkpoint.get("not_improved") or 0
        return True

    def _find_position(self, checkpoint: dict[str, Any], batch: int, saved_config: dict[str, Any], name: str) -> None:
        """Set where in its epoch the run resumes, counted in images, since the batch size may have changed. Raises
        ConfigError if the epoch's images come in another order now: some would be seen twice and others not at all."""
        loader, position = self.train_loader, checkpoint.get("position") or {}
        size = (saved_config.get("data_loader") or {}).get("args", {}).get("batch_size", loader.batch_size)
        images = position.get("images", min(batch * size, loader.epoch_size))
        if images and "order" in position and position["order"] != self._order_of(self.start_epoch):
            raise ConfigError(f"{name}: was stopped inside epoch {self.start_epoch}, whose images now come in another "
                              "order (another sampler, seed or data, or batches of another size by aspect); go on with "
                              "the old settings until the epoch's end, or from an earlier checkpoint")
        self.start_batch, self.start_offset = divmod(images, loader.batch_size)
        if self.start_offset and images < loader.epoch_size:
            self.start_batch, self.start_offset = 0, images
        elif self.start_offset:  # the epoch's last batch, which may be short
            self.start_batch, self.start_offset = self.start_batch + 1, 0

    def _schedule_calls(self) -> int:
        """How often the schedule would have stepped by now if the run had always had its present settings."""
        if getattr(self.lr_scheduler, "unit", "epoch") != "step":
            return self.last_epoch
        if not self.resumed_inside:
            return self.last_epoch * self.steps_per_epoch
        # Counted back from the epoch's end: whatever size its first batches had, the next epoch's count is right.
        self.train_loader.set_epoch(self.start_epoch, self.start_batch, self.start_offset)
        left = -(-(len(self.train_loader) - self.start_batch) // self.options["accumulate"])
        self.train_loader.set_epoch(self.start_epoch)
        return self.start_epoch * self.steps_per_epoch - left

    def _order_of(self, epoch: int) -> int:
        """A fingerprint of the order in which an epoch's images come."""
        return zlib.crc32(self.train_loader.epoch_order(epoch).tobytes())

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""
        return -(-len(self.train_loader) // self.options["accumulate"])

    def bring_schedule_to(self, calls: int, saved: dict[str, Any] | None) -> None:
        """Put the schedule into its state after `calls` calls of `step()`; saved: its state in the
        checkpoint, if any."""
        raise NotImplementedError


def plain_state(scheduler: Any) -> dict[str, Any] | None:
    """A schedule's state without the functions that some keep in it (the config rebuilds them); None for None."""
    if scheduler is None:
        return None
    return {key: value for key, value in scheduler.state_dict().items() if is_plain(value)}


def _readable(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`; {} if it is missing or can't be read."""
    try:
        return load_checkpoint(path)
    except ConfigError:
        return {}


def is_plain(value: Any) -> bool:
    """True for what a checkpoint may hold: numbers, strings, None, tensors, and lists and dicts of these."""
    if type(value) is dict:  # a Counter or a defaultdict isn't
        return all(is_plain(k) and is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor)
