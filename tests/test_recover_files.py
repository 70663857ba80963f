"""Files to noise: what is kept is what the recoverer says, and nothing is computed twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import wrap
from PIL import Image

from ringmark.data.images import read_sample, to_array
from ringmark.inversion.decoder import Inverter
from ringmark.inversion.methods import Anderson, ForwardStep
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.tasks.recover import recover_files


@pytest.fixture
def model(tiny_parts):
    parts = {k: tiny_parts[k] for k in ("vae", "unet", "text_encoder", "tokenizer", "scheduler")}
    return wrap(parts)


@pytest.fixture
def files(tmp_path):
    rng, paths = np.random.default_rng(0), []
    for i in range(5):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(paths[-1])
    Image.new("RGB", (16, 16), "red").save(paths[3])
    paths[1].write_text("no image")
    return paths


def test_files_become_noise_in_order_and_what_cannot_be_used_is_named(model, files, tmp_path):
    recoverer = Recoverer(model, Inverter(max_steps=2), 3)
    found = recover_files(recoverer, files, tmp_path / "cache", batch=2)
    assert found.ids == [str(files[i]) for i in (0, 2, 3, 4)]
    assert [error.path for error in found.refused] == [files[1]]
    assert list(found.doubts) == [2] and "flat" in found.doubts[2]
    assert found.noise.shape == (4, 4, 8, 8) and (found.seconds > 0).all()
    images = torch.from_numpy(np.stack([to_array(read_sample(Path(name), (16, 16)).image) for name in found.ids]))
    torch.testing.assert_close(found.noise, recoverer(images).noise, rtol=1e-3, atol=1e-3)


def test_nothing_is_computed_twice(model, files, tmp_path):
    class Counting(Recoverer):
        called = ()

        def latents(self, images):
            self.called += ("decoder",)
            return super().latents(images)

        def noise(self, latents):
            self.called += ("noise",)
            return super().noise(latents)

    first, again, other = (Counting(model, Inverter(max_steps=1), steps) for steps in (3, 3, 4))
    noise = [recover_files(d, files, tmp_path / "cache", batch=8).noise for d in (first, again, other)]
    assert (first.called, again.called, other.called) == (("decoder", "noise"), (), ("noise",))
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    encoders = [Counting(model, Inverter(method, 0), 3) for method in (Anderson(), ForwardStep())]
    noise = [recover_files(d, files, tmp_path / "cache", batch=8).noise for d in encoders]
    assert [d.called for d in encoders] == [("decoder", "noise"), ("decoder",)]  # which finds the same latents
    assert torch.equal(*noise)


def test_nothing_readable_is_an_empty_result(model, files, tmp_path):
    found = recover_files(Recoverer(model, steps=3), files[1:2], tmp_path / "cache")
    assert found.noise.shape == (0, 4, 8, 8) and not found.ids and len(found.refused) == 1
