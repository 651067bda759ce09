"""What a network with experts does with its features: heads, BatchFormer, the dict of outputs; its trunk is its own."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from model import batchformer
from model.classifier import make_head
from utils.errors import ConfigError


def nbn_stages(where: str | list[int], stages: list[int]) -> list[int]:
    """The stages whose norms NBN replaces, out of `stages`, the network's from the stem on: the "last", "all" or those
    listed. Raises ConfigError for any other `where`."""
    chosen = {"last": stages[-1:], "all": stages}.get(where) if isinstance(where, str) else where
    if not isinstance(chosen, list | tuple) or not chosen or not set(chosen) <= set(stages):
        raise ConfigError(f"arch.args.norm.args.where: {where!r} should be 'last', 'all' or a list of stages "
                          f"out of {stages}")
    return sorted(set(chosen))


@contextlib.contextmanager
def statistics_kept(heads: list[nn.Module]) -> Iterator[None]:
    """Batch norms in heads (NBN's logit rectification) normalise by the batch and don't remember it."""
    norms = [part for head in heads for part in head.modules() if getattr(part, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class ExpertNet(nn.Module):
    """Experts on a shared trunk. Subclasses say what is shared (`trunk`) and what an expert has (`expert_feat`).

    x `[N, 3, H, W]` -> dict of `output` `[N, C]` (mean over experts), `logits` `[N, E, C]` and `feat` `[N, E, D]`, the
    pooled features as the heads get them without BatchFormer. With `shared_classifier`, training adds `logits_old`,
    `output_old` (the same heads on the features before the block) and `bt_weights` (loss weights after and before).

    BatchFormer runs while its own module is in training mode: a frozen block is in evaluation mode and is skipped.
    `eval_bt` runs it always. Experts not in `use_experts` take no part; "rand" drops a random one each training step
    and uses all in evaluation.
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
        """Register BatchFormer's block, the features' dropout and the classifiers: last, in RIDE's order."""
        self.encoder_layers = batchformer.make_block(add_bt, self.feat_dim)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        if self.num_experts == 1:
            self.linear = make_head(classifier, self.feat_dim, self.num_classes, s)
        else:
            self.linears = nn.ModuleList(make_head(classifier, self.feat_dim, self.num_classes, s)
                                         for _ in range(self.num_experts))

    def init(self, module: nn.Module) -> None:
        """The family's initial weights of a part that is added later (gates); torch's own unless a family says so."""

    @property
    def batchformer(self) -> nn.Module | None:
        """The BatchFormer block (its keys are RIDE's `encoder_layers`), or None."""
        return self.encoder_layers

    @property
    def heads(self) -> list[nn.Module]:
        """The classifier of each expert."""
        return [self.linear] if self.num_experts == 1 else list(self.linears)

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        """What all experts share: x `[N, 3, H, W]` -> what `expert_feat` takes."""
        raise NotImplementedError

    def expert_feat(self, shared: torch.Tensor, expert: int) -> torch.Tensor:
        """The pooled features of one expert: what `trunk` gave -> `[N, D]`."""
        raise NotImplementedError

    def pick_experts(self) -> list[int]:
        """The experts that take part in this step."""
        if self.use_experts != "rand":
            return self.use_experts
        if not self.training:
            return list(range(self.num_experts))
        return sorted(torch.randperm(self.num_experts)[:self.num_experts - 1].tolist())

    def classify(self, feats: torch.Tensor, experts: list[int]) -> torch.Tensor:
        """Each expert's head on its own features: `[N, E, D]` -> logits `[N, E, C]`."""
        heads = self.heads
        return torch.stack([heads[i](feats[:, k]) for k, i in enumerate(experts)], dim=1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | tuple[float, float]]:
        shared = self.trunk(x)
        experts = self.pick_experts()
        return self.from_features(torch.stack([self.expert_feat(shared, i) for i in experts], dim=1), experts)

    def from_features(self, feats: torch.Tensor, experts: list[int] | None = None,
                      ) -> dict[str, torch.Tensor | tuple[float, float]]:
        """What `forward` makes of pooled features `[N, E, D]` of `experts`; None: of those that evaluation uses, out of
        which training with "rand" picks."""
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
        # What a head's norm remembers is for evaluation, whose stream is one of the two.
        with statistics_kept(self.heads if both and not self.eval_bt else []):
            logits = self.classify(related, experts)
        outputs = {"output": logits.mean(1), "logits": logits, "feat": feats}
        if both:
            with statistics_kept(self.heads if self.eval_bt else []):
                before = self.classify(feats, experts)
            outputs.update(output_old=before.mean(1), logits_old=before, bt_weights=self.bt_weights)
        return outputs
