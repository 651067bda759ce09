"""Train a long-tailed recognition model from a JSON config.

    python train.py -c configs/digits_lt_ride.json --num_experts 3 --add_bt 1
    python train.py -r saved/models/<name>/<run_id>/checkpoint-epoch5.pth
    torchrun --nproc_per_node 2 train.py -c configs/cifar100_lt_ride.json

Nothing heavy is imported before the form of the config was checked, so that most mistakes are reported at once.
"""
from __future__ import annotations

import contextlib
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.run_lock import hold, sole_trainer
from base.stop import StopRequest
from data_loader.derived import nothing_kept
from tools.flags import parse_train
from utils.cli import run_main
from utils.config.load import check_second_stage, load_config
from utils.config.outside import outside_flags
from utils.config.schema import SECTIONS, TOP
from utils.errors import ConfigError

if TYPE_CHECKING:
    from base.run_paths import RunPaths
    from tools.session import Start


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status. Raises ConfigError and RunError."""
    args = parse_train(argv)
    args.typed = sys.argv[1:] if argv is None else argv
    config = load_config(args.config, args.overrides) if args.config else None
    if config and not args.dry_run:
        check_second_stage(config)
    if config:
        check_own_images(config["data_loader"])
        check_unused(config, ("loss", "metrics"))
    workers = workers_wanted(args, config)
    if workers > 1:
        from tools.launch import run_workers
        return run_workers(workers, [str(Path(__file__).resolve()), *args.typed])
    stop = StopRequest()
    # Signals to stop count from here on, so that a run saves even before its first step. A dry run has nothing to save.
    with sole_trainer(), nothing_kept() if args.dry_run else stop:
        train(args, config, stop)
    return 0


def check_own_images(loader: dict[str, Any]) -> None:
    """Raise ConfigError for a missing folder of a user's own images before a network and its weights are looked for."""
    folder = (loader.get("args") or {}).get("data_dir")
    if loader.get("type") in ("ImageFolderLTDataLoader", "ListFileDataLoader") and folder is not None:
        from data_loader.files import check_data_dir
        check_data_dir(folder)


def check_unused(config: dict[str, Any], keys: Iterable[str]) -> None:
    """Raise ConfigError where a detector's config names something in `keys`, of "loss" and "metrics": detectors have
    their own. Defaults are in every run's config.json and say nothing; a trainer from outside may use both."""
    if config["trainer"]["type"] != "DetectionTrainer":
        return
    defaults = {"loss": SECTIONS["loss"].default, "metrics": next(row.default for row in TOP if row.name == "metrics")}
    why = {"loss": f"{config['arch']['type']} has losses of its own",
           "metrics": "a detector's figures are the average precisions of boxes and masks (bbox_AP, segm_AP, ...)"}
    for key in keys:
        if config[key] != defaults[key]:
            raise ConfigError(f"{key}: would have no effect, as {why[key]}; leave it out")


def workers_wanted(args: Namespace, config: dict[str, Any] | None) -> int:
    """How many processes a plain `python train.py` starts: one per GPU where the config or -d asks for several."""
    if config is None:  # a resumed run has as many as before
        with contextlib.suppress(ConfigError):
            config = load_config(Path(args.resume).with_name("config.json"), args.overrides, allowed=())
    wanted = (config or {}).get("n_gpu") or 1
    if wanted <= 1 and not (args.device and "," in args.device):
        return 1
    from utils.device import workers_to_start
    return workers_to_start(args.device, wanted)


