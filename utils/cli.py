"""The command lines of train.py and test.py, and what an entry point does with a mistake.

Only the standard library is needed here, so `--help` and a wrong flag answer at once. The flags that change the
config are data (`NAMED`): each stands for a dotted path, and its value goes through the same checks as the file's.
"""
from __future__ import annotations

import argparse
import errno
import logging
import math
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from utils import dist
from utils.config.load import Override, parse_json
from utils.errors import ConfigError, RunError, closest

#: flags -> (config path, what it is). `--learning_rate` and the like are RIDE's and BatchFormer's names.
NAMED: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("--name",), "name", "the run's name"),
    (("--seed",), "seed", "random seed"),
    (("--epochs",), "trainer.epochs", "epochs to train"),
    (("--save_dir",), "trainer.save_dir", "folder of all runs"),
    (("--save_period",), "trainer.save_period", "epochs between checkpoints"),
    (("--lr", "--learning_rate"), "optimizer.args.lr", "base learning rate"),
    (("--bs", "--batch_size"), "data_loader.args.batch_size", "images in a (global) batch"),
    (("--data_dir",), "data_loader.args.data_dir", "where the images are"),
    (("--step1",), "lr_scheduler.args.step1", "epoch of the first step (CustomLR)"),
    (("--step2",), "lr_scheduler.args.step2", "epoch of the second step (CustomLR)"),
    (("--gamma",), "lr_scheduler.args.gamma", "factor of a step"),
    (("--warmup",), "lr_scheduler.args.warmup_epoch", "epochs of warm-up"),
    (("--num_experts",), "arch.args.num_experts", "experts"),
    (("--reduce_dimension",), "arch.args.reduce_dimension", "1: narrower last two stages"),
    (("--layer2_dimension",), "arch.args.layer2_output_dim", "width of stage 2"),
    (("--layer3_dimension",), "arch.args.layer3_output_dim", "width of stage 3"),
    (("--layer4_dimension",), "arch.args.layer4_output_dim", "width of stage 4"),
    (("--add_bt", "--add_global"), "arch.args.add_bt", "BatchFormer: 0 off, 1 on, 12 13 32 33 variants"),
    (("--eval_bt",), "arch.args.eval_bt", "1: BatchFormer in evaluation too"),
    (("--pos_weight",), "arch.args.pos_weight", "weight of \"ask the next expert\" (EA models)"),
    (("--distribution_aware_diversity_factor",), "loss.args.additional_diversity_factor", "RIDE's diversity factor"),
    (("--distill_checkpoint",), "distill_checkpoint", "the teacher's weights"),
    (("--add_bt_teacher",), "distill_arch.args.add_bt", "BatchFormer in the teacher"),
)
#: Flags of a start from other weights: they are files, and config keys too so that a resumed run knows.
STARTS = (
    (("--pretrained",), "pretrained", "start from these weights"),
    (("--load_crt",), "load_crt", "stage 2: load all but the classifier from here, freeze the rest"),
)
#: Flags of other launchers: taken so that old command lines run, without effect (torchrun sets ranks itself).
LEGACY = ("--world-size", "--rank", "--dist-url", "--dist-backend", "--gpu", "--local_rank", "--local-rank")
LEGACY_SWITCHES = ("--multiprocessing-distributed",)

MAX_TAUS = 1000


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are ConfigErrors: one line, no usage block."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


Parser = _Parser  # for the tools' own command lines


class _SetNamed(argparse.Action):
    """A named override: append (path, value, flag, text) to `overrides`, in the order of the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        item = Override(self.metavar_path, value_of(values), option_string or self.option_strings[0], values)
        namespace.overrides = [*namespace.overrides, item]

    metavar_path = ""


class _SetAny(argparse.Action):
    """`--set PATH=VALUE`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        path, equals, text = values.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {values[:80]!r}: write KEY=VALUE, e.g. --set trainer.epochs=5")
        item = Override(path.strip(), value_of(text), "--set", text)
        namespace.overrides = [*namespace.overrides, item]


class _SetConstant(argparse.Action):
    """A switch that stands for a config value (and is itself true)."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: Any = None, **more: Any):
        super().__init__(option_strings, dest, nargs=0, const=const, default=False, **more)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        path, value = self.const
        namespace.overrides = [*namespace.overrides, Override(path, value, option_string or "")]
        setattr(namespace, self.dest, True)


class _Ignore(argparse.Action):
    """A flag without effect: noted in `ignored`, so that the run can say so once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.ignored = [*namespace.ignored, option_string]


