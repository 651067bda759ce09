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
        self.counts: dict[str, int] = {}     # per figure: one may have been added in mid-epoch
        self.restored = False

    def add(self, values: dict[str, torch.Tensor | float], n: int) -> None:
        """Add a batch's mean `values` (0-d tensors, or numbers) over `n` images; n = 0 counts nothing."""
        if self.restored:   # drop figures that are no longer computed
            self.sums = {name: value for name, value in self.sums.items() if name in values}
            self.restored = False
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=self.dtype, device=self.device).detach()
            term = value * n if n else torch.zeros((), dtype=self.dtype, device=self.device)
            if name in self.sums:
                self.sums[name] += term
            else:
                self.sums[name] = term
            self.counts[name] = self.counts.get(name, 0) + n

    def read(self, reduce: bool = False) -> dict[str, float]:
        """The means so far (NaN before the first image). `reduce` sums over all ranks first; then every
        rank must call it."""
        if not self.sums:
            return {}
        packed = torch.cat([torch.stack([*self.sums.values()]), self._counted()])
        if reduce:
            packed = dist.all_reduce_sum(packed)
        sums, counts = packed.view(2, -1).tolist()
        return {name: value / count if count else float("nan") for name, value, count in zip(self.sums, sums, counts)}

    def _counted(self) -> torch.Tensor:
        """`counts` in the order of the sums, on the device."""
        return torch.tensor([float(self.counts[name]) for name in self.sums], dtype=self.dtype, device=self.device)

    def state_dict(self, reduce: bool = False) -> dict[str, object]:
        """The sums and counts, for a mid-epoch checkpoint. `reduce` sums over all ranks; then every
        rank must call it."""
        sums, counts = {name: value.clone() for name, value in self.sums.items()}, self._counted()
        if reduce and sums:
            for value in (*sums.values(), counts):
                dist.all_reduce_sum(value)
        return {"sums": {name: value.cpu() for name, value in sums.items()},
                "counts": dict(zip(sums, map(int, counts.tolist())))}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict(reduce=True)` returned: rank 0 holds the sums so far, other ranks begin at 0."""
        here = dist.is_main()
        counts = state["counts"] if "counts" in state else dict.fromkeys(state["sums"], state["count"])   # older files
        self.sums = {name: value.to(self.device) * float(here) for name, value in state["sums"].items()}
        self.counts = {name: counts[name] * here for name in self.sums}
        self.restored = True
