"""A convolution with centred filters. It keeps the mean near 0, so that MABN needn't subtract it."""
from __future__ import annotations

import torch
from torch import nn


class CenConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` whose filters have mean 0 over their input channels and kernel (Yan et al., ICLR 2020).

    x: [N, C_in, H, W] -> [N, C_out, H', W']. Arguments, defaults, parameters and keys are `torch.nn.Conv2d`'s; `weight`
    holds the filters as learned, and each forward pass subtracts their means. A filter of a single element becomes 0.
    """

    def centred_weight(self) -> torch.Tensor:
        """The filters used to convolve: [C_out, C_in / groups, k, k], each with mean 0."""
        return self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.centred_weight(), self.bias)
