"""Every part of a recipe with every kind of model: a step alone, and all parts together stopped and resumed."""
from __future__ import annotations

import json

import pytest
import torch

TWO = {"num_experts": 2, "use_norm": True}
MUON = {"type": "Muon", "args": {"lr": 0.02, "others": {"type": "SGD", "args": {"lr": 0.05, "momentum": 0.9}}}}
SAM = {"type": "SAM", "args": {"rho": 0.05, "base": MUON}}
#: What a part sets, as `--set` takes it.
PARTS = {
    "augmentation": {"data_loader.args.augment": "autoaugment", "data_loader.args.cutout": 6,
                     "data_loader.args.random_erasing": 0.5, "data_loader.args.flip": "alternate"},
    "mixing": {"data_loader.args.mix": {"type": "either", "alpha": 0.4}},
    "average": {"trainer.ema": {"decay": 0.9}, "trainer.swa": {"epochs": 1}},
    "muon": {"optimizer": MUON, "trainer.no_decay": "norm_bias"},
    "sam": {"optimizer": SAM},
    "accumulation": {"trainer.accumulate": 2},
    "by step": {"lr_scheduler": {"type": "CosLR", "args": {"by": "step", "warmup_epoch": 0.5}}},
    "layer decay": {"trainer.layer_decay": 0.8, "trainer.clip_grad_norm": 1.0},
    "frozen norms": {"trainer.freeze": "norms",
                     "lr_scheduler": {"type": "OneCycleLR", "args": {"max_lr": 0.05}}},
}
KINDS = {
    "plain": {}, "experts": {"arch": {"args": TWO}, "loss": {"type": "BalPoELoss"}},
    "batchformer": {"arch": {"args": {**TWO, "add_bt": 1}}, "loss": {"type": "RIDELoss"}},
    "mabn": {"arch": {"args": {"norm": {"type": "MABN", "args": {"B": 2, "real_B": 4, "warmup_iters": 1}}}}},
    "nbn": {"arch": {"args": {**TWO, "norm": "NBN"}}, "loss": {"type": "LabelAwareSmoothingLoss"}},
    "distillation": {"arch": {"args": TWO}, "distill": True, "loss": {"type": "RIDELossWithDistill"},
                     "distill_arch": {"type": "ResNet32Model", "args": {**TWO, "layer2_output_dim": 16,
                                                                        "layer3_output_dim": 16}}},
    "bf16": {"trainer": {"amp": "bf16"}, "loss": {"type": "GCLLoss"}},
    "fp16": {"trainer": {"amp": "fp16"}, "loss": {"type": "VSLoss"}},
}


def flags(*parts: str) -> list[str]:
    return [text for part in parts for key, value in PARTS[part].items()
            for text in ("--set", f"{key}={json.dumps(value)}")]


@pytest.fixture
def teacher(shared_runs) -> list:
    """The flag that a distilling run needs."""
    path = shared_runs.models("teacher_of_recipes") / "checkpoint-epoch1.pth"
    if not path.exists():
        shared_runs("teacher_of_recipes", "--epochs", 1, arch={"args": TWO})
    return ["--distill_checkpoint", path]


@pytest.mark.parametrize(("kind", "part"), [
    *(("plain", part) for part in PARTS),      # the others: all together, below
    *((kind, part) for kind in KINDS if kind != "plain" for part in ("muon", "layer decay", "frozen norms"))])
def test_each_part_takes_a_step_with_each_kind(runs, teacher, capsys, kind, part) -> None:
    more = ["--set", "trainer.swa=null"] if kind == "mabn" and part == "average" else []
    runs("try", *flags(part), *more, *(teacher if kind == "distillation" else ()), "--dry_run", **KINDS[kind])
    said = capsys.readouterr().out
    assert "dry run: everything builds and runs" in said
    loss = float(said.split("a training step on ")[1].split("loss ")[1].split()[0])
    assert torch.isfinite(torch.tensor(loss))


@pytest.mark.parametrize("kind", KINDS)
def test_all_parts_together_resume_to_the_bit(runs, teacher, signal_at, same_state, kind) -> None:
    more = [*flags("augmentation", "mixing", "average", "sam", "accumulation", "by step"),
            *(teacher if kind == "distillation" else ()), *(["--set", "trainer.swa=null"] if kind == "mabn" else [])]
    whole = runs("whole", *more, **KINDS[kind])
    signal_at(3)  # two steps an epoch: the first of the second epoch
    stopped = runs("stopped", *more, **KINDS[kind])
    runs(None, "-r", stopped / "checkpoint-epoch2.pth")
    assert not same_state(whole / "checkpoint-epoch2.pth", stopped / "checkpoint-epoch2.pth")
    one, other = (torch.load(run / "checkpoint-epoch2.pth", weights_only=True)["raw_state_dict"]
                  for run in (whole, stopped))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
