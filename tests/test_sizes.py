"""Sizes at which a picture may have been drawn, and verdicts on pictures that were resized."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from identity import Identity, key, old_key, verifier
from PIL import Image

from ringmark.data.images import Sample, from_array, samples_of
from ringmark.errors import ModelError, SchemeError
from ringmark.inversion.sizes import candidate_sizes
from ringmark.watermark.detect.geometry import Grid
from ringmark.watermark.detect.search import Search
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.schemes.base import scheme_of
from ringmark.watermark.schemes.tree_ring import TreeRing


class Sized(Identity):
    """The identity on pictures of several usual sizes."""

    sizes = ((32, 32), (24, 40), (40, 24))


MODEL = Sized()
SIDES = st.integers(1, 300)


def picture(noise: torch.Tensor) -> Image.Image:
    """An 8-bit picture of noise (C, h, w), within ± 4 deviations."""
    return from_array(np.clip(noise.numpy() / 4, -1, 1))


def marked(size: tuple[int, int], seed: int = 0, mine=None) -> Image.Image:
    """A picture of this size (H, W) that carries a key."""
    scheme = scheme_of(mine or key(1), (3, *size))
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    return picture(scheme.embed(noise)[0])


def views(image: Image.Image, looking) -> list[Sample]:
    return samples_of(image, looking.sizes_of, id="picture")


@given(height=SIDES, width=SIDES)
def test_there_is_always_a_size_and_the_own_size_comes_first(height: int, width: int) -> None:
    found = candidate_sizes((height, width), MODEL)
    assert found and len(set(found)) == len(found)
    own = height % 8 == 0 and width % 8 == 0 and 256 <= height * width <= 4096
    assert (found[0] == (height, width)) == (own or (height, width) in MODEL.sizes)
    assert set(found[own:]) <= set(MODEL.sizes)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((32, 32), [(32, 32)]),  # as the model draws
        ((40, 24), [(40, 24)]),
        ((64, 64), [(64, 64), (32, 32)]),  # drawn so, or enlarged
        ((48, 80), [(48, 80), (24, 40)]),
        ((100, 100), [(32, 32)]),  # no multiple of 8
        ((1000, 600), [(40, 24)]),
        ((640, 640), [(32, 32)]),  # too large to be drawn
        ((500, 510), [(32, 32)]),  # a little stretched
        ((90, 300), [(24, 40)]),  # none of these shapes: the closest
    ],
)
def test_sizes_that_a_picture_may_have_had(size, expected) -> None:
    assert list(candidate_sizes(size, MODEL)) == expected


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (48, 32), (40, 64)])
def test_a_picture_of_any_size_that_the_model_draws_is_read_as_it_is(size) -> None:
    looking = verifier([key(1)], model=MODEL)
    (judged,) = looking.scan([views(marked(size), looking)])
    assert judged.best.present and judged.noise.shape == (3, *size)
    assert not any("resized" in note for note in judged.best.notes)


@pytest.mark.parametrize(("drawn", "seen"), [((32, 32), (64, 64)), ((24, 40), (48, 80)), ((32, 32), (100, 100))])
def test_a_resized_picture_is_found_at_the_size_it_was_drawn_at(drawn, seen) -> None:
    looking = verifier([key(1)], model=MODEL)
    large = marked(drawn).resize(seen[::-1], Image.Resampling.LANCZOS)
    (judged,) = looking.scan([views(large, looking)])
    assert judged.best.present and judged.noise.shape == (3, *drawn)
    assert f"resized {seen[1]}x{seen[0]} -> {drawn[1]}x{drawn[0]}" in judged.best.notes
    assert looking.detector_of(judged).number_of_tests == judged.tests == len(candidate_sizes(seen, MODEL))


def test_p_pays_for_the_sizes_that_are_tried() -> None:
    one, two = (verifier([key(1)], model=MODEL, sizes=sizes) for sizes in ([(32, 32)], [(32, 32), (64, 64)]))
    image = picture(initial_noise([3], (3, 32, 32))[0])
    (first,), (both,) = (list(looking.scan([views(image, looking)])) for looking in (one, two))
    (second,) = verifier([key(1)], model=MODEL, sizes=[(64, 64)]).scan([views(image, two)[1:]])
    assert both.best.p_value == pytest.approx(min(1, 2 * min(first.best.p_value, second.best.p_value)))
    assert two.settings()["sizes"] == [[32, 32], [64, 64]] and "sizes" not in verifier([], model=MODEL).settings()


def test_later_sizes_are_not_tried_once_a_key_is_found() -> None:
    looking = verifier([key(1)], model=MODEL)
    calls, original = [], looking.recoverer.latents
    looking.recoverer.latents = lambda images, encoded: calls.append(tuple(images.shape)) or original(images, encoded)
    found, missed = views(marked((64, 64)), looking), views(picture(initial_noise([4], (3, 64, 64))[0]), looking)
    assert [j.best.present for j in looking.scan([found, missed, found])] == [True, False, True]
    assert calls == [(3, 3, 64, 64), (1, 3, 32, 32)]


def test_unmarked_pictures_tried_at_two_sizes_are_rarely_accused() -> None:
    """P(p ≤ α) ≤ α, and not far below: the two tests are on nearly the same noise."""
    looking = verifier([key(1)], model=MODEL, method="encoder")
    noise = torch.randn(400, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    p = np.array([j.best.p_value for j in looking.scan((views(picture(x), looking) for x in noise), batch=50)])
    for alpha in (0.05, 0.2):
        assert (p <= alpha).mean() <= alpha + 3 * (alpha / len(p)) ** 0.5
    assert (p <= 0.2).mean() > 0.05


def test_a_search_is_one_more_test_and_is_made_at_the_first_size() -> None:
    looking = verifier([key(1, "rand")], model=MODEL, search=Search(grid=Grid(anchors=1, spacing=180)))
    (judged,) = looking.scan([views(picture(initial_noise([5], (3, 64, 64))[0]), looking)])
    assert judged.tests == 3


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ModelError) as caught:
        verifier([key(1)], model=MODEL, sizes=[(30, 30)])
    assert caught.value.code == "model.size"


def test_an_old_key_is_looked_for_at_its_own_size_only() -> None:
    mine = key(1)
    old = old_key(mine, TreeRing(mine).spectrum)
    assert verifier([mine], model=MODEL).sizes_of((64, 64)) == ((64, 64), (32, 32))
    assert verifier([mine, old], model=MODEL).sizes_of((64, 64)) == ((32, 32),)
    assert verifier([old], model=MODEL).sizes_of((24, 40)) == ((32, 32),)


def test_a_key_of_power_alone_is_looked_for_at_the_native_size_only() -> None:
    """Power strays from ring to ring; without references of that size, p of *zeros* would be too small."""
    assert verifier([key(1, "zeros")], model=MODEL).sizes_of((64, 64)) == ((32, 32),)
    with pytest.raises(SchemeError) as caught:
        verifier([key(1, "zeros")], model=MODEL, sizes=[(64, 64)])
    assert caught.value.code == "scheme.unranked"
