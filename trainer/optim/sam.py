"""Sharpness-aware minimization: the gradient is taken where the loss nearby is highest (Foret et al., ICLR 2021)."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from utils.errors import ConfigError


class SAM(Optimizer):
    """Wraps the optimizer `base`. `first_step()`, after a backward pass, moves the weights to w + e; `second_step()`,
    after another backward pass there, moves them back and lets `base` step with the gradient found there.

    params: the parameter groups of `base`.
    e = rho g / |g|, or if `adaptive` rho w² g / |w g| (ASAM; Kwon et al., ICML 2021), with norms over all parameters.
    Groups and state are those of `base`, so schedules and checkpoints see one optimizer. lr: in a config, the rate of
    `base` in place of the one that it names. Raises ConfigError for a rho that isn't positive.
    """

    def __init__(self, params: Any, base: Any, rho: float = 0.05, adaptive: bool = False, lr: float | None = None):
        if not 0 < rho < math.inf:
            raise ConfigError(f"optimizer.args.rho: must be greater than 0, not {rho}")
        self.base, self.rho, self.adaptive = base, rho, adaptive
        self._moved: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
        super().__init__(params, base.defaults)
        self._share()

    def _share(self) -> None:
        self.base.param_groups, self.base.state = self.param_groups, self.state
        if hasattr(self.base, "_share"):
            self.base._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def first_step(self) -> None:
        """Move the weights to w + e, where the loss nearby is highest, using the gradients in `p.grad`."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        directions = [p.grad for p in params]
        if self.adaptive:
            directions = torch._foreach_mul(params, directions)
        norm = torch.nn.utils.get_total_norm(directions)
        scale = self.rho / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        if self.adaptive:
            directions = torch._foreach_mul(params, directions)
        moves = torch._foreach_mul(directions, scale)
        before = [p.clone() for p in params]
        torch._foreach_add_(params, moves)
        self._moved = params, before

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the weights from before `first_step`, bit for bit; does nothing if they weren't moved."""
        if self._moved is not None:
            torch._foreach_copy_(*self._moved)
            self._moved = None

    def second_step(self) -> None:
        """Restore the weights and step the base optimizer with the present gradients. Raises RuntimeError if
        `first_step` wasn't called."""
        if self._moved is None:
            raise RuntimeError("second_step() comes after first_step() and another backward pass")
        self.restore()
        self.base.step()

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """The same as `second_step`; `closure` is ignored."""
        self.second_step()
