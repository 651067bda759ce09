"""What test.py does to a trained model's logits, on the weights of a short run, against the formulas."""
import json

import pytest
import torch

import test as test_script
from model.metric import EvalState
from tools.flags import parse_test
from tools.session import open_run
from utils.errors import ConfigError

COUNTS = torch.tensor([120, 77, 50, 32, 21, 13, 8, 5, 3, 2], dtype=torch.float64)
PI = COUNTS / COUNTS.sum()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_trainer):
    """One epoch of three balanced experts, and their logits on test and validation images."""
    folder = tmp_path_factory.mktemp("after")
    run = digits_trainer(folder, "run", "--set", "loss.type=BalPoELoss", "--set", "loss.args={}", "--set",
                         "data_loader.args.image_size=8", "--set", "data_loader.args.sampler=null",
                         "--set", "trainer.amp=false", epochs=1)
    opened = open_run(run.checkpoint)
    found = {}
    with torch.no_grad():
        for split in ("test", "val"):
            parts = [(opened.model(images)["logits"].double(), labels) for images, labels in opened.loader(split)]
            found[split] = [torch.cat(column) for column in zip(*parts)]
    return run.checkpoint, found


def figures(checkpoint, *flags):
    test_script.main(["-r", str(checkpoint), "-d", "cpu", "-q", *map(str, flags)])
    return json.loads((checkpoint.parent / "test_metrics.json").read_text())


def ece(logits, labels):
    state = EvalState(10)
    state.update(logits, labels)
    return state.compute()["ece"]


def right(logits, labels):
    return pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=0.0041)


def test_adjusted_logits_and_class_distributions(trained, tmp_path):
    checkpoint, found = trained
    logits, labels = found["test"]
    z = logits.mean(1)
    assert figures(checkpoint, "--classifier", "la", "--tau", 0.5)["accuracy"] == right(z - 0.5 * PI.log(), labels)
    swept = figures(checkpoint, "--classifier", "la", "--tau", "0:2:0.5", "--tau_metric", "accuracy")
    val, val_labels = found["val"]
    best = max(swept["tau_sweep"]["tau"],
               key=lambda tau: ((val.mean(1) - tau * PI.log()).argmax(1) == val_labels).double().mean())
    assert swept["tau"] == best
    # The loss says that the mean logits are for equal classes: `uniform` changes nothing, `train` adds log pi.
    assert figures(checkpoint, "--prior", "uniform")["accuracy"] == right(z, labels)
    assert figures(checkpoint, "--prior", "train")["accuracy"] == right(z + PI.log(), labels)
    (tmp_path / "prior.txt").write_text(" ".join(map(str, range(1, 11))))
    assert figures(checkpoint, "--prior", tmp_path / "prior.txt")["accuracy"] \
        == right(z + torch.arange(1, 11).log(), labels)
    estimated = figures(checkpoint, "--prior", "estimate")
    assert estimated["prior"] == "estimate" and sum(estimated["class_distribution"]) == pytest.approx(1)
    assert estimated["accuracy"] == right(z + torch.tensor(estimated["class_distribution"]).log(), labels)
    (tmp_path / "prior.txt").write_text("1 2 3")
    args = parse_test(["-r", str(checkpoint), "--prior", str(tmp_path / "prior.txt"), "-q"])
    with pytest.raises(ConfigError, match="10 numbers, one a class"):
        test_script.test(args)


def test_learned_weights_of_experts(trained):
    checkpoint, found = trained
    logits, labels = found["test"]
    first = figures(checkpoint, "--expert_weights", "learn")
    weights = torch.tensor(first["expert_weights"], dtype=torch.float64)
    assert len(weights) == 3 and float(weights.sum()) == pytest.approx(1) and weights.min() > 0.01
    assert first["accuracy"] == right(torch.einsum("nec,e->nc", logits, weights), labels)
    assert figures(checkpoint, "--expert_weights", "learn")["expert_weights"] == first["expert_weights"]


def test_a_temperature_is_fitted_on_validation_images_and_kept(trained):
    checkpoint, found = trained
    val, val_labels = found["val"]
    got = figures(checkpoint, "--calibrate")
    kept = got["calibration"]
    assert kept["before"] == pytest.approx(ece(val.mean(1), val_labels), abs=1e-4)
    cooled = val.mean(1) / kept["temperature"]
    assert kept["after"] == pytest.approx(ece(cooled, val_labels), abs=1e-4)
    z, labels = found["test"][0].mean(1), found["test"][1]
    assert got["accuracy"] == right(z, labels) and got["ece"] == pytest.approx(
        ece(z / kept["temperature"], labels), abs=1e-3)
    assert open_run(checkpoint).temperature == kept["temperature"] != 1
    other = checkpoint.parent / "other.pth"
    other.write_bytes(checkpoint.read_bytes())
    assert open_run(other).temperature == 1      # another file's isn't taken
