"""What test.py puts in place of a checkpoint's classifier, or on top of it."""
from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from data_loader.samplers import power_of
from logger.log import get_logger
from model.expert_model import chosen_experts
from model.posthoc import used_experts
from model.shift import frequencies
from tools.calibration import FILE, JOINT, classifier_name, keep_temperature
from tools.fallback import value_at
from tools.parts import make_criterion
from trainer import classifiers
from trainer.precision import choose_precision
from utils import dist
from utils.checkpoint.store import recover_config
from utils.config.outside import is_outside
from utils.errors import ConfigError

log = get_logger()
#: Which training images class means are of.
SUBSET = tuple(f"data_loader.args.{key}" for key in ("imb_factor", "imb_type", "split_seed"))


def crops_of(loader: Any) -> int | None:
    """How many crops of each image the loader gives; None for one."""
    return getattr(loader, "views", {}).get("crops")


def changes_of(args: Namespace, run: Any) -> list[str]:
    """How this command differs from a plain evaluation of the checkpoint: settings of the model, of the images or of
    the groups (`use_experts=2`, `crops=5`, `many=50`), by `--set` or another config, the file's raw weights, or only
    some of the weights."""
    found = run.changes("groups", *(SUBSET if args.classifier == "ncm" else ()))
    return found + ["raw weights"] * (args.weights == "raw") + ["some of the weights"] * bool(args.allow_partial)


def choose_classifier(args: Namespace, run: Any, loader: Any) -> tuple[Any, dict[str, Any]]:
    """(the head that `--classifier` asks for, None: the model's own; a note for the metrics). Raises ConfigError."""
    if args.expert_weights == "learn":
        if crops_of(loader):
            raise ConfigError("--expert_weights: learn moves whole images; leave out --crops")
        if run.model.routed or run.model.num_experts < 2:
            raise ConfigError(f"--expert_weights: learn needs several experts that every image uses; {args.resume} "
                              + ("chooses them by gates" if run.model.routed else "has one"))
        weights = classifiers.learned_expert_weights(run.model, loader, run.config["seed"])
        log.info("weights of the experts: %s", "  ".join(f"{w:.3f}" for w in weights.tolist()))
        joint, note = classifiers.weighted_head(weights), {"expert_weights": weights.tolist()}
    else:
        joint, note = None, {}
    if args.classifier in ("ncm", "tau"):
        run.model.route = False  # these heads need every expert's features
    if args.classifier == "ncm":
        head = classifiers.ncm_head(run.model, run.loader("train_eval"), run.model.num_classes, args.feat_type,
                                    kept_features(run, "train"))
        return head, {"classifier": "ncm", "feat_type": args.feat_type}
    if args.classifier == "la":
        warn_of_adjusting_twice(run)
    if args.classifier in ("tau", "la"):
        counts, base = run.data["cls_num_list"], joint or trained
        make = (lambda tau: classifiers.tau_head(run.model, tau)) if args.classifier == "tau" else \
            (lambda tau: classifiers.la_head(counts, tau, base))
        taus = args.tau
        if len(taus) == 1:
            return make(taus[0]), {"classifier": args.classifier, "tau": taus[0], **note}
        # Chosen on validation images, reported on test images.
        note |= run.note_of_choice("tau")
        if args.classifier == "tau":
            best, values = classifiers.sweep_tau(run.model, run.loader("val"), taus, args.tau_metric,
                                                 kept_features(run, "valid"))
        else:
            found = classifiers.outputs_of(run.model, run.loader("val"), base)
            best, values = classifiers.sweep_la(*found, counts, taus, args.tau_metric)
        for tau, value in zip(taus, values):
            log.info("tau %.2f  validation %s %.4f%s", tau, args.tau_metric, value, "  <- best" if tau == best else "")
        return make(best), {"classifier": args.classifier, "tau": best, "tau_sweep": {
            "metric": args.tau_metric, "tau": taus, f"val_{args.tau_metric}": values}, **note}
    return joint, {"classifier": "joint", **note}


def trained(outputs: dict[str, Any]) -> Any:
    """The model's own logits [N, C]."""
    return outputs["output"]


def kept_features(run: Any, split: str) -> tuple[Path, str]:
    """(the file of features, their precision) of a run that trained on cached features; there may be no such file."""
    amp, _ = choose_precision(run.config["trainer"]["amp"], run.device)
    return run.path.parent / "features" / f"{split}.f16", amp


