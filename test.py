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

from base.run_paths import RunPaths, run_of
from tools.flags import parse_test
from utils.cli import run_main
from utils.config.load import load_config
from utils.errors import ConfigError


def main(argv: list[str] | None = None) -> None:
    args = parse_test(argv)
    if args.config:
        load_config(args.config, args.overrides)  # a mistake in it answers before the checkpoint is read
    test(args)


def test(args: Namespace) -> dict[str, Any]:
    """The evaluation, step by step; returns what is written to test_metrics.json."""
    from logger.log import get_logger, setup_logging
    from tools.allocator import keep_freed_memory
    from tools.session import open_run
    from tools.words import words_for
    from trainer.precision import choose_precision
    from trainer.tasks import task_of, write_figures
    from utils import dist
    from utils.device import pick_device, set_determinism
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
    set_determinism(run.config["trainer"]["deterministic"])
    seed_everything(run.config["seed"])

    loader = run.loader(args.split)
    check_classes(run, loader)
    task = task_of(loader)
    asked = {"--open_set": args.open_set, "--classifier": args.classifier != "joint", "--prior": args.prior,
             "--calibrate": args.calibrate, "--expert_weights": args.expert_weights != "equal"}
    if not task.classifies and any(asked.values()):
        raise ConfigError(f"{next(flag for flag, value in asked.items() if value)}: is for classifiers; {args.resume} "
                          "is a detector")
    head, note = choose_classifier(args, run, loader)
    head, note = adapt(args, run, loader, head, note) if args.calibrate or args.prior else (head, note)
    # float32, whatever it was trained in, so that every processor gives the same figures; unless this command asks.
    wanted = run.config["trainer"]["amp"] if any(path == "trainer.amp" for path, *_ in args.overrides) else "off"
    amp, _ = choose_precision(wanted, device)
    more = {} if head is None else {"head": head}
    result = task.evaluate(run.model, loader, groups=run.config["groups"], amp=amp,
                           keep=bool(args.open_set) or task.keeps or args.report, **more)
    result.update(note)
    if crops_of(loader):
        result["crops"] = crops_of(loader)
    if "expert_share" in result and "expert_acc" not in result:
        result.update(with_all_experts(run, loader, amp, args.report, **more))
    if args.open_set:
        result["open_set"] = open_set(args, run, head, result)
    everything = dict(result)
    log.info("%s", task.format_result(result, f"{args.split}, {note.get('classifier', 'joint')}"))
    for line in words_for(run.config, result, loader):
        log.info(line)
    if task.classifies and run.temperature != 1 and not args.calibrate:
        log.info("predictions and exports divide its logits by %.3f, as --calibrate found; these figures are without",
                 run.temperature)
    target = figures_file(args, run)
    result.update(checkpoint=run.path.name, data_dir=(run.config["data_loader"].get("args") or {}).get("data_dir"))
    if dist.is_main():
        for path in write_figures(task, target, result):
            log.info("detections in %s", path)
        log.info("\nwritten to %s", target)
        if args.report:
            from tools.report import write_report
            log.info("report     %s", write_report(run, result=everything, loader=loader))
    dist.cleanup()
    return result


def figures_file(args: Namespace, run: Any) -> Path:
    """Where the figures go: test_metrics.json is the run's own, of its newest or best weights on its own data. Other
    data, and older checkpoints, have a file that names them; validation's never pass for test's."""
    folder, parts = run.path.parent, [f"{args.split}_metrics"]
    if not run.is_own_data:
        parts.append(Path(run.config["data_loader"]["args"]["data_dir"]).resolve().name)
    newest = max(map(RunPaths.epoch_of, run_of(run.path).checkpoints()), default=0)
    older = run.path.name.startswith("checkpoint-epoch") and (run.checkpoint.get("epoch") or 0) < newest
    if older or not run.is_own_data:
        parts.append(run.path.stem)
    return folder / f"{'.'.join(parts)}.json"


