"""What one image costs: GFLOPs and parameters, stage by stage and expert by expert, without data or weights.

    python -m tools.gflops -c configs/imagenet_lt_resnext50_ride.json --num_experts 4
    python -m tools.gflops -c configs/cifar100_lt_ride_ea.json --ea 40.99,9.47,49.54
    python -m tools.gflops -r saved/models/<name>/<run_id>/model_best.pth

A multiply-add counts as two operations (GFLOPs) or as one (GMACs). RIDE's tables, and most papers, print GMACs under
the name GFLOPs. Only convolutions and matrix products are counted; norms, activations and pooling add about 1 %.
"""
from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.cli import check_file, parse_tool, tool_parser
from utils.cli import run_main
from utils.config.check import constructor, task_name
from utils.config.load import load_config
from utils.config.schema import SECTIONS
from utils.errors import ConfigError

#: Number of classes of the data sets where it is fixed, for configs that leave it to the data.
CLASSES = {"DigitsLTDataLoader": 10, "ImbalanceCIFAR10DataLoader": 10, "ImbalanceCIFAR100DataLoader": 100,
           "CIFAR100DataLoader": 100, "ImageNetLTDataLoader": 1000, "PlacesLTDataLoader": 365,
           "iNaturalistDataLoader": 8142}
#: Arguments that make a model differ from the plain network of its kind, which its cost is compared with.
EXTRAS = ("num_experts", "reduce_dimension", "layer2_output_dim", "layer3_output_dim", "layer4_output_dim", "use_norm",
          "s", "share_layer3", "use_experts", "add_bt", "eval_bt", "norm", "classifier", "tuning", "shared_classifier",
          "top_choices_num", "pos_weight", "share_expert_help_pred_fc", "force_all", "route_threshold", "bt_gather",
          "bt_weight")


def gflops_of(config: dict[str, Any], ea: Sequence[float] | None = None) -> dict[str, Any]:
    """The cost of one image of a config's size (needs its `arch` and `data_loader`), in evaluation.

    Args:
        ea: for an expert-assignment model, the shares of images that use 1, 2, ... E experts: percentages or fractions.
    Returns:
        `gflops` (a multiply-add is 2; all experts, or the mean under `ea`), `gmacs` (half of it), `parameters`,
        `image_size`, `image_size_why` (None: the config says it); `parts`: a dict of name, `gflops`, `parameters` for
        each stage, expert and head; `by_experts`: GFLOPs of an image that uses 1, 2, ... E experts (gates included);
        `all_experts`: GFLOPs with every one;
        `plain`: `gflops`, `parameters` of the plain network with one expert and full widths, `ratio`: gflops over its.
    Raises:
        ConfigError: a detector, an unknown number of classes, a size that the network can't take, shares that don't
            fit the experts.
    """
    from tools.parts import check_size
    arch = config["arch"]
    if task_name(constructor(SECTIONS["arch"], arch["type"], "arch.type")) == "detection":
        raise ConfigError(f"arch.type: {arch['type']}: what a detector costs depends on what is in the picture")
    size, why = image_size(config)
    check_size(config, size)
    classes = number_of_classes(config)
    model, counts = count(arch, classes, size)
    parts, by_experts = take_apart(model, counts)
    if arch["type"].endswith("EAModel") and ea is not None:
        weights = shares(ea, model.num_experts)
        gflops = math.fsum(w * cost for w, cost in zip(weights, by_experts))
    elif ea is not None:
        raise ConfigError(f"--ea: goes with expert assignment; {arch['type']} always uses all its experts "
                          f"(--set arch.type={arch['type'].replace('Model', 'EAModel')})")
    else:
        gflops = counts[""] / 1e9
    plain = {"type": arch["type"].replace("EAModel", "Model"),
             "args": {key: value for key, value in arch["args"].items() if key not in EXTRAS}}
    plain_model, plain_counts = count(plain, classes, size)
    return {"gflops": gflops, "gmacs": gflops / 2, "parameters": model.num_parameters(), "image_size": size,
            "image_size_why": why, "num_classes": classes, "parts": parts, "by_experts": by_experts,
            "all_experts": counts[""] / 1e9,
            "plain": {"gflops": plain_counts[""] / 1e9, "parameters": plain_model.num_parameters()},
            "ratio": gflops / (plain_counts[""] / 1e9)}


