"""A convolution with centred filters, MABN's companion: what makes the mean not worth subtracting."""
from __future__ import annotations

import torch
from torch import nn


class CenConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` whose filters have mean 0 over their input channels and kernel (Yan et al., ICLR 2020).

    x: [N, C_in, H, W] -> [N, C_out, H', W']. Arguments, defaults, parameters and keys are `torch.nn.Conv2d`'s; `weight`
    holds the filters as learned, the mean is taken off in every forward. A filter of a single element is 0.
    """

    def centred_weight(self) -> torch.Tensor:
        """The filters that convolve: [C_out, C_in / groups, k, k], each with mean 0."""
        return self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.centred_weight(), self.bias)