def adapt(args: Namespace, run: Any, loader: Any, head: Any, note: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Apply `--calibrate` and `--prior` to a head; returns it, and the note with what they found."""
    name = name_in_use(args, note)
    is_own = args.weights == "ema" and not changes_of(args, run)
    head = head or trained
    if args.calibrate:
        head, note = calibrated(run, head, note, keep=name if is_own else None)
    if args.prior:
        head, note = with_prior(args, run, loader, head, note)
    return head, note


def name_in_use(args: Namespace, note: dict[str, Any]) -> str | None:
    """The classifier that test.py's flags ask for as predictions and exports name it (see `classifier_name`); None for
    those that they don't have. note: has `tau`."""
    if args.classifier == "ncm" or args.expert_weights == "learn":
        return None
    return classifier_name(args.classifier, note.get("tau"))


def head_for_use(args: Namespace, run: Any, *flags: str) -> tuple[Any, dict[str, str], float]:
    """What the flags of `tools.flags.add_classifier` put in place of the model's own logits, None: nothing; what that
    is, as metadata; what its logits have yet to be divided by. Prints which temperature is used and where it is from.
    flags: others of the command that change what is seen (`--crops 5`). Raises ConfigError."""
    name = classifier_name(args.classifier, args.tau and args.tau[0])
    temperature, about = run.temperature_for(name, flags), {}
    say_temperature(run, name, temperature)
    if name != JOINT:
        about["classifier"] = name
    if temperature != 1:
        about["temperature"] = f"{temperature:g}"
    if name == JOINT and args.prior is None:
        return None, about, temperature
    how = Namespace(classifier=args.classifier, tau=args.tau, prior=args.prior, expert_weights="equal")
    head, note = choose_classifier(how, run, None)
    if args.prior is None:
        return head, about, temperature
    head, _ = with_prior(how, run, None, divided(head or trained, temperature), note)
    return head, {**about, "prior": args.prior}, 1.0


def say_temperature(run: Any, name: str, temperature: float) -> None:
    """Print the temperature in use and the file that it is from, or that the file has none for what is in use."""
    file = run.path.parent / FILE
    if temperature != 1:
        print(f"temperature {temperature:.3f} of classifier {name}, from {file}")
    elif name not in run.temperatures and file.is_file():
        others = f"classifier {name}, only for {', '.join(run.temperatures)}" if run.temperatures else "these weights"
        print(f"no temperature: {file} has none for {others} (test.py --calibrate finds it)")


def divided(head: Any, temperature: float) -> Any:
    """A head with its logits, in float32, divided by a temperature."""
    return lambda outputs: head(outputs).float() / temperature


def calibrated(run: Any, head: Any, note: dict[str, Any], keep: str | None) -> tuple[Any, dict[str, Any]]:
    """`--calibrate`: the head with its logits divided by the temperature that suits the validation images. keep: the
    classifier for which it is saved for predictions and export (see `name_in_use`), None: for none."""
    found = classifiers.calibrate(run.model, run.loader("val"), head)
    note = {**note, "calibration": found, **run.note_of_choice("the temperature")}
    log.info("temperature %.3f: validation ECE %.4f before, %.4f after%s", found["temperature"], found["before"],
             found["after"], f"; kept for predictions and export with classifier {keep}" if keep else "")
    if keep and dist.is_main():
        keep_temperature(run.path, run.checkpoint.get("epoch"), run.model, found, keep)
    return divided(head, found["temperature"]), note


def with_prior(args: Namespace, run: Any, loader: Any, head: Any, note: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """`--prior`: the head, adapted to another class distribution than the one it has learned. Raises ConfigError."""
    counts = run.data["cls_num_list"]
    uniform = torch.full((len(counts),), 1 / len(counts), dtype=torch.float64)
    learned = uniform   # tau-normalised logits are for classes of equal size
    if args.classifier in ("joint", "la"):
        if run.model.routed and not run.model.force_all:
            raise ConfigError(f"--prior: the experts of {run.path} were trained in stage 1, by a loss and a sampler "
                              "that it doesn't know; give stage 1's checkpoint")
        criterion, power = trained_with(run)
        for part, known in (("loss", criterion), ("sampler", power)):
            if known is None:
                raise ConfigError(f"--prior: {run.path} was trained with a {part} from outside that this command "
                                  "doesn't name, or that doesn't say what it favours (see CONTRIBUTING.md)")
        learned = classifiers.learned_prior(criterion, counts, power, shares_of_experts(run, note))
    if args.classifier == "la":     # logits less tau * log of the frequencies
        learned = learned / frequencies(counts) ** note["tau"]
        learned = learned / learned.sum()
    if args.prior == "estimate":
        prior = classifiers.estimated_prior(run.model, loader, head, learned)
        log.info("estimated class distribution: from %.4f (class %d) to %.4f (class %d)", prior.min(),
                 int(prior.argmin()), prior.max(), int(prior.argmax()))
    else:
        prior = {"uniform": uniform, "train": frequencies(counts)}.get(args.prior)
        prior = read_prior(args.prior, len(counts)) if prior is None else prior
    return classifiers.prior_head(head, learned, prior), {**note, "prior": args.prior,
                                                          "class_distribution": prior.tolist()}


def trained_with(run: Any) -> tuple[Any | None, float | None]:
    """The loss that a run's model was trained with, and the power q of its sampler (1: images as they come, 0: all
    classes equally often), whatever -c and --set say now. None for one from outside that this command doesn't name, or
    that doesn't say."""
    own = {**run.config, **(recover_config(run.checkpoint) or {})}
    criterion, power = None, None
    if may_run(own, run.config, "loss.type"):
        criterion = make_criterion(own, run.data["cls_num_list"])
        criterion = criterion if hasattr(criterion, "learned_prior") else None
    if criterion is not None:
        criterion.set_epoch(int(run.checkpoint.get("epoch") or 0))
    if may_run(own, run.config, "data_loader.args.sampler.type"):
        power = power_of(own["data_loader"].get("args") or {})
    return criterion, power


def may_run(own: dict[str, Any], named: dict[str, Any], key: str) -> bool:
    """Whether what a checkpoint's config `own` names at `key` is ours, or named by this command's config too."""
    return not is_outside(value_at(own, key)) or value_at(own, key) == value_at(named, key)


def trained_experts(run: Any) -> list[int]:
    """The experts used in training, in the order in which the loss saw them, whatever `use_experts` says now."""
    own = recover_config(run.checkpoint) or run.config
    found = chosen_experts(value_at(own, "arch.args.use_experts"), run.model.num_experts)
    return list(range(run.model.num_experts)) if found in (None, "rand") else found


def warn_of_adjusting_twice(run: Any) -> None:
    """Warn where loss or sampler already adjusted for rare classes in training, as `--classifier la` does again."""
    if run.model.routed:
        return
    criterion, power = trained_with(run)
    balanced = power is not None and power < 1
    favours = criterion is not None and (
        torch.as_tensor(criterion.added(len(trained_experts(run)))).any() or criterion.weighted)
    if balanced or favours:
        by = "a sampler" if balanced else type(criterion).__name__
        log.warning("--classifier la: %s was trained by %s that reckons with how rare a class is, which now counts "
                    "twice; la is for cross-entropy on images as they come (--prior knows what a loss added)",
                    run.path, by)


def shares_of_experts(run: Any, note: dict[str, Any]) -> torch.Tensor:
    """The weight of each of `trained_experts` in the logits, float64 [E] of sum 1. note: has `expert_weights` where
    they were learned. Raises ConfigError where an expert is used that wasn't trained."""
    used, trained = used_experts(run.model), trained_experts(run)
    new = sorted(set(used) - set(trained))
    if new:
        raise ConfigError(f"--prior: expert {new[0]} took no part in the training of {run.path}, so that nothing says "
                          "what its logits are right for; give --set arch.args.use_experts="
                          + ",".join(map(str, trained)))
    shares = torch.zeros(len(trained), dtype=torch.float64)
    weights = note.get("expert_weights", [1 / len(used)] * len(used))
    shares[[trained.index(expert) for expert in used]] = torch.tensor(weights, dtype=torch.float64)
    return shares


def read_prior(path: str, num_classes: int) -> Any:
    """A file of one number a class (0 or more; counts or shares) as shares, float64 [C]. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = torch.tensor([float(word) for word in text.strip().strip("[]").replace(",", " ").split()],
                              dtype=torch.float64)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prior: {path}: should hold a number a class: {str(error)[:100]}") from None
    usable = len(values) == num_classes and (values >= 0).all() and values.sum() > 0 and values.sum().isfinite()
    if not usable:
        raise ConfigError(f"--prior: {path}: should hold {num_classes} numbers, one a class, 0 or more and not all 0; "
                          f"it has {len(values)}")
    return values / values.sum()
