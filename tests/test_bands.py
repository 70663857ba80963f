"""Marks that are tested in bands: p by hand and its distribution, many keys, shifts, what describes the bands."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from identity import of_shape, secret
from scipy import stats

from ringmark.errors import SchemeError
from ringmark.watermark.bank import Bank
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Null
from ringmark.watermark.schemes import _bands, _parse_bands
from ringmark.watermark.schemes.bands import recommend_bands
from ringmark.watermark.schemes.base import description, make_key
from ringmark.watermark.schemes.fourier import BandedTest, Placement
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.statistics import cosine_p, cosine_scores

SHAPE = (3, 64, 64)
LOW, HIGH = {"channels": [0, 1, 2], "radii": [2, 3]}, {"channels": [1], "radii": [4, 9]}
NULL = replace(Null.white(SHAPE), layout_known=True)


def key(seed: int = 0, **parameters: object) -> Key:
    """A key with the bands LOW and HIGH, unless it is made in another way."""
    parameters = parameters or {"bands": [LOW, HIGH]}
    return make_key("tree-ring", **of_shape(SHAPE), secret=secret(seed), **parameters)


def changed(made: Key, **fields: object) -> Key:
    return Key(made.metadata | fields, made.secret)


def white(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, *SHAPE, generator=torch.Generator().manual_seed(seed))


def refusal(make) -> SchemeError:
    with pytest.raises(SchemeError) as caught:
        make()
    return caught.value


def test_only_recommended_rand_keys_have_bands():
    bands = key(pattern="rand").metadata["bands"]
    assert bands == [LOW, {"channels": [0, 1, 2], "radii": [4, 9]}]
    for parameters in ({"radii": (1, 9)}, {"pattern": "ring"}, {"pattern": "zeros"}, {"mask": "published"}):
        assert "bands" not in key(**parameters).metadata
    assert [band["channels"] for band in key(channels=(1,)).metadata["bands"]] == [[1], [1]]


def test_low_rings_that_take_too_much_of_the_budget_make_no_band_of_their_own():
    (one,) = recommend_bands(None, (4, 16, 16))
    assert one.radii[0] == 1
    low, high = recommend_bands(None, (4, 32, 32))
    assert (low.radii, high.radii[0]) == ((2, 3), 4)


def test_the_mark_takes_the_bins_of_its_bands_alone():
    scheme, noise = TreeRing(key()), white(4)
    before, after = (torch.fft.fft2(x.double(), norm="ortho") for x in (noise, scheme.embed(noise)))
    moved = (after - before).abs().amax(0) > 1e-3
    ring = scheme.ring
    assert torch.equal(moved[1], (ring >= 2) & (ring <= 9))
    assert torch.equal(moved[0], (ring >= 2) & (ring <= 3)) and torch.equal(moved[0], moved[2])
    share = sum(Placement(tuple(b["channels"]), tuple(b["radii"])).share(SHAPE) for b in (LOW, HIGH))
    assert moved.double().mean() == pytest.approx(share)
    power = scheme.spectrum.abs().square().sum((1, 2)) / scheme.marked.sum((1, 2))
    assert power == pytest.approx([1, 1, 1])


def test_keys_from_before_bands_had_channels_are_as_they_were():
    whole = key(channels=(0, 2), radii=(1, 9))
    old = changed(whole, bands=[[1, 4], [5, 9]])
    assert torch.equal(TreeRing(whole).embed(white(2)), TreeRing(old).embed(white(2)))
    assert TreeRing(old).bands == (Placement((0, 2), (1, 4)), Placement((0, 2), (5, 9)))
    assert description(old.metadata, ()).get("bands") == "1-4; 5-9"


def test_bands_as_text():
    text = "2-3 in channels 0-2; 4-9 in channel 1"
    assert description(key().metadata, ()).get("bands") == text and _parse_bands(text) == [LOW, HIGH]
    assert _parse_bands("2-3 in 0,1,2;4-9 in 1") == [LOW, HIGH]
    assert _bands([LOW | {"channels": [2, 0]}]) == "2-3 in channels 2,0"
    for wrong in ("", "2-3", "2-3 in", "in 0", "2 in 0", "2-3 in 0;", "3-2 in 0"):
        with pytest.raises(ValueError, match="use"):
            _parse_bands(wrong)


def test_p_by_hand():
    scheme = TreeRing(key())
    test = scheme.on(NULL)
    noise = torch.cat([white(5), 0.5 * scheme.embed(white(1, 1)) + white(1, 2)])
    observed = test.observe(noise)
    assert isinstance(test, BandedTest) and [each.start for each in test.bands[1:]] == [test.bands[0].stop]
    assert test.bands[0].start == 0 and test.bands[1].stop == observed.shape[1]
    p = [cosine_p(cosine_scores(observed[:, b], test.template[b]), b.stop - b.start) for b in test.bands]
    expected = stats.chi2.sf(-2 * np.log(p).sum(0), 4)
    scores = test.score(observed)
    assert 10 ** test.log10_p(scores) == pytest.approx(expected, rel=1e-9)
    assert 10**-scores == pytest.approx(expected, rel=1e-9) and expected[5] < 1e-10


def test_each_band_holds_its_rings():
    scheme = TreeRing(key())
    test = scheme.on(NULL)
    noise = white(1)
    for at, band in zip(test.bands, scheme.bands, strict=True):
        alone = TreeRing(key(channels=band.channels, radii=band.radii))
        assert at.stop - at.start == alone.numbers
        assert set(test.observe(noise)[0, at].round(9)) == set(alone.on(NULL).observe(noise)[0].round(9))


def test_p_of_unmarked_noise_is_uniform():
    test = TreeRing(key()).on(NULL)
    p = 10 ** test.log10_p(test.score(test.observe(white(1500))))
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_the_density_is_that_of_the_score():
    test = TreeRing(key()).on(NULL)
    s = np.linspace(0, 12, 20001)
    assert np.trapezoid(test.density(s), s) == pytest.approx(1, abs=1e-6) and test.density(np.array([-1.0])) == 0


def test_scores_of_many_keys_are_those_of_each():
    schemes = [TreeRing(key(seed)) for seed in range(4)]
    noise = torch.cat([0.5 * schemes[2].embed(white(1)) + white(1, 5), white(3, 1)])
    observed = schemes[0].on(NULL).observe(noise)
    alone = np.stack([scheme.on(NULL).score(observed) for scheme in schemes], 1)
    assert Bank(schemes, NULL).scores(observed) == pytest.approx(alone, rel=1e-6, abs=1e-6)
    assert alone[0].argmax() == 2


REFUSED = ("scheme.bands", "scheme.channels", "scheme.description")


@pytest.mark.parametrize(
    "bands",
    [
        *(5, [], [[1]], [[1, 4]], [[4, 2]], [["2", 4]], [[2.0, 4]], [None], [[]], {}),
        *([LOW | {"channels": []}], [LOW | {"channels": [0, 0]}], [LOW | {"radii": [3, 2]}]),
        *(
            [LOW, LOW],
            [LOW, HIGH | {"radii": [3, 9]}],
            [{"channels": [0]}],
            [LOW | {"radii": [2, 3, 4]}],
            [[2, 4], [4, 9]],
        ),
    ],
)
def test_bands_that_are_no_bands(bands):
    assert refusal(lambda: TreeRing(changed(key(), bands=bands))).code in REFUSED


def test_bands_of_channels_that_are_not_there():
    assert refusal(lambda: TreeRing(changed(key(), bands=[LOW | {"channels": [3]}]))).code == "scheme.channels"


OUTSIDE = ([1, 4], LOW | {"radii": [1, 3]}, HIGH | {"radii": [4, 10]}, LOW | {"channels": [3]})


@pytest.mark.parametrize("beyond", OUTSIDE)
def test_bands_lie_within_the_mark_that_is_described(beyond):
    made = changed(key(), channels=[0, 1, 2], radii=[2, 9], bands=[beyond])
    assert refusal(lambda: TreeRing(made)).code == "scheme.bands"


def test_bands_of_new_keys_that_cannot_be():
    bands = [LOW, HIGH]
    assert refusal(lambda: key(bands=bands, radii=(2, 9))).code == "scheme.both"
    assert refusal(lambda: key(bands=bands, channels=(0,))).code == "scheme.both"
    assert refusal(lambda: key(bands=[])).code == "scheme.bands"
    assert refusal(lambda: key(bands=bands, pattern="zeros")).code == "scheme.one-band"
    assert refusal(lambda: key(bands=bands, mask="published")).code == "scheme.one-band"
    assert refusal(lambda: TreeRing(changed(key(), pattern="zeros"))).code == "scheme.one-band"
    assert refusal(lambda: key(bands=bands, budget=0.01)).code == "scheme.budget"
    assert refusal(lambda: key(bands=[HIGH | {"radii": [4, 32]}])).code == "scheme.radii"
    assert refusal(lambda: key(bands=[HIGH | {"channels": [3]}])).code == "scheme.channels"


def test_huge_radii_are_refused_at_once():
    assert refusal(lambda: TreeRing(changed(key(), bands=[LOW, HIGH | {"radii": [4, 10**30]}]))).code == "scheme.radii"


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (32, 20)])
def test_bands_without_a_direction_at_a_size_are_not_tested(size):
    scheme = TreeRing(key(), (3, *size))
    test = scheme.on(replace(Null.white((3, *size)), layout_known=True))
    noise = torch.randn(300, 3, *size, generator=torch.Generator().manual_seed(0))
    assert all(band.stop - band.start > 1 for band in test.bands)
    p = 10 ** test.log10_p(test.score(test.observe(noise)))
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert np.isfinite(scheme.waves.values.numpy()).all() and len(scheme.key_panels()) == 3
    assert test.score(test.observe(scheme.embed(noise[:2]))).min() > 2


def test_a_size_without_any_band_is_refused():
    assert refusal(lambda: TreeRing(key(), (3, 6, 6))).code == "scheme.size"


def test_a_key_whose_bands_cannot_reach_alpha_together_is_refused():
    """Two features in each band: p = .045 in each at a cosine of .99, .015 together."""
    faint = TreeRing(key(bands=[{"channels": [0, 1], "radii": [r, r]} for r in (1, 2)], pattern="ring"))
    assert faint.numbers == 4 and refusal(lambda: faint.check_findable(1e-3)).code == "scheme.unfindable"
    faint.check_findable(0.02)


def test_low_rings_are_not_tested_where_the_layout_is_unknown():
    scheme, unknown = TreeRing(key()), replace(NULL, layout_known=False)
    test, high = scheme.on(unknown), TreeRing(key(channels=(1,), radii=(4, 9)))
    noise = torch.cat([white(40), 0.2 * scheme.embed(white(1, 1)) + white(1, 2)])
    assert test.observe(noise) == pytest.approx(high.on(NULL).observe(noise))
    layout = torch.cos(2 * torch.pi * 2 * torch.arange(64) / 64)[:, None].expand(3, 64, 64)  # on ring 2
    assert test.score(test.observe(noise + layout)) == pytest.approx(test.score(test.observe(noise)), abs=1e-4)
    schemes = [TreeRing(key(seed)) for seed in range(3)]
    alone = np.stack([each.on(unknown).score(test.observe(noise)) for each in schemes], 1)
    assert Bank(schemes, unknown).scores(test.observe(noise)) == pytest.approx(alone, rel=1e-6, abs=1e-6)
    low = TreeRing(key(channels=(1,), radii=(1, 3)))
    assert low.on(unknown).observe(noise).shape == low.on(NULL).observe(noise).shape


def test_templates_are_the_features_of_the_spectrum():
    for scheme in (TreeRing(key()), TreeRing(key(channels=(0, 2), radii=(1, 9)))):
        for found, expected in zip(scheme.key_bins, scheme.tested_bins(scheme.hermitian), strict=True):
            assert torch.allclose(found, expected, atol=1e-12)


def test_damaged_bands_are_shown_as_they_are():
    for bands in (5, [3], [{"radii": [1, 2]}], [{"channels": 3, "radii": [1, 2]}]):
        assert description({"scheme": "tree-ring", "bands": bands}, ("scheme",)) == {"bands": str(bands)}


def test_circles_are_tested_in_bands_too():
    scheme = TreeRing(key(bands=[LOW, HIGH], pattern="ring"))
    test, noise = scheme.on(NULL), white(400)
    p = 10 ** test.log10_p(test.score(test.observe(noise)))
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert test.score(test.observe(scheme.embed(noise[:2]))).min() > 5


def test_the_search_goes_by_the_channels_of_the_largest_band():
    waves = TreeRing(key()).waves
    assert waves.channels == (1,) and (int(waves.ring.min()), int(waves.ring.max())) == (2, 9)
    alone = TreeRing(key(channels=(1,), radii=(2, 9))).waves
    assert torch.equal(waves.frequencies, alone.frequencies) and waves.values.abs().square().mean() < 2
    same = TreeRing(key(bands=[{"channels": [0], "radii": [1, 4]}, {"channels": [0], "radii": [5, 9]}])).waves
    whole = TreeRing(key(channels=(0,), radii=(1, 9))).waves
    assert torch.equal(same.frequencies, whole.frequencies) and torch.allclose(same.values, whole.values)
