"""Each image is drawn from its own seed, marked or not."""

from __future__ import annotations

import torch
from identity import MODEL, key

from ringmark.watermark.embed import generate, initial_noise
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.tree_ring import TreeRing


def test_generate_draws_each_image_from_its_own_seed():
    mine = TreeRing(key(6))
    whole = list(generate(MODEL, ["a", "b", "c"], [3, 4, 5], scheme=mine, steps=2, guidance=1.0, batch=2))
    (alone,) = generate(MODEL, ["c"], [5], scheme=mine, steps=2, guidance=2.0, batch=1)
    assert torch.equal(whole[2].noise, alone.noise) and torch.allclose(whole[2].image, alone.image)
    assert [(d.prompt, d.seed) for d in whole] == [("a", 3), ("b", 4), ("c", 5)]
    observe = mine.on(Null.white(MODEL.latent_shape)).observe
    planted = observe(mine.embed(torch.zeros(1, *MODEL.latent_shape)))
    assert abs(observe(whole[0].noise[None]) - planted).max() < 1e-4


def test_unmarked_images_are_drawn_from_the_noise_of_their_seeds():
    (drawn,) = generate(MODEL, ["a"], [3], steps=2, guidance=1.0)
    assert torch.equal(drawn.noise, initial_noise([3], MODEL.latent_shape)[0])
    assert torch.equal(initial_noise([1, 3], MODEL.latent_shape)[1], initial_noise([3], MODEL.latent_shape)[0])
