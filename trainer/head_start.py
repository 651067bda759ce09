"""Initial classifier weights: the class means of the training images' features, or text features of the class names.

`init_classifier` names an entry of STARTS. Both give each class a direction in feature space, so that a pretrained
network classifies from the first step on (the semantic-aware initialisation of LIFT; Shi et al., ICML 2024).
"""
from __future__ import annotations

import contextlib
import importlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from logger.log import get_logger, shows
from logger.progress import progress_bar
from model.classifier import weight_by_class
from model.posthoc import ClassMeans
from model.weights.pretrained import unreachable
from trainer.cached import OnFeatures
from trainer.classifiers import features
from trainer.feature_store import FeatureLoader
from utils import dist
from utils.config.build import build
from utils.errors import ConfigError, brief

if TYPE_CHECKING:
    from trainer.trainer import Trainer

PATH = "init_classifier"


def start_classifier(model: nn.Module, loader: Any, spec: Mapping[str, Any], max_batches: int | None = None) -> None:
    """Set the weights of `model`'s classifiers as `spec`, {"type", "args"}, asks for.

    Args:
        loader: the training split's, on the model's device; for class means a `FeatureLoader` will do.
        max_batches: for class means, use only so many batches (a dry run).
    Raises:
        ConfigError: a missing package, file or weights, or names that don't fit the classes.
    """
    was_training = model.training
    build(STARTS, spec, PATH, model, loader, max_batches)
    model.train(was_training)


def start_on_features(trainer: Trainer, spec: Mapping[str, Any]) -> bool:
    """`start_classifier` on the cached features that `trainer` will train on, so that they are computed only once. It
    counts as a part of the first epoch's time. Returns False if a stop was requested meanwhile."""
    began = time.monotonic()
    if not trainer.prepare_features():
        return False
    start_classifier(trainer.model, trainer.cached.train, spec)
    if trainer.judged_model is not trainer.model:   # averaged weights start from there too
        trainer.judged_model.load_state_dict(trainer.model.state_dict())
    trainer.clock.prepare(time.monotonic() - began)
    return True


def check_start(spec: Mapping[str, Any]) -> None:
    """Check what can be checked before data and model are built: for "text" that its package is installed and the file
    of class names can be read. Raises ConfigError."""
    if spec["type"] == "text":
        open_clip()
        if spec["args"].get("class_names"):
            read_names(spec["args"]["class_names"])


def set_weights(head: nn.Module, directions: torch.Tensor, known: torch.Tensor) -> None:
    """Set a head's weights to `directions` [C, D], scaled to unit length, for the classes that are `known` [C] (bool),
    and its bias to 0. Raises ConfigError for a head without `weight`, or whose layout its shape doesn't tell."""
    directions = F.normalize(directions, dim=1)
    if not hasattr(head, "weight"):
        raise ConfigError(f"init_classifier: {type(head).__name__} has no `weight` to begin from; leave it out")
    with torch.no_grad():
        weight = weight_by_class(head, len(directions))
        weight[known] = directions[known].to(weight)
        if getattr(head, "bias", None) is not None:
            head.bias.zero_()


# ---------------------------------------------------------------------- from images

def class_means(model: nn.Module, loader: Any, max_batches: int | None) -> None:
    """Set each class's weights to the mean feature of its training images, without augmentation, scaled to unit length,
    for each expert separately. A class without images keeps its weights. The arguments are `start_classifier`'s."""
    if dist.world_size() > 1:   # ranks initialised new layers differently; training starts from rank 0's
        for tensor in (*model.parameters(), *model.buffers()):
            torch.distributed.broadcast(tensor.detach(), 0)
    plain = loader.train_eval_loader()
    gathered = ClassMeans(model.num_classes)
    total = len(plain) if max_batches is None else min(max_batches, len(plain))
    with progress_bar(total, shows(logging.INFO), desc="class means") as bar:
        source = OnFeatures(model) if isinstance(plain, FeatureLoader) else model
        for batch, (feats, labels) in enumerate(features(source, plain), 1):
            gathered.update(feats, labels)
            bar.update()
            if batch == max_batches:
                break
    if gathered.sums is None:       # this rank has no image and contributes zeros
        some = next(model.parameters())
        gathered.sums = some.new_zeros(model.num_classes, len(model.used_heads()), model.feat_dim)
        gathered.counts = torch.zeros(model.num_classes, dtype=torch.int64, device=some.device)
    dist.all_reduce_sum(gathered.sums)
    dist.all_reduce_sum(gathered.counts)
    for expert, head in enumerate(model.used_heads()):
        set_weights(head, gathered.means()[:, expert], gathered.counts > 0)
    get_logger().info("classifier: starts from the class means of %s training images",
                      f"{int(gathered.counts.sum()):,}")


