"""SIGTERM and SIGINT end a run at a step's end instead of anywhere."""
from __future__ import annotations

import signal
import threading
from types import FrameType

import torch

from utils import dist


class StopRequest:
    """Remembers that a stop was asked for. A second SIGINT interrupts at once, as people expect of Ctrl-C."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self, device: torch.device, is_sync_point: bool) -> bool:
        """Has any rank been asked to stop? Every rank gets the same answer.

        Many processes must stop at the same step, or the rest wait for ever in the next collective call: the flag
        is summed over ranks, each step on CPU, and on GPUs only where the host waits for the device anyway
        (`is_sync_point`).
        """
        if dist.world_size() == 1:
            return self.signal is not None
        if device.type == "cuda" and not is_sync_point:
            return False
        flag = torch.tensor(float(self.signal is not None), device=device)
        return bool(dist.all_reduce_sum(flag).item())
