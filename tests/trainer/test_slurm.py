"""The batch script of docs/many-machines.md, as it stands there, with two tasks and stand-ins for Slurm's commands."""
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from logger.metrics_csv import read_table

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 40
#: As Slurm does: `srun` runs its command once a node; `scontrol` names the nodes and notes what goes back to the queue.
COMMANDS = {
    "srun": 'for node in $(seq "$SLURM_NNODES"); do "$@" & echo $! >> tasks; done\nwait',
    "scontrol": 'case "$1" in show) echo localhost;; requeue) echo "$2" >> requeued;; esac'}


def job(folder: Path) -> subprocess.Popen:
    """The script's process, in `folder`."""
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2",
                   "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(["bash", "job.sh"], cwd=folder, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_job_that_runs_out_of_time_is_requeued_and_goes_on(runs, tmp_path):
    script = re.search(r"```bash\n(.*?)```", (ROOT / "docs/many-machines.md").read_text(), re.DOTALL)[1]
    name = re.search(r"^NAME=(\w+)$", script, re.MULTILINE)[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        script = script.replace("29500", str(free.getsockname()[1]))
    folder = tmp_path / "job"
    (folder / "configs").mkdir(parents=True)
    (folder / "job.sh").write_text(script)
    (folder / "train.py").symlink_to(ROOT / "train.py")
    runs.config(name=name, trainer={"epochs": EPOCHS, "save_dir": "saved"}).rename(folder / "configs" / f"{name}.json")
    for command, text in COMMANDS.items():
        (folder / command).write_text(f"#!/bin/bash\n{text}\n")
        (folder / command).chmod(0o755)
    models = folder / "saved" / "models" / name / "first"

    first, deadline = job(folder), time.monotonic() + 120
    while not list(models.glob("checkpoint-epoch*.pth")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    tasks = (folder / "tasks").read_text().split()
    assert len(tasks) == 2
    for task in tasks:
        os.kill(int(task), signal.SIGTERM)
    said = first.communicate(timeout=120)[0]
    assert not (models / "test_metrics.json").exists(), said
    assert (folder / "requeued").read_text() == "7\n", said

    again = job(folder)
    said = again.communicate(timeout=240)[0]
    assert again.returncode == 0, said
    assert (folder / "requeued").read_text() == "7\n", "a run that is done isn't queued again"
    assert json.loads((models / "test_metrics.json").read_text())["n_samples"] == 11
    epochs = [row["epoch"] for row in read_table(folder / "saved" / "log" / name / "first" / "metrics.csv")]
    assert [int(epoch) for epoch in epochs] == list(range(1, EPOCHS + 1))
