"""Where a pipeline computes: the answers of diffusers, remembered until they may have changed."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from checkpoints import pipeline

from ringmark.inversion.models.devices import Remembered, remembering


@pytest.fixture
def network():
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.double(),
        lambda module: module.to("meta"),
        lambda module: setattr(module, "_hf_hook", None),
        lambda module: setattr(module, "_diffusers_hook", None),
    ],
    ids=["cast", "moved", "offloaded by accelerate", "hooked by diffusers"],
)
def test_it_is_asked_again_only_after_a_change(network, change):
    asked = []
    remembered = Remembered(network, lambda: len(asked.append(None) or asked))
    assert [remembered(), remembered()] == [1, 1]
    change(network)
    assert [remembered(), remembered()] == [2, 2]


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
