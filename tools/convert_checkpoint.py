"""Write another project's checkpoint in this project's layout: `python -m tools.convert_checkpoint IN OUT`.

IN may be RIDE's, BatchFormer's, classifier-balancing's, NBN's, MABN's, torchvision's or timm's. OUT holds plain
tensors and data: `arch epoch state_dict optimizer config`, and `data` where IN has it. The config that is known
(inside IN, or in config.json beside it) is kept, its `arch` unchanged where that takes the weights; else the
architecture is inferred from them. `python test.py -r OUT -c CONFIG` needs no more.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.cli import Parser
from utils.cli import run_main
from utils.errors import ConfigError, RunError

# Args that leave no trace in the weights: where the architecture is inferred, they are taken from the old config.
_TRACELESS = ("s", "dropout", "returns_feat", "use_experts", "pos_weight", "force_all", "eval_bt", "shared_classifier")


def convert(source: Path, target: Path) -> dict[str, Any]:
    """Convert `source` into `target`; returns what was written. Raises ConfigError; RunError if it can't be written."""
    from model.weights.remap import recognise
    from tools.session import facts_of_checkpoint
    from utils.checkpoint.store import load_checkpoint, plain_data, save_checkpoint
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError(f"{target}: is the file to convert; name another one to write")
    if target.is_dir():
        raise ConfigError(f"{target}: is a folder; name the file to write")
    checkpoint = load_checkpoint(source)
    config = known_config(checkpoint, source)
    facts = plain_data(facts_of_checkpoint(checkpoint)) or {}
    try:
        arch, weights = own_arch(checkpoint, config, facts.get("num_classes")) or read_off(checkpoint, config)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    optimizer = plain_data(checkpoint.get("optimizer"))
    epoch = next((checkpoint[key] for key in ("epoch", "best_epoch") if isinstance(checkpoint.get(key), int)), 0)
    converted = {"arch": arch["type"], "epoch": epoch, "state_dict": weights,
                 "optimizer": optimizer if isinstance(optimizer, dict) else {}, "config": {**config, "arch": arch},
                 **({"data": facts} if facts else {}), "origin": recognise(checkpoint)}
    try:
        save_checkpoint(target, converted)
    except OSError as error:
        raise RunError(f"{target}: can't be written ({error.strerror})") from None
    return converted


def own_arch(checkpoint: dict, config: dict[str, Any], num_classes: int | None) -> tuple[dict, dict] | None:
    """(the config's own arch, the weights under its model's keys); None where there is none that takes them.

    It says what weights don't: where NBN is applied, the gates' threshold. A class outside the repo isn't imported.
    """
    from model.model import build_model
    from model.weights.remap import load_weights, to_ours
    from utils.config.outside import refuse_outside
    arch = config.get("arch")
    if not isinstance(arch, dict) or not isinstance(arch.get("args", {}), dict):
        return None
    try:
        refuse_outside({"arch": arch}, ())
        model = build_model(arch, num_classes, bare=True)
        load_weights(model, checkpoint, exact=True)
        return arch, to_ours(checkpoint, model)
    except ConfigError:
        return None


def read_off(checkpoint: dict, config: dict[str, Any]) -> tuple[dict, dict]:
    """(the arch inferred from the weights, the weights under our keys). Raises ConfigError."""
    from model.weights.infer_arch import infer_arch
    from model.weights.remap import to_ours
    weights = to_ours(checkpoint)
    arch = infer_arch(weights)
    old = config.get("arch")
    old_args = old.get("args") if isinstance(old, dict) else None
    old_args = old_args if isinstance(old_args, dict) else {}
    arch["args"].update({key: old_args[key] for key in _TRACELESS if key in old_args})
    if old_args.get("add_bt") and arch["args"].get("add_bt"):
        arch["args"]["add_bt"] = old_args["add_bt"]
    return arch, weights


def known_config(checkpoint: dict, source: Path) -> dict[str, Any]:
    """The config in a checkpoint, else in config.json beside it, else an empty one. Raises ConfigError: not JSON."""
    from utils.checkpoint.store import recover_config
    config = recover_config(checkpoint)
    beside = source.parent / "config.json"
    if config is None and beside.is_file():
        try:
            config = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{beside}: isn't readable JSON ({error})") from None
    return config if isinstance(config, dict) else {}


def main(argv: list[str] | None = None) -> None:
    """The command. Raises ConfigError and RunError."""
    parser = Parser(prog="python -m tools.convert_checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="IN", type=Path, help="the checkpoint to read; no code in it is run")
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write")
    args = parser.parse_args(argv)
    converted = convert(args.source, args.target)
    arch = converted["config"]["arch"]
    values = sum(tensor.numel() for tensor in converted["state_dict"].values())
    print(f"{args.source}: {converted['origin']}'s layout, {len(converted['state_dict'])} tensors, {values:,} values")
    print(f"arch: {json.dumps(arch)}")
    print(f"epoch: {converted['epoch']}")
    print(f"written: {args.target}")
    print(f"next: python test.py -r {args.target} -c CONFIG.json")


if __name__ == "__main__":
    run_main(main)
