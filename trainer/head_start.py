"""What a classifier starts from before training: the class means of the training images, or the classes' names.

`init_classifier` names a line of STARTS. Both give each class a direction in feature space, so that a pretrained
network classifies from the first step on (the semantic-aware start of LIFT; Shi et al., ICML 2024).
"""
from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from logger.log import get_logger
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
    """Give `model`'s classifiers the weights that `spec`, {"type", "args"}, asks for.

    Args:
        loader: of the training split, on the model's device; one of its features will do for class means.
        max_batches: of class means, look at so many batches only (a dry run).
    Raises:
        ConfigError: a missing package, file or weights, names that don't fit the classes.
    """
    was_training = model.training
    build(STARTS, spec, PATH, model, loader, max_batches)
    model.train(was_training)


def start_on_features(trainer: Trainer, spec: Mapping[str, Any]) -> bool:
    """The same from the features that `trainer` will go on with, so that one pass does for both; False where a stop was
    asked for during it."""
    if not trainer.prepare_features():
        return False
    start_classifier(trainer.model, trainer.cached.train, spec)
    if trainer.judged_model is not trainer.model:   # an average begins there too
        trainer.judged_model.load_state_dict(trainer.model.state_dict())
    return True


def check_start(spec: Mapping[str, Any]) -> None:
    """What can be said before data and model are built: the package of "text" is there, and its file of names."""
    if spec["type"] == "text":
        open_clip()
        if spec["args"].get("class_names"):
            read_names(spec["args"]["class_names"])


def set_weights(head: nn.Module, directions: torch.Tensor, known: torch.Tensor) -> None:
    """Unit vectors [C, D] as a head's weights, for the classes that are `known` [C]; a bias of 0."""
    directions = F.normalize(directions, dim=1)
    if not hasattr(head, "weight"):
        raise ConfigError(f"init_classifier: {type(head).__name__} has no `weight` to begin from; leave it out")
    with torch.no_grad():
        weight = head.weight if isinstance(head, nn.Linear) else head.weight.t()   # ours for cosines is [D, C]
        weight[known] = directions[known].to(weight)
        if getattr(head, "bias", None) is not None:
            head.bias.zero_()


# ---------------------------------------------------------------------- from images

def class_means(model: nn.Module, loader: Any, max_batches: int | None) -> None:
    """Each class's weights are the mean feature of its training images, not augmented, at unit length; each expert has
    its own. A class without images keeps what it has."""
    from tqdm import tqdm
    if dist.world_size() > 1:   # each rank drew new parts of its own; training will begin from rank 0's
        for tensor in (*model.parameters(), *model.buffers()):
            torch.distributed.broadcast(tensor.detach(), 0)
    plain = loader.train_eval_loader()
    gathered = ClassMeans(model.num_classes)
    total = len(plain) if max_batches is None else min(max_batches, len(plain))
    with tqdm(total=total, desc="class means", leave=False, dynamic_ncols=True,
              disable=not dist.is_main() or not sys.stderr.isatty()) as bar:
        source = OnFeatures(model) if isinstance(plain, FeatureLoader) else model
        for batch, (feats, labels) in enumerate(features(source, plain), 1):
            gathered.update(feats, labels)
            bar.update()
            if batch == max_batches:
                break
    if gathered.sums is None:       # this rank has no image: its share of the sums
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
    """Each class's weights are CLIP's text features of its name in `template`, at unit length.

    Where the network's features are those before CLIP's image projection P [D, d], as timm's are, the text features
    [C, d] go through its transpose.

    clip, pretrained: open_clip's names of the model and its weights (or a file of them), the image encoder's own.
    class_names: a file of one name a line, in the order of the labels; None takes the data's.
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
    """(unit features of texts [C, d], the image encoder's projection [D, d] where it has one). On the CPU."""
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
    """Weights come from the hub's cache alone where the hub can't be reached, which else is tried for a minute. Nothing
    is logged: what goes wrong is said in one line."""
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
    """The package, or a ConfigError with the line that installs it."""
    try:
        import open_clip
    except ImportError:
        raise ConfigError(f"{PATH}: text needs the package open_clip; pip install open_clip_torch") from None
    return open_clip


def read_names(path: str) -> list[str]:
    """A file's lines. Raises ConfigError, also for an empty line among them."""
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{PATH}.args.class_names: {path}: can't be read "
                          f"({getattr(error, 'strerror', None) or 'it is not text'})") from None
    if "" in names:
        raise ConfigError(f"{PATH}.args.class_names: {path}, line {names.index('') + 1}: is empty; a line is a class")
    return names


#: What `init_classifier` may name: (model, loader, max_batches, **args).
STARTS: dict[str, Callable[..., None]] = {"class_means": class_means, "text": text}
