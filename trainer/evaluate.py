"""One pass over a split: the figures of test.py, of each epoch's validation and of the report."""
from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from model.metric import EvalState, group_masks
from utils import dist
from utils.meters import Means

GROUPS = ("many", "medium", "few")
Head = Callable[[dict[str, Any]], torch.Tensor]


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any, *, criterion: nn.Module | None = None,
             metrics: dict[str, Callable] | None = None, groups: dict[str, int] | None = None, amp: object = None,
             memory_format: torch.memory_format = torch.channels_last, head: Head | None = None,
             max_batches: int | None = None, keep: bool = False, by_expert: bool = False) -> dict[str, Any]:
    """Evaluate `model` on `loader`'s split; every rank sees its share and all get the same figures.

    Args:
        model: returns the contract's dict; put in evaluation mode here.
        criterion: for `loss` (its evaluation mode); cross-entropy of the logits without one.
        metrics: more figures by name, functions of (logits [N, C], labels [N]).
        groups: {"many": 100, "few": 20}, the limits of training counts.
        head: other logits [N, C] from the model's dict (NCM, tau-normalised), in place of `output`.
        max_batches: stop early (a dry run).
        keep: also return `predictions`, `confidences`, `labels` by image (this rank's, on the CPU).
        by_expert: also each expert's accuracy and how often the experts disagree.
    Returns:
        the figures of test_metrics.json, each metric, `seconds`; for expert-assignment models `expert_share`.
    """
    # Imported here: the trainer imports this module.
    from trainer.trainer import autocast
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    if criterion is not None:
        criterion.eval()
    num_classes = len(loader.cls_num_list)
    state, means = EvalState(num_classes, device), Means(device)
    usage: torch.Tensor | None = None
    right_by_expert: torch.Tensor | None = None
    disagree = torch.zeros((), dtype=torch.long, device=device)
    kept: list[tuple[torch.Tensor, ...]] = []
    began = time.monotonic()
    for batch, (images, labels) in enumerate(loader):
        if max_batches is not None and batch >= max_batches:
            break
        n, _ = loader.share(batch)
        if n == 0:
            continue
        images, labels = images[:n].contiguous(memory_format=memory_format), labels[:n]
        with autocast(device, amp):
            outputs = model(images)
        logits = (outputs["output"] if head is None else head(outputs)).float()
        state.update(logits, labels)
        loss = F.cross_entropy(logits, labels) if criterion is None or head is not None \
            else criterion(outputs, labels)
        means.add({"loss": loss, **{name: f(logits, labels) for name, f in (metrics or {}).items()}}, n)
        if "sample_num_experts" in outputs:
            if usage is None:
                usage = torch.zeros(num_classes, model.num_experts, dtype=torch.long, device=device)
            usage.view(-1).index_add_(0, labels * model.num_experts + outputs["sample_num_experts"].long() - 1,
                                      torch.ones_like(labels))
        if by_expert and "logits" in outputs and head is None:
            chosen = outputs["logits"].argmax(-1)  # [N, E]
            right = (chosen == labels[:, None]).sum(0)
            right_by_expert = right if right_by_expert is None else right_by_expert + right
            disagree += (chosen != chosen[:, :1]).any(1).sum()
        if keep:
            confidence, prediction = logits.softmax(-1).max(-1)
            kept.append((prediction.cpu(), confidence.cpu(), labels.cpu()))
    for tensor in state.tensors():
        dist.all_reduce_sum(tensor)
    limits = {"many": 100, "few": 20, **(groups or {})}
    result = state.compute(loader.cls_num_list, many=limits["many"], few=limits["few"])
    result.update(means.read(reduce=True))
    if usage is not None:
        result["expert_share"] = expert_share(dist.all_reduce_sum(usage).cpu(), loader.cls_num_list, limits)
    if right_by_expert is not None:
        right_by_expert, disagree = dist.all_reduce_sum(right_by_expert), dist.all_reduce_sum(disagree)
        total = max(1, result["n_samples"])
        result["expert_accuracy"] = [value / total for value in right_by_expert.tolist()]
        result["expert_disagreement"] = disagree.item() / total
    result["seconds"] = time.monotonic() - began
    if keep:
        empty = (torch.empty(0, dtype=torch.long), torch.empty(0), torch.empty(0, dtype=torch.long))
        parts = [torch.cat(part) for part in zip(*kept)] if kept else empty
        result["predictions"], result["confidences"], result["labels"] = (part.numpy() for part in parts)
    model.train(was_training)
    return result


def expert_share(usage: torch.Tensor, cls_num_list: list[int], limits: dict[str, int]) -> dict[str, list[float] | None]:
    """Fractions of images that used 1..E experts, over all and by group (None where a group has no image).

    usage: [C, E], how many images of a class used 1, 2, ... experts.
    """
    masks = {"all": torch.ones(len(cls_num_list), dtype=torch.bool),
             **{name: torch.as_tensor(mask) for name, mask in
                zip(GROUPS, group_masks(cls_num_list, limits["many"], limits["few"]))}}
    shares: dict[str, list[float] | None] = {}
    for name, mask in masks.items():
        counts = usage[mask].sum(0)
        shares[name] = (counts / counts.sum()).tolist() if counts.sum() else None
    return shares


def format_result(result: dict[str, Any], title: str = "") -> str:
    """The figures a person looks for first: all, many, medium, few in percent."""
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"
    header = f"{title:<16}" + "".join(f"{name:>9}" for name in ("all", "many", "medium", "few"))
    row = [percent(result["accuracy"])] + [percent(result[f"{g}_shot_acc"]) for g in GROUPS]
    classes = ["", str(result["many_class_num"]), str(result["medium_class_num"]), str(result["few_class_num"])]
    lines = [header, f"{'accuracy %':<16}" + "".join(f"{v:>9}" for v in row),
             f"{'classes':<16}" + "".join(f"{v:>9}" for v in classes)]
    return "\n".join(lines)
