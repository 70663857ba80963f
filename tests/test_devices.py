"""Where a pipeline computes: the answers of diffusers, remembered until they may have changed."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from checkpoints import pipeline

from ringmark.inversion.models.devices import remembered, remembering


@pytest.fixture
def network():
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.double(),
        lambda module: module.to("meta"),
        lambda module: setattr(module, "_hf_hook", None),
        lambda module: setattr(module[0], "_diffusers_hook", None),
    ],
    ids=["cast", "moved", "offloaded by accelerate", "its first layer hooked by diffusers"],
)
def test_it_is_asked_again_only_after_a_change(network, change):
    asked = []

    def answers() -> list[int]:
        return [remembered(network, "which", lambda: len(asked.append(None) or asked)) for _ in range(2)]

    assert answers() == [1, 1]
    change(network)
    assert answers() == [2, 2]
    assert remembered(copy.deepcopy(network), "which", lambda: "a copy is asked anew") == "a copy is asked anew"


def test_the_pipeline_itself_stays_as_it_is(tiny_parts):
    pipe = pipeline(tiny_parts)
    kind, before = type(pipe), dict(vars(pipe))
    other = remembering(pipe)
    assert other._execution_device == pipe._execution_device == torch.device("cpu")
    assert type(pipe) is kind and vars(pipe) == before
    assert isinstance(other, kind) and type(other).__name__ == kind.__name__ and other.components == pipe.components


def test_an_offloaded_network_computes_where_it_is_sent(tiny_parts):
    pipe = pipeline(copy.deepcopy(tiny_parts))
    other = remembering(pipe)
    assert other._execution_device == torch.device("cpu")
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        accelerate.cpu_offload(part, torch.device("cpu"))
    assert next(pipe.unet.parameters()).is_meta
    assert other._execution_device == torch.device("cpu")


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_a_network_that_is_offloaded_in_groups_computes_where_it_is_sent(tiny_parts, kind):
    pipe = pipeline(copy.deepcopy(tiny_parts))
    other = remembering(pipe)
    assert other._execution_device == torch.device("cpu")
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    onto = torch.device("cpu:0")  # differs from "cpu" by name alone
    pipe.unet.enable_group_offload(onload_device=onto, offload_type=kind, **options)
    assert str(other._execution_device) == str(pipe._execution_device) == "cpu:0"


def test_copies_of_a_model_compute_where_they_are(tiny_parts):
    other = remembering(pipeline(copy.deepcopy(tiny_parts)))
    assert other._execution_device == torch.device("cpu")
    copied = copy.deepcopy(other)
    for part in (copied.unet, copied.vae, copied.text_encoder):
        part.to("meta")
    assert copied._execution_device == torch.device("meta") and other._execution_device == torch.device("cpu")