def check_classes(run: Any, loader: Any) -> None:
    """The model must know as many classes as the data has."""
    if run.model.num_classes != loader.num_classes:
        raise ConfigError(f"data_loader: the data has {loader.num_classes} classes, the model of {run.path} knows "
                          f"{run.model.num_classes}; give the data it was trained for")


def crops_of(loader: Any) -> int | None:
    """How many crops of each image the loader gives; None for one."""
    return getattr(loader, "views", {}).get("crops")


def choose_classifier(args: Namespace, run: Any, loader: Any) -> tuple[Any, dict[str, Any]]:
    """The head that `--classifier` asks for (None: the model's own) and what to note of it in the metrics."""
    from logger.log import get_logger
    from trainer import classifiers
    if args.expert_weights == "learn":
        if crops_of(loader):
            raise ConfigError("--expert_weights: learn moves whole images; leave out --crops")
        if run.model.routed or run.model.num_experts < 2:
            raise ConfigError(f"--expert_weights: learn needs several experts that every image uses; {args.resume} "
                              + ("chooses them by gates" if run.model.routed else "has one"))
        weights = classifiers.learned_expert_weights(run.model, loader, run.config["seed"])
        get_logger().info("weights of the experts: %s", "  ".join(f"{w:.3f}" for w in weights.tolist()))
        joint, note = classifiers.weighted_head(weights), {"expert_weights": weights.tolist()}
    else:
        joint, note = None, {}
    if args.classifier in ("ncm", "tau"):
        run.model.route = False  # these heads need every expert's features
    if args.classifier == "ncm":
        head = classifiers.ncm_head(run.model, run.loader("train_eval"), run.model.num_classes, args.feat_type,
                                    kept_features(run, "train"))
        return head, {"classifier": "ncm", "feat_type": args.feat_type}
    if args.classifier in ("tau", "la"):
        counts, base = run.data["cls_num_list"], joint or trained
        make = (lambda tau: classifiers.tau_head(run.model, tau)) if args.classifier == "tau" else \
            (lambda tau: classifiers.la_head(counts, tau, base))
        taus = args.tau
        if len(taus) == 1:
            return make(taus[0]), {"classifier": args.classifier, "tau": taus[0], **note}
        # Chosen on validation images, reported on test images.
        if args.classifier == "tau":
            best, values = classifiers.sweep_tau(run.model, run.loader("val"), taus, args.tau_metric,
                                                 kept_features(run, "valid"))
        else:
            found = classifiers.outputs_of(run.model, run.loader("val"), base)
            best, values = classifiers.sweep_la(*found, counts, taus, args.tau_metric)
        log = get_logger()
        for tau, value in zip(taus, values):
            log.info("tau %.2f  validation %s %.4f%s", tau, args.tau_metric, value, "  <- best" if tau == best else "")
        return make(best), {"classifier": args.classifier, "tau": best, "tau_sweep": {
            "metric": args.tau_metric, "tau": taus, f"val_{args.tau_metric}": values}, **note}
    return joint, {"classifier": "joint", **note}


def trained(outputs: dict[str, Any]) -> Any:
    """The model's own logits [N, C]."""
    return outputs["output"]


def kept_features(run: Any, split: str) -> tuple[Path, str]:
    """Where a run that trained on its features has them, and their precision."""
    from trainer.precision import choose_precision
    amp, _ = choose_precision(run.config["trainer"]["amp"], run.device)
    return run.path.parent / "features" / f"{split}.f16", amp


