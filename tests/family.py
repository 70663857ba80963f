"""What holds for every family of models, as tests to inherit: `class TestX(FamilyTests): name = "x"`."""

from __future__ import annotations

from functools import wraps
from typing import Any, ClassVar

import pytest
import torch
from checkpoints import draw
from families import build
from torch import Tensor

from ringmark.inversion.diffusion import invert, sample
from ringmark.inversion.methods import Anderson
from ringmark.inversion.metrics import nmse_db
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.embed import mark
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import make_key, scheme_of
from scripts.experiments.common import score_and_p

PROMPTS = ["a red lake", "old hills under the moon"]


def ddim(scheduler: Any, **changes: Any) -> Any:
    """The deterministic sampler on another scheduler's levels, but for these changes of its configuration."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, **changes)


def packed(latents: Tensor) -> Tensor:
    """(B, C, h, w) → (B, hw/4, 4C), as the pipelines of FLUX.1 do it."""
    from diffusers import FluxPipeline

    return FluxPipeline._pack_latents(latents, *latents.shape)


def unpacked(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse for a picture of this size (H, W)."""
    from diffusers import FluxPipeline

    return FluxPipeline._unpack_latents(latents, *size, 8)


def recorded(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Filled with the latents after each step of this scheduler."""
    latents, own = [], scheduler.step

    @wraps(own)  # pipelines read the signature
    def step(*args: Any, **options: Any) -> Any:
        done = own(*args, **options)
        latents.append(done[0])
        return done

    monkeypatch.setattr(scheduler, "step", step)
    return latents


class FamilyTests:
    """Tests of the tiny pipeline of this name. Pictures are not square, and guidance has another value than usual."""

    name: ClassVar[str]
    family: ClassVar[str]
    channels: ClassVar[int] = 16
    factor: ClassVar[int] = 8
    native: ClassVar[tuple[int, int]] = (128, 128)
    size: ClassVar[tuple[int, int]] = (64, 96)
    call: ClassVar[dict[str, Any]] = {}  # arguments of the pipeline's call besides the usual ones

    @classmethod
    def deterministic(cls, scheduler: Any) -> Any:
        """A scheduler that takes the steps that we invert, on the levels of the pipeline's own."""
        return scheduler

    def given(self, noise: Tensor) -> Tensor:
        """Noise (B, C, h, w) as the pipeline takes it."""
        return noise

    def canonical(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Latents of the pipeline's loop as (B, C, h, w), for a picture of this size (H, W)."""
        return latents

    def guided(self, guidance: float) -> dict[str, Any]:
        """The pipeline's arguments for this scale of guidance; 1 turns it off."""
        return {"guidance_scale": guidance}

    @pytest.fixture(scope="class")
    @classmethod
    def pipe(cls) -> Any:
        pipe = build(cls.name)
        pipe.scheduler = cls.deterministic(pipe.scheduler)
        return pipe

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, pipe: Any) -> LatentModel:
        return LatentModel(pipe, name=cls.name)

    @pytest.fixture(scope="class")
    @classmethod
    def noise(cls) -> Tensor:
        return draw(2, cls.channels, *(side // cls.factor for side in cls.size))

    def test_latents_are_those_of_the_family(self, model, noise):
        assert model.kind == {"family": self.family, "channels": self.channels, "factor": self.factor}
        assert model.image_size == self.native
        assert model.noise_shape(self.size) == noise.shape[1:]

    @pytest.mark.parametrize("guidance", [1.0, 3.0])
    def test_our_walk_draws_the_pipelines_picture(self, pipe, model, noise, guidance, monkeypatch):
        latents = sample(model, noise, model.condition(PROMPTS, guidance=guidance), model.schedule(4, self.size))
        theirs = recorded(pipe.scheduler, monkeypatch)
        drawn = self.draw(pipe, self.size, guidance, output_type="pt", latents=self.given(noise))
        assert torch.allclose(latents, self.canonical(theirs[-1], self.size), rtol=1e-4, atol=1e-4)
        assert drawn.shape == (2, 3, *self.size) and drawn.std() > 0.05
        assert torch.allclose((model.decode(latents) / 2 + 0.5).clamp(0, 1), drawn, rtol=0, atol=1e-4)

    def draw(self, pipe: Any, size: tuple[int, int], guidance: float = 3.0, **arguments: Any) -> Any:
        """What the pipeline draws of the prompts, in four steps."""
        call = {"height": size[0], "width": size[1], "num_inference_steps": 4, "output_type": "latent"} | self.call
        return pipe(prompt=PROMPTS, **call | self.guided(guidance) | arguments).images

    @torch.inference_mode()
    def test_encoding_scales_latents_as_decoding_expects_them(self, model):
        images = draw(1, 3, *self.size).clamp(-1, 1)
        latents = model.encode(images)
        assert latents.shape == (1, *model.noise_shape(self.size))
        assert torch.allclose(model.family.normalise(model.vae, self.posterior_mean(model.vae, images)), latents)
        assert torch.allclose(model.decode(latents), self.reconstruction(model.vae, images), atol=1e-5)

    def posterior_mean(self, vae: Any, images: Tensor) -> Tensor:
        return vae.encode(images).latent_dist.mode()

    def reconstruction(self, vae: Any, images: Tensor) -> Tensor:
        return vae.decode(self.posterior_mean(vae, images)).sample

    def test_latents_are_inverted_without_text_encoders(self, model, noise):
        bare = build(self.name, prompts=False)
        bare.scheduler = self.deterministic(bare.scheduler)
        blind, schedule = LatentModel(bare, name=self.name, empty=model.empty), model.schedule(2, self.size)
        x0, same = (m.predict(noise, 2, schedule, m.nothing.expand(2))[0] for m in (model, blind))
        assert blind.identity == model.identity and torch.allclose(x0, same, atol=1e-5)

    def test_saved_and_loaded_it_is_the_same_model(self, pipe, model, noise, tmp_path):
        pipe.save_pretrained(tmp_path, variant="fp16")
        loaded, schedule = LatentModel.from_pretrained(tmp_path), model.schedule(2, self.size)
        assert loaded.identity == model.identity | {"name": tmp_path.name} and loaded.image_size == model.image_size
        x0, again = (m.predict(noise, 2, schedule, m.condition(PROMPTS))[0] for m in (model, loaded))
        assert torch.allclose(x0, again, atol=1e-4)

    def test_exact_inversion_recovers_the_noise(self, model, noise):
        condition, schedule = model.condition(PROMPTS, guidance=3.0), model.schedule(8, self.size)
        latents = sample(model, noise, condition, schedule)
        naive = nmse_db(invert(model, latents, condition, schedule), noise)
        exact = invert(model, latents, condition, schedule, method=Anderson(), max_steps=5, tol=1e-4)
        assert nmse_db(exact, noise).max() < -50 < naive.min() < naive.max() < -10

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_draws_nearly_the_same(self, model, noise, dtype):
        half = LatentModel(build(self.name).to(dtype), name=self.name)
        schedule = model.schedule(2, self.size)
        latents, rounded = (sample(m, noise, m.condition(PROMPTS), schedule) for m in (model, half))
        assert half.dtype == dtype and rounded.dtype == torch.float32
        assert nmse_db(rounded, latents).max() < -20
        assert nmse_db(half.decode(rounded).float(), model.decode(latents)).max() < -20

    def test_marks_are_found_in_what_the_pipeline_draws(self, pipe, model, monkeypatch):
        size = (16 * self.factor, 24 * self.factor)
        key, other = (self.key(model, bytes([i] * 32)) for i in (1, 2))
        latents = recorded(pipe.scheduler, monkeypatch)
        with mark(pipe, key):
            self.draw(pipe, size, generator=torch.Generator().manual_seed(0))
        drawn = self.canonical(latents[-1], size)
        noise = invert(model, drawn, model.nothing.expand(2), model.schedule(4, size))
        p, p_other = (
            score_and_p(scheme_of(k, drawn.shape[1:]), Null.white(drawn.shape[1:]), noise)[1] for k in (key, other)
        )
        assert p.max() < 1e-6 and p_other.min() > 1e-3

    def key(self, model: LatentModel, secret: bytes) -> Key:
        """Of low frequencies, for latents of 16×16."""
        reference = (16 * self.factor, 16 * self.factor)
        return make_key(
            "tree-ring", kind=model.kind, reference=reference, model=model.identity, secret=secret, radii=(1, 4)
        )
