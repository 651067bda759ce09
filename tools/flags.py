"""The command lines of train.py and test.py. Nothing heavy is imported, so `--help` and mistakes answer at once."""
from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from tools.cli import SetValue, add_named, add_overrides, base_parser, check_file, parse
from utils.errors import ConfigError
from utils.files import check_folder_name

#: Flags that name a file of weights to start from; they are config keys too, so that a resumed run knows them.
STARTS = (
    (("--pretrained",), "pretrained", "start from these weights"),
    (("--load_crt",), "load_crt", "stage 2: load all but the classifier from here, freeze the rest"),
)
#: Flags of test.py on how it sees images.
CROPS = (
    (("--crops",), "data_loader.args.crops", "average the logits of 5 or 10 crops of each image"),
    (("--expand",), "data_loader.args.expand", "with crops: pixels that an image is larger than a crop"),
)
MAX_TAUS = 1000


def train_parser() -> argparse.ArgumentParser:
    """The flags of train.py."""
    parser = base_parser("train.py", "Train a long-tailed recognition model.", """examples:
  python train.py -c configs/digits_lt_ride.json --num_experts 3 --add_bt 1
  python train.py -r saved/models/<name>/<run_id>/checkpoint-epoch5.pth
  torchrun --nproc_per_node 2 train.py -c configs/cifar100_lt_ride.json""")
    run = parser.add_argument_group("the run")
    run.add_argument("--run_id", metavar="ID", help="the run's folder name; default: date and time")
    run.add_argument("--dry_run", action="store_true", help="build everything, take one step, write nothing")
    run.add_argument("--profile", action=SetValue, path="trainer.profile", const=True,
                     help="write a torch.profiler trace of a few steps")
    add_named(run, STARTS)
    add_overrides(parser)
    return parser


def test_parser() -> argparse.ArgumentParser:
    """The flags of test.py."""
    parser = base_parser("test.py", "Evaluate a checkpoint on the test split.", """examples:
  python test.py -r saved/models/<name>/<run_id>/model_best.pth
  python test.py -r CHECKPOINT --classifier tau --tau 0:2:0.1""")
    how = parser.add_argument_group("how to evaluate")
    how.add_argument("--split", choices=("test", "val"), default="test", help="which images (default test)")
    how.add_argument("--classifier", choices=("joint", "ncm", "tau", "la"),
                     help="joint: the trained one (default); ncm: nearest class mean; tau: weights / norm^tau; la: "
                          "logits - tau log(n_j / n)")
    how.add_argument("--tau", metavar="T", help="0.7, or FIRST:LAST:STEP for a sweep; for --classifier tau (default "
                     "0:2:0.1) and la (default 1)")
    how.add_argument("--tau_metric", choices=("class_mean_acc", "accuracy", "macro_f1"), help="what a sweep's tau is "
                     "best in on the validation images (default class_mean_acc: rare classes count as much as others)")
    how.add_argument("--feat_type", choices=("un", "l2n", "cl2n"), help="features for --classifier ncm: "
                     "as they are, of length 1, or centred and of length 1 (default cl2n)")
    how.add_argument("--prior", metavar="P", help="the class distribution where the model will be used: uniform, "
                     "train, estimate (from the test images, without their labels), or a file of one number a class")
    how.add_argument("--expert_weights", choices=("equal", "learn"), default="equal", help="learn: weigh the experts "
                     "by how steady they are on the test images, without their labels")
    how.add_argument("--calibrate", action="store_true", help="fit a temperature on the validation split; it is "
                     "kept for predictions and exports with this classifier (not ncm's)")
    how.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a run with averaged weights "
                     "(trainer.ema): the average (default), or those that training went on with")
    how.add_argument("--open_set", metavar="LIST", help="a list file of images of no known class")
    how.add_argument("--open_threshold", metavar="P", help="probability under which a prediction means "
                     "\"unknown\" (default 0.1)")
    add_named(how, CROPS)
    how.add_argument("--allow_partial", action="store_true", help="load the weights that fit, leave the others")
    how.add_argument("--report", action="store_true", help="also write the HTML report")
    add_overrides(parser)
    return parser


def add_classifier(parser: argparse.ArgumentParser) -> None:
    """Add test.py's `--classifier`, `--tau` and `--prior`, as far as a command that sees no split can heed them; check
    them with `check_classifier`."""
    how = parser.add_argument_group("another classifier", "found with test.py, which chooses tau")
    how.add_argument("--classifier", choices=("joint", "tau", "la"), default="joint", help="joint: the trained one "
                     "(default); tau: weights / norm^tau; la: logits - tau log(n_j / n)")
    how.add_argument("--tau", metavar="T", help="a number; for la 1 if not given")
    how.add_argument("--prior", metavar="P", help="the class distribution where the model will be used: uniform, "
                     "train, or a file of one number a class")