# ---------------------------------------------------------------------- from names

def text(model: nn.Module, loader: Any, max_batches: int | None, clip: str = "ViT-B-16-quickgelu",
         pretrained: str = "openai", template: str = "a photo of a {}.", class_names: str | None = None) -> None:
    """Set each class's weights to CLIP's text features of its name in `template`, scaled to unit length.

    If the network's features are those before CLIP's image projection P [D, d], as timm's are, the text features [C, d]
    are multiplied by its transpose.

    clip, pretrained: open_clip's names of the model and of its weights (or a weights file); they must belong to the
    network's image encoder.
    class_names: a file with one name per line, in the order of the labels; None: the data set's names.
    Raises ConfigError if names or weights are missing, or features and classes don't fit the model.
    """
    names = loader.class_names if class_names is None else read_names(class_names)
    if names is None:
        raise ConfigError(f"{PATH}.args.class_names: missing; these data have labels only: give a file of one name a "
                          "line, in the order of the labels")
    if len(names) != model.num_classes:
        raise ConfigError(f"{PATH}.args.class_names: {class_names or 'the data'}: {len(names)} names for "
                          f"{model.num_classes} classes")
    if "{}" not in template:
        raise ConfigError(f"{PATH}.args.template: must have {{}} where the name goes, not {template[:80]!r}")
    texts, projection = text_features(clip, pretrained, [template.format(name.replace("_", " ")) for name in names])
    width = model.feat_dim
    if projection is not None and projection.shape == (width, texts.shape[1]):
        texts = texts @ projection.t()
    elif texts.shape[1] != width:
        raise ConfigError(f"{PATH}.args.clip: {clip} describes texts by {texts.shape[1]} numbers, and the model's "
                          f"features have {width}; use the text encoder that the network was trained with")
    known = torch.ones(model.num_classes, dtype=torch.bool)
    for head in model.used_heads():
        set_weights(head, texts, known)
    get_logger().info("classifier: starts from the names of %d classes (%s, %s)", len(names), clip, pretrained)


@torch.no_grad()
def text_features(clip: str, pretrained: str, texts: list[str],
                  batch_size: int = 256) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(text features [C, d] of unit length, the image encoder's projection [D, d] or None), computed on the CPU. Raises
    ConfigError if the weights can't be loaded."""
    package = open_clip()
    try:
        with _quick_hub():
            network = package.create_model(clip, pretrained=pretrained).float().eval()
            tokenize = package.get_tokenizer(clip)
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f"{PATH}.args.pretrained: {pretrained!r} of {clip!r} can't be had ({brief(error)}); "
                          "without a network give a file of the weights") from None
    found = [F.normalize(network.encode_text(tokenize(texts[at:at + batch_size])), dim=1)
             for at in range(0, len(texts), batch_size)]
    projection = getattr(network.visual, "proj", None)
    return torch.cat(found), projection.detach() if isinstance(projection, torch.Tensor) else None


@contextlib.contextmanager
def _quick_hub() -> Iterator[None]:
    """Inside, weights come only from the hub's cache if the hub can't be reached, instead of a minute of retries.
    Logging is off, as the caller reports an error in one line."""
    from importlib.util import find_spec
    logging.disable(logging.CRITICAL)
    constants = importlib.import_module("huggingface_hub.constants") if find_spec("huggingface_hub") else None
    offline = constants is not None and not constants.HF_HUB_OFFLINE and unreachable(constants.ENDPOINT) is not None
    try:
        if offline:
            constants.HF_HUB_OFFLINE = True
        yield
    finally:
        logging.disable(logging.NOTSET)
        if offline:
            constants.HF_HUB_OFFLINE = False


def open_clip() -> Any:
    """Import and return the package. Raises ConfigError, with the command that installs it, if it is missing."""
    try:
        import open_clip
    except ImportError:
        raise ConfigError(f"{PATH}: text needs the package open_clip; pip install open_clip_torch") from None
    return open_clip


def read_names(path: str) -> list[str]:
    """The class names in a file, one per line. Raises ConfigError if it can't be read or has an empty line."""
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{PATH}.args.class_names: {path}: can't be read "
                          f"({getattr(error, 'strerror', None) or 'it is not text'})") from None
    if "" in names:
        raise ConfigError(f"{PATH}.args.class_names: {path}, line {names.index('') + 1}: is empty; a line is a class")
    return names


#: What `init_classifier` may name; each is called with (model, loader, max_batches, **args).
STARTS: dict[str, Callable[..., None]] = {"class_means": class_means, "text": text}
