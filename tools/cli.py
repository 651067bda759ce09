"""What all command lines share: config, checkpoint, device, and the flags that change config values.

Only the standard library is needed here, so that `--help` and a wrong flag are answered at once. The flags that change
the config are data (`NAMED`): each stands for a dotted path, and its value is checked like the file's.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from utils.config.load import Override
from utils.config.read import parse_json
from utils.errors import ConfigError, closest

#: (flags, config path, what it is). `--learning_rate` and the like are RIDE's and BatchFormer's names.
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
#: Flags of other launchers, accepted without effect so that old command lines still run (torchrun sets ranks itself).
LEGACY = ("--world-size", "--rank", "--dist-url", "--dist-backend", "--gpu", "--local_rank", "--local-rank")
LEGACY_SWITCHES = ("--multiprocessing-distributed",)


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError, one line, instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise argparse's `message` as a ConfigError."""
        raise ConfigError(message.removeprefix("argument "))


class SetValue(argparse.Action):
    """Append an `Override` to `overrides`, in the order of the command line.

    It sets `path` or, where that is "", the KEY of a word KEY=VALUE. With `const` the flag is a switch that sets `path`
    to that value.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, path: str = "", const: Any = None, **more: Any):
        switch = {} if const is None else {"nargs": 0, "default": False}
        super().__init__(option_strings, dest, const=const, **switch, **more)
        self.path = path

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        flag = option_string or self.option_strings[0]
        if self.const is not None:
            item = Override(self.path, self.const, flag)
            setattr(namespace, self.dest, True)
        elif self.path:
            item = Override(self.path, value_of(values), flag, values)
        else:
            path, equals, text = values.partition("=")
            if not equals or not path.strip():
                raise ConfigError(f"--set {values[:80]!r}: write KEY=VALUE, e.g. --set trainer.epochs=5")
            item = Override(path.strip(), value_of(text), flag, text)
        namespace.overrides = [*namespace.overrides, item]


class _Ignore(argparse.Action):
    """A flag without effect: noted in `ignored`, so that the run can say so once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.ignored = [*namespace.ignored, option_string]


def value_of(text: str) -> Any:
    """`text` parsed as JSON where it is JSON, else as it is: 5 -> 5, true -> True, NBN -> "NBN"."""
    def not_json(name: str) -> Any:
        raise ValueError(name)  # NaN and Infinity stay text: they may be somebody's name

    try:
        return parse_json(text, parse_constant=not_json)
    except ValueError:
        return text


#: Arguments of an option for which argparse stores no attribute of its own.
_SILENT = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}


def add_named(group: Any, rows: Iterable[tuple[tuple[str, ...], str, str]]) -> None:
    """Add a flag to `group` for each row of a table like `NAMED`."""
    for flags, path, doc in rows:
        group.add_argument(*flags, action=SetValue, path=path, metavar="V", help=f"{doc} ({path})", **_SILENT)


def base_parser(prog: str, what: str, examples: str) -> Parser:
    """A parser with -c, -r, -d and --help. what: its description; examples: printed below the flags."""
    parser = Parser(prog=prog, description=what, epilog=examples, allow_abbrev=False, add_help=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(overrides=[], ignored=[])
    main = parser.add_argument_group("what to run")
    main.add_argument("-c", "--config", metavar="JSON", help="the config file")
    main.add_argument("-r", "--resume", metavar="FILE", help="a checkpoint (train.py also: auto)")
    main.add_argument("-d", "--device", metavar="D", help="cpu, or GPU numbers: 0 or 0,1")
    main.add_argument("-h", "--help", action="help", help="show this and exit")
    return parser


def tool_parser(prog: str, what: str, examples: str = "", overrides: bool = False) -> argparse.ArgumentParser:
    """A tool's parser with -c, -r, -d, --set, --help and, if asked for, the named overrides.

    Parse with `parse_tool`, which suggests the nearest right name for a misspelt flag.
    """
    parser = base_parser(prog, what, examples)
    if overrides:
        add_overrides(parser)
    else:
        add_set(parser)
    return parser


def parse_tool(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a tool's command line. Raises ConfigError as the parsers of train.py and test.py do."""
    return parse(parser, argv, parser.parse_known_intermixed_args)


@contextlib.contextmanager
def tidied_when_stopped() -> Iterator[None]:
    """In the block, SIGTERM raises KeyboardInterrupt as SIGINT does, so that temporary files are removed on the way."""
    if threading.current_thread() is not threading.main_thread():   # only the main thread can set a handler
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def add_set(parser: argparse.ArgumentParser) -> Any:
    """Add `--set KEY=VALUE`, collected in `overrides`; returns its group of flags."""
    parser.set_defaults(overrides=[])
    group = parser.add_argument_group("config values", "instead of what the config says")
    group.add_argument("--set", action=SetValue, metavar="KEY=V", **_SILENT,
                       help="any value: dots between keys, JSON or else text; may be repeated")
    return group


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add `--set`, the named overrides, -q, -v, and the flags of other launchers, which have no effect."""
    group = add_set(parser)
    add_named(group, NAMED)
    group.add_argument("-q", "--quiet", action=SetValue, path="trainer.verbosity", const=0, help="only warnings")
    group.add_argument("-v", "--verbose", action=SetValue, path="trainer.verbosity", const=2, help="every log step")
    for flag in LEGACY:
        group.add_argument(flag, action=_Ignore, help=argparse.SUPPRESS, **_SILENT)
    for flag in LEGACY_SWITCHES:
        group.add_argument(flag, action=_Ignore, nargs=0, help=argparse.SUPPRESS, **_SILENT)


def parse(parser: Parser, argv: Sequence[str] | None, read: Callable | None = None) -> argparse.Namespace:
    """Parse `argv` (None: sys.argv). Raises ConfigError: an unknown flag (and the nearest), no value, a bad -d."""
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
    """`--gamma -2e-1` as `--gamma=-2e-1`: argparse would take such a number for a flag."""
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
    """Raise ConfigError unless `path` is a file that can be read."""
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
    """Raise ConfigError unless it is `cpu` or GPU numbers such as `0` or `0,1`; whether they exist is checked later."""
    parts = device.strip().split(",")
    if device.strip().lower() != "cpu" and not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise ConfigError(f"-d/--device: {device[:80]!r} is neither \"cpu\" nor GPU numbers such as 0 or 0,1")