def check_classifier(args: argparse.Namespace) -> None:
    """Convert the flags of `add_classifier`: tau becomes a list of one number, or None. Raises ConfigError."""
    if args.classifier == "joint" and args.tau is not None:
        raise ConfigError("--tau: goes with --classifier tau or la")
    if args.classifier == "tau" and args.tau is None:
        raise ConfigError("--tau: missing; test.py --classifier tau finds the one that is best on validation images")
    args.tau = None if args.classifier == "joint" else parse_taus(args.tau or "1")
    if args.tau is not None and len(args.tau) > 1:
        raise ConfigError("--tau: must be one number here; test.py chooses from several")
    if args.prior == "estimate":
        raise ConfigError("--prior: estimate needs a test split; give test.py's class_distribution as a file")
    if args.prior not in (None, "uniform", "train"):
        check_file(args.prior, "--prior")


def parse_train(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of train.py: config, resume, device, run_id, dry_run, profile, quiet, verbose, ignored (flags without
    effect), and overrides: `Override`s in the order given.

    Raises ConfigError for an unknown flag, a missing value or file.
    """
    args = parse(train_parser(), argv)
    if args.config is None and args.resume is None:
        raise ConfigError("train.py: needs -c CONFIG.json, or -r CHECKPOINT to go on from")
    if args.resume == "auto":
        if args.config is None or args.run_id is None:
            raise ConfigError("-r auto: needs -c CONFIG.json and --run_id ID, the run to go on with")
    elif args.resume is not None:
        check_file(args.resume, "-r")
    if args.run_id is not None:
        check_folder_name(args.run_id, "--run_id")
    for item in args.overrides:
        if item.path in ("pretrained", "load_crt", "distill_checkpoint") and item.text is not None:
            check_file(item.text, item.flag)
    return args


def parse_test(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of test.py: config, resume, device, overrides as in train.py; split, classifier ("joint" where not
    given), tau (list of floats, None without the tau or la classifier), tau_metric, feat_type, prior (None, a word
    or a file), expert_weights, calibrate, weights, open_set, open_threshold, allow_partial, report.

    Raises ConfigError for an unknown flag, a missing value or file, and flags that don't go together.
    """
    args = parse(test_parser(), argv)
    if args.resume is None:
        raise ConfigError("test.py: needs -r CHECKPOINT")
    check_file(args.resume, "-r")
    if args.tau is not None and args.classifier not in (None, "tau", "la"):
        raise ConfigError(f"--tau: goes with --classifier tau or la, not {args.classifier}")
    if args.feat_type is not None and args.classifier != "ncm":
        raise ConfigError("--feat_type: goes with --classifier ncm")
    args.classifier = args.classifier or ("tau" if args.tau is not None else "joint")
    default = {"tau": "0:2:0.1", "la": "1"}.get(args.classifier)
    args.tau = parse_taus(default if args.tau is None else args.tau) if default else None
    if args.prior is not None and args.classifier == "ncm":
        raise ConfigError("--prior: is for logits; a nearest class mean has distances, leave out --classifier ncm")
    if args.prior not in (None, "uniform", "train", "estimate"):
        check_file(args.prior, "--prior")
    if args.expert_weights == "learn" and args.classifier not in ("joint", "la"):
        raise ConfigError(f"--expert_weights: weighs the model's own classifiers, not --classifier {args.classifier}")
    if args.tau_metric is not None and len(args.tau or ()) < 2:
        raise ConfigError("--tau_metric: chooses from a sweep, --tau FIRST:LAST:STEP")
    args.tau_metric = args.tau_metric or "class_mean_acc"
    args.feat_type = args.feat_type or "cl2n"
    given = args.open_threshold is not None
    args.open_threshold = _number(args.open_threshold if given else "0.1", "--open_threshold")
    if not 0 <= args.open_threshold <= 1:
        raise ConfigError(f"--open_threshold: must be from 0 to 1, not {args.open_threshold:g}")
    if args.open_set is not None:
        check_file(args.open_set, "--open_set")
    elif given:
        raise ConfigError("--open_threshold: goes with --open_set LIST")
    return args


def parse_taus(text: str) -> list[float]:
    """`0.7` as [0.7]; `0:2:0.5` as [0, 0.5, 1, 1.5, 2]: both ends included, none below 0. Raises ConfigError."""
    parts = [_number(part, "--tau") for part in text.split(":")]
    if len(parts) == 1:
        taus = parts
    elif len(parts) == 3 and parts[2] > 0 and parts[1] >= parts[0]:
        first, last, step = parts
        count = math.floor((last - first) / step + 1e-9) + 1 if (last - first) / step < MAX_TAUS else MAX_TAUS + 1
        if count > MAX_TAUS:
            raise ConfigError(f"--tau: {text!r} is more than {MAX_TAUS} values")
        taus = [round(first + i * step, 10) for i in range(count)]
    else:
        raise ConfigError(f"--tau: {text[:80]!r} is neither a number nor FIRST:LAST:STEP with LAST >= FIRST, STEP > 0")
    if taus[0] < 0:
        raise ConfigError(f"--tau: must be 0 or more, not {taus[0]:g}")
    return taus


def _number(text: str, flag: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{flag}: {text[:80]!r} isn't a number")
    return value
