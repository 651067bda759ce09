"""The part common to all networks with experts, from pooled features on: dropout, BatchFormer, heads, output dict."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from model import batchformer
from model.classifier import make_head
from utils.errors import ConfigError


def nbn_stages(where: str | list[int], stages: list[int]) -> list[int]:
    """The numbers of the stages whose norms NBN replaces, ascending. stages: all of the network's stages, in order.

    where: "last", "all", or a list of numbers out of `stages`. Raises ConfigError for anything else.
    """
    chosen = {"last": stages[-1:], "all": stages}.get(where) if isinstance(where, str) else where
    numbers = isinstance(chosen, list | tuple) and all(type(stage) is int for stage in chosen)
    if not numbers or not chosen or not set(chosen) <= set(stages):
        raise ConfigError(f"arch.args.norm.args.where: {where!r} should be 'last', 'all' or a list of stages "
                          f"out of {stages}")
    return sorted(set(chosen))


@contextlib.contextmanager
def statistics_kept(heads: list[nn.Module]) -> Iterator[None]:
    """Inside, batch norms in `heads` (NBN's logit rectification) use batch statistics, leaving running ones alone."""
    norms = [part for head in heads for part in head.modules() if getattr(part, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class ExpertNet(nn.Module):
    """Experts on a shared trunk. Subclasses define the shared part (`trunk`) and each expert's part (`expert_feat`).

    x `[N, 3, H, W]` -> dict of `output` `[N, C]` (mean over experts), `logits` `[N, E, C]` and `feat` `[N, E, D]`, the
    pooled features after dropout but before BatchFormer. With `shared_classifier`, training adds `logits_old`,
    `output_old` (the same heads on the features before the block) and `bt_weights`, the loss weights (after, before).

    BatchFormer runs while its own module is in training mode, so a frozen block, which stays in evaluation mode, is
    skipped; with `eval_bt` it always runs. Experts not in `use_experts` are left out (E counts those used); "rand"
    leaves out a random one each training step and uses all in evaluation.
    """

    def __init__(self, *, num_classes: int, feat_dim: int, num_experts: int = 1,
                 use_experts: list[int] | str | None = None, eval_bt: bool = False, shared_classifier: bool = False,
                 bt_gather: bool = False, bt_weights: tuple[float, float] = (1.0, 1.0)):
        super().__init__()
        self.num_classes, self.num_experts, self.feat_dim = num_classes, num_experts, feat_dim
        self.use_experts = list(range(num_experts)) if use_experts is None else use_experts
        self.eval_bt, self.shared_classifier, self.bt_gather = eval_bt, shared_classifier, bt_gather
        self.bt_weights = bt_weights

    def add_heads(self, classifier: str, s: float, dropout: float, add_bt: int) -> None:
        """Register the BatchFormer block, the dropout of features and the classifiers. Call it last: RIDE's order."""
        self.encoder_layers = batchformer.make_block(add_bt, self.feat_dim)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        if self.num_experts == 1:
            self.linear = make_head(classifier, self.feat_dim, self.num_classes, s)
        else:
            self.linears = nn.ModuleList(make_head(classifier, self.feat_dim, self.num_classes, s)
                                         for _ in range(self.num_experts))

    def init(self, module: nn.Module) -> None:
        """Initialise a part that is added later (gates) as this family does; the default keeps torch's values."""

    @property
    def batchformer(self) -> nn.Module | None:
        """The BatchFormer block (`encoder_layers` in state_dicts, as in RIDE), or None."""
        return self.encoder_layers

    @property
    def heads(self) -> list[nn.Module]:
        """The classifier of each expert, [E]."""
        return [self.linear] if self.num_experts == 1 else list(self.linears)

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        """The part that all experts share: x `[N, 3, H, W]` -> the input of `expert_feat`."""
        raise NotImplementedError

    def expert_feat(self, shared: torch.Tensor, expert: int) -> torch.Tensor:
        """The pooled features of one expert (index from 0): output of `trunk` -> `[N, D]`."""
        raise NotImplementedError

    def pick_experts(self) -> list[int]:
        """The indices of the experts used in this step; with "rand", training draws which one is left out."""
        if self.use_experts != "rand":
            return self.use_experts
        if not self.training:
            return list(range(self.num_experts))
        return sorted(torch.randperm(self.num_experts)[:self.num_experts - 1].tolist())

    def logits_of(self, feat: torch.Tensor, expert: int) -> torch.Tensor:
        """One expert's head on its features: `[N, D]` -> logits `[N, C]`. In evaluation always in float32: bfloat16
        makes logits equal that aren't, and of equal ones the first, more frequent class would win."""
        kind = feat.device.type
        if not self.training and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self.heads[expert](feat.float())
        return self.heads[expert](feat)

    def classify(self, feats: torch.Tensor, experts: list[int]) -> torch.Tensor:
        """Each expert's head on its own features: `[N, E, D]` -> logits `[N, E, C]`."""
        return torch.stack([self.logits_of(feats[:, k], i) for k, i in enumerate(experts)], dim=1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | tuple[float, float]]:
        shared = self.trunk(x)
        experts = self.pick_experts()
        return self.from_features(torch.stack([self.expert_feat(shared, i) for i in experts], dim=1), experts)

    def from_features(self, feats: torch.Tensor, experts: list[int] | None = None,
                      ) -> dict[str, torch.Tensor | tuple[float, float]]:
        """The dict that `forward` returns, from pooled features `[N, E, D]`.

        experts: the experts that `feats` is of. None: those that evaluation uses; training with "rand" drops one.
        """
        if experts is None:
            experts = self.pick_experts()
            feats = feats[:, experts] if self.use_experts == "rand" else feats
        feats = self.dropout(feats)
        block = self.encoder_layers
        if block is None or not (block.training or self.eval_bt):
            logits = self.classify(feats, experts)
            return {"output": logits.mean(1), "logits": logits, "feat": feats}
        related = batchformer.across_ranks(block, feats) if self.bt_gather else block(feats)
        both = self.shared_classifier and block.training
        # A head's norm keeps running statistics of one stream only: the one that it will see in evaluation.
        with statistics_kept(self.heads if both and not self.eval_bt else []):
            logits = self.classify(related, experts)
        outputs = {"output": logits.mean(1), "logits": logits, "feat": feats}
        if both:
            with statistics_kept(self.heads if self.eval_bt else []):
                before = self.classify(feats, experts)
            outputs.update(output_old=before.mean(1), logits_old=before, bt_weights=self.bt_weights)
        return outputs
