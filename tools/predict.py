"""A trained model on one's own images: the likeliest classes of each, from nothing but the checkpoint.

    python -m tools.predict -r saved/models/<name>/<run_id>/model_best.pth photo.jpg holiday/ --csv found.csv
    python -m tools.predict -r CHECKPOINT holiday/ --topk 3 --gallery found.png

Folders are searched recursively; hidden files and those that systems leave are skipped. Files that can't be read are
listed at the end. CHECKPOINT may also be the ONNX file that tools.export made of one.
"""
from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from logger.metrics_csv import csv_text
from logger.text import count_of
from tools.classify import Prediction, Predictions, class_name, classify, detect, facts_of, find_images
from tools.cli import check_file, parse_tool, tool_parser
from tools.flags import add_classifier, check_classifier
from utils.cli import run_main
from utils.errors import ConfigError, RunError

# ---------------------------------------------------------------------- what is written

def rows(done: Predictions, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """One dict per image (detectors: per instance) with keys as the CSV's columns; None for what isn't known."""
    from data_loader.images import shown
    table = []
    for one in done.found:
        if isinstance(one, Prediction):
            row = {"path": shown(one.path), "class": class_name(names, one.classes[0]),
                   "probability": one.probabilities[0], "experts": one.experts, "agreement": one.agreement}
            for k, (label, probability) in enumerate(zip(one.classes[1:], one.probabilities[1:]), 2):
                row |= {f"class_{k}": class_name(names, label), f"probability_{k}": probability}
            table.append(row)
        else:
            path, found = one
            boxes = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist())
            table += [{"path": shown(path), "class": class_name(names, label - 1), "probability": score,
                       **dict(zip(("left", "top", "right", "bottom"), box))} for label, score, box in boxes] or [
                           {"path": shown(path), "class": None, "probability": None}]
    return table


def as_csv(table: list[dict[str, Any]]) -> str:
    """Rows as CSV; a column for every key, probabilities with six digits."""
    return csv_text(list(dict.fromkeys(key for row in table for key in row)) or ["path", "class", "probability"],
                    ({key: f"{value:.6f}" if isinstance(value, float) else value for key, value in row.items()}
                     for row in table))


def as_line(row: dict[str, Any], width: int, num_experts: int) -> str:
    """A row for the terminal: path, then each class with its probability in percent."""
    if row["class"] is None:
        return f"{row['path']:<{width}}  nothing found"
    guesses = [("class", "probability")] + [(key, f"probability_{key[6:]}") for key in row if key.startswith("class_")
                                            and row[f"probability_{key[6:]}"] >= 0.0005]  # less is shown as 0.0%
    text = f"{row['path']:<{width}}  " + "  ".join(f"{row[c]} {100 * row[p]:.1f}%" for c, p in guesses)
    if row.get("agreement") is not None:
        text += f"  ({round(row['agreement'] * row['experts'])} of {row['experts']} experts agree)"
    elif num_experts > 1 and "experts" in row:
        text += f"  ({row['experts']} of {num_experts} experts used)"
    return text


# ---------------------------------------------------------------------- the command

