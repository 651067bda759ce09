"""What test.py puts on a trained model without training: tau-normalised heads and NCM (Kang 2020), adjusted logits
(Menon 2021), the class distribution at use, weights of experts, a temperature; the formulas are in `model`."""
from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model import posthoc, shift
from model.crops import forward_crops
from model.metric import EvalState
from trainer.cached import store_of
from trainer.evaluate import Head
from trainer.feature_store import FeatureLoader
from utils import dist


@torch.no_grad()
def features(model: nn.Module, loader: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's pooled features of a split, batch by batch: (feats [n, E, D], labels [n])."""
    model.eval()
    for batch, (images, labels) in enumerate(loader):
        n, _ = loader.share(batch)
        if n:
            yield forward_crops(model, images[:n])["feat"], labels[:n]


def features_once(model: nn.Module, loader: Any, kept: tuple[Path, object] | None = None,
                  ) -> Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]:
    """`features` for several passes over them, of which the first alone computes any; the others read a temporary file.

    kept: (file, precision) of the features of this split that a training kept (`trainer.cache_features`). They are
    taken where they are of these weights and these images, each seen in one crop as there.
    """
    one_crop = "crops" not in getattr(loader, "views", {})
    if one_crop and kept is not None and kept[0].with_suffix(".json").is_file() and hasattr(loader, "feature_loader"):
        store = store_of(model, loader.feature_loader(), kept[0], 1, kept[1])
        if store.complete:
            again = FeatureLoader(loader, store)
            return lambda: ((feats[:n], labels[:n]) for batch, (feats, labels) in enumerate(again)
                            if (n := again.share(batch)[0]))
    spool, known, whole = tempfile.TemporaryFile(), [], []  # noqa: SIM115 it lives as long as the function

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        spool.seek(0)
        if whole:
            for like, shape, labels in known:
                values = torch.frombuffer(bytearray(spool.read(math.prod(shape) * like.element_size())),
                                          dtype=like.dtype)
                yield values.view(shape).to(labels.device), labels
            return
        known.clear()
        for feats, labels in features(model, loader):
            spool.write(feats.cpu().contiguous().numpy())
            known.append((feats.new_empty(0), feats.shape, labels))
            yield feats, labels
        whole.append(True)
    return batches


def tau_head(model: nn.Module, tau: float) -> Head:
    """The model's classifier with weights w_j / |w_j|^tau and no bias."""
    heads = posthoc.TauHeads(posthoc.model_heads(model))
    return lambda outputs: heads.logits(outputs["feat"], tau)


def sweep_tau(model: nn.Module, loader: Any, taus: list[float],
              metric: str = "class_mean_acc", kept: tuple[Path, object] | None = None) -> tuple[float, list[float]]:
    """The tau with the largest `metric` on `loader`'s split (the smaller of equals), and each one's value.

    metric: `class_mean_acc`, `accuracy` or `macro_f1`, as `model.metric.EvalState` computes them. kept: see
    `features_once`.
    """
    heads = posthoc.TauHeads(posthoc.model_heads(model))
    states = [EvalState(heads.num_classes, next(model.parameters()).device) for _ in taus]
    for feats, labels in features_once(model, loader, kept)():
        heads.count(feats, labels, taus, states)
    return _best(taus, states, metric)


def sweep_la(logits: torch.Tensor, labels: torch.Tensor, cls_num_list: list[int], taus: list[float],
             metric: str = "class_mean_acc") -> tuple[float, list[float]]:
    """The same for adjusted logits: this rank's logits [n, C] and labels [n] of a split."""
    states = [EvalState(logits.shape[1], logits.device) for _ in taus]
    for tau, state in zip(taus, states, strict=True):
        state.update(shift.adjust_logits(logits, cls_num_list, tau), labels)
    return _best(taus, states, metric)


def _best(taus: list[float], states: list[EvalState], metric: str) -> tuple[float, list[float]]:
    for state in states:
        state.merge()
    values = [state.compute()[metric] for state in states]
    return posthoc.best_tau(taus, values), values


def ncm_head(model: nn.Module, train_loader: Any, num_classes: int, feat_type: str,
             kept: tuple[Path, object] | None = None) -> Head:
    """Nearest class mean over the training images' features; kept: see `features_once`."""
    classifier = posthoc.fit_nearest_class_mean(features_once(model, train_loader, kept), num_classes, feat_type,
                                                merge=dist.all_reduce_sum)
    return lambda outputs: classifier.logits(outputs["feat"])


