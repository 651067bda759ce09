"""How a run starts, and how a checkpoint's config and data facts are read. `tools.parts` makes what a config names."""
from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.base_data_loader import BaseDataLoader
from base.freezing import freeze_plan
from base.run_paths import new_run
from data_loader.held_out import check_held_out, of_same_data
from logger.log import get_logger
from model import routing
from model.weights.files import load_file
from model.weights.remap import load_weights
from tools.fallback import value_at
from tools.parts import input_of, make_model
from utils.checkpoint.store import load_checkpoint, newest_good_checkpoint, recover_config
from utils.config.load import check_config, load_config
from utils.errors import ConfigError

log = get_logger()
GATES = f"backbone.{routing.GATES}"
#: Keys that name a file of weights to start from, and those that name a run's folder, which a resumed run keeps.
FILES, PLACE = ("pretrained", "load_crt"), ("name", "trainer.save_dir")
#: Keys that have an effect only where a run begins.
AT_START = ("init_classifier", "arch.args.weights")


# ---------------------------------------------------------------------- configs of checkpoints

def config_of(checkpoint: dict[str, Any], path: Path, overrides: list[tuple] = ()) -> dict[str, Any]:
    """The config that goes with a checkpoint: inside it (RIDE's pickled parser included), or config.json beside it.

    Classes outside the repo that it names are refused unless `overrides` name them too. Raises ConfigError, also where
    there is neither.
    """
    config = recover_config(checkpoint)
    if config is not None and "arch" in config:
        return check_config(config, overrides, allowed=())
    beside = path.parent / "config.json"
    if beside.is_file():
        return load_config(beside, overrides, allowed=())
    raise ConfigError(f"{path}: holds no config and there is no config.json beside it; name one with -c CONFIG.json")


@dataclass
class Start:
    """Where a training begins: its config, and the checkpoint that it goes on from or takes weights from."""

    config: dict[str, Any]
    checkpoint: dict[str, Any] | None = None
    path: Path | None = None
    #: True: the same run goes on, in its own folder. False: a new run.
    goes_on: bool = False
    #: Files that the config names, read for their data facts and kept until their weights are loaded.
    _opened: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    def facts_of(self, file: str) -> dict[str, Any] | None:
        """The data facts in a file that the config names, or None; what was read is kept for `take`."""
        return facts_of_checkpoint(self.opened(file))

    def opened(self, file: str) -> dict[str, Any]:
        """What a file that the config names holds, kept for `take`."""
        if file not in self._opened:
            self._opened[file] = load_file(file)
        return self._opened[file]

    def take(self, file: str) -> dict[str, Any]:
        """What a file that the config names holds, read only once; not kept afterwards, as a training takes hours."""
        return self._opened.pop(file) if file in self._opened else load_file(file)

    @property
    def brings_weights(self) -> bool:
        """Whether all of the model's weights come from a file, so that its arch needs to fetch none."""
        return self.checkpoint is not None or any(self.config.get(key) for key in FILES)


def find_start(args: Namespace, config: dict[str, Any] | None) -> Start:
    """Work out what `-c`, `-r`, `--run_id` and `--pretrained` ask for together.

    `-r FILE` alone goes on with the file's run; with `-c` too, a config with `resume_state_dict_only` starts a new run
    from the file's weights, any other replaces the run's config. `-r auto` takes the newest good checkpoint of the run
    that `-c` and `--run_id` name, and starts a new run where there is none. Raises ConfigError for flags that don't go
    together, and for a checkpoint that can't be read.
    """
    if not args.resume:
        return Start(config)
    if args.resume == "auto":
        if config is None or not args.run_id:
            raise ConfigError("-r auto: needs -c CONFIG.json and --run_id ID, the run to go on with")
        paths = new_run(config["trainer"]["save_dir"], config["name"], args.run_id)
        found = newest_good_checkpoint(paths.models)
        return Start(config) if found is None else Start(config, found[1], found[0], goes_on=True)
    path = Path(args.resume)
    checkpoint = load_checkpoint(path)
    before = recover_config(checkpoint) or {}
    new = config is not None and config["resume_state_dict_only"]
    given = [(item.path, item.value, item.flag) for item in args.overrides]
    for key, value, flag in [*given, *((key, config[key], key) for key in FILES if new)]:
        if key in FILES and value not in (None, before.get(key)):
            raise ConfigError(f"{flag}: a run begins from one file, and -r {path} has its weights; leave one out")
    if new:
        return Start(config, checkpoint, path)
    for key, value, flag in given:
        old = value_at(before, key)
        same = value in (None, old) or (isinstance(old, dict) and old.get("type") == value)
        if any(f"{key}.".startswith(f"{first}.") for first in AT_START) and not same:
            raise ConfigError(f"{flag} {key}: has its effect where a run begins, and -r {path} goes on with one; leave "
                              f"it out, or start a new run with --pretrained {path}")
    if re.match(r"superseded\d*-", path.name):
        raise ConfigError(f"-r {path}: belongs to epochs that its run has discarded; to go on with it, copy it to a "
                          f"folder of its own as {path.name.partition('-')[2]}, or start a new run with --pretrained "
                          f"{path}")
    staying = [item for item in args.overrides if item.path not in PLACE]
    if config is None:
        config = config_of(checkpoint, path, staying)
    elif len(staying) < len(args.overrides):
        config = load_config(args.config, staying)
    return Start(config, checkpoint, path, goes_on=True)


