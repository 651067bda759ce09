"""How entry points report errors: one line on stderr, and the exit status."""
from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from utils import dist
from utils.errors import ConfigError, RunError

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)  # faults of the disk, not ours


def run_main(main: Callable[[], Any]) -> NoReturn:
    """Run an entry point's `main` and exit: with its status (None: 0), 2 for a ConfigError, 1 for any other error.

    Errors that users can act on are one line on stderr, once where all ranks of a torchrun would print the same; others
    are a traceback. Warnings, and what is logged before logging is set up, go to stdout.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does, for names its encoding lacks
    warnings.showwarning = _show_on_stdout
    logging.lastResort = logging.StreamHandler(sys.stdout)
    logging.lastResort.setLevel(logging.WARNING)  # as the default handler's
    threading.excepthook = _quiet_disk_error
    try:
        status = main() or 0
    except (ConfigError, RunError) as error:
        status = 2 if isinstance(error, ConfigError) else 1
        if not error.told:
            _fail(str(error), status)
    except KeyboardInterrupt:
        status = _fail("interrupted", 1)
    except OSError as error:
        if error.errno == errno.EPIPE and not _flush("\n"):
            status = 0
        elif error.errno not in DISK:
            traceback.print_exc()
            status = 1
        else:
            status = _fail(f"{error.filename or 'writing'}: {error.strerror}", 1)
    except Exception as error:
        if dist.initialised() and any(name in str(error) for name in ("gloo", "NCCL")):
            # The other process says on stderr what happened to it; our traceback would bury that.
            sys.stdout.write(f"rank {dist.rank()}: lost another process of the run ({str(error).splitlines()[0]})\n")
            status = 1
        else:
            traceback.print_exc()
            status = 1
    _flush()
    sys.exit(status)


def _fail(message: str, status: int) -> int:
    """Print a one-line message on stderr, once where several ranks would print the same; returns `status`."""
    # A DataLoader worker hands over its error as text with the whole traceback; the last line is the message.
    if message.startswith("Caught ConfigError in DataLoader worker"):
        message = message.rpartition("ConfigError: ")[2]
    if dist.first_to_say(message):
        _flush()
        sys.stderr.write(f"{message}\n")
    return status


def _show_on_stdout(message: Any, *_: Any) -> None:
    sys.stdout.write(f"warning: {' '.join(str(message).split())}\n")


def _quiet_disk_error(what: Any) -> None:
    """Keep disk errors of TensorBoard's thread quiet: they are raised again, and reported, at the run's next write."""
    if not (isinstance(what.exc_value, OSError) and what.exc_value.errno in DISK):
        threading.__excepthook__(what)


def _flush(last: str = "") -> bool:
    """Write `last` and flush stdout; False where its reader has gone (`| head`), which is no error."""
    try:
        print(last, end="", flush=True)
        return True
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