def la_head(cls_num_list: list[int], tau: float, base: Head = lambda outputs: outputs["output"]) -> Head:
    """The logits of `base` less tau · log(n_j / n)."""
    return lambda outputs: shift.adjust_logits(base(outputs).float(), cls_num_list, tau)


@torch.no_grad()
def outputs_of(model: nn.Module, loader: Any, head: Head, view: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's logits of a split, [n, ...] float32 as `head` gives them, and labels [n]; `view` is what the model
    sees of a batch."""
    model.eval()
    found = []
    for batch, (images, labels) in enumerate(loader):
        n, _ = loader.share(batch)
        logits = head(forward_crops(model, view(images))).float()
        found.append((logits[:n], labels[:n]))      # no row of a rank that was lent an image; its shape though
    logits, labels = zip(*found)
    return torch.cat(logits), torch.cat(labels)


def calibrate(model: nn.Module, loader: Any, head: Head) -> dict[str, float]:
    """The temperature of `head`'s logits that fits `loader`'s split best, and that split's ECE `before` and `after`."""
    logits, labels = outputs_of(model, loader, head)
    temperature = shift.fit_temperature(logits, labels, dist.all_reduce_sum)
    eces = []
    for factor in (1.0, temperature):
        state = EvalState(logits.shape[1], logits.device)
        state.update(logits / factor, labels)
        state.merge()
        eces.append(state.compute()["ece"])
    return {"temperature": temperature, "before": eces[0], "after": eces[1]}


def learned_prior(criterion: nn.Module, cls_num_list: list[int], power: float,
                  expert_weights: torch.Tensor) -> torch.Tensor:
    """The class distribution that a model's plain logits are right for, [C]: what its sampler drew, its loss's class
    weights and what its loss added.

    cls_num_list: training images a class, of the training itself, whatever data are there now. power: see
    `data_loader.samplers.power_of`. expert_weights: what each expert that was trained counts in the logits, [E].
    """
    seen = shift.frequencies(cls_num_list) ** power
    seen = seen / seen.sum()
    if not hasattr(criterion, "learned_prior"):
        return seen
    return criterion.learned_prior(seen, len(expert_weights), expert_weights)


def prior_head(base: Head, learned: torch.Tensor, prior: torch.Tensor) -> Head:
    """The logits of `base`, right for the class distribution `learned` [C], made right for `prior` [C]."""
    offset = prior.double().clamp_min(torch.finfo(torch.float32).tiny).log() - learned.double().log()
    return lambda outputs: base(outputs).float() + offset.to(outputs["output"].device, torch.float32)


def estimated_prior(model: nn.Module, loader: Any, head: Head, learned: torch.Tensor) -> torch.Tensor:
    """The class distribution of a split's images, without their labels: see `model.shift.estimate_prior`."""
    logits, _ = outputs_of(model, loader, head)
    return shift.estimate_prior(logits, learned, dist.all_reduce_sum).cpu()


def learned_expert_weights(model: nn.Module, loader: Any, seed: int = 0) -> torch.Tensor:
    """Weights of the experts, [E], from each image as it is and once flipped (unless the data mustn't be) or moved by
    up to an eighth of its side: see `model.shift.learn_expert_weights`. No label is looked at."""
    generator, flips = torch.Generator().manual_seed(seed), bool(getattr(loader, "flip", True))

    def moved(images: torch.Tensor) -> torch.Tensor:
        far = max(1, images.shape[-1] // 8)
        down, right = torch.randint(2 * far + 1, (2,), generator=generator).tolist()
        flipped = (torch.rand(len(images), generator=generator) < 0.5 * flips).to(images.device)
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        return nn.functional.pad(images, (far,) * 4)[:, :, down:down + images.shape[2], right:right + images.shape[3]]

    views = [outputs_of(model, loader, lambda outputs: outputs["logits"], view)[0] for view in (lambda x: x, moved)]
    return shift.learn_expert_weights(*views, merge=dist.all_reduce_sum).cpu()


def weighted_head(weights: torch.Tensor) -> Head:
    """The experts' logits weighed by `weights` [E], in place of their mean."""
    return lambda outputs: torch.einsum("nec,e->nc", outputs["logits"].float(),
                                        weights.to(outputs["logits"].device, torch.float32))
