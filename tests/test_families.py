"""The records of families themselves, and pipelines of other kinds."""

from __future__ import annotations

import diffusers
import pytest
import torch
from checkpoints import draw
from families import build

from ringmark.errors import ModelError
from ringmark.inversion.models.families import FAMILIES, family_of
from ringmark.inversion.models.flow import RectifiedFlowPipeline
from ringmark.inversion.models.pipeline import LatentModel

CLASSES = [(family, name) for family in FAMILIES for name in family.pipelines]


@pytest.mark.parametrize(("family", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_pipelines_are_classes_of_diffusers_and_of_one_family(family, name):
    kind = RectifiedFlowPipeline if name == "RectifiedFlowPipeline" else getattr(diffusers, name)
    assert family_of(kind) is family


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_usual_sizes_have_whole_patches(family):
    assert len(set(family.sizes)) == len(family.sizes) > 0
    assert all(
        side % (32 if family.name == "sana" else 8 * family.patch) == 0 for size in family.sizes for side in size
    )


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_unpacking_is_the_inverse_of_packing(family):
    latents = draw(2, 16, 4, 6)
    assert torch.equal(family.unpack(family.pack(latents), (4, 6)), latents)


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "FluxFillPipeline", "LTXPipeline", "DDPMPipeline"])
def test_other_pipelines_are_refused_with_what_is_missing(name):
    with pytest.raises(ModelError) as caught:
        family_of(getattr(diffusers, name))
    assert caught.value.code == "model.family"
    assert caught.value.subject == name and "FluxPipeline" in caught.value.fact


@pytest.mark.parametrize("name", ["sdxl", "flux.2", "z-image"])
def test_the_callers_pipeline_is_not_changed(name):
    pipe = build(name)
    config, scheduler, timesteps = dict(pipe.config), pipe.scheduler, getattr(pipe.scheduler, "timesteps", None)
    model = LatentModel(pipe, name=name)
    model.predict(draw(1, *model.noise_shape((64, 64))), 2, model.schedule(2, (64, 64)), model.nothing)
    assert dict(pipe.config) == config and pipe.scheduler is scheduler and scheduler.timesteps is timesteps