def value_of(text: str) -> Any:
    """JSON where it is JSON, else the text itself: 5 -> 5, true -> True, NBN -> "NBN"."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def _add_named(group: Any, flags: tuple[str, ...], path: str, doc: str) -> None:
    action = group.add_argument(*flags, action=_SetNamed, dest=argparse.SUPPRESS, default=argparse.SUPPRESS,
                                metavar="V", help=f"{doc} ({path})")
    action.metavar_path = path


def _parser(prog: str, what: str, examples: str) -> _Parser:
    parser = _Parser(prog=prog, description=what, epilog=examples, allow_abbrev=False, add_help=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(overrides=[], ignored=[])
    main = parser.add_argument_group("what to run")
    main.add_argument("-c", "--config", metavar="JSON", help="the config file")
    main.add_argument("-r", "--resume", metavar="FILE", help="a checkpoint (train.py also: auto)")
    main.add_argument("-d", "--device", metavar="D", help="cpu, or GPU numbers: 0 or 0,1")
    main.add_argument("-h", "--help", action="help", help="show this and exit")
    return parser


def tool_parser(prog: str, what: str, examples: str = "", overrides: bool = False) -> argparse.ArgumentParser:
    """The beginning of a tool's command line: -c, -r, -d, --set, --help and, if asked for, the named overrides.

    Read it with `parse_tool`, which knows the nearest right name of a misspelt flag.
    """
    parser = _parser(prog, what, examples)
    if overrides:
        _add_overrides(parser)
    else:
        add_set(parser)
    return parser


def parse_tool(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """A tool's flags. Raises ConfigError as the parsers of train.py and test.py do."""
    return _parse(parser, argv, parser.parse_known_intermixed_args)


def add_set(parser: argparse.ArgumentParser) -> Any:
    """`--set KEY=VALUE`, gathered in `overrides`; the group of flags that it is in."""
    parser.set_defaults(overrides=[])
    group = parser.add_argument_group("config values", "instead of what the config says")
    group.add_argument("--set", action=_SetAny, metavar="KEY=V", dest=argparse.SUPPRESS, default=argparse.SUPPRESS,
                       help="any value: dots between keys, JSON or else text; may be repeated")
    return group


def _add_overrides(parser: _Parser) -> None:
    group = add_set(parser)
    for flags, path, doc in NAMED:
        _add_named(group, flags, path, doc)
    group.add_argument("-q", "--quiet", action=_SetConstant, const=("trainer.verbosity", 0), help="only warnings")
    group.add_argument("-v", "--verbose", action=_SetConstant, const=("trainer.verbosity", 2), help="every log step")
    for flag in LEGACY:
        group.add_argument(flag, action=_Ignore, dest=argparse.SUPPRESS, default=argparse.SUPPRESS,
                           help=argparse.SUPPRESS)
    for flag in LEGACY_SWITCHES:
        group.add_argument(flag, action=_Ignore, nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS,
                           help=argparse.SUPPRESS)


def train_parser() -> argparse.ArgumentParser:
    """The flags of train.py."""
    parser = _parser("train.py", "Train a long-tailed recognition model.", """examples:
  python train.py -c configs/digits_lt_ride.json --num_experts 3 --add_bt 1
  python train.py -r saved/models/<name>/<run_id>/checkpoint-epoch5.pth
  torchrun --nproc_per_node 2 train.py -c configs/cifar100_lt_ride.json""")
    run = parser.add_argument_group("the run")
    run.add_argument("--run_id", metavar="ID", help="the run's folder name; default: date and time")
    run.add_argument("--dry_run", action="store_true", help="build everything, take one step, write nothing")
    run.add_argument("--profile", action=_SetConstant, const=("trainer.profile", True),
                     help="write a torch.profiler trace of a few steps")
    for flags, path, doc in STARTS:
        _add_named(run, flags, path, doc)
    _add_overrides(parser)
    return parser


