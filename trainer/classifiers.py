"""What test.py can put on a trained model without training: tau-normalised heads and NCM (Kang et al., ICLR
2020), logit adjustment (Menon et al., ICLR 2021), a test-time class prior, expert weights, a temperature; the
formulas are in `model`."""
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
    """`features` for several passes: the returned function starts a pass. Only the first one computes features; later
    ones read them from a temporary file.

    kept: (file, precision) of this split's features that a training cached (`trainer.cache_features`). They are used if
    they were made with these weights from these images and, like them, `loader` takes one crop per image.
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
    logits = posthoc.TauHeads(posthoc.model_heads(model)).at(tau)
    return lambda outputs: logits(outputs["feat"])


def sweep_tau(model: nn.Module, loader: Any, taus: list[float],
              metric: str = "class_mean_acc", kept: tuple[Path, object] | None = None) -> tuple[float, list[float]]:
    """The tau with the largest `metric` on `loader`'s split (the smallest on a tie), and the metric's
    value for each tau.

    metric: `class_mean_acc`, `accuracy` or `macro_f1`, as `model.metric.EvalState` computes them. kept:
    see `features_once`.
    """
    heads = posthoc.TauHeads(posthoc.model_heads(model))
    states = [EvalState(heads.num_classes, next(model.parameters()).device) for _ in taus]
    for feats, labels in features_once(model, loader, kept)():
        heads.count(feats, labels, taus, states)
    return _best(taus, states, metric)


def sweep_la(logits: torch.Tensor, labels: torch.Tensor, cls_num_list: list[int], taus: list[float],
             metric: str = "class_mean_acc") -> tuple[float, list[float]]:
    """`sweep_tau` for logit adjustment. logits [n, C] and labels [n]: this rank's share of a split."""
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
    """Nearest class mean of the training images' features; feat_type: see `posthoc.fit_nearest_class_mean`; kept:
    see `features_once`."""
    classifier = posthoc.fit_nearest_class_mean(features_once(model, train_loader, kept), num_classes, feat_type,
                                                merge=dist.all_reduce_sum)
    return lambda outputs: classifier.logits(outputs["feat"])


def la_head(cls_num_list: list[int], tau: float, base: Head = lambda outputs: outputs["output"]) -> Head:
    """The logits of `base` less tau · log(n_j / n)."""
    return lambda outputs: shift.adjust_logits(base(outputs).float(), cls_num_list, tau)


@torch.no_grad()
def outputs_of(model: nn.Module, loader: Any, head: Head, view: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's logits of a split, [n, ...] float32 as `head` returns them, and labels [n]. view: applied to each
    batch of images before the model sees it."""
    model.eval()
    found = []
    for batch, (images, labels) in enumerate(loader):
        n, _ = loader.share(batch)
        logits = head(forward_crops(model, view(images))).float()
        found.append((logits[:n], labels[:n]))      # a borrowed image adds no row, but gives the shape
    logits, labels = zip(*found)
    return torch.cat(logits), torch.cat(labels)


def calibrate(model: nn.Module, loader: Any, head: Head) -> dict[str, float]:
    """The `temperature` that fits `head`'s logits best on `loader`'s split, and that split's ECE
    `before` and `after`."""
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
    """The class prior that a model's plain logits imply, [C]: the class frequencies drawn by its sampler, times its
    loss's class weights, corrected for what its loss added to the logits.

    cls_num_list: training images per class in the training itself, whatever data are used now. power: see
    `data_loader.samplers.power_of`. expert_weights: the weight in the logits of each expert that was trained, [E].
    """
    seen = shift.frequencies(cls_num_list) ** power
    seen = seen / seen.sum()
    return criterion.learned_prior(seen, len(expert_weights), expert_weights)


def prior_head(base: Head, learned: torch.Tensor, prior: torch.Tensor) -> Head:
    """The logits of `base`, which imply the class prior `learned` [C], corrected to the class prior `prior` [C]."""
    offset = prior.double().clamp_min(torch.finfo(torch.float32).tiny).log() - learned.double().log()
    return lambda outputs: base(outputs).float() + offset.to(outputs["output"].device, torch.float32)


def estimated_prior(model: nn.Module, loader: Any, head: Head, learned: torch.Tensor) -> torch.Tensor:
    """The class distribution of a split's images, [C], estimated without labels: see `model.shift.estimate_prior`."""
    logits, _ = outputs_of(model, loader, head)
    return shift.estimate_prior(logits, learned, dist.all_reduce_sum).cpu()


def learned_expert_weights(model: nn.Module, loader: Any, seed: int = 0) -> torch.Tensor:
    """Weights of the experts, [E], learned without labels from two views of each image: as it is, and moved by up to an
    eighth of its side and, unless the data must not be, randomly flipped. See `model.shift.learn_expert_weights`."""
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
    """The sum of the experts' logits with `weights` [E], in place of their mean."""
    return lambda outputs: torch.einsum("nec,e->nc", outputs["logits"].float(),
                                        weights.to(outputs["logits"].device, torch.float32))
