"""A file made to run code when it is unpickled: refused wherever a checkpoint may be named, and nothing in it runs."""

import contextlib
import json
import os
import pickle

import pytest
import torch

RIDE = ["train.py", "-c", "configs/digits_lt_ride.json"]
DISTILL = ["train.py", "-c", "configs/digits_lt_ride_distill.json"]


class Touch:
    """Unpickled by Python's own reader, it creates a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def write(path, kind, marker):
    """A checkpoint whose weights can be read, with the attack beside them (as RIDE keeps its config) or among them."""
    weights = {"backbone.conv1.weight": torch.ones(16, 3, 3, 3)}
    if "among" in kind:
        weights["backbone.linear.weight"] = Touch(marker)
    content = {"arch": "ResNet32Model", "epoch": 1, "state_dict": weights,
               "config": {} if "among" in kind else Touch(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Touch(marker)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization="stacked" not in kind)


@pytest.mark.parametrize(("command", "kind"), [
    ([*RIDE, "-r", "FILE"], "zip, beside the weights"),
    (["train.py", "-r", "FILE"], "stacked, among the weights"),
    ([*RIDE, "--pretrained", "FILE"], "zip, among the weights"),
    ([*RIDE, "--load_crt", "FILE"], "stacked, beside the weights"),
    ([*DISTILL, "--distill_checkpoint", "FILE"], "zip, beside the weights"),
    (["test.py", "-r", "FILE"], "pickle")],
    ids=lambda value: " ".join(value[-3:]) if isinstance(value, list) else value)
def test_is_refused_and_not_run(call_cli, tmp_path, command, kind):
    folder, marker = tmp_path / "files", tmp_path / "ran"
    folder.mkdir()
    file = folder / "innocent.pth"
    write(file, kind, marker)
    with contextlib.suppress(Exception):  # of a bare pickle torch says that it is no checkpoint, after it ran it
        torch.load(file, weights_only=False)
    assert marker.exists(), "no attack at all"
    marker.unlink()

    place = [] if command[0] == "test.py" else ["--save_dir", tmp_path / "saved"]
    done = call_cli([file if word == "FILE" else word for word in command] + ["-d", "cpu", *place])
    assert not marker.exists(), "the file's code ran"
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1 and "innocent.pth: refused" in done.stderr, done.stderr
    assert "Traceback" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["files"]   # no run folder, no figures
    assert [path.name for path in folder.iterdir()] == ["innocent.pth"]


@pytest.mark.parametrize("arch", [
    {"type": "os:system", "args": {"command": "touch ran"}},
    {"type": "ResNet32Model", "args": {"num_classes": 10, "norm": {"type": "os:mkdir", "args": {"path": "ran"}}}}])
def test_a_table_of_runs_runs_none_of_their_code(call_cli, tmp_path, monkeypatch, arch):
    """What a model costs is told without the class that a run's config.json names."""
    folder = tmp_path / "models" / "ce" / "run"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({
        "name": "ce", "arch": arch, "data_loader": {"type": "DigitsLTDataLoader", "args": {}}, "trainer": {}}))
    (folder / "checkpoint-epoch1.pth").touch()
    made = []
    monkeypatch.setattr("model.model.build_model", lambda *_, **more: made.append(more))
    done = call_cli(["-m", "tools.compare", tmp_path], cwd=tmp_path, check=True)
    assert "ce/run" in done.stdout and not made and not (tmp_path / "ran").exists()
