"""Every norm in a whole training on digits-LT: it learns, and a stop in the middle changes no bit of it."""
import csv

import pytest
import torch

NORMS = {
    "BatchNorm2d": {}, "NBN": {"where": "all"}, "MABN": {"B": 32, "real_B": 128, "warmup_iters": 4},
    "MABN of 2": {"B": 2, "real_B": 16, "warmup_iters": 4, "normalization_batch_size": 2},
    "BatchRenorm": {"momentum": 0.1, "warmup_iters": 4, "r_ramp_iters": 40, "d_ramp_iters": 80},
    "BatchRenorm of 2": {"momentum": 0.1, "warmup_iters": 4, "r_ramp_iters": 40, "d_ramp_iters": 80,
                         "normalization_batch_size": 2},
    "BatchNorm2d of 2": {"normalization_batch_size": 2},
    "GroupNorm": {}, "InstanceNorm": {}, "LayerNorm": {}, "SyncBatchNorm": {},
}
#: Whose state and arithmetic another one's test goes through as well.
LIKE_OTHERS = {"SyncBatchNorm", "BatchNorm2d of 2", "BatchRenorm of 2", "InstanceNorm", "LayerNorm"}
DIGITS = {"data_loader": {"type": "DigitsLTDataLoader", "args": {
              "data_dir": None, "image_size": 16, "batch_size": 32}},
          "optimizer": {"type": "SGD", "args": {"lr": 0.02}}, "trainer": {"no_decay_scale": True}}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name
                                  for name in NORMS])
def test_a_model_of_each_norm_learns_and_resumes(name, runs, same_state, signal_at):
    arch = {"args": {"norm": {"type": name.split()[0], "args": NORMS[name]}}}
    whole = runs("whole", arch=arch, **DIGITS) / "checkpoint-epoch2.pth"
    signal_at(9)        # of 11 in an epoch: past the warm-ups, into the buffers
    stopped = runs("stopped", arch=arch, **DIGITS)
    assert torch.load(stopped / "checkpoint-epoch1.pth", weights_only=True)["batch"] == 9
    runs(None, "-r", stopped / "checkpoint-epoch1.pth")
    assert same_state(whole, stopped / "checkpoint-epoch2.pth") == []
    rows = list(csv.DictReader((runs.log("whole") / "metrics.csv").open()))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
