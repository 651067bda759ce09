"""When things happen in a run: epochs, validation, keeping the best, checkpoints, stopping, going on.

What one epoch does is a subclass's business (`train_epoch`, `validate`).
"""
from __future__ import annotations

import contextlib
import json
import math
import shlex
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.run_paths import RunPaths
from logger.log import get_logger, log_to_file
from logger.metrics_csv import MetricsCSV
from logger.tensorboard import make_writer
from utils import dist
from utils.checkpoint.store import save_checkpoint
from utils.config.outside import outside_flags
from utils.config.schema import TRAINER, defaults
from utils.errors import ConfigError, RunError
from utils.files import write_json
from utils.seed import rng_state, set_rng_state
from utils.stop import StopRequest

log = get_logger()


def duration(seconds: float) -> str:
    """A time a person reads at a glance: 8.3 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class BaseTrainer(ABC):
    """Runs epochs 1 to `trainer.epochs` and leaves checkpoints, metrics.csv, TensorBoard events and a log.

    Args:
        model: the plain model (not wrapped for data parallel training), on `device`.
        optimizer, lr_scheduler: the schedule is stepped once an epoch and may be None.
        config: the effective config, saved with the run and in each checkpoint.
        train_loader, valid_loader: see `base.BaseDataLoader`; `valid_loader` may be None.
        paths: the run's folders; None writes nothing at all (a dry run).
        device: where the model is.
        data_facts: plain data about the data set, kept in the checkpoint so that a model can be used without it.
        stop: who hears SIGTERM and SIGINT; one that listens during `train` only, where absent.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], *,
                 train_loader: Any, valid_loader: Any = None, lr_scheduler: Any = None, paths: RunPaths | None = None,
                 device: torch.device | str = "cpu", data_facts: dict[str, Any] | None = None,
                 stop: StopRequest | None = None):
        self.model, self.optimizer, self.lr_scheduler = model, optimizer, lr_scheduler
        self.config, self.options = config, defaults(TRAINER, config["trainer"])
        self.train_loader, self.valid_loader = train_loader, valid_loader
        self.paths, self.device = paths, torch.device(device)
        self.data_facts = data_facts or {}

        self.epochs: int = self.options["epochs"]
        self.save_period: int = self.options["save_period"]
        self.keep_last: int | None = self.options["keep_last"]
        self.monitor_mode, self.monitor = self._parse_monitor(self.options["monitor"])
        self.early_stop: float = self.options["early_stop"] or math.inf
        self.best: float | None = None
        self.not_improved = 0
        self.batches_done = 0
        self.start_epoch, self.start_batch, self.global_step = 1, 0, 0
        self.start_offset = 0        # images of the first epoch that were done in batches of another size
        self.last_epoch = 0          # the last complete one
        self.epoch_lr: float | None = None  # the rate at the beginning of the epoch
        self.finished = True         # False where a stop ended the run before its last epoch did
        self.resumed_inside = False  # an epoch: its checkpoint is of the middle until the end is written
        self.scaler = None
        #: train.py's own, where it listens from the start.
        self.stop = StopRequest() if stop is None else stop
        self.writer: Any = make_writer(None)
        self.is_main = dist.is_main()

    # ------------------------------------------------------------------ what a subclass gives

    @abstractmethod
    def train_epoch(self, epoch: int, start_batch: int) -> dict[str, float] | None:
        """Train one epoch from batch `start_batch`; its figures, or None where a stop was asked for inside it.

        Sets `batches_done`.
        """

    @abstractmethod
    def validate(self, epoch: int) -> dict[str, float | None] | None:
        """Figures on the validation split, without the `val_` prefix; None where a stop was asked for before it ended.

        Every rank returns the same. It draws no random numbers, so that it can be done again.
        """

    def extra_state(self) -> dict[str, Any]:
        """More of the subclass's state for the checkpoint (tensors and plain data); called on every rank."""
        return {}

    def load_extra_state(self, state: dict[str, Any], checkpoint: dict[str, Any]) -> None:  # noqa: B027
        """Take back what `extra_state` returned; `checkpoint` is the whole file."""

    @property
    def judged_model(self) -> nn.Module:
        """The model that is validated and saved as `state_dict`; another than the one that trains where its weights are
        averaged."""
        return self.model

    def log_epoch(self, epoch: int, figures: dict[str, float | None]) -> None:  # noqa: B027
        """Draw more than the scalars (histograms, images); rank 0 only."""

    # ------------------------------------------------------------------ the run

    def train(self) -> Path | None:
        """Run to the end, or until a stop is asked for. Returns the last checkpoint's path (None in a dry run)."""
        if self.paths is None:
            raise ValueError("train() needs paths; a dry run calls dry_run()")
        self._open_run()
        began = time.monotonic()
        last = None
        # The order of these lines is the recipe of a run; each is explained where it is defined.
        with self.stop:
            for epoch in self._epochs_left():
                start_batch = self.start_batch if epoch == self.start_epoch else 0
                epoch_began = time.monotonic()
                if not (self.resumed_inside and epoch == self.start_epoch and self.epoch_lr is not None):
                    self.epoch_lr = self.optimizer.param_groups[0]["lr"]
                trained = self.train_epoch(epoch, start_batch)
                if trained is None:
                    return self._stopped(epoch)
                train_seconds = time.monotonic() - epoch_began
                self.last_epoch = epoch
                self.sync_buffers()
                validated = self.validate(epoch) if self.valid_loader is not None else {}
                if validated is None:
                    return self._stopped(epoch)
                figures = {"loss": None, "val_loss": None, **trained,
                           **{f"val_{key}": value for key, value in validated.items()}}
                self._step_schedule(figures)
                improved = self._is_better(figures)
                self.not_improved = 0 if improved or self.monitor_mode == "off" else self.not_improved + 1
                with self._writing():
                    self._report(epoch, self.epoch_lr, figures, time.monotonic() - epoch_began,
                                 time.monotonic() - began, improved)
                    self._report_time(epoch, start_batch, train_seconds, time.monotonic() - epoch_began)
                ends = epoch == self.epochs or self.not_improved >= self.early_stop
                inside = self.resumed_inside and epoch == self.start_epoch
                if epoch % self.save_period == 0 or ends or inside:
                    last = self.save(epoch)
                if improved:
                    self.save(epoch, self.paths.best)
                self._drop_old(epoch)
                if self.stop.agreed(self.device, True) and not ends:
                    return self._stopped(epoch, last if last == self.paths.checkpoint(epoch) else None, complete=True)
                if ends and epoch < self.epochs:
                    log.info("early stop: %s hasn't improved for %d epochs", self.monitor, self.not_improved)
                if ends:
                    break
        if last is not None:
            log.info("trained in %s", duration(time.monotonic() - began))
        elif self.not_improved >= self.early_stop:
            log.info("nothing left to train: %s hasn't improved for %d epochs (trainer.early_stop is %d)", self.monitor,
                     self.not_improved, self.early_stop)
        else:
            log.info("nothing left to train: the checkpoint is of epoch %d of %d; --epochs N trains longer",
                     self.start_epoch - 1, self.epochs)
        return last

    def close(self) -> None:
        """Nothing more is written to TensorBoard."""
        self.writer.close()

    def dry_run(self) -> None:
        """One training and one validation step; writes nothing."""
        raise NotImplementedError

    def sync_buffers(self) -> None:
        """Give every rank rank 0's buffers (norm statistics), so that what is validated is what is saved."""
        if dist.world_size() > 1:
            for model in dict.fromkeys((self.model, self.judged_model)):
                for buffer in model.buffers():
                    torch.distributed.broadcast(buffer, 0)

    # ------------------------------------------------------------------ parts of it

    def _open_run(self) -> None:
        dist.on_main(self._open_files)

    def _open_files(self) -> None:
        """The run's folders and logs, by rank 0. Raises ConfigError where they can't be written."""
        self.paths.create()
        try:
            log_to_file(self.paths.log)
            write_json(self.paths.config, self.config)
            self.writer = make_writer(self.paths.log, self.options["tensorboard"],
                                      self.start_epoch - 1, self.global_step)
        except OSError as error:
            raise ConfigError(f"trainer.save_dir: can't write in {error.filename or self.paths.models}: "
                              f"{error.strerror}") from None
        self.csv = MetricsCSV(self.paths.log / "metrics.csv", self.start_epoch - 1)
        self.times = MetricsCSV(self.paths.log / "timing.csv", self.start_epoch - 1)
        for half in self.paths.models.glob(".*.pth.*.tmp"):  # a killed run was writing it
            half.unlink(missing_ok=True)

    def _epochs_left(self) -> range:
        first = self.start_epoch
        return range(first, first if self.not_improved >= self.early_stop else self.epochs + 1)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Around what writes logs: a disk that is full ends the run with a line that says so."""
        try:
            yield
        except OSError as error:
            raise RunError(f"can't write {error.filename or self.paths.log}: {error.strerror}; checkpoints are "
                           f"intact, the newest is {self._newest()}") from None

    def _newest(self) -> str:
        kept = self.paths.checkpoints() if self.paths else []
        return str(kept[-1]) if kept else "none yet"

    def _step_schedule(self, figures: dict[str, Any]) -> None:
        unit = getattr(self.lr_scheduler, "unit", "epoch")
        if unit == "figure":
            value = figures.get(self.monitor) if self.monitor_mode != "off" else figures.get("val_loss")
            value = figures["loss"] if value is None and self.monitor_mode != "max" else value
            if value is not None:
                self.lr_scheduler.step(value)
        elif self.lr_scheduler is not None and unit == "epoch":
            self.lr_scheduler.step()

    def _report(self, epoch: int, lr: float, figures: dict[str, Any], seconds: float, so_far: float,
                improved: bool) -> None:
        """One line an epoch, one row in metrics.csv, one point in TensorBoard."""
        if not self.is_main:
            return
        done = epoch - self.start_epoch + 1
        left = so_far / done * (self.epochs - epoch)
        shown = "  ".join(f"{key} {value:.4f}" for key, value in figures.items()
                          if value is not None and not key.endswith(("shot_acc", "class_mean_acc")))
        groups = [figures.get(f"val_{g}_shot_acc") for g in ("many", "medium", "few")]
        if any(v is not None for v in groups):
            shown += "  many/medium/few " + "/".join("-" if v is None else f"{v:.3f}" for v in groups)
        ending = f"  {duration(left)} left" if epoch < self.epochs else ""
        log.info("epoch %d/%d  lr %.4g  %s  [%s%s]%s", epoch, self.epochs, lr, shown, duration(seconds), ending,
                 "  best" if improved else "")
        self.csv.append({"epoch": epoch, "lr": lr, **figures})
        self.writer.add_scalar("lr", lr, epoch)
        for key, value in figures.items():
            if value is not None:
                tag = f"{key[4:]}/val" if key.startswith("val_") else f"{key}/train"
                self.writer.add_scalar(tag, value, epoch)
        self.log_epoch(epoch, figures)
        self.writer.flush()

    def _report_time(self, epoch: int, start_batch: int, train_seconds: float, seconds: float) -> None:
        """A row of timing.csv: what `tools.compare` shows as wall time and images/s.

        A file of its own, because metrics.csv is the same for the same seed and times never are.
        """
        if self.is_main:
            images = sum(self.train_loader.share(b)[1] for b in range(start_batch, len(self.train_loader)))
            self.times.append({"epoch": epoch, "seconds": round(seconds, 3),
                               "images_per_second": round(images / max(train_seconds, 1e-9), 2)})

    @staticmethod
    def _parse_monitor(monitor: str) -> tuple[str, str]:
        if monitor in ("off", "", None):
            return "off", ""
        mode, _, name = monitor.partition(" ")
        if mode not in ("min", "max") or not name:
            raise ConfigError(f"trainer.monitor: {monitor!r}; write \"off\", \"max val_accuracy\" or \"min val_loss\"")
        return mode, name.strip()

    def _is_better(self, figures: dict[str, Any]) -> bool:
        if self.monitor_mode == "off":
            return False
        if self.monitor not in figures:
            if self.valid_loader is None and self.monitor.startswith("val_"):
                log.warning("trainer.monitor: no validation split, so %s isn't known; nothing is monitored",
                            self.monitor)
            else:
                log.warning("trainer.monitor: no figure is named %s (there are %s); nothing is monitored",
                            self.monitor, ", ".join(figures))
            self.monitor_mode = "off"
            return False
        value = figures[self.monitor]
        if value is None or math.isnan(value):
            return False
        better = self.best is None or (value < self.best if self.monitor_mode == "min" else value > self.best)
        if better:
            self.best = value
        return better

    # ------------------------------------------------------------------ checkpoints

    def state(self, epoch: int, batch: int | None) -> dict[str, Any]:
        """Everything a run needs to go on, as tensors and plain data.

        Args:
            epoch: the epoch that the state belongs to.
            batch: how many of its batches are done, or None where the epoch is complete.
        """
        position = None if batch is None else {"images": self.train_loader.images_done(batch),
                                               "order": self._order_of(epoch)}
        judged = self.judged_model
        raw = {} if judged is self.model else {"raw_state_dict": self.model.state_dict()}
        return {"arch": self.config["arch"]["type"], "epoch": epoch, "batch": batch, "position": position,
                "global_step": self.global_step, "state_dict": judged.state_dict(), **raw,
                "optimizer": self.optimizer.state_dict(), "lr_scheduler": plain_state(self.lr_scheduler),
                "epoch_lr": self.epoch_lr, "scaler": self.scaler and self.scaler.state_dict(),
                "monitor": self.options["monitor"], "monitor_best": self.best, "not_improved": self.not_improved,
                "rng": self._all_rng(), "config": self.config, "data": self.data_facts, "extra": self.extra_state()}

    def _all_rng(self) -> list[dict[str, Any]]:
        """Every rank's generator states, so that dropout goes on as it would have."""
        mine = rng_state()
        if dist.world_size() == 1:
            return [mine]
        states: list[Any] = [None] * dist.world_size()
        torch.distributed.all_gather_object(states, mine)
        return states

    def save(self, epoch: int, path: Path | None = None, batch: int | None = None) -> Path:
        """Write a checkpoint, whole or not at all; all ranks call it, rank 0 writes.

        Raises RunError, on every rank, where the disk doesn't take it; what was there before stays.
        """
        path = path or self.paths.checkpoint(epoch)
        self._write(path, self.state(epoch, batch))
        return path

    def save_weights(self, path: Path, model: nn.Module) -> None:
        """Write a checkpoint of `model`'s weights alone: for test.py and the tools, not to go on with."""
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

    def _drop_old(self, epoch: int) -> None:
        """Keep `keep_last` checkpoints. Those of later epochs are of a course that this run has left (it was resumed
        from before them): they are renamed, or `-r auto` would take one of them."""
        if not self.is_main:
            return
        kept = [path for path in self.paths.checkpoints() if self.paths.epoch_of(path) <= epoch]
        for later in set(self.paths.checkpoints()) - set(kept):
            later.replace(later.with_name(f"superseded-{later.name}"))
        if self.keep_last:
            for old in kept[:-self.keep_last]:
                old.unlink(missing_ok=True)

    def _stopped(self, epoch: int, saved: Path | None = None, complete: bool = False) -> Path:
        path = saved or self.save(epoch, batch=None if complete else self.batches_done)
        self.finished = False
        where = f"after epoch {epoch}" if complete else \
            f"in epoch {epoch}, after {self.batches_done} of its {len(self.train_loader)} steps"
        log.info("stopped on request %s; go on with: %s -r %s%s", where, dist.command("train.py"),
                 shlex.quote(str(path)), outside_flags(self.config))
        self.writer.close()
        return path

    def resume(self, checkpoint: dict[str, Any], path: Path | None = None) -> None:
        """Go on from where `checkpoint` was written: mid-epoch if need be, bit for bit on CPU.

        Raises ConfigError where the checkpoint has no such state (weights only, or written by another project).
        """
        name = str(path or "the checkpoint")
        if "optimizer" not in checkpoint or not isinstance(checkpoint.get("epoch"), int):
            raise ConfigError(f"{name}: holds weights only; start a new run from them with --pretrained {name}")
        saved_config = checkpoint.get("config") if isinstance(checkpoint.get("config"), dict) else {}
        self._load_optimizer(checkpoint["optimizer"], saved_config, name)
        if self.scaler is not None and checkpoint.get("scaler"):
            self.scaler.load_state_dict(checkpoint["scaler"])
        self._load_best(checkpoint)
        self.epoch_lr = checkpoint.get("epoch_lr")
        batch = checkpoint.get("batch")
        self.resumed_inside = batch is not None
        self.start_epoch = checkpoint["epoch"] + (batch is None)
        self.last_epoch = self.start_epoch - 1
        if batch is not None:
            self._find_position(checkpoint, batch, saved_config, name)
        if self.lr_scheduler is not None:
            self.bring_schedule_to(self._schedule_calls(), checkpoint.get("lr_scheduler"))
        step = checkpoint.get("global_step")
        self.global_step = checkpoint["epoch"] * len(self.train_loader) if step is None else step
        if "raw_state_dict" in checkpoint:  # `state_dict` is their average
            self.model.load_state_dict(checkpoint["raw_state_dict"])
        if checkpoint.get("extra"):
            self.load_extra_state(checkpoint["extra"], checkpoint)
        states = checkpoint.get("rng")
        if isinstance(states, list) and len(states) == dist.world_size():
            set_rng_state(states[dist.rank()])
        elif states:
            log.warning("the run was saved by %d processes and goes on with %d: dropout will differ", len(states),
                        dist.world_size())
        changes = list(config_changes(saved_config, self.config))
        if changes:
            log.info("changed from what the checkpoint had, and in force from here: %s", "; ".join(changes))

    def _load_optimizer(self, state: Any, saved_config: dict[str, Any], name: str) -> None:
        """The optimizer's memory from a checkpoint; its numbers (rate, decay, momentum) stay the config's."""
        kind, before = self.config["optimizer"].get("type"), (saved_config.get("optimizer") or {}).get("type")
        if before is not None and before != kind:
            raise ConfigError(f"optimizer.type: {name} was trained with {before}, whose state {kind} can't go on with; "
                              f"start a new run from its weights with --pretrained {name}")
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(state)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{name}: its optimizer state doesn't fit this config ({error}); start a new run from "
                              f"its weights with --pretrained {name}") from None
        for group, numbers in zip(self.optimizer.param_groups, own):
            saved = {key: group[key] for key in ("lr", "initial_lr") if key in group}
            group.update(numbers)
            if getattr(self.lr_scheduler, "unit", None) == "figure" and saved.get("initial_lr"):
                # A plateau's rate is history: what it has become, by what the base rate is now.
                group["lr"] = saved["lr"] * (numbers["lr"] / saved["initial_lr"])

    def _load_best(self, checkpoint: dict[str, Any]) -> None:
        """The best figure so far, unless it is another figure that is monitored now."""
        best, monitor = checkpoint.get("monitor_best"), checkpoint.get("monitor")
        if monitor is not None and monitor != self.options["monitor"] and best is not None:
            log.info("trainer.monitor: %s instead of %s: the best so far begins anew", self.options["monitor"], monitor)
            return
        self.best = best.item() if isinstance(best, torch.Tensor) else best
        self.not_improved = checkpoint.get("not_improved") or 0

    def _find_position(self, checkpoint: dict[str, Any], batch: int, saved_config: dict[str, Any], name: str) -> None:
        """Where in its epoch a run goes on: by images, since the batch's size may have changed. Raises ConfigError
        where the epoch's order of images is another: some would be seen twice and others not at all."""
        loader, position = self.train_loader, checkpoint.get("position") or {}
        size = (saved_config.get("data_loader") or {}).get("args", {}).get("batch_size", loader.batch_size)
        images = position.get("images", min(batch * size, loader.epoch_size))
        if "order" in position and position["order"] != self._order_of(self.start_epoch):
            raise ConfigError(f"{name}: was stopped inside epoch {self.start_epoch}, whose images now come in another "
                              "order (another sampler, seed or data); go on with the old settings until the "
                              "epoch's end, or from an earlier checkpoint")
        self.start_batch, self.start_offset = divmod(images, loader.batch_size)
        if self.start_offset and images < loader.epoch_size:
            self.start_batch, self.start_offset = 0, images
        elif self.start_offset:  # the epoch's last batch, which may be short
            self.start_batch, self.start_offset = self.start_batch + 1, 0

    def _schedule_calls(self) -> int:
        """How often the schedule would have been called by now, had the run been this one from its beginning."""
        if getattr(self.lr_scheduler, "unit", "epoch") != "step":
            return self.last_epoch
        inside = self.start_batch // (self.options["accumulate"])
        if self.start_offset:
            inside = round(self.start_offset / self.train_loader.epoch_size * self.steps_per_epoch)
        return self.last_epoch * self.steps_per_epoch + inside

    def _order_of(self, epoch: int) -> int:
        """A fingerprint of the order in which an epoch's images come."""
        return zlib.crc32(self.train_loader.epoch_order(epoch).tobytes())

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""
        return -(-len(self.train_loader) // (self.options["accumulate"]))

    def bring_schedule_to(self, calls: int, saved: dict[str, Any] | None) -> None:
        """Bring the schedule to where it is after `calls` calls of its `step`."""
        raise NotImplementedError


def config_changes(before: dict[str, Any], now: dict[str, Any], path: str = "") -> Iterator[str]:
    """What the config says otherwise than a checkpoint's: "optimizer.args.lr 0.05 -> 0.001". Where a run's files are
    isn't told, nor keys that only one of them knows."""
    for key in before.keys() & now.keys():
        here = f"{path}{key}"
        old, new = before[key], now[key]
        if isinstance(old, dict) and isinstance(new, dict):
            yield from config_changes(old, new, f"{here}.")
        elif old != new and here not in ("trainer.save_dir", "trainer.verbosity", "name"):
            yield f"{here} {json.dumps(old)} -> {json.dumps(new)}"



def plain_state(scheduler: Any) -> dict[str, Any] | None:
    """A schedule's state without the functions some keep in it (they are built from the config)."""
    if scheduler is None:
        return None
    return {key: value for key, value in scheduler.state_dict().items() if is_plain(value)}


def is_plain(value: Any) -> bool:
    """True for what a checkpoint may hold: numbers, strings, None, tensors, and lists and dicts of these."""
    if type(value) is dict:  # a Counter or a defaultdict isn't
        return all(is_plain(k) and is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor)