def test_parser() -> argparse.ArgumentParser:
    """The flags of test.py."""
    parser = _parser("test.py", "Evaluate a checkpoint on the test split.", """examples:
  python test.py -r saved/models/<name>/<run_id>/model_best.pth
  python test.py -r CHECKPOINT --classifier tau --tau 0:2:0.1""")
    how = parser.add_argument_group("how to evaluate")
    how.add_argument("--split", choices=("test", "val"), default="test", help="which images (default test)")
    how.add_argument("--classifier", choices=("joint", "ncm", "tau"),
                     help="joint: the trained one (default); ncm: nearest class mean; tau: weights / norm^tau")
    how.add_argument("--tau", metavar="T", help="0.7, or FIRST:LAST:STEP for a sweep; for --classifier tau")
    how.add_argument("--tau_metric", choices=("class_mean_acc", "accuracy", "macro_f1"), help="what a sweep's tau is "
                     "best in on the validation images (default class_mean_acc: rare classes count as much as others)")
    how.add_argument("--feat_type", choices=("un", "l2n", "cl2n"), help="features for --classifier ncm: "
                     "as they are, of length 1, or centred and of length 1 (default cl2n)")
    how.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a run with averaged weights "
                     "(trainer.ema): the average (default), or those that training went on with")
    how.add_argument("--open_set", metavar="LIST", help="a list file of images of no known class")
    how.add_argument("--open_threshold", metavar="P", default="0.1", help="probability under which a prediction means "
                     "\"unknown\" (default 0.1)")
    how.add_argument("--allow_partial", action="store_true", help="load the weights that fit, leave the others")
    how.add_argument("--report", action="store_true", help="also write the HTML report")
    _add_overrides(parser)
    return parser


