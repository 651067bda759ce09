"""Muon: momentum SGD whose update matrices are orthogonalized before each step (Jordan et al., 2024;
Liu et al., 2025)."""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from utils.errors import ConfigError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)   # of the Newton-Schulz iteration (Jordan et al., 2024)


def orthogonalize(u: Tensor, steps: int = 5) -> Tensor:
    """Approximately the nearest matrices with orthonormal rows (or columns, if there are fewer), for a
    stack u [m, r, c].

    X = u / |u|, then `steps` times X <- P X, P = a I + b A + c A², A = X Xᵀ on the shorter side: singular values end
    between 0.7 and 1.2. Every P is a polynomial of the first A, so the iteration runs on A alone, A <- P A P, and X is
    multiplied once, by the product of all P: half the time for filter banks several times as wide as high.
    """
    a, b, c = COEFFICIENTS
    tall = u.shape[1] > u.shape[2]
    x = u.mT if tall else u
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    gram, factors = x @ x.mT, []
    for _ in range(steps):
        if factors:
            gram = factors[-1] @ gram @ factors[-1]
        factors.append(torch.baddbmm(gram, gram, gram, beta=b, alpha=c))
        factors[-1].diagonal(dim1=1, dim2=2).add_(a)
    x = reduce(torch.matmul, factors) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Muon on the given groups, and another optimizer on the remaining parameters.

    Each parameter is treated as a matrix [out, in·k·k]: b = momentum · b + g, u = g + momentum · b (Nesterov), the step
    is lr · 0.2 · sqrt(max(out, in·k·k)) · orthogonalize(u), which matches the size of AdamW's updates (Liu et al.,
    2025; torch's `match_rms_adamw`); weight decay is decoupled, w <- w (1 - lr · weight_decay).

    params: parameters with two or more dimensions, or groups of them. others: the optimizer of the remaining
    parameters. Its groups follow Muon's in `param_groups`, so that a schedule reaches both.
    Matrices of the same shape are processed together. Raises ConfigError for values out of range and for parameters
    with one dimension.
    """

    def __init__(self, params: Any, lr: float = 0.02, momentum: float = 0.9, weight_decay: float = 0.0, steps: int = 5,
                 others: Any = None):
        for name, value, right, wanted in (
                ("lr", lr, 0 < lr < math.inf, "greater than 0"), ("momentum", momentum, 0 <= momentum < 1, "0 to 1"),
                ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "0 or more"),
                ("steps", steps, steps >= 1, "1 or more")):
            if not right:
                raise ConfigError(f"optimizer.args.{name}: must be {wanted}, not {value}")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps))
        flat = [p for group in self.param_groups for p in group["params"] if p.dim() < 2]
        if flat:
            raise ConfigError(f"optimizer.type: Muon takes matrices and filters, not a parameter of shape "
                              f"{tuple(flat[0].shape)}")
        self.own, self.others = len(self.param_groups), others
        if others is not None:
            self.param_groups += others.param_groups
            self._share()

    def _share(self) -> None:
        """Let the other optimizer use the same groups and the same state dict, so that saving, loading and schedules
        see a single optimizer."""
        if self.others is not None:
            self.others.param_groups, self.others.state = self.param_groups[self.own:], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Take one step with the gradients in `p.grad`; `closure` is ignored."""
        for group in self.param_groups[:self.own]:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((len(p), p[0].numel()), []).append(p)
            for (rows, columns), params in by_shape.items():
                self._step_together(params, group, 0.2 * math.sqrt(max(rows, columns)))
        if self.others is not None:
            self.others.step()

    def _step_together(self, params: list[Tensor], group: dict[str, Any], size: float) -> None:
        momentum, lr = group["momentum"], group["lr"]
        gradients = [p.grad for p in params]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        updates = torch._foreach_add(gradients, buffers, alpha=momentum)
        moves = orthogonalize(torch.stack([u.flatten(1) for u in updates]), group["steps"])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, [move.view(p.shape) for move, p in zip(moves, params)], alpha=-lr * size)
