"""A trained model as one file that runs without this toolkit: ONNX, or PyTorch's own exported program.

    python -m tools.export -r saved/models/<name>/<run_id>/model_best.pth --format onnx
    python -m tools.export -r CHECKPOINT --format pt2 --out pets.pt2

The file takes `images`, float [N, 3, H, W] normalised as its metadata say, and gives `output`, logits [N, C], for any
N. Norms are folded into the convolutions, LoRA into the weights. An expert-assignment model runs all its experts and
gives what its gates choose. The exported outputs are compared with the model's; where they differ, no file is left
behind.
"""
from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.cli import check_file, parse_tool, tidied_when_stopped, tool_parser
from tools.flags import add_classifier, check_classifier
from utils.cli import run_main
from utils.errors import ConfigError, RunError, unknown

TOLERANCE = 1e-4     # largest allowed difference of a logit
ROUNDING = 1e-5      # of the largest logit: what float32 can keep where logits are large (cosine heads: up to 30)
CHECKED = (1, 2, 5)  # batch sizes compared
OPSET = 18
ONE_FILE = 2**31 - 2**24  # bytes of weights that an ONNX file can hold itself


def exportable(model: Any, temperature: float = 1.0, head: Callable | None = None) -> Any:
    """The model as a module of images alone, folded, for evaluation: [N, 3, H, W] -> logits [N, C] / `temperature`.
    head: makes the logits from the model's dict, in place of `output`."""
    import torch

    from model.norm import fold_norm
    from model.tuning_parts import merge_lora
    if model.routed:
        model.route = False  # every expert for every image, masked by the gates: nothing branches on the data

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = merge_lora(fold_norm(model)).cpu().to(memory_format=torch.contiguous_format)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            outputs = self.model(images)
            logits = outputs["output"] if head is None else head(outputs)
            return logits if temperature == 1 else logits / temperature

    return Classifier().eval().requires_grad_(False)


def metadata(run: Any, facts: dict[str, Any], model: Any) -> dict[str, str]:
    """What a user of the file needs to know, name -> text; `preprocess` and `class_names` are JSON."""
    from data_loader.transforms import MOST_ELONGATED
    preprocess = facts["preprocess"]
    names = facts["class_names"] or [str(label) for label in range(model.num_classes)]
    size, mode = preprocess["image_size"], preprocess["interpolation"]
    side, keeps = preprocess["resize"], preprocess["crop"] and not preprocess.get("squash")
    resized = f"cut to {MOST_ELONGATED} : 1 about the centre where longer, short side resized to {side}" if keeps else \
        f"resized to {side} x {side}"
    centre = f", centre {size} x {size}" if preprocess["crop"] else ""
    return {"task": "classification",
            "input": f"images: float32 [N, 3, {size}, {size}], from a photo: JPEGs decoded at 1/8, 1/4 or 1/2 of their "
                     f"size where that leaves the short side {side} pixels (Pillow's draft), upright (EXIF orientation "
                     f"applied), 16-bit grey / 257, RGB, {resized} ({mode}, antialiased){centre}, value / 255, minus "
                     "mean, divided by std",
            "output": "output: logits [N, C], already divided by `temperature`, if there is one; softmax gives "
                      "probabilities",
            "preprocess": json.dumps(preprocess), "class_names": json.dumps(names), "arch": run.config["arch"]["type"],
            "run": str(run.config.get("name", "")), "epoch": str(run.checkpoint.get("epoch", ""))}


# ---------------------------------------------------------------------- the formats

def write_onnx(model: Any, example: Any, about: dict[str, str], path: Path) -> None:
    """One ONNX file (and `<name>.data` beside it for weights of 2 GB or more)."""
    import onnx
    import torch
    batch = torch.export.Dim("N", min=1)
    program = torch.onnx.export(model, (example,), dynamo=True, opset_version=OPSET, verbose=False,
                                input_names=["images"], output_names=["output"], dynamic_shapes={"images": {0: batch}})
    program.model.metadata_props.update(about)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    program.save(str(path), external_data=weights > ONE_FILE)
    onnx.checker.check_model(str(path))


def run_onnx(path: Path) -> Callable[[Any], Any]:
    """The file as a function of a tensor, opened as tools.predict opens it."""
    from tools.exported import OnnxModel
    model = OnnxModel(path)
    return lambda images: model(images)["output"]


def write_pt2(model: Any, example: Any, about: dict[str, str], path: Path) -> None:
    """One file for torch.export.load; the metadata are its extra file metadata.json."""
    import torch
    batch = torch.export.Dim("N", min=1)
    program = torch.export.export(model, (example,), dynamic_shapes={"images": {0: batch}})
    torch.export.save(program, str(path), extra_files={"metadata.json": json.dumps(about)})


def run_pt2(path: Path) -> Callable[[Any], Any]:
    """The file as a function of a tensor."""
    import torch
    return torch.export.load(str(path)).module()