# ---------------------------------------------------------------------- data, model, loss

def make_teacher(start: Start, num_classes: int, device: torch.device | str,
                 preprocess: dict[str, Any] | None = None) -> nn.Module | None:
    """The teacher of a config that distils, with its weights, in evaluation mode.

    preprocess: how the images that it gets are normalised; they are renormalised as in the teacher's own training, or
    as its package says if the file doesn't. That they have another size is warned of.
    Returns None where the config doesn't distil. Raises ConfigError for weights that don't fit.
    """
    from trainer.distill_trainer import Renormalised
    config = start.config
    if not config.get("distill"):
        return None
    teacher = make_model(config, num_classes, "distill_arch", bare=True)
    file = start.take(config["distill_checkpoint"])
    load_weights(teacher, file, name=config["distill_checkpoint"], exact=True)
    theirs = (facts_of_checkpoint(file) or {}).get("preprocess") or input_of({"arch": config["distill_arch"]}) or {}
    ours, wanted = ((known or {}).get("image_size") for known in (preprocess, theirs))
    if None not in (ours, wanted) and ours != wanted:
        log.warning("distill: the teacher was trained on images of %d pixels and sees them at data_loader.args."
                    "image_size, %d; give it those that it knows", wanted, ours)
    if preprocess and any(theirs.get(key, preprocess[key]) != preprocess[key] for key in ("mean", "std")):
        log.info("distill: the teacher's images are normalised as in its own training (mean %s, std %s)",
                 theirs["mean"], theirs["std"])
        teacher = Renormalised(teacher, preprocess, theirs)
    return teacher.to(device).eval().requires_grad_(False)


def data_facts(loader: BaseDataLoader) -> dict[str, Any]:
    """The data facts for a checkpoint, as plain data: classes, training counts, preprocessing, the split, and
    `seen` (see `data_loader.held_out.seen_in`) if images of "test" or "val" aren't new to the model."""
    seen = getattr(loader, "seen", None)
    return {"num_classes": int(loader.num_classes), "cls_num_list": [int(n) for n in loader.cls_num_list],
            "class_names": None if loader.class_names is None else [str(name) for name in loader.class_names],
            "preprocess": loader.preprocess, "split": getattr(loader, "split_memory", None) or {"rule": "names"},
            **({"seen": dict(seen)} if seen else {})}


def check_labels(config: dict[str, Any], loader: BaseDataLoader) -> None:
    """Raise ConfigError, with file and line, for a list's label beyond what `arch.args.num_classes` allows."""
    limit = (config["arch"].get("args") or {}).get("num_classes")
    where = getattr(getattr(loader, "images", None), "where", None)
    if limit is None or where is None or not (loader.targets >= limit).any():
        return
    at = int((loader.targets >= limit).argmax())
    raise ConfigError(f"{where[0]}, line {where[1][at]}: label {loader.targets[at]} is out of range; "
                      f"arch.args.num_classes is {limit}, so labels are 0 to {limit - 1}")


def facts_of_checkpoint(checkpoint: dict[str, Any] | None) -> dict[str, Any] | None:
    """The data facts in a checkpoint (see `data_facts`); None where it has none, being another project's."""
    facts = (checkpoint or {}).get("data")
    return facts if isinstance(facts, dict) else None


def facts_to_follow(start: Start) -> dict[str, Any] | None:
    """The data facts that a training's data must agree with, or None: of the run that is resumed, of the teacher (with
    "teacher") or (with "optional": where the classes are the same) of the weights that it starts from. With "frozen",
    what these weights see images with isn't trained, so that images must be prepared as they were for them."""
    config = start.config
    if start.checkpoint is not None:
        facts, how = facts_of_checkpoint(start.checkpoint), {}
    elif config.get("distill") and config.get("distill_checkpoint"):
        facts, how = start.facts_of(config["distill_checkpoint"]), {"teacher": True}
    else:
        source = config.get("load_crt") or config.get("pretrained")
        facts, how = start.facts_of(source) if source else None, {"optional": True}
    if not start.goes_on and "teacher" not in how and backbone_stays(config):
        how["frozen"] = True
    return None if facts is None else {**facts, **how}


