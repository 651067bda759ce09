"""SIGTERM, SIGINT and SIGUSR1 end a run after a complete step instead of in the middle of one."""
from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

from utils import dist

if TYPE_CHECKING:
    import torch

#: The signals that ask a run to stop. Slurm's `--signal=USR1@60` sends SIGUSR1 before the time is up (not on Windows).
STOPS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """Remembers that a stop was requested. A second SIGINT interrupts at once, as people expect of Ctrl-C.

    Used as a context manager, which may be nested: signals are caught until the outermost one exits. (torch isn't
    imported at the top of this file, so that a run can listen before anything slow begins.)
    """

    #: One Ctrl-C reaches a rank twice, directly and through torchrun: only after this time is it the user's second.
    PATIENCE_S = 1.0

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._depth = 0
        self._process = os.getpid()
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if self._depth == 0 and threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            for number in STOPS:
                self._old[number] = signal.signal(number, self._remember)
        self._depth += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._old.items():
                signal.signal(number, handler)
            self._old.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker that was forked with this handler: its parent will end it
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            self._say(f"{signal.Signals(number).name}: stopping as soon as the run can be saved"
                      + ("; Ctrl-C once more stops at once" if number == signal.SIGINT else ""))
        elif number == signal.SIGINT and time.monotonic() - self._since > self.PATIENCE_S:
            raise KeyboardInterrupt

    @staticmethod
    def _say(line: str) -> None:
        """Print from inside a signal handler, where the log and sys.stdout may be in the middle of a line."""
        if dist.is_main():
            try:
                os.write(1, f"\n{line}\n".encode())
            except OSError:
                pass  # stdout's reader is gone

    def agreed(self, device: torch.device, is_sync_point: bool) -> bool:
        """Whether any rank was asked to stop. Every rank must call it and gets the same answer.

        All processes must stop at the same step, or the others would wait forever in the next collective call. The flag
        is summed over ranks: on CPU at each step, on GPUs only where the host waits for the device anyway
        (`is_sync_point`); elsewhere the answer is False.
        """
        if dist.world_size() == 1:
            return self.signal is not None
        if device.type == "cuda" and not is_sync_point:
            return False
        import torch
        flag = torch.tensor(float(self.signal is not None), device=device)
        return bool(dist.all_reduce_sum(flag).item())
