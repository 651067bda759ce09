"""Applies a trained model to image files: finds them, decodes them in threads, classifies them in batches.

Shared by `tools.predict` and by test.py's open-set testing.
"""
from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import ConfigError

AHEAD = 3  # batches that are decoded while one is classified


def class_name(names: Sequence[str] | None, label: int) -> str:
    """A class's name; its number where names aren't known."""
    return names[label] if names and 0 <= label < len(names) else str(label)


# ---------------------------------------------------------------------- which images

def find_images(paths: Iterable[str], other: list[str] | None = None) -> list[str]:
    """The image files in `paths`: files as named, folders searched recursively (also through links), once each.

    In folders only files with an image's extension count; the names of the rest are appended to `other`. Hidden files
    and those that operating systems leave are skipped (see data_loader.images.is_system). Raises ConfigError for a path
    that doesn't exist, and where there is no image.
    """
    from data_loader.images import EXTENSIONS, is_image, shown, walk
    found: dict[str, None] = {}
    for path in paths:
        if os.path.isdir(path):
            for folder, _, _, names in walk(path):
                for name in names:
                    if is_image(name):
                        found[os.path.join(folder, name)] = None
                    elif other is not None:
                        other.append(name)
        elif "\0" in path or not os.path.exists(path):
            raise ConfigError(f"{shown(path)}: no such file or folder")
        else:
            found[path] = None
    if not found:
        raise ConfigError(f"{', '.join(map(shown, paths))}: no image in there ({' '.join(sorted(EXTENSIONS))})")
    return list(found)


def read_open_set(file: str | Path, data_dir: str | None = None, allow_outside: bool = False) -> list[str]:
    """The paths in an open-set list, i.e. of images of no known class: `path` or `path -1` per line.

    Paths are relative to the list's folder or, if the first isn't there, to `data_dir`. Raises ConfigError with file
    and line: another label, no such image, one outside the folder unless `allow_outside`.
    """
    from data_loader.files import check_paths
    from data_loader.images import shown
    from data_loader.list_lines import read_text_bytes
    file = Path(file)
    content = read_text_bytes(file, "--open_set: ")
    names: dict[str, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        name = os.fsdecode(line.strip().replace(b"\t", b" "))
        before, _, label = name.rpartition(" ")
        if before and label.removeprefix("-").isdigit():
            if label != "-1":
                raise ConfigError(f"{shown(str(file))}, line {number}: the label is {label}; images of no known class "
                                  "are labelled -1, or not at all")
            name = before.strip()
        if "\0" in name:
            raise ConfigError(f"{shown(str(file))}, line {number}: a path can't hold a zero byte")
        if name:
            names.setdefault(name, number)
    if not names:
        raise ConfigError(f"--open_set: {shown(str(file))}: lists no image; a line is `path` or `path -1`")
    first = next(iter(names))
    root = file.parent
    if data_dir and not os.path.lexists(root / first) and os.path.lexists(Path(data_dir) / first):
        root = Path(data_dir)
    return check_paths(root, list(names), allow_outside, shown(str(file)), list(names.values()))


# ---------------------------------------------------------------------- decoding and classifying

@dataclass
class Prediction:
    """The prediction for one image.

    classes, probabilities: the k most likely, in descending order. experts: how many were used (None: an exported model
    doesn't say). agreement: the share of them, 0 to 1, whose own top class is the first one (None where that isn't
    known: one expert, or expert assignment).
    """

    path: str
    classes: list[int]
    probabilities: list[float]
    experts: int | None = 1
    agreement: float | None = None


@dataclass
class Predictions:
    """found: a result per image that was read, in order. unreadable: (path, reason) of the others."""

    found: list[Any] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def decoded(paths: Sequence[str], read: Callable[[str], Any], batch_size: int, threads: int | None,
            ) -> Iterator[list[tuple[str, Any, str | None]]]:
    """Batches of (path, what `read` returned or None, why it couldn't be read or None), read ahead by `threads` threads
    (None: one per core, 8 at most)."""
    from data_loader.workers import worker_count

    def attempt(path: str) -> tuple[str, Any, str | None]:
        try:
            return path, read(path), None
        except ConfigError as error:
            return path, None, str(error)

    batches = (paths[at:at + batch_size] for at in range(0, len(paths), batch_size))
    with ThreadPoolExecutor(worker_count(None, 1) if threads is None else max(1, threads)) as pool:
        waiting: deque[list[Future]] = deque()
        for batch in batches:
            waiting.append([pool.submit(attempt, path) for path in batch])
            if len(waiting) > AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]


def gathered(batches: Iterable[Predictions]) -> Predictions:
    """The batches of `classified` or `detected` in one."""
    done = Predictions()
    for batch in batches:
        done.found += batch.found
        done.unreadable += batch.unreadable
    return done


def classify(model: Any, paths: Sequence[str], preprocess: dict[str, Any], **how: Any) -> Predictions:
    """`classified`, all batches in one."""
    return gathered(classified(model, paths, preprocess, **how))


