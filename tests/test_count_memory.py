"""The memory of weights is counted from configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from scripts import count_memory


def test_verification_is_counted_without_text_encoders():
    with torch.device("meta"):
        modules = {"vae": nn.Linear(999, 1000), "text_encoder_2": nn.Linear(1999, 1000)}
    rows = {name: (millions, size) for name, millions, size in count_memory.table(modules)}
    assert rows["verification without"] == rows["vae"] == pytest.approx((1.0, 0.002))
    assert rows["verification with text encoders"] == pytest.approx((3.0, 0.006))


@pytest.mark.slow
def test_the_documented_numbers_are_those_of_the_configs():
    page = (Path(__file__).parents[1] / "docs" / "howto" / "models.md").read_text()
    for name, millions, size in count_memory.table(count_memory.parts()):
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} "))
        assert f" {millions:.0f} |" in row and f" {size:.2f} |" in row
