"""What an entry point does with a mistake: one line on stderr, and the exit status."""
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

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)  # what is wrong with the disk, not with us


def run_main(main: Callable[[], Any]) -> NoReturn:
    """Run an entry point's `main` and exit: 0 done; 2 with one line on stderr for a ConfigError; 1 for anything else.

    Python's warnings, and what is logged before logging is set up, go to stdout, so that stderr holds that line alone.
    Where every rank of a torchrun has the same to say, it is said once.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: of a name that its encoding lacks
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
    """Say what was wrong, in one line, once for all ranks where they'd all say the same."""
    # A loader's worker process hands its error over with its whole traceback as text; its last line is the message.
    if message.startswith("Caught ConfigError in DataLoader worker"):
        message = message.rpartition("ConfigError: ")[2]
    if dist.first_to_say(message):
        _flush()
        sys.stderr.write(f"{message}\n")
    return status


def _show_on_stdout(message: Any, *_: Any) -> None:
    sys.stdout.write(f"warning: {' '.join(str(message).split())}\n")


def _quiet_disk_error(what: Any) -> None:
    """TensorBoard writes in a thread: its full disk is raised again, and told, where the run next adds to it."""
    if not (isinstance(what.exc_value, OSError) and what.exc_value.errno in DISK):
        threading.__excepthook__(what)


def _flush(last: str = "") -> bool:
    """Write out what is buffered, and `last`; False where its reader went away (`| head`), which is no error."""
    try:
        print(last, end="", flush=True)
        return True
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