def train(args: Namespace, config: dict[str, Any] | None, stop: StopRequest) -> None:
    """The run, step by step."""
    from logger.log import get_logger, set_verbosity, setup_logging
    from tools import parts, session
    from tools.allocator import keep_freed_memory
    from tools.fallback import as_begun, settle_weights
    from tools.launch import note_stop
    from trainer import trainer_class
    from trainer.cached import check_options, keeps_plain
    from trainer.head_start import check_start, start_classifier, start_on_features
    from trainer.precision import choose_precision, set_determinism
    from trainer.schedules import build_optimizer, build_scheduler
    from trainer.tasks import task_of
    from utils import dist
    from utils.checkpoint.store import recover_config
    from utils.device import pick_device
    from utils.seed import seed_everything

    setup_logging()
    log = get_logger()
    start = session.find_start(args, config)
    if config is None:  # a run begun by an older version goes on, whatever its config names
        check_unused(start.config, {item.path.partition(".")[0] for item in args.overrides} & {"loss", "metrics"})
    config = start.config
    options = config["trainer"]
    set_verbosity(options["verbosity"])
    if args.ignored:
        log.warning("%s: taken for old command lines' sake, without effect (torchrun starts several processes)",
                    ", ".join(dict.fromkeys(args.ignored)))

    device = pick_device(args.device, config["n_gpu"])
    if device.type == "cpu":
        keep_freed_memory()
    dist.setup(device)
    set_determinism(config, device)
    seed_everything(config["seed"], dist.rank())
    if not start.goes_on:
        start.config = config = settle_weights(config, args.overrides, args.config, start.brings_weights)
    elif args.config:
        before = recover_config(start.checkpoint) or {}
        start.config = config = as_begun(config, before, args.overrides, args.config)
    options = config["trainer"]
    check_options(options)
    starts = None if start.goes_on else config["init_classifier"]
    if starts:
        check_start(starts)

    train_loader = parts.make_loader(config, device, facts=session.facts_to_follow(start))
    session.warn_of_seen(start, train_loader)
    config = parts.settled(config, train_loader)
    valid_loader = train_loader.split_validation()
    describe_data(train_loader, config)
    session.check_labels(config, train_loader)

    model = parts.make_model(config, train_loader.num_classes, bare=start.brings_weights)
    session.load_start(model, start, train_loader.class_names)
    if options["freeze"] is not None:
        model.freeze(options["freeze"])
    model.to(device)
    log.info(model.summary())
    # Where training caches features, class means are computed from them: one pass for both.
    of_features = bool(starts) and not args.dry_run and starts["type"] == "class_means" and keeps_plain(options)
    if starts and not of_features:
        start_classifier(model, train_loader, starts, max_batches=1 if args.dry_run else None)

    criterion = parts.make_criterion(config, train_loader.cls_num_list)
    teacher = session.make_teacher(start, model.num_classes, device, getattr(train_loader, "preprocess", None))
    parts.check_loss(config, criterion, model, teacher)
    amp, _ = choose_precision(options["amp"], device)    # "auto" may be fp16, for which no optimizer is fused
    optimizer = build_optimizer(config["optimizer"], model, {**options, "amp": amp})
    parts.warn_of_no_effect(args.overrides, config, model, optimizer)
    steps_per_epoch = -(-len(train_loader) // options["accumulate"])
    judged = valid_loader is not None or " val_" not in options["monitor"]
    scheduler = build_scheduler(config["lr_scheduler"], optimizer, options["epochs"], steps_per_epoch,
                                monitor=options["monitor"] if judged else "off")

    trainer = trainer_class(options["type"])(
        model, criterion, optimizer, config, teacher=teacher, train_loader=train_loader, valid_loader=valid_loader,
        lr_scheduler=scheduler, device=device, data_facts=session.data_facts(train_loader), stop=stop)
    if start.goes_on:
        trainer.resume(start.checkpoint, start.path)
    if args.dry_run:
        trainer.dry_run()
        log.info("dry run: everything builds and runs; nothing was written")
        return

    trainer.paths = paths = run_folders(args, start)
    stopped = of_features and not start_on_features(trainer, starts)
    if stopped:
        log.info("stopped on request before the first step, with the features so far in %s; go on with: %s",
                 paths.models / "features", once_more(args, paths))
    checkpoint = None if stopped else trainer.train() or start.path
    if stopped or not trainer.finished:
        note_stop()
        dist.cleanup()
        return
    if not stop.agreed(device, True):
        test(trainer, checkpoint)
    trainer.close()
    log.info("\n%s", next_steps(checkpoint, paths, task_of(train_loader).classifies, outside_flags(config),
                                options["report"]))
    dist.cleanup()


def test(trainer: Any, checkpoint: Path) -> None:
    """Evaluate the trained model on the test images: printed, and written to test_metrics.json and the report."""
    from logger.log import get_logger
    from tools import parts
    from tools.opened import Run
    from tools.report import write_report
    from tools.words import words_for
    from trainer.tasks import task_of, write_figures
    from utils import dist

    config, options, log = trainer.config, trainer.options, get_logger()
    with saved_in(checkpoint, outside_flags(config)):
        test_loader = parts.make_loader(config, trainer.device, training=False, facts=trainer.data_facts)
        task = task_of(test_loader)
        result = trainer.test(test_loader, keep=task.keeps or trainer.wants_images or options["report"])
    log.info("\n%s", task.format_result(result, f"test, epoch {trainer.last_epoch}"))
    for line in words_for(config, result, test_loader):
        log.info(line)
    trainer.run_ended(result)
    if dist.is_main():
        write_figures(task, checkpoint.parent / "test_metrics.json", {**result, "checkpoint": checkpoint.name})
        if options["report"]:
            about = {"epoch": trainer.last_epoch, "data": trainer.data_facts}
            run = Run(checkpoint, config, about, trainer.judged_model, trainer.device)
            write_report(run, dict(result), test_loader)


@contextlib.contextmanager
def saved_in(checkpoint: Path, more: str = "") -> Iterator[None]:
    """Add to a ConfigError about the test images that training is done, and how to test; more: flags for that."""
    try:
        yield
    except ConfigError as error:
        error.args = (f"{error}; the training is done: when that is mended, test it with python test.py -r "
                      f"{shlex.quote(str(checkpoint))}{more}",)
        raise


def next_steps(checkpoint: Path, paths: RunPaths, is_classifier: bool, more: str = "",
               reported: bool = False) -> str:
    """What to do with a finished run: lines with commands to copy. more: flags for those that open its checkpoint.
    reported: the report has been written."""
    file, log, models = (shlex.quote(str(path)) for path in (checkpoint, paths.log, paths.models))
    steps = {"checkpoint": checkpoint, "evaluate": f"python test.py -r {file}{more}",
             "look at it": f"tensorboard --logdir {log}",
             "report": paths.models / "report.html" if reported else f"python -m tools.report {models}{more}"}
    if is_classifier:
        steps |= {"predict": f"python -m tools.predict -r {file} PHOTOS{more}",
                  "export": f"python -m tools.export -r {file} --format onnx{more}"}
    return "\n".join(f"{what:<13}{how}" for what, how in steps.items())


def run_folders(args: Namespace, start: Start) -> RunPaths:
    """The run's folders: new ones, or a resumed run's own, held by this process (`base.run_lock`). Raises ConfigError
    rather than overwrite another run, or train one that another process trains."""
    from base.run_paths import new_run, run_of
    from logger.log import get_logger
    from tools.session import PLACE
    from utils import dist
    from utils.files import write_json
    if start.goes_on:
        for item in args.overrides if args.resume != "auto" else ():
            if item.path in PLACE:
                get_logger().warning("%s: a run that goes on stays in its own folder, %s", item.path, start.path.parent)
        if args.run_id not in (None, run_of(start.path).models.name):
            get_logger().warning("--run_id: a run that goes on stays in its own folder, %s", start.path.parent)

    def claim() -> RunPaths:
        if start.goes_on:
            return hold(run_of(start.path))
        paths = new_run(start.config["trainer"]["save_dir"], start.config["name"], args.run_id)
        if args.resume != "auto" and paths.saved():
            raise ConfigError(f"--run_id: {args.run_id} is a run already, with {paths.saved()[-1]}; go on with it "
                              f"(-r auto --run_id {args.run_id}) or choose another name")
        hold(paths)
        try:
            paths.origin.unlink(missing_ok=True)    # of an attempt that saved nothing
            if start.path is not None:
                write_json(paths.origin, {"checkpoint": str(start.path)})
        except OSError as error:
            raise ConfigError(f"trainer.save_dir: can't write in {paths.models}: {error.strerror}") from None
        return paths
    return dist.on_main(claim)


def once_more(args: Namespace, paths: RunPaths) -> str:
    """The command that was typed, with the flags to resume in the same folder."""
    from utils.dist import command
    same = [] if args.resume else ["-r", "auto"] if args.run_id else ["-r", "auto", "--run_id", paths.models.name]
    return f"{command('train.py')} {shlex.join([*args.typed, *same])}"


def describe_data(loader: Any, config: dict[str, Any]) -> None:
    """Log what there is to learn from: for a user's own images the whole summary, else one line."""
    from logger.log import get_logger
    log = get_logger()
    for line in loader.summary(config["groups"]):
        log.info(line)
    if loader.validation_note:
        log.info(loader.validation_note)


if __name__ == "__main__":
    run_main(main)
