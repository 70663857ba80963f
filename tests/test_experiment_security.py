"""Averaging, forging and finding the ring on noise of known make; the small setting, end to end."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from identity import of_shape, secret
from scipy import stats

from ringmark.inversion.noise_recovery import NoiseRecovery
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.null import Null
from ringmark.watermark.schemes.base import make_key
from ringmark.watermark.schemes.fourier import Placement
from ringmark.watermark.schemes.tree_ring import TreeRing
from scripts.experiments import security as script
from scripts.experiments.common import score_and_p

SHAPE, PLACE, ALPHA = (4, 32, 32), Placement((0, 2), (7, 9)), 1e-3
OF_SHAPE = of_shape(SHAPE, name="none", fingerprint="0")


@pytest.fixture(scope="module")
def key():
    placed = {"channels": PLACE.channels, "radii": PLACE.radii}
    return make_key("tree-ring", **OF_SHAPE, secret=secret(3), **placed)


def recovered(key, number: int, a: float, v: float, seed: int = 0):
    """As an inversion might give it back: everything by a, and white noise of variance v."""
    first, second = initial_noise(list(range(seed, seed + 2 * number)), SHAPE).split(number)
    return a * TreeRing(key).embed(first) + v**0.5 * second


def p_of(key, estimate) -> float:
    """Of noise marked with the estimate, tested with the key, nothing lost."""
    noise = TreeRing(estimate).embed(initial_noise([9], SHAPE))
    return float(score_and_p(TreeRing(key), Null.white(SHAPE), noise)[1][0])


def test_a_key_forged_from_perfect_recovery_is_the_key(key):
    estimate = script.forged(key, 0.7 * TreeRing(key).embed(initial_noise([1], SHAPE)))
    assert torch.allclose(TreeRing(estimate).spectrum, TreeRing(key).spectrum, atol=1e-5)
    assert float(script.likeness(key, [estimate])[0]) == pytest.approx(1)
    assert p_of(key, estimate) < 1e-100


def test_one_poor_image_forges_nothing_many_do(key):
    noise = recovered(key, 256, a=0.05, v=1.0)
    one, many = script.forged(key, noise[:1]), script.forged(key, noise)
    assert p_of(key, one) > ALPHA > p_of(key, many)
    other = script.forged(key, initial_noise([5], SHAPE))  # an image without the key
    assert p_of(key, other) > ALPHA and abs(float(script.likeness(key, [other])[0])) < 0.2


def test_averaging_raises_the_cosine_as_it_must(key):
    a, v = 0.4, 1.0
    noise = recovered(key, 128, a, v)
    flat = NoiseRecovery(torch.full((4, 24), a).double(), torch.full((4, 24), v).double())
    for m in script.ladder(32):
        found = script.likeness(key, [script.forged(key, some) for some in script.groups(noise, m)])
        expected = (m * a**2 / (m * a**2 + v)) ** 0.5
        assert len(found) == 128 // m and float(found.mean()) == pytest.approx(expected, abs=0.02)
        assert script.expected_cosine(SimpleNamespace(recovery=flat), TreeRing(key), m) == pytest.approx(expected)
    assert script.expected_cosine(SimpleNamespace(recovery=None), TreeRing(key), 1) is None


def test_unequal_rings_are_expected_as_they_come(key):
    scheme = TreeRing(key)
    a = torch.rand(4, 24, generator=torch.Generator().manual_seed(1)).double() + 0.3
    model = SimpleNamespace(recovery=NoiseRecovery(a, torch.ones(4, 24).double()))
    ring = torch.fft.fft2(scheme.embed(torch.zeros(1, *SHAPE)).double(), norm="ortho")
    gains = a[:, script.rings(32, 32)]
    noise = torch.fft.ifft2(ring * gains).real * 32 + initial_noise(list(range(64)), SHAPE)
    for m in (1, 8):
        found = script.likeness(key, [script.forged(key, some) for some in script.groups(noise, m)])
        assert float(found.mean()) == pytest.approx(script.expected_cosine(model, scheme, m), abs=0.03)


def test_noise_that_shares_nothing_shows_no_ring(key):
    z = torch.stack([script.ring_z(some)[:, 1:16] for some in script.groups(initial_noise(list(range(160)), SHAPE), 8)])
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    possible, marked = script.cells(TreeRing(key))
    assert possible.sum() == 4 * 15 and marked.sum() == 2 * 3 and possible[marked].all()
    assert script.shown(initial_noise(list(range(64)), SHAPE), 16, possible)["count"] == 0


def test_a_ring_shows_where_it_is_and_the_more_the_more_images(key):
    noise = recovered(key, 64, a=0.5, v=1.0, seed=500)
    possible, marked = script.cells(TreeRing(key))
    shares = [script.shown(noise, m, marked)["share"] for m in (2, 8, 32)]
    assert shares == sorted(shares) and shares[-1] == 1
    assert script.shown(noise, 32, possible & ~marked)["count"] == 0
    assert script.shown(noise, 1, marked)["of"] is None  # of one image there is no spread
    spectrum = torch.fft.fft2(noise.double(), norm="ortho")
    of_mean, each = spectrum.mean(0).abs().square(), spectrum.abs().square().mean(0)
    inside = TreeRing(key).inside
    assert float(of_mean[[1, 3]].mean() / each[[1, 3]].mean()) == pytest.approx(1 / 64, rel=0.1)
    assert float(of_mean[[0, 2]][:, inside].mean()) == pytest.approx(0.25 + 1 / 64, rel=0.1)


def test_limits_by_hand():
    rows = [
        {"images": m, "forged passing, count": n, "forged passing, share": n / 4}
        for m, n in ((1, 0), (2, 1), (4, 3), (8, 3))
    ]
    found = script.limits(rows)
    assert list(found.values()) == [2, 4, None]
    assert script.ladder(1) == [1] and script.ladder(64)[-1] == 64 and script.ladder(100)[-1] == 64


def test_only_the_ring_is_replaced(key, bench):
    noise = TreeRing(key).embed(initial_noise([1, 2, 3], SHAPE))
    model = SimpleNamespace(latent_shape=SHAPE, identity=OF_SHAPE["model"], kind=OF_SHAPE["kind"], recovery=None)
    changed = script.replaced(bench(model, seed=7), noise, [PLACE])
    before, after = (torch.fft.fft2(x.double(), norm="ortho") for x in (noise, changed))
    inside = torch.zeros(4, 32, 32, dtype=torch.bool)
    inside[[0, 2]] = TreeRing(key).inside
    assert torch.allclose(before[:, ~inside], after[:, ~inside], atol=1e-5)
    assert script.likeness(key, [script.forged(key, x[None]) for x in changed]).abs().max() < 0.2


@pytest.mark.slow
def test_small_setting(experiment, tmp_path):
    found = experiment("security", tmp_path, "-n", 2, "--forged", 1, "--steps", 2)
    one, two = found["rows"]
    assert (one["images"], two["images"]) == (1, 2) and 0.1 < one["correlation"] < two["correlation"] < 1
    assert found["settings"]["bands"] == ["channels 0, 1, 2, 3, radii 2-3", "channel 0, radii 4-10"]
    assert one["ring shown, of"] is None and two["ring shown, of"] == 2 * 4 + 7
    assert two["unmarked shown, of"] == 60
    assert found["limits"]["some forged images pass from"] in (1, 2, None) and len(found["ring_z"]) == 4
    again = {r["drawn again"]: r for r in csv.DictReader((tmp_path / "security_drawn_again.csv").open())}
    assert float(again["not at all"]["pixel correlation"]) == pytest.approx(1)
    assert again["same prompt, other noise"]["key present, count"] == "0" and len(again) == 8


def test_what_is_refused(tmp_path):
    for options, said in ((["--images", str(tmp_path)], "--images"), (["--published", "melt:3"], "'melt'")):
        done = CliRunner().invoke(script.main, [*options, "-o", str(tmp_path)])
        assert done.exit_code == 2 and said in done.output
