"""Moving average batch norm: batch norm for small batches, with moments averaged over the last iterations."""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from model.norm.grouped import check_group_size, group_expand, group_mean
from model.norm.kernels import affine, dot_and_sum, same_format, weighted_sum, without_autocast
from utils.errors import ConfigError

_MAX_CALLS = 64      # forward passes between two optimizer steps that a recomputation can still refer to


class _Call(NamedTuple):
    """The statistics of one training forward pass, [C] each ([G, C] with simulated small batches), and iteration t."""
    chi: torch.Tensor       # mean of x^2
    inv_std: torch.Tensor   # 1 / sqrt(var + eps)
    per_x: torch.Tensor     # r / sqrt(var + eps): r z = x * per_x
    t: int | torch.Tensor


# The same code updates the state on every device. On the CPU the iteration t and all conditions on it are plain Python
# values, which saves small tensor operations; on a GPU they are tensors, so that no step waits for the device.

def _iteration(iters: torch.Tensor) -> int | torch.Tensor:
    return iters.item() if iters.device.type == "cpu" else iters.clone()


def _all_finite(values: torch.Tensor) -> bool | torch.Tensor:
    total = values.sum()
    return math.isfinite(total.item()) if values.device.type == "cpu" else total.isfinite()


def _choose(condition: bool | torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, yes, no) if isinstance(condition, torch.Tensor) else yes if condition else no


