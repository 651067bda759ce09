"""Every trainer against every fault: a stop, a batch that isn't finite, a full disk; and it goes on to the last bit.

What today's recipes add is on in all of them: averaged weights, and steps of two batches.
"""

import errno
import signal

import pytest
import torch

import base.resumable as resumable
from tests.scenes import SCENES, SMALL, scenes, shallow_resnet50  # noqa: F401 (fixtures)
from trainer import TRAINERS
from trainer.trainer import Trainer
from utils.checkpoint.store import load_checkpoint
from utils.errors import RunError

TWO = {"num_experts": 2, "use_norm": True}
SECTIONS = {
    "Trainer": {"arch": {"args": {**TWO, "add_bt": 1}}, "loss": {"type": "RIDELoss"}, "trainer": {"amp": "bf16"},
                "data_loader": {"args": {"mix": {"type": "mixup"}}}},
    "DistillTrainer": {"arch": {"args": TWO}, "distill": True, "loss": {"type": "RIDELossWithDistill"},
                       "distill_arch": {"type": "ResNet32Model", "args": {
                           **TWO, "layer2_output_dim": 16, "layer3_output_dim": 16}}},
    "ExpertAssignmentTrainer": {"arch": {"type": "ResNet32EAModel", "args": TWO}, "resume_state_dict_only": True},
    "DetectionTrainer": {},
}


@pytest.fixture(params=TRAINERS)
def kind(request):
    if request.param == "DetectionTrainer":
        pytest.importorskip("pycocotools")
    return request.param


@pytest.fixture
def train(runs, shared_runs, kind, request):
    """`train(run_id, *flags, **trainer)` trains two epochs with this kind of trainer; the run's models folder."""
    flags, sections = (), SECTIONS[kind]
    if kind == "DetectionTrainer":
        request.getfixturevalue("shallow_resnet50")
        runs.base |= {
            "arch": {"type": "MaskRCNNR50FPNModel", "args": dict(SMALL)}, "optimizer": {"type": "SGD", "args": {
                "lr": 0.01, "momentum": 0.9}},
            "data_loader": {"type": "DigitScenesDataLoader", "args": {
                **SCENES, "data_dir": str(request.getfixturevalue("scenes")), "batch_size": 3, "min_size": 48}}}
    elif kind != "Trainer":
        teacher = shared_runs.models("two_experts") / "checkpoint-epoch1.pth"
        if not teacher.exists():
            shared_runs("two_experts", "--epochs", 1, trainer={"on_nonfinite": "skip"}, arch={"args": TWO})
        flags = ("--distill_checkpoint" if kind == "DistillTrainer" else "-r", teacher)

    def run(run_id, *more, **trainer):
        if run_id is None:
            return runs(None, *more)
        options = {**sections.get("trainer", {}), "ema": {"decay": 0.9}, "accumulate": 2, "on_nonfinite": "skip"}
        return runs(run_id, *flags, *more, **{**sections, "trainer": {**options, **trainer}})
    return run


@pytest.fixture(autouse=True)
def a_bad_step(monkeypatch):
    """The images of the run's second step hold an infinity."""
    original = Trainer._backward

    def spoilt(images):
        images = [image.clone() for image in images]
        images[0][0, 0, 0] = float("inf")
        return images

    def backward(self, parts):
        if self.global_step == 1:
            parts = [part._replace(images=spoilt(part.images) if isinstance(part.images, list)
                                   else torch.stack(spoilt(part.images))) for part in parts]
        return original(self, parts)
    monkeypatch.setattr(Trainer, "_backward", backward)


def test_faults_cost_nothing(train, kind, runs, monkeypatch, signal_at, same_state):
    whole = train("whole") / "checkpoint-epoch2.pth"
    saved = load_checkpoint(whole)
    assert saved["extra"]["skipped"] == 1 and saved["config"]["trainer"]["type"] == kind
    for weights in ("state_dict", "raw_state_dict"):
        assert all(torch.isfinite(value).all() for value in saved[weights].values())

    save = resumable.save_checkpoint

    def full(path, state):
        if state["epoch"] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, state)
    with monkeypatch.context() as patch:
        patch.setattr(resumable, "save_checkpoint", full)
        with pytest.raises(RunError, match=r"checkpoint-epoch2\.pth: No space left on device.*newest is .*epoch1\.pth"):
            train("faulty")
    faulty = runs.models("faulty")
    assert [path.name for path in faulty.glob("*.pth")] == ["checkpoint-epoch1.pth"]

    with monkeypatch.context():
        signal_at(1, signal.SIGTERM)  # the first step of epoch 2
        train(None, "-r", faulty / "checkpoint-epoch1.pth")
    stopped = load_checkpoint(faulty / "checkpoint-epoch2.pth")
    assert stopped["batch"] == 2
    train(None, "-r", faulty / "checkpoint-epoch2.pth")
    assert same_state(whole, faulty / "checkpoint-epoch2.pth") == []
    raw = load_checkpoint(faulty / "checkpoint-epoch2.pth")["raw_state_dict"]
    assert all(torch.equal(value, raw[name]) for name, value in saved["raw_state_dict"].items())
    assert any(not torch.equal(value, saved["state_dict"][name]) for name, value in raw.items())
    one, other = ((runs.log(name) / "metrics.csv").read_text() for name in ("whole", "faulty"))
    assert one == other


def test_a_step_that_isnt_finite_ends_the_run(train, runs):
    with pytest.raises(RunError, match=r"isn't finite at epoch 1, step 2.*Last good checkpoint: none yet"):
        train("nan", on_nonfinite="stop")
    assert not list(runs.models("nan").glob("*.pth"))