#: format -> (write, run what was written, packages that both need)
FORMATS: dict[str, tuple[Callable, Callable, tuple[str, ...]]] = {
    "onnx": (write_onnx, run_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "pt2": (write_pt2, run_pt2, ()),
}


def check_packages(kind: str) -> None:
    """Raise ConfigError, with the command that installs them, where a format's packages are missing."""
    from importlib.util import find_spec
    missing = [name for name in FORMATS[kind][2] if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--format {kind}: needs the package {' and '.join(missing)}; "
                          f"pip install {' '.join(missing)}")


# ---------------------------------------------------------------------- writing and checking

def export(run: Any, kind: str, target: Path, head: Callable | None = None, about: dict[str, str] | None = None,
           temperature: float = 1.0) -> tuple[float, list[Path]]:
    """Write a run's model to `target`; returns (the largest difference from the model's logits, the files written).
    head, about, temperature: what `tools.heads.head_for_use` returns.

    Raises ConfigError for a detector, a missing package or a folder that can't be written, RunError where the file
    and the model disagree; then nothing is left behind.
    """
    import torch

    from tools.classify import facts_of
    facts = facts_of(run)
    if facts["preprocess"].get("task") == "detection":
        raise ConfigError(f"-r {run.path}: is a detector; only classifiers are exported")
    check_packages(kind)
    write, reload, _ = FORMATS[kind]
    model, size = exportable(run.model, temperature, head), facts["preprocess"]["image_size"]
    generator = torch.Generator().manual_seed(0)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".export-", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"--out: {target}: can't be written: {error.strerror}") from None
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters' internal ones
            # Two images: a program traced with one takes N = 1 for a constant.
            write(model, torch.randn(2, 3, size, size, generator=generator),
                  metadata(run, facts, run.model) | (about or {}), folder / target.name)
            answers = reload(folder / target.name)
            difference = largest_difference(run.model, answers, size, generator, temperature, head)
        # The model last: it is of no use without its weights beside it.
        written = [Path(shutil.move(path, target.parent / path.name))
                   for path in sorted(folder.iterdir(), reverse=True)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return difference, written


def largest_difference(model: Any, answers: Callable, size: int, generator: Any,
                       temperature: float = 1.0, head: Callable | None = None) -> float:
    """The largest |difference| of a logit between `model`, not folded, and `answers`, the exported one.

    Raises RunError where it exceeds TOLERANCE or, with logits above 10, ROUNDING times the largest; and where shapes
    differ.
    """
    import torch
    device, worst, scale = next(model.parameters()).device, 0.0, 0.0
    for n in CHECKED:
        images = torch.randn(n, 3, size, size, generator=generator)
        outputs = model(images.to(device))
        wanted = (outputs["output"] if head is None else head(outputs)).float().cpu() / temperature
        given = answers(images)
        if given.shape != wanted.shape:
            raise RunError(f"the exported model answers {n} images with {list(given.shape)}, not {list(wanted.shape)}")
        scale = max(scale, float(wanted.abs().max()))
        worst = max(worst, float((given - wanted).abs().max().nan_to_num(float("inf"))))
    allowed = max(TOLERANCE, ROUNDING * scale)
    if not worst <= allowed:
        raise RunError(f"the exported model differs from PyTorch's by up to {worst:.2g}, more than {allowed:.2g}; no "
                       "file was kept")
    return worst


# ---------------------------------------------------------------------- the command

def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The flags, with `out`, the path to write. Raises ConfigError."""
    parser = tool_parser("python -m tools.export", "A trained model as one file that needs nothing of this toolkit.",
                         __doc__.split("\n\n")[1])
    parser.add_argument("--format", default="onnx", metavar="F", help=f"{' or '.join(FORMATS)} (default onnx)")
    parser.add_argument("--out", metavar="FILE", help="the file to write (default: model.F beside the checkpoint)")
    add_classifier(parser)
    args = parse_tool(parser, argv)
    check_classifier(args)
    if args.resume is None:
        raise ConfigError("python -m tools.export: needs -r CHECKPOINT")
    check_file(args.resume, "-r")
    if args.format not in FORMATS:
        raise unknown("--format", args.format, FORMATS, "format")
    args.out = Path(args.out or Path(args.resume).parent / f"model.{args.format}")
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise ConfigError(f"--out: {args.out}: " + ("is a folder" if args.out.is_dir() else "there is no such folder"))
    if args.out.exists() and os.path.samefile(args.out, args.resume):
        raise ConfigError(f"--out: {args.out}: is the checkpoint itself")
    if args.out.suffix != f".{args.format}":     # by which torch, tools.predict and others tell the format
        raise ConfigError(f"--out: {args.out}: must end in .{args.format}")
    check_packages(args.format)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises ConfigError and RunError."""
    args = parse(argv)
    with tidied_when_stopped():
        export_run(args)


def export_run(args: Namespace) -> None:
    """The command, step by step."""
    import logging

    from logger.log import setup_logging
    from tools.heads import head_for_use
    from tools.opened import open_run
    from utils.config.check import task_name
    from utils.device import pick_device
    setup_logging(0)
    for noisy in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    run = open_run(args.resume, args.config, args.overrides, pick_device(args.device or "cpu"))
    if (run.config["data_loader"].get("args") or {}).get("crops"):
        print("the file takes one crop of an image, not data_loader.args.crops; tools.predict --crops gives it several")
    head, about, temperature = None, {}, 1.0
    if task_name(run.model) == "classification":
        run.model.cpu()     # where the exported program runs, for the weights of another classifier too
        head, about, temperature = head_for_use(args, run)
    difference, written = export(run, args.format, args.out, head, about, temperature)
    print(f"largest difference from PyTorch: {difference:.2g} (batches of {', '.join(map(str, CHECKED))} images)")
    for path in written:
        print(f"written to {path} ({path.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    run_main(main)
