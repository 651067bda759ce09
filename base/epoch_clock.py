"""The time that an epoch takes."""
from __future__ import annotations

import time


class EpochClock:
    """Seconds that an epoch takes, in all and its training alone, over the processes that train it in turn."""

    def __init__(self) -> None:
        self.earlier: tuple[float, float] | None = (0.0, 0.0)    # of other processes: in all, training; None: unknown
        self._began, self._trained = time.monotonic(), None
        self.prepared = 0.0     # seconds before the first epoch that count as its own

    def prepare(self, seconds: float) -> None:
        """The run, a new one, took this long before its first epoch."""
        self.prepared, self.earlier = seconds, (seconds, 0.0)

    def begin(self) -> None:
        """This process begins, or goes on with, an epoch."""
        self._began, self._trained = time.monotonic(), None

    def trained(self) -> None:
        """The epoch's images are done; validation follows."""
        self._trained = time.monotonic()

    def end(self) -> None:
        """The epoch is complete."""
        self.earlier = (0.0, 0.0)

    @property
    def spent(self) -> tuple[float, float]:
        """Seconds so far, in all and for training; this process's alone if the earlier ones aren't known."""
        before, trained_before = self.earlier or (0.0, 0.0)
        trained = (self._trained or time.monotonic()) - self._began
        return before + time.monotonic() - self._began, trained_before + trained
