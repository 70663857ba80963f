"""Marks that are tested in bands: p by hand and its distribution, many keys, shifts, what describes the bands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from identity import of_shape, secret
from scipy import stats

from ringmark.errors import SchemeError
from ringmark.watermark.bank import Bank
from ringmark.watermark.keys.key import Key
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import description, make_key
from ringmark.watermark.schemes.fourier import BandedTest, bands_of
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.statistics import cosine_p, cosine_scores

SHAPE = (1, 64, 64)
NULL = Null.white(SHAPE)


def key(seed: int = 0, **parameters: object) -> Key:
    return make_key("tree-ring", **of_shape(SHAPE), secret=secret(seed), **parameters)


def white(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_only_recommended_rand_keys_have_bands():
    assert key().metadata["bands"] == [[1, 4], [5, 9]] and TreeRing(key()).placement.radii == (1, 9)
    for parameters in ({"radii": (1, 9)}, {"pattern": "ring"}, {"pattern": "zeros"}, {"mask": "published"}):
        assert "bands" not in key(**parameters).metadata
    assert bands_of((4, 10)) == bands_of((1, 5)) == ()


def test_bands_as_text():
    assert description(key().metadata, ()).get("bands") == "1-4,5-9"


def test_p_by_hand():
    scheme = TreeRing(key())
    test = scheme.on(NULL)
    noise = torch.cat([white(5), 0.5 * scheme.embed(white(1, 1)) + white(1, 2)])
    observed = test.observe(noise)
    assert isinstance(test, BandedTest) and sorted(np.concatenate(test.bands)) == list(range(observed.shape[1]))
    p = [cosine_p(cosine_scores(observed[:, b], test.template[b]), len(b)) for b in test.bands]
    expected = stats.chi2.sf(-2 * np.log(p).sum(0), 4)
    scores = test.score(observed)
    assert 10 ** test.log10_p(scores) == pytest.approx(expected, rel=1e-9)
    assert 10**-scores == pytest.approx(expected, rel=1e-9) and expected[5] < 1e-10


def test_each_band_holds_its_rings():
    scheme = TreeRing(key())
    test = scheme.on(NULL)
    for band, (low, high) in zip(test.bands, scheme.bands, strict=True):
        alone = TreeRing(key(radii=(low, high)))
        assert len(band) == alone.numbers
        noise = white(1)
        assert set(test.observe(noise)[0, band].round(9)) == set(alone.on(NULL).observe(noise)[0].round(9))


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


@pytest.mark.parametrize("bands", [5, [[1]], [[0, 4]], [[4, 1]], [[5, 10]], [["1", 4]], [[1.0, 4]], [None]])
def test_bands_that_are_no_bands(bands):
    sound = key()
    with pytest.raises(SchemeError) as refused:
        TreeRing(Key(sound.metadata | {"bands": bands}, sound.secret))
    assert refused.value.code == "scheme.description"