class MABN2d(nn.Module):
    """Moving Average Batch Normalization (Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of
    Batch Normalization", ICLR 2020), as its formal implementation defines it.

    x: [N, C, H, W] -> the same shape, dtype and memory format. Training iteration t = 1, 2, ...; K = real_B / B:
    - chi = mean of x^2 over N, H, W goes to `buffer_x2[t mod K]`; var = chi while t <= K or t < warmup_iters, then the
      buffer's mean. z = x / sqrt(var + eps).
    - r = sqrt(var + eps) / sqrt(running_var + eps), 1 while t <= max(1000, warmup_iters), then clipped to [1/5, 5];
      y = w r z + b; afterwards running_var = momentum * running_var + (1 - momentum) * var.
    - Backward: g = dy w r; psi = mean of g z goes to `buffer_gz[t mod K]`; the psi used is psi itself or the buffer's
      mean, by the same rule; dx = (g - z psi) / sqrt(var + eps); dw = sum of dy r z; db = sum of dy.
    Evaluation: x / sqrt(running_var + eps) * w + b. No mean is subtracted: see `CenConv2d`.

    `B` is the number of images in a training batch, `real_B` the number whose moments are averaged, a multiple of B.
    Any batch size works: each batch, even a smaller last one, counts as one iteration. An empty batch changes nothing.
    `normalization_batch_size` simulates small batches inside a large one (the paper's ImageNet study): consecutive
    groups of that many images have their own moments, averaged over the K newest groups, including those of earlier
    iterations; the buffers then hold the K newest groups, newest last, and running_var follows the mean over the
    groups. The last group may be smaller.

    Buffers (names and shapes as in the authors' checkpoints): running_var [1, C, 1, 1], iters [1] int64,
    buffer_x2 and buffer_gz [K, C]. All work stays on the device. Non-finite values, which mixed precision produces
    when its loss scale is too high, never enter the buffers.
    Gradient checkpointing: a forward pass recomputed in the backward pass reuses the statistics of the original one
    and doesn't change the state. DDP: each process has its own statistics; with DDP's default `broadcast_buffers`,
    rank 0's are copied to the others before each forward pass, so that rank 0's history normalises all batches.
    `torch.compile`: the training forward runs outside the graph (the backward pass updates a buffer).

    Raises ConfigError for B, real_B, eps, momentum or the group size out of range; ValueError for x that isn't 4-D.
    """

    def __init__(self, channels: int, B: int, real_B: int, eps: float = 1e-5, momentum: float = 0.98,
                 warmup_iters: int = 100, normalization_batch_size: int | None = None):
        super().__init__()
        if B < 1 or real_B < B or real_B % B:
            raise ConfigError(f"MABN: real_B {real_B} must be a multiple of B {B}, and B at least 1")
        if not 0 <= momentum <= 1 or eps < 0:
            raise ConfigError(f"MABN: momentum {momentum} must be between 0 and 1, and eps {eps} not below 0")
        self.num_features, self.B, self.real_B = channels, B, real_B
        self.eps, self.momentum, self.warmup_iters = eps, momentum, warmup_iters
        self.normalization_batch_size = check_group_size(normalization_batch_size)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(1, channels, 1, 1))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.long))
        self.register_buffer("buffer_x2", torch.zeros(real_B // B, channels))
        self.register_buffer("buffer_gz", torch.zeros(real_B // B, channels))
        self._calls: list[_Call] = []
        self._calls_version = -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4:
            raise ValueError(f"expected 4D input (got {x.dim()}D input)")
        if self.training and x.numel():
            compiling = torch.compiler.is_compiling()
            return self._train_forward_outside_the_graph(x) if compiling else self._train_forward(x)
        variance = self.running_var.view(-1)
        return F.batch_norm(x, torch.zeros_like(variance), variance, self.weight, self.bias, False, 0.0, self.eps)

    @torch._disable_dynamo
    def _train_forward_outside_the_graph(self, x: torch.Tensor) -> torch.Tensor:
        return self._train_forward(x)

    def _train_forward(self, x: torch.Tensor) -> torch.Tensor:
        x = same_format(x, like=x)
        with without_autocast(x):
            x_ = x.detach()
            call = self.statistics(self._pool(dot_and_sum(x_, x_, self._grouped)[0], x))
        return _Normalise.apply(x, self.weight, self.bias, call, self)

    def statistics(self, chi: torch.Tensor) -> _Call:
        """The statistics of this forward pass from its chi, [C] or [G, C]; advances the state by one iteration unless
        this is a recomputation."""
        if torch._C._current_graph_task_id() != -1 and self._calls:           # we are inside a backward pass
            return self._recall(chi)
        t = _iteration(self.iters.add_(1))
        var, finite = self._average(self.buffer_x2, chi, t)
        running = self.running_var.view(-1)
        inv_std = (var + self.eps).rsqrt_()
        clipped = (running + self.eps).rsqrt_().clamp(inv_std * (1 / 5), inv_std * 5)      # r in [1/5, 5]
        per_x = _choose(t <= max(1000, self.warmup_iters), inv_std, clipped)
        newest = (var.mean(0) if self._grouped else var).to(running.dtype)
        running.lerp_(_choose(finite, newest, running), 1 - self.momentum)
        call = _Call(chi, inv_std, per_x, t)
        self._remember(call)
        return call

    def slope(self, psi: torch.Tensor, call: _Call) -> torch.Tensor:
        """The factor of x in dx, -psi / (var + eps), shaped like psi [C] or [G, C]. Enters this backward pass's psi in
        the buffer and uses the averaged one."""
        averaged, _ = self._average(self.buffer_gz, psi, call.t)
        return averaged * (call.inv_std * -call.inv_std)                # times x this is -z psi / sqrt(var + eps)

    @property
    def _grouped(self) -> bool:
        return self.normalization_batch_size is not None

    def _pool(self, sums: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Turn sums over x's values into means: [C] -> [C] over the batch, or [N, C] -> [G, C] over each group."""
        if self._grouped:
            return group_mean(sums, self.normalization_batch_size) / (x.shape[2] * x.shape[3])
        return sums * (x.shape[1] / x.numel())

    def _spread(self, per_group: torch.Tensor, n: int) -> torch.Tensor:
        """Each of n samples' row of its group, [G, C] -> [n, C]; [C] stays as it is."""
        return group_expand(per_group, self.normalization_batch_size, n) if self._grouped else per_group

    def _average(self, buffer: torch.Tensor, new: torch.Tensor, t: int | torch.Tensor) -> tuple:
        """Enter iteration t's moments `new` [C] or [G, C] in `buffer` [K, C], if all are finite.

        Returns the moments to use, shaped like `new`, and whether `new` was finite.
        """
        size = len(buffer)
        finite = _all_finite(new)
        if self._grouped:
            history = torch.cat([buffer.to(new.dtype), new])                  # [K + G, C]
            buffer.copy_(_choose(finite, history[-size:].to(buffer.dtype), buffer))
            averaged = history.unfold(0, size, 1)[1:].mean(-1)                # group g's K newest: [G, C]
        else:
            slot = t % size
            buffer[slot] = _choose(finite, new, buffer[slot])
            averaged = buffer.mean(0, dtype=new.dtype)
        return _choose((t <= size) | (t < self.warmup_iters), new, averaged), finite

    def _remember(self, call: _Call) -> None:
        """Keep the call for a recomputation; those from before the last optimizer step are no longer needed."""
        if self.weight._version != self._calls_version:
            self._calls_version = self.weight._version
            self._calls.clear()
        self._calls.append(call)
        del self._calls[:-_MAX_CALLS]

    def _recall(self, chi: torch.Tensor) -> _Call:
        """The original call on this input: the one with the nearest chi, as a layer may be called more than once."""
        alike = [call for call in self._calls if call.chi.shape == chi.shape]
        if len(alike) == 1:
            return alike[0]
        return alike[(torch.stack([call.chi for call in alike]) - chi).abs().flatten(1).sum(1).argmin().item()]

    def train(self, mode: bool = True) -> MABN2d:
        self._calls.clear()
        return super().train(mode)

    def extra_repr(self) -> str:
        simulated = f", normalization_batch_size={self.normalization_batch_size}" if self._grouped else ""
        return (f"{self.num_features}, B={self.B}, real_B={self.real_B}, eps={self.eps}, momentum={self.momentum}, "
                f"warmup_iters={self.warmup_iters}{simulated}")

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Load the authors' two kinds of checkpoints (running_var [1, C, 1, 1] or [C]; the classification demo's
        `sta_matrix pre_x2 pre_gz` are dropped) and batch norm's (the second moment is variance + mean^2).

        A history that is missing, or of another length K, is filled with its mean as far as that is known.
        """
        for name in ("sta_matrix", "pre_x2", "pre_gz", "num_batches_tracked"):
            state_dict.pop(prefix + name, None)
        mean = state_dict.pop(prefix + "running_mean", None)
        moment = state_dict.get(prefix + "running_var")
        if moment is not None and moment.numel() == self.num_features:
            moment = moment.reshape(1, -1) if mean is None else moment.reshape(1, -1) + mean.to(moment) ** 2
            state_dict[prefix + "running_var"] = moment.view_as(self.running_var)
            state_dict.setdefault(prefix + "iters", torch.zeros_like(self.iters))
            for name, known in (("buffer_x2", moment), ("buffer_gz", torch.zeros_like(moment))):
                history = state_dict.get(prefix + name, known)
                if history.shape[1:] == moment.shape[1:] and len(history) != len(self.buffer_x2):
                    history = history.mean(0, keepdim=True).expand_as(self.buffer_x2)
                state_dict[prefix + name] = history.expand_as(self.buffer_x2)
        self._calls.clear()
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Normalise(torch.autograd.Function):
    """y = w r z + b, with a gradient that uses averaged moments. `layer`: the MABN2d."""

    @staticmethod
    def forward(ctx, x, weight, bias, call, layer):
        ctx.layer, ctx.call = layer, call
        with without_autocast(x):
            scale = weight * call.per_x                                        # dy * scale = g / sqrt(var + eps)
            ctx.save_for_backward(x, scale)
            shift = bias.to(scale.dtype)
            return affine(x, layer._spread(scale, len(x)), shift.expand(len(x), -1) if layer._grouped else shift)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, scale = ctx.saved_tensors
        layer, n = ctx.layer, len(x)
        with without_autocast(x):
            dy = same_format(dy, like=x)
            dot, total = dot_and_sum(dy, x, layer._grouped)                    # sums of dy x and of dy: [C] or [N, C]
            slope = layer.slope(scale * layer._pool(dot, x), ctx.call)
            dx = weighted_sum(dy, layer._spread(scale, n), x, layer._spread(slope, n))
            d_weight = dot * layer._spread(ctx.call.per_x, n)
            if layer._grouped:
                d_weight, total = d_weight.sum(0), total.sum(0)
        return dx, d_weight, total, None, None