def adapt(args: Namespace, run: Any, loader: Any, head: Any, note: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """`--calibrate` and `--prior` on top of a head; what they found joins the note."""
    from data_loader.samplers import power_of
    from logger.log import get_logger
    from model.shift import frequencies
    from tools.calibration import keep_temperature
    from tools.session import make_criterion
    from trainer import classifiers
    from utils import dist
    log, own = get_logger(), head is None
    head = head or trained
    if args.calibrate:
        found = classifiers.calibrate(run.model, run.loader("val"), head)
        note = {**note, "calibration": found}
        log.info("temperature %.3f: validation ECE %.4f before, %.4f after%s", found["temperature"], found["before"],
                 found["after"], "; kept for predictions and export" if own and args.weights == "ema" else "")
        if own and args.weights == "ema" and dist.is_main():
            keep_temperature(run.path, run.checkpoint.get("epoch"), run.model, found)
        head = (lambda plain: lambda outputs: plain(outputs).float() / found["temperature"])(head)
    if args.prior:
        import torch
        counts = run.data["cls_num_list"]
        uniform = torch.full((len(counts),), 1 / len(counts), dtype=torch.float64)
        learned = uniform   # tau-normalised and adjusted logits are for classes of equal size
        if args.classifier == "joint":
            criterion = make_criterion(run.config, counts)
            if hasattr(criterion, "set_epoch"):
                criterion.set_epoch(int(run.checkpoint.get("epoch") or 0))
            power = power_of(run.config["data_loader"].get("args") or {})
            learned = classifiers.learned_prior(criterion, counts, power, run.model.num_experts)
        if args.prior == "estimate":
            prior = classifiers.estimated_prior(run.model, loader, head, learned)
            log.info("estimated class distribution: from %.4f (class %d) to %.4f (class %d)", prior.min(),
                     int(prior.argmin()), prior.max(), int(prior.argmax()))
        else:
            prior = {"uniform": uniform, "train": frequencies(counts)}.get(args.prior)
            prior = read_prior(args.prior, len(counts)) if prior is None else prior
        head = classifiers.prior_head(head, learned, prior)
        note = {**note, "prior": args.prior, "class_distribution": prior.tolist()}
    return head, note


def read_prior(path: str, num_classes: int) -> Any:
    """A file of one number a class (0 or more; counts or shares) as shares, float64 [C]. Raises ConfigError."""
    import torch
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = torch.tensor([float(word) for word in text.strip().strip("[]").replace(",", " ").split()],
                              dtype=torch.float64)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prior: {path}: should hold a number a class: {str(error)[:100]}") from None
    usable = len(values) == num_classes and values.isfinite().all() and (values >= 0).all() and values.sum() > 0
    if not usable:
        raise ConfigError(f"--prior: {path}: should hold {num_classes} numbers, one a class, 0 or more and not all 0; "
                          f"it has {len(values)}")
    return values / values.sum()


def with_all_experts(run: Any, loader: Any, amp: str, keep: bool, **more: Any) -> dict[str, Any]:
    """What routing leaves unseen, from a second pass that asks every expert for every image: `all_experts_acc` of
    their mean, `expert_acc` of each alone, `expert_disagreement`, and with `keep` `expert_predictions` [N, E]."""
    from trainer.evaluate import evaluate
    run.model.force_all = True
    try:
        everyone = evaluate(run.model, loader, groups=run.config["groups"], amp=amp, keep=keep, **more)
    finally:
        run.model.force_all = False
    names = ("expert_acc", "expert_disagreement", "expert_predictions")
    return {"all_experts_acc": everyone["accuracy"], **{name: everyone[name] for name in names if name in everyone}}


def open_set(args: Namespace, run: Any, head: Any, result: dict[str, Any]) -> dict[str, Any]:
    """The F-measure with extra images of no known class among the test images (OLTR; Liu et al., CVPR 2019)."""
    import numpy as np

    from logger.log import get_logger
    from model.metric import open_set_f_measure
    from tools.classify import classify_list
    loader = run.loader(args.split)
    preds, probs = classify_list(run, args.open_set, getattr(loader, "views", loader.preprocess), head)
    labels = np.concatenate([result["labels"], np.full(len(preds), -1)])
    value = open_set_f_measure(np.concatenate([result["predictions"], preds]), labels,
                               np.concatenate([result["confidences"], probs]), args.open_threshold)
    get_logger().info("open set: F-measure %.4f over %d known and %d unknown images, threshold %g", value,
                      len(result["labels"]), len(preds), args.open_threshold)
    return {"f_measure": value, "threshold": args.open_threshold, "unknown_images": len(preds)}


if __name__ == "__main__":
    run_main(main)
