"""Record the four batch statistics of one norm layer while a network trains."""
from __future__ import annotations

import torch
from torch import nn

from model.norm.facts import is_norm, read_facts
from model.norm.kernels import dot_and_sum, same_format, wide_type
from model.norm.mabn import MABN2d
from utils.errors import unknown


class StatisticsRecorder:
    """Batch mean, batch variance and the two backward statistics of a norm layer, as MABN's authors plot them.

    With x the layer's input, y = (x - mean) / sqrt(var + eps) (MABN: x / sqrt(mean of x^2 + eps)), w its weight and
    g = w * dL/d(output): `mean` and `var` of x, `mean_g` = mean of g, `mean_gy` = mean of g * y, over the whole batch
    (the last two are g_B and Psi_B in Yan et al., ICLR 2020; small batches increase their variance).

    layer: the norm's name in `model`; by default the last norm. channel: which channel to report; None: the mean over
    channels. Values stay on the device; `read` returns 0-d tensors. `close()` ends the recording. Raises ConfigError if
    `model` has no norm of that name.
    """

    def __init__(self, model: nn.Module, layer: str | None = None, channel: int | None = None):
        norms = {name: m for name, m in model.named_modules() if is_norm(m)}
        if layer is None and norms:
            layer = list(norms)[-1]
        if layer not in norms:
            raise unknown("trainer.statistics_layer", layer, norms, "norm layer")
        self.layer, self.channel = layer, channel
        self._latest: dict[str, torch.Tensor] = {}
        self._hook = norms[layer].register_forward_hook(self._forward)

    def read(self) -> dict[str, torch.Tensor]:
        """The latest training step's statistics: 0-d tensors; empty before the first step."""
        return {name: value.mean() if self.channel is None else value[self.channel]
                for name, value in self._latest.items()}

    def close(self) -> None:
        """Remove the hook from the layer."""
        self._hook.remove()

    @torch.no_grad()
    def _forward(self, norm: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = inputs[0].detach()
        if not norm.training or not x.numel():
            return
        var, mean = torch.var_mean(x.to(wide_type(x.dtype)), dim=(0, 2, 3), correction=0)
        self._latest.update(mean=mean, var=var)
        if not output.requires_grad:
            return
        centre, spread = (torch.zeros_like(mean), var + mean ** 2) if isinstance(norm, MABN2d) else (mean, var)
        weight = read_facts(norm).weight
        scale = (spread + norm.eps).rsqrt() * (1 if weight is None else weight.detach())

        def backward(dy: torch.Tensor) -> None:
            x_ = same_format(x, like=x)
            dot, total = dot_and_sum(same_format(dy, like=x_).to(x_.dtype), x_)
            values = x_.numel() // x_.shape[1]
            self._latest["mean_g"] = total / values * (1 if weight is None else weight.detach())
            self._latest["mean_gy"] = scale * (dot - centre * total) / values
        output.register_hook(backward)