def classified(model: Any, paths: Sequence[str], preprocess: dict[str, Any], *, head: Callable | None = None,
               temperature: float = 1.0, topk: int = 5, batch_size: int = 64, threads: int | None = None,
               ) -> Iterator[Predictions]:
    """Classify image files, preprocessed as the model's test images are, batch by batch.

    Args:
        model: one of model.model's, in evaluation mode.
        preprocess: as in a checkpoint's `data`; see data_loader.transforms.
        head: a function of the model's output dict to logits [N, C] (NCM, tau-normalised), in place of `output`.
        temperature: what logits are divided by, above 0.
        topk: classes per image, 1 or more; all C where it is larger.
        threads: how many decode images (None: one per core, 8 at most).
    """
    import torch

    from data_loader.transforms import Normalise, read_for_test, test_pixels
    from model.crops import forward_crops
    device = next(model.parameters(), torch.empty(0)).device  # an exported model has none
    normalise = Normalise(preprocess["mean"], preprocess["std"], device)
    for batch in decoded(paths, lambda path: test_pixels(read_for_test(path, preprocess), preprocess), batch_size,
                         threads):
        done = Predictions(unreadable=[(path, reason) for path, _, reason in batch if reason is not None])
        good = [(path, pixels) for path, pixels, reason in batch if reason is None]
        if good:
            with torch.inference_mode():    # not around `yield`: it would be on in the caller's code too
                pixels = torch.stack([pixels for _, pixels in good]).to(device)
                outputs = forward_crops(model, normalise(pixels))
                done.found = read_outputs([path for path, _ in good], outputs, head, topk, temperature)
        yield done


def read_outputs(paths: list[str], outputs: dict[str, Any], head: Callable | None, topk: int,
                 temperature: float = 1.0) -> list[Prediction]:
    """A model's output dict for a batch as one Prediction per image."""
    logits = (outputs["output"] if head is None else head(outputs)).float() / temperature
    best = logits.softmax(1).topk(min(topk, logits.shape[1]), dim=1)
    used, experts = outputs.get("sample_num_experts"), outputs.get("logits")
    agreement = None
    if used is None:
        count = None if experts is None else experts.shape[1]
        if experts is not None and count > 1 and head is None:
            agreement = (experts.argmax(2) == best.indices[:, :1]).float().mean(1).tolist()
        used = [count] * len(paths)
    else:
        used = used.tolist()
    return [Prediction(path, classes, probabilities, used[i], None if agreement is None else agreement[i])
            for i, (path, classes, probabilities) in enumerate(zip(paths, best.indices.tolist(), best.values.tolist()))]


def detect(model: Any, paths: Sequence[str], **how: Any) -> Predictions:
    """`detected`, all images in one."""
    return gathered(detected(model, paths, **how))


def detected(model: Any, paths: Sequence[str], *, threads: int | None = None, threshold: float = 0.5, masks: int = 0,
             ) -> Iterator[Predictions]:
    """Run a detector on image files, one by one: finds (path, {"boxes", "labels", "scores"} on the CPU, scores >=
    `threshold`).

    masks: how many images also keep "masks", bool, each as large as its image.
    """
    import torch

    from data_loader.detection.dataset import to_tensor
    from data_loader.images import read_rgb
    device = next(model.parameters()).device
    for [(path, image, reason)] in decoded(paths, read_rgb, 1, threads):
        if reason is not None:
            yield Predictions(unreadable=[(path, reason)])
            continue
        with torch.inference_mode():
            found = model([to_tensor(image).to(device)])["detections"][0]
            keep = found["scores"] >= threshold
            if "masks" in found:
                found = {**found, "masks": found["masks"] > 0.5}
            if masks <= 0:
                found.pop("masks", None)
            masks -= 1
            done = Predictions([(path, {key: value[keep].cpu() for key, value in found.items()})])
        yield done


def classify_list(run: Any, file: str, preprocess: dict[str, Any], head: Callable | None = None) -> tuple[Any, Any]:
    """Classify the images of an open-set list (see `read_open_set`) for test.py: (predictions int64 [n], their
    probabilities float32 [n]). preprocess: the test images'. Raises ConfigError for the first that can't be read."""
    import numpy as np
    args = run.config["data_loader"].get("args") or {}
    paths = read_open_set(file, args.get("data_dir"), bool(args.get("allow_outside")))
    done = classify(run.model, paths, preprocess, head=head, topk=1)
    if done.unreadable:
        raise ConfigError(done.unreadable[0][1])
    return (np.array([one.classes[0] for one in done.found], dtype=np.int64),
            np.array([one.probabilities[0] for one in done.found], dtype=np.float32))


def facts_of(run: Any) -> dict[str, Any]:
    """`preprocess` and `class_names` of a run: from its checkpoint, else (another project's weights) its loader's
    defaults, without names. An `image_size` given by -c or --set overrides the checkpoint's, as in test.py. Raises
    ConfigError where the data loader, one from outside, had no preprocessing."""
    from data_loader import data_loaders
    from data_loader.transforms import as_recorded, test_preprocess
    from tools.parts import input_of
    known = run.checkpoint.get("data")
    spec = run.config.get("data_loader") or {}
    args = spec.get("args") or {}
    size, wanted = args.get("image_size"), input_of(run.config)
    if isinstance(known, dict) and isinstance(known.get("preprocess"), dict):
        preprocess = known["preprocess"]
        if not preprocess:
            raise ConfigError(f"data_loader.type: {spec.get('type')} doesn't say how photos are prepared for the "
                              "model; set its `preprocess` (see base.base_data_loader.BaseDataLoader) and train again")
        if isinstance(size, int) and size != preprocess.get("image_size", size):
            preprocess = test_preprocess(size, preprocess["mean"], preprocess["std"], as_recorded(wanted, preprocess))
        return {"preprocess": preprocess, "class_names": known.get("class_names")}
    kind = getattr(data_loaders, spec["type"])
    if not hasattr(kind, "default_size"):
        return {"preprocess": {"task": "detection"}, "class_names": None}
    size = size if isinstance(size, int) else (wanted or {"image_size": kind.default_size})["image_size"]
    return {"preprocess": test_preprocess(size, *kind.statistics, wanted), "class_names": None}
