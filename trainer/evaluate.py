"""One pass over a split: the figures of test.py, of each epoch's validation and of the report."""
from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from base.labels import WholeBatch
from logger.text import percent
from model.crops import forward_crops
from model.gather import all_gather_with_grad
from model.metric import EvalState
from trainer.meters import Means
from trainer.precision import autocast
from trainer.tasks import Task
from utils import dist
from utils.class_counts import GROUPS, group_limits
from utils.config.build import lookup
from utils.config.check import metric_kind, metric_table
from utils.config.outside import short_name

Head = Callable[[dict[str, Any]], torch.Tensor]


def metrics_of(names: list[str], monitor: str) -> dict[str, Callable | None]:
    """The functions of the metrics that a config names, and of the monitored one, by name; None for what every
    evaluation computes. names: the config's `metrics`; monitor: `trainer.monitor` without its direction."""
    table, figure = metric_table(), monitor.removeprefix("val_")
    names = [*names, *([figure] if figure in table else [])]
    return {short_name(name): lookup(table, name, "metrics") for name in names}


def further(metrics: dict[str, Callable | None]) -> dict[str, Callable]:
    """Those of `metrics` that test_metrics.json lacks without them."""
    return {name: function for name, function in metrics.items() if function is not None and name != "accuracy"}


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any, *, criterion: nn.Module | None = None,
             metrics: dict[str, Callable] | None = None, groups: dict[str, int] | None = None, amp: object = None,
             memory_format: torch.memory_format = torch.channels_last, head: Head | None = None,
             max_batches: int | None = None, keep: bool = False,
             stop: Callable[[int], bool] | None = None) -> dict[str, Any] | None:
    """Evaluate `model` on `loader`'s split; every rank sees its share and all get the same figures.

    Args:
        model: returns the dict described in `BaseModel`; it is put in evaluation mode for this.
        criterion: computes `loss`, in its evaluation mode; without one, or with `head`, that is the
            cross-entropy of the logits.
        metrics: further figures by name: functions of (output [N, C], target [N]), which are averaged over the
            images, or of (probs [N, C], labels [N]), called with the whole split on every rank; None for what
            is computed anyway.
        groups: {"many": 100, "few": 20}, the groups' limits in training images per class.
        amp: `bf16`, `fp16` or `off` (None).
        head: computes other logits [N, C] from the model's dict (NCM, tau-normalised), in place of `output`.
        max_batches: stop early (a dry run).
        keep: also return `predictions`, `confidences`, `labels` by image (this rank's, NumPy arrays) and, if the logits
            of several experts are known, `expert_predictions` [N, E].
        stop: called before each batch, on every rank; if it returns True, evaluation ends and returns None.
    Returns:
        the figures of test_metrics.json, each metric, and `seconds`; if the model's dict has each expert's logits also
            `expert_acc` and `expert_disagreement`; for expert-assignment models `expert_share`.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    if criterion is not None:
        criterion.eval()
    num_experts = getattr(model, "num_experts", 1)
    state = EvalState(len(loader.cls_num_list), device, num_experts if num_experts > 1 else 0)
    means = Means(device)
    kept: list[tuple[torch.Tensor, ...]] = []
    batchwise, whole_split = ({name: function for name, function in (metrics or {}).items()
                               if metric_kind(function) == kind} for kind in ("batch", "split"))
    probs: list[tuple[torch.Tensor, torch.Tensor]] = []
    began = time.monotonic()
    for batch, (images, labels) in enumerate(loader):
        if max_batches is not None and batch >= max_batches:
            break
        if stop is not None and stop(batch):
            model.train(was_training)
            return None
        # A rank without images of its own has a borrowed one: it adds the figures' names, but isn't counted.
        n, n_global = loader.share(batch)
        images, labels = images[:max(n, 1)], labels[:max(n, 1)]
        with autocast(device, amp):
            outputs = forward_crops(model, images, memory_format)
        logits = (outputs["output"] if head is None else head(outputs)).float()
        gated = getattr(model, "route", False)      # then the gates chose the experts, whatever the head
        own = {} if head is not None and not gated else {"expert_logits": outputs.get("logits"),
                                                         "sample_num_experts": outputs.get("sample_num_experts")}
        if own.get("expert_logits") is not None and own["expert_logits"].shape[1] != num_experts:
            own["expert_logits"] = None  # `use_experts` left some out
        figures = {name: function(logits, labels) for name, function in batchwise.items()}
        if criterion is not None and head is None:
            whole = {"whole": WholeBatch(labels, n, n, n_global)} if dist.world_size() > 1 else {}
            figures["loss"] = criterion({**outputs, **whole}, labels)
        means.add(figures, n)
        if whole_split:
            probs.append((logits[:n].softmax(1), labels[:n]))
        if n == 0:
            continue
        state.update(logits, labels, **own)
        if keep:
            confidence, prediction = logits.softmax(-1).max(-1)
            experts = own.get("expert_logits") if num_experts > 1 else None  # a single one is the model itself
            kept.append((prediction.cpu(), confidence.cpu(), labels.cpu(),
                         torch.empty(n, 0) if experts is None else experts.argmax(2).cpu()))
    state.merge()
    result = state.compute(loader.cls_num_list, **group_limits(groups))
    result.update(means.read(reduce=True))
    if whole_split:
        everyone = [all_gather_with_grad(torch.cat(part))[0] for part in zip(*probs)]
        values = {name: float(function(*everyone)) for name, function in whole_split.items()}
        result.update({name: value if math.isfinite(value) else None for name, value in values.items()})
    result["seconds"] = time.monotonic() - began
    if keep:
        none = torch.empty(0, dtype=torch.long)
        parts = [torch.cat(part) for part in zip(*kept)] if kept else (none, torch.empty(0), none, torch.empty(0, 0))
        *parts, experts = (part.numpy() for part in parts)
        result["predictions"], result["confidences"], result["labels"] = parts
        if experts.size:
            result["expert_predictions"] = experts
    model.train(was_training)
    return result


def with_all_experts(model: nn.Module, loader: Any, result: dict[str, Any], **how: Any) -> dict[str, Any]:
    """For a model that routes images to experts, `result` and what routing leaves unseen, from a second pass in which
    every image uses every expert: `all_experts_acc` and, by group, `all_experts_shot_acc` of their mean logits,
    `expert_acc` of each alone, `expert_disagreement`, and with `keep` `expert_predictions` [N, E]. Any other model's
    `result` is returned as it is.

    how: the arguments of `evaluate`, as for the first pass. Every rank must call it.
    """
    if "expert_share" not in result or "expert_acc" in result:
        return result
    model.force_all = True
    try:
        everyone = evaluate(model, loader, **how)
    finally:
        model.force_all = False
    names = ("expert_acc", "expert_disagreement", "expert_predictions")
    return {**result, "all_experts_acc": everyone["accuracy"],
            "all_experts_shot_acc": {group: everyone[f"{group}_shot_acc"] for group in GROUPS},
            **{name: everyone[name] for name in names if name in everyone}}


def format_result(result: dict[str, Any], title: str = "") -> str:
    """A table of the main figures, in percent: all, many, medium, few, and each expert's accuracy and
    share of the images."""
    header = f"{title:<16}" + "".join(f"{name:>9}" for name in ("all", "many", "medium", "few"))
    row = [percent(result["accuracy"])] + [percent(result[f"{g}_shot_acc"]) for g in GROUPS]
    classes = ["", str(result["many_class_num"]), str(result["medium_class_num"]), str(result["few_class_num"])]
    lines = [header, f"{'accuracy %':<16}" + "".join(f"{v:>9}" for v in row),
             f"{'classes':<16}" + "".join(f"{v:>9}" for v in classes)]
    shares = result.get("expert_share") or {}
    for used in range(len(shares.get("all") or ())):
        row = [percent(shares[g][used] if shares.get(g) else None) for g in ("all", *GROUPS)]
        lines.append(f"{f'used {used + 1} %':<16}" + "".join(f"{v:>9}" for v in row))
    if result.get("expert_acc"):
        together = result.get("all_experts_acc")
        each = "   ".join(f"{number}: {percent(v)}" for number, v in enumerate(result["expert_acc"], 1))
        lines.append(f"{'each expert %':<18}{each}"
                     + ("" if together is None else f"   all of them {percent(together)}"))
    return "\n".join(lines)


TASK = Task("classification", evaluate, format_result, lambda target, result: [], keeps=False, classifies=True)