def backbone_stays(config: dict[str, Any]) -> bool:
    """Whether only classifiers or gates of weights to start from are trained, from the first epoch to the last."""
    options = config["trainer"]
    plan = freeze_plan(options["freeze"])
    return bool(config.get("load_crt")) or options["type"] == "ExpertAssignmentTrainer" or (
        plan is not None and plan.what == "backbone" and (plan.until is None or plan.until >= options["epochs"]))


def warn_of_seen(start: Start, loader: BaseDataLoader) -> None:
    """Warn where the weights to start from, or the teacher, may have been trained on some of the validation images; the
    run's data facts then have it (`seen`), so that later nothing is chosen on these images without a word."""
    config, sources = start.config, {}
    if start.checkpoint is not None:
        sources[str(start.path)] = start.checkpoint
    elif source := config.get("load_crt") or config.get("pretrained"):
        sources[source] = start.opened(source)
    if not start.goes_on and config.get("distill") and (teacher := config.get("distill_checkpoint")):
        sources[teacher] = start.opened(teacher)
    for source, file in sources.items():
        facts, before = facts_of_checkpoint(file), (recover_config(file) or {}).get("data_loader")
        if not facts or not before:
            continue
        now = config["data_loader"]
        same = of_same_data(before, now, facts)
        try:
            check_held_out(loader, facts, (before.get("args") or {}) if same else None, now.get("args") or {})
        except ConfigError as error:
            log.warning("validation figures will be too good, %s may have learned from these images: %s", source, error)
            reason = (facts.get("seen") or {}).get("val") or str(error)
            loader.seen = {**getattr(loader, "seen", {}), "val": reason}
            return


def load_start(model: nn.Module, start: Start, class_names: list[str] | None = None) -> None:
    """Load the weights that a run starts from, and freeze what stage 2 doesn't train.

    class_names: the data's, in the order of their labels. A classifier of other classes isn't loaded, even where their
    number is the same.

    The config's `pretrained` is a file of weights to start from (a classifier of other classes is left new); its
    `load_crt` is stage 1's file: all but the classifier is loaded, and everything but the classifier frozen (Kang et
    al., ICLR 2020). With the `lws` classifier stage 1's classifier is loaded too and only its scales are learned.

    Raises ConfigError for weights that don't fit.
    """
    config = start.config
    if config.get("load_crt") and model.routed:
        raise ConfigError("load_crt: retrains a classifier, and an EAModel trains gates; give stage 1's model with -r")
    if start.checkpoint is not None:
        # Stage 1's file has no gates yet; any other must hold all weights.
        stage1 = not start.goes_on and not any(GATES in key for key in start.checkpoint.get("state_dict") or {})
        load_weights(model, start.checkpoint, name=str(start.path), skip_prefixes=(GATES,) if stage1 else (),
                     exact=start.goes_on or model.routed)
    elif config.get("pretrained"):
        file = start.take(config["pretrained"])
        known = (facts_of_checkpoint(file) or {}).get("class_names")
        other = None not in (known, class_names) and list(known) != list(class_names)
        said = model.load_pretrained(file, config["pretrained"], other)
        if said is not None:
            log.info(said)
        else:
            if other:
                log.info("%s knows other classes: the classifier is left new", config["pretrained"])
            load_weights(model, file, name=config["pretrained"], new_head=True,
                         skip_prefixes=(GATES, *(model.classifier_prefixes() if other else ())))
    elif model.routed and not model.force_all:
        log.warning("the gates learn when experts that nobody trained are right; give the trained model with "
                    "-r STAGE1")
    elif config["trainer"].get("freeze") and not config.get("load_crt") and not config["arch"]["args"].get("weights"):
        log.warning("trainer.freeze: what is frozen stays as it was initialised; give trained weights with "
                    "--pretrained FILE")
    if config.get("second_stage") and not config.get("load_crt"):  # only a dry run comes here
        log.warning("load_crt: missing; without it this config can't be trained, only tried")
    if config.get("load_crt"):
        learned = tuple(model.stage2_prefixes())
        if start.checkpoint is None:
            file = start.take(config["load_crt"])
            refuse_other_classes(model, file, config["load_crt"], learned, class_names)
            load_weights(model, file, name=config["load_crt"], skip_prefixes=learned, exact=True)
        model.freeze_except(learned)


def refuse_other_classes(model: nn.Module, file: dict[str, Any], name: str, learned: tuple[str, ...],
                         class_names: list[str] | None) -> None:
    """Raise ConfigError where a second stage keeps stage 1's classifier (LWS) but the data have other classes."""
    known = (facts_of_checkpoint(file) or {}).get("class_names")
    keeps = not set(learned) >= set(model.classifier_prefixes())
    if keeps and None not in (known, class_names) and list(known) != list(class_names):
        raise ConfigError(f"load_crt: {name} knows other classes ({', '.join(map(str, known[:3]))} ...) than the data "
                          f"({', '.join(class_names[:3])} ...), and lws keeps its classifier; give stage 1's data")