def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The flags, with numbers converted and in range. Raises ConfigError."""
    parser = tool_parser("python -m tools.predict", "What a trained model sees in images.", __doc__.split("\n\n")[1])
    parser.add_argument("paths", nargs="*", metavar="PATH", help="image files, or folders to search for them")
    parser.add_argument("--csv", metavar="FILE", help="write a row an image: path, class, probability (a fraction) ...")
    parser.add_argument("--json", metavar="FILE", help="the same as JSON, unreadable files included")
    parser.add_argument("--gallery", metavar="PNG", help="write a sheet of the images with what was seen in them")
    parser.add_argument("--topk", metavar="K", default="5", help="classes an image (default 5)")
    parser.add_argument("--crops", metavar="N", help="average the logits of 5 or 10 crops of each image (default: what "
                        "the config says, else 1)")
    parser.add_argument("--expand", metavar="N", help="with --crops: pixels that an image is larger than a crop "
                        "(default: what the config says, else 3/28 of it)")
    parser.add_argument("--threshold", metavar="P", help="detectors: the least score (default 0.5)")
    parser.add_argument("--batch_size", metavar="N", default="64", help="images at a time (default 64)")
    parser.add_argument("--num_workers", metavar="N", help="threads that decode (default: one a core)")
    add_classifier(parser)
    args = parse_tool(parser, argv)
    check_classifier(args)
    if args.resume is None or not args.paths:
        raise ConfigError("python -m tools.predict: needs -r CHECKPOINT and one or more images or folders")
    check_file(args.resume, "-r")
    for name, least in (("topk", 1), ("batch_size", 1), ("num_workers", 0), ("crops", 1), ("expand", 0)):
        text = getattr(args, name)
        if text is not None:
            if not text.isascii() or not text.isdigit() or not least <= int(text) < 10**9:
                raise ConfigError(f"--{name}: must be a whole number, {least} or more, not {text[:40]!r}")
            setattr(args, name, int(text))
    try:
        args.threshold = None if args.threshold is None else float(args.threshold)
    except ValueError:
        args.threshold = -1.0
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ConfigError("--threshold: must be a number from 0 to 1")
    for flag in ("csv", "json", "gallery"):
        target = getattr(args, flag)
        if target == "":
            raise ConfigError(f"--{flag}: needs the name of a file")
        if target is not None and (os.path.isdir(target) or not os.path.isdir(os.path.dirname(target) or ".")):
            raise ConfigError(f"--{flag}: {target} can't be written: "
                              + ("it is a folder" if os.path.isdir(target) else "there is no such folder"))
    return args


def check_targets(args: Namespace, images: Sequence[str]) -> None:
    """Raise ConfigError where a file to write is the checkpoint, one of the images, or to be written twice."""
    taken: list[str] = []
    for flag in ("csv", "json", "gallery"):
        target = getattr(args, flag)
        if target is None:
            continue
        name, what = os.path.basename(target), None
        if os.path.isfile(target) and os.path.samefile(target, args.resume):
            what = "the checkpoint itself"
        elif os.path.isfile(target) and any(os.path.basename(path) == name and os.path.samefile(path, target)
                                            for path in images):
            what = "one of the images"
        elif os.path.realpath(target) in taken:
            what = "asked for twice"
        if what:
            raise ConfigError(f"--{flag}: {target} is {what}; give another name")
        taken.append(os.path.realpath(target))


def predict(args: Namespace) -> None:
    """The command, step by step."""
    other: list[str] = []
    paths = find_images(args.paths, other)  # before torch is imported: a mistyped path answers at once
    check_targets(args, paths)
    import torch

    from data_loader.crops import with_crops
    from logger.log import setup_logging
    from logger.progress import progress_bar
    from model.norm import fold_norm
    from tools.exported import is_exported
    setup_logging(0)
    kind = is_exported(args.resume)
    model, facts = open_model(args) if kind is None else open_export(args, kind)
    names = facts["class_names"]
    with progress_bar(len(paths), unit=" images") as bar:
        if facts["preprocess"].get("task") == "detection":
            least = 0.5 if args.threshold is None else args.threshold
            done = detect(model, paths, threads=args.num_workers, threshold=least,
                          masks=most_pictures(args.gallery), advance=bar.update)
        elif args.threshold is not None:
            raise ConfigError(f"--threshold: is for detectors; {args.resume} classifies, leave it out")
        else:
            folded = fold_norm(model).to(memory_format=torch.channels_last) if kind is None else model
            given = args.crops is not None or args.expand is not None
            crops = (facts.get("crops") or 1) if args.crops is None else args.crops
            expand = facts.get("expand") if args.expand is None and args.crops != 1 else args.expand
            preprocess = with_crops(facts["preprocess"], crops, expand, "--" if given else "data_loader.args.")
            done = classify(folded, paths, preprocess, head=facts.get("head"),
                            temperature=facts.get("temperature", 1.0), topk=args.topk, batch_size=args.batch_size,
                            threads=args.num_workers, advance=bar.update)
    table = rows(done, names)
    broken = [row["path"] for row in table for value in row.values()
              if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        raise ConfigError(f"-r {args.resume}: its outputs aren't finite numbers ({broken[0]}); give a checkpoint from "
                          "before its training went wrong")
    if done.found or args.json or args.csv:    # also if no file could be read: old output mustn't pass for new
        report(args, done, table, names, model.num_experts)
    if done.unreadable and len(paths) > 1:
        print(f"\n{len(done.unreadable)} of {len(paths)} files couldn't be read:")
        print("\n".join(f"  {reason}" for _, reason in done.unreadable))
    if other:
        from data_loader.folders import not_images
        print(f"left out: {not_images(other)}")
    if not done.found:
        raise RunError("none of the files could be read" if len(paths) > 1 else done.unreadable[0][1])


def open_model(args: Namespace) -> tuple[Any, dict[str, Any]]:
    """(the checkpoint's model, its facts: `preprocess`, `class_names`, `temperature`, its config's crops and the
    `head` that the flags ask for)."""
    from tools.heads import head_for_use
    from tools.opened import open_run
    from utils.device import pick_device
    run = open_run(args.resume, args.config, args.overrides, pick_device(args.device))
    data = run.config["data_loader"].get("args") or {}
    crops = data.get("crops") or 1
    other = [f"--{key} {value}" for key, value, usual in (("crops", args.crops, crops),
                                                          ("expand", args.expand, data.get("expand")))
             if value not in (None, usual)]
    facts = {**facts_of(run), "crops": data.get("crops"), "expand": data.get("expand")}
    if facts["preprocess"].get("task") == "detection":
        if args.classifier != "joint" or args.prior:
            raise ConfigError(f"--classifier, --prior: are for classifiers; {args.resume} is a detector")
        return run.model, facts
    head, _, temperature = head_for_use(args, run, *other)
    return run.model, {**facts, "head": head, "temperature": temperature}


def open_export(args: Namespace, kind: str) -> tuple[Any, dict[str, Any]]:
    """As `open_model`, for a file that tools.export wrote. Raises ConfigError, also for flags that it can't heed."""
    from tools.exported import open_exported
    for given, flag in ((args.config, "-c"), (args.overrides, "--set"),
                        (args.classifier != "joint", "--classifier"), (args.prior, "--prior")):
        if given:
            raise ConfigError(f"{flag}: {args.resume} is an exported model, which has no config; leave {flag} out or "
                              "give the checkpoint")
    if args.device not in (None, "cpu"):
        raise ConfigError(f"-d/--device: {args.resume} is an exported model and runs on the CPU here; leave -d out or "
                          "give the checkpoint")
    model = open_exported(args.resume, kind)
    return model, {"preprocess": model.preprocess, "class_names": model.class_names}


