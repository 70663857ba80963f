"""Changed pictures are found, whatever the change; p holds for any picture and counts every test."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from identity import MODEL, key, samples, secret
from PIL import Image
from scipy import stats

from ringmark.data.images import Sample, WithParts, from_array, samples_of
from ringmark.errors import SchemeError
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.attacks.chains import apply
from ringmark.watermark.detect.geometry import IDENTITY, Candidate, Grid, Group, all_shifts, undo
from ringmark.watermark.detect.search import Found, Search, _Keys
from ringmark.watermark.embed import generate, initial_noise
from ringmark.watermark.schemes.base import Waves, scheme_of
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.tasks.keygen import new_key

SMALL = Search(grid=Grid(anchors=12, spacing=5, enlarged=6, stretched=2), refined=1, early_steps=1, steps=2)
MINE, OTHER = key(1, "rand", (1, 6)), key(2, "rand", (1, 6))
SCHEMES = {each.fingerprint: scheme_of(each) for each in (OTHER, MINE)}


def marked(seed: int = 5) -> torch.Tensor:
    return TreeRing(MINE).embed(initial_noise([seed], MODEL.latent_shape))


def found_in(noise: torch.Tensor, search: Search = SMALL, **options) -> list[list[Found]]:
    return search(MODEL, SCHEMES, samples(noise), **options)


@pytest.mark.parametrize(
    "change",
    [
        IDENTITY,
        Candidate(0, mirrored=True),
        Candidate(180, mirrored=True),
        Candidate(72.5),
        Candidate(-117.5),
        Candidate(0, 1.04**4),
        Candidate(0, 1, 1.04**2, mirrored=True),
    ],
)
def test_a_changed_picture_is_found(change):
    inverse = Candidate(-change.angle, 1 / change.scale, 1 / change.stretch)
    noise = undo(marked().flip(3) if change.mirrored else marked(), [inverse])
    ((other, mine),) = found_in(noise)
    assert mine.p_value < 1e-3 < other.p_value and mine.candidate._replace(angle=0) == change._replace(angle=0)
    assert (mine.candidate.angle - change.angle) % 360 == 0 and np.abs(mine.shift).max() <= 1
    assert mine.calls == 2 * 1 + 2


def test_a_shift_is_found_and_a_group_of_samples_is_as_one_by_one():
    noise = torch.cat([marked().roll((3, -5), (2, 3)), initial_noise([7, 8], MODEL.latent_shape)])
    together = found_in(noise)
    assert together[0][1].shift == (-5, 3) and together[0][1].note.endswith("noise shifted 3 down and -5 right")
    for one, several in zip([row for x in noise.split(1) for row in found_in(x, batch=1)], together, strict=True):
        for a, b in zip(one, several, strict=True):
            assert (a.key, a.candidate, a.shift) == (b.key, b.candidate, b.shift)
            assert a.score == pytest.approx(b.score, abs=1e-4)


def test_a_picture_within_another_is_found():
    sheet, mine = samples(torch.cat([initial_noise([7], MODEL.latent_shape), marked()]))
    others = [sample.image for sample in samples(initial_noise([8, 9], MODEL.latent_shape))]
    for parts in ((mine.image,), (others[0], mine.image, others[1])):
        ((_, found),) = SMALL(MODEL, SCHEMES, [replace(sheet, parts=parts)])
        assert found.within and found.p_value < 1e-3 and "a picture within this one" in found.note


def test_what_is_not_promising_is_left():
    (row,) = found_in(initial_noise([7], MODEL.latent_shape))
    assert [each.log10_p for each in row] == [0.0, 0.0] and {each.calls for each in row} == {2}
    (row,) = found_in(initial_noise([7], MODEL.latent_shape), replace(SMALL, limit=9.0))
    assert {each.calls for each in row} == {4} and all(each.log10_p <= 0 for each in row)


def coloured(seed: int) -> torch.Tensor:
    """Noise (1, 3, 32, 32) far from white: a few waves outweigh all others."""
    noise = initial_noise([seed], (3, 32, 32))
    ramp = torch.linspace(0, 6, 32)
    return noise + 5 * torch.sin(ramp)[:, None] + 3 * torch.cos(ramp)


def keys(number: int, waves: Waves) -> _Keys:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(number, *waves.values.shape, dtype=torch.complex64, generator=generator)
    return _Keys(numbers=list(range(number)), waves=waves, values=values)


def test_p_is_uniform_over_keys_whatever_the_picture():
    still = Group([IDENTITY, Candidate(30, 1.2)], torch.zeros(1, 2), tests=1)
    (tested,) = keys(2000, scheme_of(MINE).waves).tested(coloured(1), [still])
    assert tested.log10_p.shape == (1, 2, 2000)
    for candidate in (0, 1):
        assert stats.kstest(10 ** tested.log10_p[0, candidate], "uniform").pvalue > 0.01


def test_the_best_of_all_tests_is_called_no_better_than_it_is():
    groups = Grid(enlarged=4, stretched=1).upright((32, 32))
    least = np.min([t.log10_p[0].min(0) for t in keys(300, scheme_of(MINE).waves).tested(coloured(2), groups)], 0)
    for alpha in (0.3, 0.1, 0.01):
        assert stats.binom.sf((least <= np.log10(alpha)).sum() - 1, 300, alpha) > 1e-3
    assert (least <= 0).mean() > 0.05  # nor much worse


def test_waves_of_a_key_are_those_it_embeds():
    scheme = TreeRing(MINE)
    here = Group([IDENTITY], all_shifts((32, 32), 1), tests=1)
    mine = _Keys(numbers=[0], waves=scheme.waves, values=scheme.waves.values[None].to(torch.complex64))
    (tested,) = mine.tested(marked(), [here])
    assert tested.cosine[0, 0, 0] > 0.9 and here.shifts[tested.at[0, 0, 0]].tolist() == [0, 0]
    assert scheme.waves.values.shape == (2, len(scheme.waves.ring)) and 4 * len(scheme.waves.ring) == scheme.numbers


@pytest.mark.parametrize("pattern", ["ring", "zeros"])
def test_what_cannot_be_searched_for_is_refused(pattern):
    with pytest.raises(SchemeError) as caught:
        SMALL(MODEL, {"mine": scheme_of(key(1, pattern))}, samples(marked()))
    assert caught.value.code == "scheme.no-search" and caught.value.subject == "key mine"


def test_what_was_found_in_words():
    found = Found(
        sample_id="a",
        key="k",
        score=0.5,
        log10_p=-400.0,
        candidate=Candidate(75.0, 1.27),
        shift=(-1.5, 2.0),
        tests=9,
        calls=3,
        seconds=1.0,
    )
    assert found.note == "found by the search: rotated by 75°, enlarged 1.27 times, noise shifted 2 down and -1.5 right"
    assert replace(found, candidate=IDENTITY, shift=(0.0, 0.0)).note == "found by the search: unchanged"
    assert found.p_value == 0 and replace(found, log10_p=-2.0).p_value == 0.01


@pytest.mark.slow
def test_pictures_of_pocket():
    pocket = LatentModel.from_pretrained("pocket")
    drawn_with, other = (new_key(pocket, "tree-ring", secret=secret(i)) for i in (0, 1))
    (drawn,) = generate(pocket, ["lake at day with green hills"], [3], key=drawn_with, steps=10)
    image = from_array(drawn.image.numpy())
    search = Search(grid=Grid(anchors=4, spacing=5, enlarged=8, stretched=1), refined=1)
    schemes = {each.fingerprint: scheme_of(each) for each in (drawn_with, other)}
    some = [Sample(spec, apply(spec, image, 1)) for spec in ("rotation:90", "crop:0.75", "flip")]
    page = Image.new("RGB", (400, 300), (240, 240, 245))
    page.paste(image.resize((180, 180), Image.Resampling.BICUBIC), (150, 80))
    some += samples_of(apply("jpeg:90", page, 0), lambda _: WithParts([pocket.image_size]), id="shown")
    for mine, another in search(pocket, schemes, some):
        assert mine.p_value < 1e-3 < another.p_value and mine.within is (mine.sample_id == "shown")