def count(arch: dict[str, Any], num_classes: int, size: int) -> tuple[Any, dict[str, int]]:
    """A model without weights, and the FLOPs of one image in each of its modules.

    It runs on torch's meta device where it can be made there. The key "" is the whole model. A module that is called
    several times counts each time.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from model.model import build_model
    device = "meta"
    try:
        with torch.device(device):
            model = build_model(arch, num_classes, bare=True).eval()
    except NotImplementedError:    # torchvision's RegNets compute while they are made
        device, model = "cpu", build_model(arch, num_classes, bare=True).eval()
    model.route = False  # every expert: without data the gates have nothing to decide by
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size, device=device))
    found = {name: sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()}
    return model, {"": counter.get_total_flops(),
                   **{name.partition(".")[2]: flops for name, flops in found.items() if "." in name}}


def take_apart(model: Any, counts: dict[str, int]) -> tuple[list[dict[str, Any]], list[float]]:
    """(parts with their costs in the order of the forward pass, GFLOPs of an image that uses 1, 2, ... experts)."""
    def spent(name: str) -> int:
        """FLOPs of a module; of a ModuleList, which is never called itself, those of its members."""
        if name in counts:
            return counts[name]
        return sum(spent(f"{name}.{child}") for child, _ in model.get_submodule(name).named_children())

    parts: list[dict[str, Any]] = []
    shared, gates, costs = 0.0, 0.0, [0.0] * model.num_experts
    for part in model.cost_parts():
        flops = math.fsum(spent(name) for name in part.modules) / 1e9
        values = sum(p.numel() for name in part.modules for p in model.get_submodule(name).parameters())
        unused = not flops and part.training
        parts.append({"name": part.name + (" (training only)" if unused else ""), "gflops": flops,
                      "parameters": values})
        if part.expert is not None:
            costs[part.expert] += flops
        elif part.gates:
            gates += flops / (model.num_experts - 1)
        else:
            shared += flops
    totals = [shared + math.fsum(costs[:k]) + gates * min(k, model.num_experts - 1)
              for k in range(1, model.num_experts + 1)]
    known = sum(part["parameters"] for part in parts)
    if known != model.num_parameters():  # NBN's scales, or a transformer's tokens and position embedding
        parts.append({"name": "embeddings" if model.nbn_scales is None else "norm scales", "gflops": 0.0,
                      "parameters": model.num_parameters() - known})
    return parts, totals


def image_size(config: dict[str, Any]) -> tuple[int, str | None]:
    """(side in pixels of a config's images, why it is that where the config doesn't say): its `image_size`, else its
    network's own, else its loader's default."""
    from data_loader import data_loaders
    from data_loader.pixels import SMALLEST_AUTO, half_size
    from tools.parts import input_of, size_problem
    spec = config["data_loader"]
    size = (spec.get("args") or {}).get("image_size")
    if isinstance(size, int):
        return size, None
    wanted = input_of(config)
    if size == "auto" and wanted is None:
        return SMALLEST_AUTO, "what \"auto\" is on a CPU; on a GPU it is 224 or 128 where the photos have as many"
    if wanted is None:
        return getattr(data_loaders, spec["type"]).default_size, None
    own = wanted["image_size"]
    smaller = size == "auto" and half_size(own, lambda half: size_problem(config, half) is None)
    return own, "the network's own" + (f"; photos under {smaller} pixels are taken at {smaller}" if smaller else "")


def number_of_classes(config: dict[str, Any]) -> int:
    """The number of classes: the config's, else the data set's. Raises ConfigError where neither is known."""
    classes = config["arch"]["args"].get("num_classes") or CLASSES.get(config["data_loader"]["type"])
    if classes is None:
        raise ConfigError("arch.args.num_classes: not in the config, and it depends on the images; give it with "
                          "--set arch.args.num_classes=N")
    return classes


def shares(values: Sequence[float], num_experts: int) -> list[float]:
    """Percentages or fractions of the images that use 1, 2, ... experts, as fractions. Raises ConfigError."""
    total = math.fsum(values)
    whole = next((whole for whole in (1, 100) if abs(total - whole) <= 0.01 * whole), None)
    if len(values) != num_experts or min(values) < 0 or whole is None:
        raise ConfigError(f"--ea: {' '.join(f'{v:g}' for v in values)}: give the percentages of images that use 1 to "
                          f"{num_experts} experts, {num_experts} numbers that sum to 100")
    return [value / total for value in values]


# ---------------------------------------------------------------------- the command

def table(cost: dict[str, Any], ea: Sequence[float] | None = None) -> str:
    """The cost as lines of text."""
    why = [f"image size: {cost['image_size_why']}"] if cost["image_size_why"] else []
    lines = [f"one image of {cost['image_size']} x {cost['image_size']}, {cost['num_classes']:,} classes", *why, "",
             f"{'':<26}{'GFLOPs':>10}{'GMACs':>10}{'parameters':>14}"]

    def line(name: str, gflops: float, parameters: int | None = None) -> None:
        count = "" if parameters is None else f"{parameters:,}"
        lines.append(f"{name:<26}{gflops:>10.4f}{gflops / 2:>10.4f}{count:>14}".rstrip())

    for part in cost["parts"]:
        line(part["name"], part["gflops"], part["parameters"])
    several = len(cost["by_experts"]) > 1
    line("all experts" if several else "total", cost["all_experts"], cost["parameters"])
    if several and any(part["name"] == "gates" for part in cost["parts"]):
        lines.append("")
        for k, gflops in enumerate(cost["by_experts"], 1):
            line(f"using {k} expert{'s' * (k > 1)}", gflops)
    if ea is not None:
        line("mean of " + " / ".join(f"{100 * w:.1f}" for w in shares(ea, len(ea))) + " %", cost["gflops"])
    lines.append("")
    line("plain network", cost["plain"]["gflops"], cost["plain"]["parameters"])
    lines += [f"{'ratio to it':<26}{cost['ratio']:>10.3f}{'':>10}"
              f"{cost['parameters'] / cost['plain']['parameters']:>14.3f}", "",
              "A multiply-add is 2 FLOPs or 1 MAC; papers on long tails (RIDE's too) print MACs as \"GFLOPs\"."]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The flags, with `ea` as a list of floats. Raises ConfigError."""
    parser = tool_parser("python -m tools.gflops", "GFLOPs and parameters for one image.", __doc__.split("\n\n")[1],
                         overrides=True)
    parser.add_argument("--ea", "--ea_percentage", nargs="+", metavar="P", help="expert assignment: percentages of "
                        "images that use 1, 2, ... experts, e.g. 40.99,9.47,49.54; with -r, test_metrics.json's")
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    args = parse_tool(parser, argv)
    if (args.config is None) == (args.resume is None):
        raise ConfigError("python -m tools.gflops: needs -c CONFIG.json or -r CHECKPOINT")
    if args.ea is not None:
        try:
            args.ea = [float(part) for word in args.ea for part in word.split(",") if part.strip()]
        except ValueError:
            raise ConfigError(f"--ea: {' '.join(args.ea)[:80]!r}: give percentages such as 40.99,9.47,49.54") from None
        if not args.ea or not all(map(math.isfinite, args.ea)):
            raise ConfigError("--ea: give percentages such as 40.99,9.47,49.54")
    return args


