"""RIDE's loss and gradient on fixed logits: figures that a program of its own, in plain Python floats and with central
differences, worked out from the paper's formulas. Whoever changes the loss and its slow twin together is told here."""
import json
from pathlib import Path

import pytest
import torch

from model.loss import build_loss

FIGURES = json.loads(Path(__file__).with_name("ride_figures.json").read_text())


@pytest.mark.parametrize("case", FIGURES["cases"], ids=lambda case: case["name"])
def test_loss_and_gradient_are_those_of_the_formulas(case):
    logits = torch.tensor(FIGURES["logits"], dtype=torch.float64, requires_grad=True)
    outputs = {"logits": logits, "output": logits.mean(1),
               "teacher": torch.tensor(FIGURES["teacher"], dtype=torch.float64)}
    criterion = build_loss({"type": case["type"], "args": case["args"]}, FIGURES["counts"])
    criterion.set_epoch(case["epoch"])
    loss = criterion(outputs, torch.tensor(FIGURES["target"]))
    assert loss.item() == pytest.approx(case["loss"], rel=1e-10)
    loss.backward()
    assert torch.allclose(logits.grad, torch.tensor(case["gradient"], dtype=torch.float64), atol=1e-6)
