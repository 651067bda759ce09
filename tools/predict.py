"""A trained model on one's own images: the likeliest classes of each, from nothing but the checkpoint.

    python -m tools.predict -r saved/models/<name>/<run_id>/model_best.pth photo.jpg holiday/ --csv found.csv
    python -m tools.predict -r CHECKPOINT holiday/ --topk 3 --gallery found.png

Folders are searched recursively; hidden files and those that systems leave are skipped. Files that can't be read are
listed at the end; the exit status is then 1, or 2 if none could be read. `--csv -` writes the table, and nothing else,
to stdout. CHECKPOINT may also be the ONNX file that tools.export made of one.
"""
from __future__ import annotations

import contextlib
import math
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from logger.text import count_of
from tools.classify import Predictions, classified, detected, facts_of, find_images
from tools.cli import check_file, parse_tool, tidied_when_stopped, tool_parser
from tools.flags import add_classifier, check_classifier
from tools.prediction_files import STDOUT, CsvWriter, JsonWriter, LineWriter, naming, rows, table_alone, writer
from utils.cli import run_main
from utils.errors import ConfigError, RunError

# ---------------------------------------------------------------------- the command

def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The flags, with numbers converted and in range. Raises ConfigError."""
    parser = tool_parser("python -m tools.predict", "What a trained model sees in images.", __doc__.split("\n\n")[1])
    parser.add_argument("paths", nargs="*", metavar="PATH", help="image files, or folders to search for them")
    parser.add_argument("--csv", metavar="FILE", help="write a row an image: path, class, probability (a fraction) "
                        "...; -: to stdout, all else to stderr")
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
        if target == "" or (flag == "gallery" and target == "-"):
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


def predict(args: Namespace, out: TextIO) -> None:
    """The command, step by step. out: standard output, for what is to be written there."""
    other: list[str] = []
    paths = find_images(args.paths, other)  # before torch is imported: a mistyped path answers at once
    check_targets(args, paths)
    from data_loader.images import shown
    from logger.log import setup_logging
    from logger.progress import progress_bar
    from tools.exported import is_exported
    setup_logging(0)
    kind = is_exported(args.resume)
    model, facts = open_model(args) if kind is None else open_export(args, kind)
    batches, count, most = found_by(args, model, facts, paths, folded=kind is not None), 0, most_pictures(args.gallery)
    pictures: list[Any] = []
    unreadable: list[tuple[str, str]] = []
    with contextlib.ExitStack() as files, progress_bar(len(paths), unit=" images") as bar:
        writers = [files.enter_context(writer(path, form, out))
                   for path, form in ((args.csv, CsvWriter), (args.json, JsonWriter)) if path]
        if not writers and not args.gallery:
            writers = [LineWriter(out, min(60, max(len(shown(path)) for path in paths)), model.num_experts)]
        for batch in batches:
            table = rows(batch.found, facts["class_names"])
            refuse_nonfinite(args, table)
            count += len(batch.found)
            unreadable += batch.unreadable
            pictures += batch.found[:most - len(pictures)]
            with bar.external_write_mode():
                for one in writers:
                    one.add(table)
            bar.update(len(batch.found) + len(batch.unreadable))
        for one in writers:     # also if no file could be read: old output mustn't pass for new
            one.end(unreadable)
    if args.gallery and pictures:
        write_gallery(args.gallery, pictures, facts["class_names"])
    report(args, count, len(pictures))
    end(paths, count, unreadable, other)


def found_by(args: Namespace, model: Any, facts: dict[str, Any], paths: Sequence[str], folded: bool,
             ) -> Iterator[Predictions]:
    """What the model finds in the images, batch by batch. folded: its norms are already."""
    if facts["preprocess"].get("task") == "detection":
        return detected(model, paths, threads=args.num_workers, masks=most_pictures(args.gallery),
                        threshold=0.5 if args.threshold is None else args.threshold)
    if args.threshold is not None:
        raise ConfigError(f"--threshold: is for detectors; {args.resume} classifies, leave it out")
    import torch

    from data_loader.crops import with_crops
    from model.norm import fold_norm
    if not folded:
        model = fold_norm(model).to(memory_format=torch.channels_last)
    given = args.crops is not None or args.expand is not None
    crops = (facts.get("crops") or 1) if args.crops is None else args.crops
    expand = facts.get("expand") if args.expand is None and args.crops != 1 else args.expand
    preprocess = with_crops(facts["preprocess"], crops, expand, "--" if given else "data_loader.args.")
    return classified(model, paths, preprocess, head=facts.get("head"), temperature=facts.get("temperature", 1.0),
                      topk=args.topk, batch_size=args.batch_size, threads=args.num_workers)


def refuse_nonfinite(args: Namespace, table: list[dict[str, Any]]) -> None:
    """Raise ConfigError where the model's outputs aren't finite."""
    broken = [row["path"] for row in table for value in row.values()
              if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        raise ConfigError(f"-r {args.resume}: its outputs aren't finite numbers ({broken[0]}); give a checkpoint from "
                          "before its training went wrong")


def end(paths: Sequence[str], count: int, unreadable: Sequence[tuple[str, str]], other: Sequence[str]) -> None:
    """Print which files couldn't be read or weren't used. Raises ConfigError where none of `paths` could be read,
    RunError where `count` others could."""
    some = f"{len(unreadable)} of {len(paths)} files couldn't be read"
    if unreadable and len(paths) > 1:
        print(f"\n{some}:")
        print("\n".join(f"  {reason}" for _, reason in unreadable))
    if other:
        from data_loader.folders import not_images
        print(f"left out: {not_images(other)}")
    if unreadable and not count:
        raise ConfigError(unreadable[0][1] if len(paths) == 1 else
                          f"none of the {len(paths)} files could be read; the first: {unreadable[0][1]}")
    if unreadable:
        raise RunError(f"{some}, such as {unreadable[0][1]}")


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


def report(args: Namespace, count: int, pictures: int) -> None:
    """Print which files were written, with `count` images, respectively `pictures` of them."""
    for path, written in ((args.csv, count), (args.json, count), (args.gallery, pictures)):
        if path and path not in STDOUT and (written or path != args.gallery):
            print(("" if written == count else f"the first {written:,} of ")
                  + f"{count_of(count, 'image', 'images')}, written to {path}")


def most_pictures(path: str | None) -> int:
    """How many images the gallery at `path` can show, 0 without one: masks of others aren't needed."""
    if not path:
        return 0
    from tools.gallery import MOST
    return MOST


def write_gallery(path: str, found: Sequence[Any], names: Sequence[str] | None) -> None:
    """Write the gallery. Raises ConfigError where it can't be written."""
    from tools.gallery import gallery
    with naming(path):
        gallery(found, names, path)


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises ConfigError and RunError."""
    args = parse(argv)
    with tidied_when_stopped(), table_alone(bool({args.csv, args.json}.intersection(STDOUT))) as out:
        predict(args, out)


if __name__ == "__main__":
    run_main(main)