def parse_train(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of train.py: config, resume, device, run_id, dry_run, profile, quiet, verbose, ignored (flags without
    effect), and overrides: `Override`s in the order given.

    Raises ConfigError for an unknown flag, a missing value or file.
    """
    args = _parse(train_parser(), argv)
    if args.config is None and args.resume is None:
        raise ConfigError("train.py: needs -c CONFIG.json, or -r CHECKPOINT to go on from")
    if args.resume == "auto":
        if args.config is None or args.run_id is None:
            raise ConfigError("-r auto: needs -c CONFIG.json and --run_id ID, the run to go on with")
    elif args.resume is not None:
        check_file(args.resume, "-r")
    if args.run_id is not None and (args.run_id in ("", ".", "..") or len(args.run_id) > 200
                                    or any(char in "/\\" or char < " " for char in args.run_id)):
        raise ConfigError(f"--run_id: {args.run_id[:80]!r} can't name a folder; use letters, digits, '-' and '_'")
    for item in args.overrides:
        if item.path in ("pretrained", "load_crt", "distill_checkpoint") and item.text is not None:
            check_file(item.text, item.flag)
    return args


def parse_test(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of test.py: config, resume, device, overrides as in train.py; split, classifier ("joint" where not
    given), tau (list of floats, None without the tau classifier), tau_metric, feat_type, open_set, open_threshold,
    allow_partial, report.

    Raises ConfigError for an unknown flag, a missing value or file, and flags that don't go together.
    """
    args = _parse(test_parser(), argv)
    if args.resume is None:
        raise ConfigError("test.py: needs -r CHECKPOINT")
    check_file(args.resume, "-r")
    if args.tau is not None and args.classifier not in (None, "tau"):
        raise ConfigError(f"--tau: goes with --classifier tau, not {args.classifier}")
    if args.feat_type is not None and args.classifier != "ncm":
        raise ConfigError("--feat_type: goes with --classifier ncm")
    args.classifier = args.classifier or ("tau" if args.tau is not None else "joint")
    args.tau = parse_taus(args.tau or "0:2:0.1") if args.classifier == "tau" else None
    if args.tau_metric is not None and len(args.tau or ()) < 2:
        raise ConfigError("--tau_metric: chooses from a sweep, --tau FIRST:LAST:STEP")
    args.tau_metric = args.tau_metric or "class_mean_acc"
    args.feat_type = args.feat_type or "cl2n"
    args.open_threshold = _number(args.open_threshold, "--open_threshold")
    if not 0 <= args.open_threshold <= 1:
        raise ConfigError(f"--open_threshold: must be from 0 to 1, not {args.open_threshold:g}")
    if args.open_set is not None:
        check_file(args.open_set, "--open_set")
    return args


def _parse(parser: _Parser, argv: Sequence[str] | None, read: Callable | None = None) -> argparse.Namespace:
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    args, left = (read or parser.parse_known_args)(_joined(list(sys.argv[1:] if argv is None else argv), flags))
    if left:
        name = left[0].partition("=")[0]
        if not name.startswith("-"):
            raise ConfigError(f"{parser.prog}: unexpected {name[:80]!r}; values follow a flag, such as -c CONFIG.json")
        shown = [flag for flag, action in flags.items() if action.help != argparse.SUPPRESS]
        near = closest(name, shown) or closest(name.replace("-", "_"), shown)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(f"{parser.prog}: unknown flag {name[:80]!r}{hint} (--help lists all flags)")
    if args.device is not None:
        check_device(args.device)
    return args


def _joined(argv: list[str], flags: dict[str, Any]) -> list[str]:
    """`--gamma -2e-1` as `--gamma=-2e-1`: argparse takes such a number for a flag."""
    joined: list[str] = []
    for word in argv:
        before = joined[-1] if joined else ""
        if before.startswith("--") and before in flags and flags[before].nargs is None and _is_negative(word):
            joined[-1] = f"{before}={word}"
        else:
            joined.append(word)
    return joined


def _is_negative(word: str) -> bool:
    try:
        return word.startswith("-") and float(word) <= 0
    except ValueError:
        return False


def check_file(path: str, flag: str) -> None:
    """ConfigError unless `path` is a file that can be read."""
    shown = repr(path)[1:-1]
    try:
        if os.path.isdir(path):
            raise ConfigError(f"{flag}: {shown} is a folder; give a file in it")
        if not os.path.exists(path):
            raise ConfigError(f"{flag}: no such file: {shown}")
        if not os.access(path, os.R_OK):
            raise ConfigError(f"{flag}: {shown} can't be read")
    except ValueError as error:
        raise ConfigError(f"{flag}: {shown}: {error}") from None


def check_device(device: str) -> None:
    """`cpu`, or GPU numbers such as `0` or `0,1`. Raises ConfigError; whether they exist is seen later."""
    parts = device.strip().split(",")
    if device.strip().lower() != "cpu" and not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise ConfigError(f"-d/--device: {device[:80]!r} is neither \"cpu\" nor GPU numbers such as 0 or 0,1")


def parse_taus(text: str) -> list[float]:
    """`0.7` as [0.7]; `0:2:0.5` as [0, 0.5, 1, 1.5, 2]: both ends belong to it. Raises ConfigError."""
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


# ---------------------------------------------------------------------- what an entry point does with a mistake

def run_main(main: Callable[[], Any]) -> NoReturn:
    """Run an entry point's `main` and exit: 0 done; 2 with one line on stderr for a ConfigError; 1 for anything else.

    Python's warnings, and what is logged before logging is set up, go to stdout, so that stderr holds that line alone.
    Where every rank of a torchrun has the same to say, it is said once.
    """
    warnings.showwarning = _show_on_stdout
    logging.lastResort = logging.StreamHandler(sys.stdout)
    logging.lastResort.setLevel(logging.WARNING)  # as the one it replaces
    threading.excepthook = _quiet_disk_error
    try:
        status = main() or 0
    except (ConfigError, RunError) as error:
        status = 2 if isinstance(error, ConfigError) else 1
        if not error.told:
            _fail(str(error), status)
    except KeyboardInterrupt:
        status = _fail("interrupted", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO):
            traceback.print_exc()
            status = 1
        else:
            status = _fail(f"{error.filename or 'writing'}: {error.strerror}", 1)
    except Exception as error:
        if _joined_ranks() and any(name in str(error) for name in ("gloo", "NCCL")):
            # The other process says on stderr what happened to it; our traceback would bury that.
            sys.stdout.write(f"rank {dist.rank()}: lost another process of the run ({str(error).splitlines()[0]})\n")
            status = 1
        else:
            traceback.print_exc()
            status = 1
    _flush()
    sys.exit(status)


def _fail(message: str, status: int) -> int:
    """Say what was wrong, in one line, once for all ranks where they'd all say the same."""
    # A loader's worker process hands its error over with its whole traceback as text; its last line is the message.
    if message.startswith("Caught ConfigError in DataLoader worker"):
        message = message.rpartition("ConfigError: ")[2]
    if dist.first_to_say(message):
        _flush()
        sys.stderr.write(f"{message}\n")
    return status


def _joined_ranks() -> bool:
    module = sys.modules.get("torch.distributed")
    return module is not None and module.is_available() and module.is_initialized()


def _show_on_stdout(message: Any, *_: Any) -> None:
    sys.stdout.write(f"warning: {' '.join(str(message).split())}\n")


def _quiet_disk_error(what: Any) -> None:
    """TensorBoard writes in a thread: its full disk is raised again, and told, where the run next adds to it."""
    if not isinstance(what.exc_value, OSError):
        threading.__excepthook__(what)


def _flush() -> None:
    """Write out what is buffered; a reader that went away (`| head`) is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
