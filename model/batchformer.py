"""BatchFormer: a transformer encoder across the images of a batch (Hou et al., CVPR 2022)."""
from __future__ import annotations

import copy

import torch
from torch import nn

from model.gather import all_gather_with_grad

# add_bt -> number of encoder layers; 32 and 33 are one layer with a shared classifier.
DEPTHS = {0: 0, 1: 1, 12: 8, 13: 6, 32: 1, 33: 1}
# add_bt -> loss weights (after the block, before it) with a shared classifier. 33 weights both equally; 32 almost drops
# the stream after the block, the author's way to train the block slowly (zhihou7/BatchFormer, issue 4). The others lie
# in between: with equal weights on CIFAR-100-LT the block learns a constant opposed to the features (cosine -0.78 after
# five epochs at learning rate 0.1), and the shared classifier can serve neither stream.
STREAM_WEIGHTS = {1: (0.1, 1.0), 12: (0.1, 1.0), 13: (0.1, 1.0), 33: (1.0, 1.0), 32: (0.01, 1.0)}
DROPOUT = 0.5


class BatchFormerLayer(nn.TransformerEncoderLayer):
    """One encoder layer over the batch: post-norm, ReLU, feed-forward as wide as the features, dropout 0.5.

    features `[N, E, D]` -> `[N, E, D]`: the N images are the sequence, and the E experts take the place of a batch, so
    that they don't see each other and one call applies the same weights to all. width: D.

    `record = True` keeps `last_attention` `[N, N]`, detached: row i is image i's attention to each image, the mean
    over heads and experts, without attention dropout. Recording changes neither results nor random numbers.
    """

    def __init__(self, width: int):
        super().__init__(width, nhead=4 if width > 128 else 1, dim_feedforward=width, dropout=DROPOUT)
        self.record = False
        self.last_attention: torch.Tensor | None = None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.record:
            self.last_attention = self._attention(features)
        return super().forward(features)

    @torch.no_grad()
    def _attention(self, features: torch.Tensor) -> torch.Tensor:
        n, experts, width = features.shape
        heads = self.self_attn.num_heads
        weight, bias = self.self_attn.in_proj_weight[:2 * width], self.self_attn.in_proj_bias[:2 * width]
        query_key = nn.functional.linear(features, weight, bias)                            # [N, E, 2D]
        query, key = query_key.float().view(n, experts, 2, heads, width // heads).permute(2, 1, 3, 0, 4)
        scores = query @ key.transpose(-1, -2) / (width // heads) ** 0.5                    # [E, heads, N, N]
        return scores.softmax(-1).mean((0, 1))


class BatchFormerStack(nn.Module):
    """`depth` layers in sequence with equal initial weights, as in `nn.TransformerEncoder`, whose keys it shares.

    features `[N, E, D]` -> `[N, E, D]`.
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        layer = BatchFormerLayer(width)
        self.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(depth)])

    @property
    def record(self) -> bool:
        """Whether to record the first layer's attention; later layers attend to mixtures of images."""
        return self.layers[0].record

    @record.setter
    def record(self, value: bool) -> None:
        self.layers[0].record = value

    @property
    def last_attention(self) -> torch.Tensor | None:
        """The first layer's `last_attention`, `[N, N]`."""
        return self.layers[0].last_attention

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            features = layer(features)
        return features


def make_block(add_bt: int, width: int) -> nn.Module | None:
    """The block for a value of `add_bt` (a key of DEPTHS; 0: None), `width` = D features wide."""
    depth = DEPTHS[add_bt]
    if depth == 0:
        return None
    return BatchFormerLayer(width) if depth == 1 else BatchFormerStack(width, depth)


def across_ranks(block: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Apply `block` to all ranks' features together and keep this rank's rows; gradients reach every rank.

    features `[n, E, D]` -> `[n, E, D]`; n may differ between ranks. A recorded attention is cut to this rank's images,
    so that its rows then sum to less than 1.
    """
    everyone, start = all_gather_with_grad(features)
    own = slice(start, start + len(features))
    out = block(everyone)[own]
    if block.record:
        layer = block.layers[0] if isinstance(block, BatchFormerStack) else block
        layer.last_attention = layer.last_attention[own, own]
    return out