def report(args: Namespace, done: Predictions, table: list[dict[str, Any]], names: Sequence[str] | None,
           num_experts: int) -> None:
    """Print what was found, and write the files that were asked for."""
    from utils.files import write_json, write_text
    if not (args.csv or args.json or args.gallery):
        width = min(60, max(len(row["path"]) for row in table))
        print("\n".join(as_line(row, width, num_experts) for row in table))
        return
    unreadable = [{"path": path, "reason": reason} for path, reason in done.unreadable]
    for path, write in ((args.csv, lambda: write_text(args.csv, as_csv(table))),
                        (args.json, lambda: write_json(args.json, {"predictions": table, "unreadable": unreadable})),
                        (args.gallery, lambda: write_gallery(args.gallery, done, names))):
        if path and (done.found or path != args.gallery):
            try:
                written = write() or len(done.found)
            except OSError as error:
                raise ConfigError(f"{path}: can't be written: {error.strerror or error}") from None
            print(("" if written == len(done.found) else f"the first {written:,} of ")
                  + f"{count_of(len(done.found), 'image', 'images')}, written to {path}")


def most_pictures(path: str | None) -> int:
    """How many images the gallery at `path` can show, 0 without one: masks of others aren't needed."""
    if not path:
        return 0
    from tools.gallery import MOST
    return MOST


def write_gallery(path: str, done: Predictions, names: Sequence[str] | None) -> int:
    """Write the gallery; returns how many images are on it, as it has room for the first ones only."""
    from tools.gallery import gallery
    return gallery(done.found, names, path)


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises ConfigError and RunError."""
    predict(parse(argv))


if __name__ == "__main__":
    run_main(main)