def measured_shares(checkpoint: Path) -> list[float] | None:
    """`expert_share` over all images from the test_metrics.json beside a checkpoint; None where there is none."""
    try:
        found = json.loads((checkpoint.parent / "test_metrics.json").read_text(encoding="utf-8"))
        return [float(share) for share in found["expert_share"]["all"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Raises ConfigError."""
    args = parse(argv)
    if args.config:
        config = load_config(args.config, args.overrides)
    else:
        check_file(args.resume, "-r")
        from tools.session import config_of
        from utils.checkpoint.store import load_checkpoint
        checkpoint = load_checkpoint(args.resume)
        config = config_of(checkpoint, Path(args.resume), args.overrides)
        facts = checkpoint.get("data")
        if isinstance(facts, dict):
            config["arch"]["args"].setdefault("num_classes", facts.get("num_classes"))
        if args.ea is None and config["arch"]["type"].endswith("EAModel"):
            args.ea = measured_shares(Path(args.resume))
    cost = gflops_of(config, args.ea)
    print(f"{config['arch']['type']} of {args.config or args.resume}, {table(cost, args.ea)}")
    if args.json:
        from utils.files import write_json
        try:
            write_json(args.json, cost)
        except OSError as error:
            raise ConfigError(f"--json: {args.json}: can't be written: {error.strerror}") from None


if __name__ == "__main__":
    run_main(main)
