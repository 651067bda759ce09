"""Running means that stay on the device until they are read."""
from __future__ import annotations

import torch

from utils import dist


class Means:
    """Sample-weighted means of named figures, summed on the device in float64 and read in one transfer.

    >>> means = Means("cpu")
    >>> means.add({"loss": torch.tensor(2.0)}, 3)
    >>> means.add({"loss": torch.tensor(4.0)}, 1)
    >>> means.read()
    {'loss': 2.5}
    """

    def __init__(self, device: torch.device | str):
        self.dtype = torch.float64
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0

    def add(self, values: dict[str, torch.Tensor | float], n: int) -> None:
        """Add a batch's mean `values` (0-d tensors, or numbers) over `n` images; n = 0 counts nothing."""
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=self.dtype, device=self.device).detach()
            term = value * n if n else torch.zeros((), dtype=self.dtype, device=self.device)
            if name in self.sums:
                self.sums[name] += term
            else:
                self.sums[name] = term
        self.count += n

    def read(self, reduce: bool = False) -> dict[str, float]:
        """The means so far (NaN before the first image). `reduce` sums over all ranks first; all must call it."""
        if not self.sums:
            return {}
        packed = torch.stack([*self.sums.values(), torch.tensor(float(self.count), dtype=self.dtype,
                                                                device=self.device)])
        if reduce:
            packed = dist.all_reduce_sum(packed)
        *sums, count = packed.tolist()
        return {name: value / count if count else float("nan") for name, value in zip(self.sums, sums)}

    def state_dict(self, reduce: bool = False) -> dict[str, object]:
        """For the checkpoint of an epoch that isn't finished. `reduce` sums over all ranks; all must call it."""
        sums = {name: value.clone() for name, value in self.sums.items()}
        count = torch.tensor(float(self.count), dtype=self.dtype, device=self.device)
        if reduce:
            for value in (*sums.values(), count):
                dist.all_reduce_sum(value)
        return {"sums": {name: value.cpu() for name, value in sums.items()}, "count": int(count)}

    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict(reduce=True)` returned: rank 0 holds the sums so far, other ranks begin at 0."""
        here = float(dist.is_main())
        self.sums = {name: value.to(self.device) * here for name, value in state["sums"].items()}
        self.count = state["count"] if dist.is_main() else 0
