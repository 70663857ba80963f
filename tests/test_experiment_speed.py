"""Time by batch size and way of computing: the architectures are those they are named for; the small setting."""

from __future__ import annotations

import pytest
import torch

from scripts.experiments import speed as script

META = torch.device("meta")


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("SD 1.5", 859_520_964),
        ("SD 2.1", 865_910_724),
        ("SDXL", 2_567_463_684),
        ("FLUX.1", 11_891_178_560),
        ("LaVie", 859_520_964 + 453_209_280),
    ],
)
@pytest.mark.slow  # LaVie's: Stable Diffusion 1.5 and AnimateDiff's motion modules
def test_architectures_are_those_of_the_models(name, parameters):
    shape = script.SHAPES[name]
    network = script.network_of(shape, torch.bfloat16, META)
    assert sum(p.numel() for p in network.parameters()) == parameters
    with torch.inference_mode():
        found = network(**script.inputs_of(shape, 2, device=META, dtype=torch.bfloat16), return_dict=False)[0]
    assert len(found) == 2 and found.numel() == 2 * shape.frames * torch.Size(shape.latent).numel()


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    ways = ("--way", "eager", "--way", "channels-last")
    found = experiment("speed", tmp_path, *ways, "--batch", 1, "--rounds", 1, figure=False)
    rows = {(row["part"], row["way"]): row for row in found["rows"]}
    assert set(rows) == {(part, way) for part in ("encoder", "decoder", "network") for way in ways[1::2]}
    assert all(row["ms an image"] > 0 and row["error"] < 1e-4 for row in found["rows"])
    assert rows["network", "eager"]["error"] == 0
