"""Train a long-tailed recognition model from a JSON config.

    python train.py -c configs/digits_lt_ride.json --num_experts 3 --add_bt 1
    python train.py -r saved/models/<name>/<run_id>/checkpoint-epoch5.pth
    torchrun --nproc_per_node 2 train.py -c configs/cifar100_lt_ride.json

Nothing heavy is imported before the config is known to be good, so that a mistake answers at once.
"""
from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from utils.cli import parse_train, run_main
from utils.config import load_config
from utils.errors import ConfigError


def main(argv: list[str] | None = None) -> None:
    args = parse_train(argv)
    config = load_config(args.config, args.overrides) if args.config else None
    if not launch_workers(args, config, sys.argv[1:] if argv is None else argv):
        train(args, config)


def launch_workers(args: Namespace, config: dict[str, Any] | None, argv: list[str]) -> bool:
    """Start one process a GPU where the config asks for several; False where this process trains alone."""
    wanted = (config or {}).get("n_gpu") or 1
    if wanted <= 1 and not (args.device and "," in args.device):
        return False
    from utils.device import workers_to_start
    workers = workers_to_start(args.device, wanted)
    if workers <= 1:
        return False
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    launch = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=workers, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", max_restarts=0)
    elastic_launch(launch, sys.executable)("-u", str(Path(__file__).resolve()), *argv)
    return True


def train(args: Namespace, config: dict[str, Any] | None) -> None:
    """The run, step by step."""
    from logger.log import get_logger, setup_logging
    from trainer import trainer_class
    from trainer.evaluate import format_result
    from trainer.schedules import build_optimizer, build_scheduler
    from utils import dist, session
    from utils.device import pick_device, set_determinism
    from utils.run_paths import new_run, run_of
    from utils.seed import seed_everything

    start = session.find_start(args, config)
    config = start.config
    options = config["trainer"]
    setup_logging(options["verbosity"])
    log = get_logger()

    device = pick_device(args.device, config["n_gpu"])
    dist.setup(device.type)
    set_determinism(options["deterministic"])
    seed_everything(config["seed"], dist.rank())

    train_loader = session.make_loader(config, device)
    valid_loader = train_loader.split_validation()
    describe_data(train_loader, config)

    model = session.make_model(config, train_loader.num_classes)
    config["arch"]["args"]["num_classes"] = model.num_classes
    session.load_start(model, start)
    model.to(device)
    log.info(model.summary())

    criterion = session.make_criterion(config, train_loader.cls_num_list)
    teacher = session.make_teacher(config, model.num_classes, device)
    optimizer = build_optimizer(config["optimizer"], model, options)
    scheduler = build_scheduler(config["lr_scheduler"], optimizer, options["epochs"])

    paths = None if args.dry_run else run_of(start.path) if start.goes_on \
        else new_run(options["save_dir"], config["name"], dist.broadcast_object(args.run_id))
    trainer = trainer_class(options["type"])(
        model, criterion, optimizer, config, teacher=teacher, train_loader=train_loader, valid_loader=valid_loader,
        lr_scheduler=scheduler, paths=paths, device=device, data_facts=session.data_facts(train_loader))
    if start.goes_on:
        trainer.resume(start.checkpoint, start.path)
    if args.dry_run:
        trainer.dry_run()
        log.info("dry run: everything builds and runs; nothing was written")
        return

    checkpoint = trainer.train() or start.path
    if trainer.stop.signal is None:
        # What the run is worth, on images that no choice was made on.
        test_loader = session.make_loader(config, device, training=False)
        result = trainer.test(test_loader)
        log.info("\n%s", format_result(result, f"test, epoch {options['epochs']}"))
        log.info("\ncheckpoint   %s\nevaluate     python test.py -r %s\nlook at it   tensorboard --logdir %s",
                 checkpoint, checkpoint, paths.log)
    dist.cleanup()


def describe_data(loader: Any, config: dict[str, Any]) -> None:
    """Say what there is to learn from: for a user's own images the whole summary, else one line."""
    from logger.log import get_logger
    log = get_logger()
    for line in loader.summary():
        log.info(line)
    if loader.validation_note:
        log.info(loader.validation_note)


if __name__ == "__main__":
    run_main(main)
