"""Turned and cropped pictures are found on a grid; what is found is as significant as the number of tests allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from identity import of_shape, secret

from ringmark.data.images import Sample, from_array
from ringmark.errors import SchemeError
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.attacks.chains import apply
from ringmark.watermark.detect.geometry import IDENTITY, Candidate, undo
from ringmark.watermark.detect.search import Found, Search, _Look
from ringmark.watermark.embed import generate
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import make_key, scheme_of
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.tasks.keygen import new_key

SHAPE = (4, 32, 32)


def made(seed: int, radii: tuple[int, int] = (3, 5), pattern: str = "rand") -> TreeRing:
    placed = {"pattern": pattern, "channels": (0, 2), "radii": radii}
    return TreeRing(make_key("tree-ring", **of_shape(SHAPE), secret=secret(seed), **placed))


@pytest.fixture(scope="module")
def pocket() -> LatentModel:
    return LatentModel.from_pretrained("pocket")


def test_the_grid_holds_the_identity_once_and_tests_count_all():
    for search in (Search(), Search(angles=(3,), scales=(1.1,)), Search(angles=(), scales=())):
        assert search.grid[0] == IDENTITY and search.grid.count(IDENTITY) == 1
        assert search.inversions == 1 + min(search.dear, len(search.grid) - 1)
    assert len(Search().grid) == 1800
    search = Search(angles=(0, 10), scales=(1.0,), factor=1, slack=1.0)
    assert search.tests(SHAPE) == 32 * 32 + 3 * 3


def test_turned_noise_ranks_what_was_turned(pocket):
    """Were the networks to turn with the picture, the cheap stage alone would tell: here the noise itself is turned."""
    schemes, search = {"other": made(9), "mine": made(0)}, Search(angles=tuple(range(-180, 180, 10)))
    look = _Look(
        search=search,
        recoverer=Recoverer(pocket, search.inverter, search.steps),
        schemes=schemes,
        null=Null.white(SHAPE),
        batch=8,
    )
    for truth in (Candidate(70.0, 1.0), Candidate(-40.0, 1.1249), Candidate(0.0, 1.2653)):
        inverse = Candidate(-truth.angle, 1 / truth.scale)
        noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
        turned = undo(schemes["mine"].embed(noise), [inverse], padding="zeros")
        assert look.promising(turned[0])[0] == truth
        assert len(look.promising(turned[0])) == search.dear


def test_what_was_found_in_words():
    found = Found(
        sample_id="a",
        key="k",
        score=0.5,
        log10_p=-400.0,
        candidate=Candidate(75.0, 1.27),
        shift=(2.0, -1.5),
        tests=9,
        inversions=3,
        seconds=1.0,
    )
    assert found.note == "found by the search: rotated by 75°, enlarged 1.27 times, noise shifted 2 down and -1.5 right"
    assert Found(
        sample_id="a",
        key="k",
        score=0.5,
        log10_p=-2.0,
        candidate=IDENTITY,
        shift=(0.0, 0.0),
        tests=9,
        inversions=3,
        seconds=1.0,
    ).note.endswith(": unchanged")
    assert (
        found.p_value == 0
        and Found(
            sample_id="a",
            key="k",
            score=0.5,
            log10_p=-2.0,
            candidate=IDENTITY,
            shift=(0.0, 0.0),
            tests=9,
            inversions=3,
            seconds=1.0,
        ).p_value
        == 0.01
    )


def test_what_cannot_be_searched_for_is_refused(pocket):
    image = from_array(np.random.default_rng(0).uniform(-1, 1, (3, *pocket.image_size)))
    search = Search(angles=(0,), scales=(1.0,), dear=0, steps=1)
    with pytest.raises(SchemeError) as caught:
        search(pocket, {"silence": made(0, pattern="zeros")}, Null.of_model(pocket), [Sample("a", image)])
    assert caught.value.code == "scheme.no-shifts"


@pytest.mark.slow
def test_the_search_finds_a_turned_and_a_cropped_picture(pocket):
    keys = [new_key(pocket, "tree-ring", secret=secret(i)) for i in (0, 1)]
    schemes, null = {key.fingerprint: scheme_of(key) for key in keys}, Null.of_model(pocket)
    (drawn,) = generate(pocket, ["lake at day with green hills"], [3], key=keys[0], steps=10)
    image = from_array(drawn.image.numpy())
    samples = [Sample(spec, apply(spec, image, 1)) for spec in ("rotation:75", "crop:0.75")]
    search = Search(angles=(-100, -50, 0, 50, 75), scales=(1.0, 1.08, 1.16), dear=2, steps=5)
    turned, cropped = search(pocket, schemes, null, samples)
    assert [f.key for f in turned] == [f.key for f in cropped] == list(schemes)
    for (mine, other), sample, truth in zip(
        (turned, cropped), samples, (Candidate(75, 1), Candidate(0, 1.16)), strict=True
    ):
        assert mine.sample_id == sample.id and mine.candidate == truth and mine.p_value < 1e-3
        assert other.p_value > 0.01 and other.score < mine.score
        assert mine.inversions == other.inversions == search.inversions == 3
        assert mine.tests == search.tests(pocket.latent_shape)
    assert np.abs(turned[0].shift).max() <= 1
    same = search(pocket, schemes, null, samples[1:], batch=1)
    assert same[0][0].score == pytest.approx(cropped[0].score, abs=1e-4)
