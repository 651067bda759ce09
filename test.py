"""Evaluate a checkpoint on the test split.

    python test.py -r saved/models/<name>/<run_id>/model_best.pth
    python test.py -r CHECKPOINT --classifier tau --tau 0:2:0.1
    python test.py -r CHECKPOINT --classifier ncm --feat_type cl2n
    python test.py -r CHECKPOINT --classifier la --tau 1 --calibrate
"""
from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from tools.flags import parse_test
from utils.cli import run_main
from utils.config.load import load_config
from utils.errors import ConfigError


def main(argv: list[str] | None = None) -> None:
    """The command. Raises ConfigError."""
    args = parse_test(argv)
    if args.config:
        load_config(args.config, args.overrides)  # mistakes in it are reported before the checkpoint is read
    test(args)


def test(args: Namespace) -> dict[str, Any]:
    """The evaluation, step by step; returns what is written to test_metrics.json. Raises ConfigError."""
    from logger.log import get_logger, setup_logging
    from tools.allocator import keep_freed_memory
    from tools.heads import adapt, changes_of, choose_classifier, crops_of, name_in_use
    from tools.open_set import open_set
    from tools.opened import open_run
    from tools.words import refuse_nonfinite, words_for
    from trainer.evaluate import further, metrics_of, with_all_experts
    from trainer.precision import choose_precision, set_determinism
    from trainer.tasks import task_of, write_figures
    from utils import dist
    from utils.config.check import monitored
    from utils.device import pick_device
    from utils.seed import seed_everything

    setup_logging(0 if args.quiet else 2)
    log = get_logger()
    device = pick_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    if args.open_set and dist.world_size() > 1:
        raise ConfigError("--open_set: needs all test images in one process; run it without torchrun")
    dist.setup(device)
    run = open_run(args.resume, args.config, args.overrides, device, allow_partial=args.allow_partial,
                   weights=args.weights)
    set_determinism(run.config, device)
    seed_everything(run.config["seed"])

    loader = run.loader(args.split)
    check_classes(run, loader)
    if reason := getattr(loader, "seen", {}).get(args.split):
        log.warning("figures are too good: %s", reason)
    task = task_of(loader)
    asked = {"--open_set": args.open_set, "--classifier": args.classifier != "joint", "--prior": args.prior,
             "--calibrate": args.calibrate, "--expert_weights": args.expert_weights != "equal"}
    if not task.classifies and any(asked.values()):
        raise ConfigError(f"{next(flag for flag, value in asked.items() if value)}: is for classifiers; {args.resume} "
                          "is a detector")
    head, note = choose_classifier(args, run, loader)
    head, note = adapt(args, run, loader, head, note) if args.calibrate or args.prior else (head, note)
    # float32, whatever it was trained in, so that all processors give the same figures, unless this command sets it.
    wanted = run.config["trainer"]["amp"] if any(path == "trainer.amp" for path, *_ in args.overrides) else "off"
    amp, _ = choose_precision(wanted, device)
    more = {} if head is None else {"head": head}
    named = {"metrics": further(metrics_of(run.config["metrics"], monitored(run.config["trainer"]["monitor"])[1]))}
    result = task.evaluate(run.model, loader, groups=run.config["groups"], amp=amp,
                           keep=bool(args.open_set) or task.keeps or args.report, **more,
                           **(named if task.classifies else {}))
    result.update(note)
    if changes := changes_of(args, run):
        result["changed"] = changes
    if crops_of(loader):
        result["crops"] = crops_of(loader)
    if task.classifies:
        refuse_nonfinite(result, args.resume)
        result = with_all_experts(run.model, loader, result, groups=run.config["groups"], amp=amp, keep=args.report,
                                  **more)
    if args.open_set:
        result["open_set"] = open_set(args, run, head, result)
    everything = dict(result)
    log.info("%s", task.format_result(result, f"{args.split}, {note.get('classifier', 'joint')}"))
    for line in words_for(run.config, result, loader):
        log.info(line)
    name = name_in_use(args, note)
    if task.classifies and name and not changes and not args.calibrate and run.temperature_for(name) != 1:
        log.info("predictions and exports divide its logits by %.3f, as --calibrate found; these figures are without",
                 run.temperature_for(name))
    target = figures_file(args, run)
    result.update(checkpoint=run.path.name, data_dir=(run.config["data_loader"].get("args") or {}).get("data_dir"))
    if dist.is_main():
        for path in write_figures(task, target, result):
            log.info("detections in %s", path)
        log.info("\nwritten to %s", target)
        if args.report:
            from tools.report import write_report
            log.info("report     %s", write_report(run, everything, loader, args.split))
    dist.cleanup()
    return result


def figures_file(args: Namespace, run: Any) -> Path:
    """The file for the figures: `<split>_metrics.json` beside the checkpoint is for the newest or best weights on the
    run's own data; for other data and older checkpoints the name contains these."""
    return run.path.parent / f"{'.'.join([f'{args.split}_metrics', *run.about()])}.json"


def check_classes(run: Any, loader: Any) -> None:
    """Raise ConfigError unless the model has as many classes as the data."""
    if run.model.num_classes != loader.num_classes:
        raise ConfigError(f"data_loader: the data has {loader.num_classes} classes, the model of {run.path} knows "
                          f"{run.model.num_classes}; give the data it was trained for")


if __name__ == "__main__":
    run_main(main)
