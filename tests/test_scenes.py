"""Scenes are named by their seeds, look like something, and say what they show."""

from __future__ import annotations

import warnings
from itertools import product

import numpy as np
import pytest

from ringmark.data import scenes
from ringmark.data.scenes import (
    ACCENTS,
    GROUNDS,
    RELIEFS,
    SKIES,
    WATER,
    Attributes,
    caption,
    draw_attributes,
    fractal,
    paint,
    scene,
    scene_caption,
)

FLAT = 8.0  # grey levels; the least lively scenes, snowfields in fog, have some 10


def painted(attributes: Attributes, seed: int = 0, size: int = 32) -> np.ndarray:
    """Pixels, painted with warnings as errors and checked for what must hold of every scene."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = paint(attributes, np.random.default_rng(seed), size)
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    assert pixels.std() > FLAT, attributes
    return pixels


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63])
def test_a_seed_names_a_scene(seed):
    one, same = scene(seed, 32), scene(seed, 32)
    assert one.pixels.tobytes() == same.pixels.tobytes()
    assert (one.attributes, one.caption) == (same.attributes, same.caption)


@pytest.mark.parametrize(("size", "number"), [(128, 12), (33, 200)])
def test_the_caption_of_a_scene_is_known_without_painting_all_of_it(size, number, monkeypatch):
    captions = [scene(seed, size).caption for seed in range(number)]
    monkeypatch.setattr(scenes, "paint", lambda *args: paint(*args) if args[2] < 33 else pytest.fail("painted whole"))
    assert [scene_caption(seed, size) for seed in range(number)] == captions


def test_global_randomness_is_left_alone():
    before = np.random.get_state()[1].tobytes()
    scene(3, 32)
    assert np.random.get_state()[1].tobytes() == before


def test_seeds_differ():
    assert len({scene(seed, 32).pixels.tobytes() for seed in range(40)}) == 40


@pytest.mark.parametrize("size", [16, 17, 32, 64])
def test_sizes(size):
    assert scene(5, size).pixels.shape == (size, size, 3)


@pytest.mark.parametrize("sky", SKIES)
def test_every_sky_over_every_ground(sky):
    for ground in GROUNDS:
        painted(Attributes(sky, ground))


@pytest.mark.parametrize(("sky", "relief"), list(product(SKIES, RELIEFS)))
def test_every_relief_and_weather(sky, relief):
    for weather in sorted(set(SKIES[sky].weathers)):
        painted(Attributes(sky=sky, ground="meadow", relief=relief, weather=weather), seed=1)


@pytest.mark.parametrize("sky", SKIES)
def test_every_accent(sky):
    for accent in ACCENTS:
        painted(Attributes(sky, "desert", accent=accent), seed=2)
    for ground, accent in product(WATER, ("boulders", "a sailboat", "tall grass")):
        painted(Attributes(sky, ground, accent=accent), seed=2)


BASE = Attributes("day", "meadow")


@pytest.mark.parametrize(
    "other",
    [
        *(Attributes("day", "meadow", relief=r) for r in RELIEFS if r),
        *(Attributes("day", "meadow", weather=w) for w in ("clouds", "snowfall")),
        *(Attributes("day", "meadow", accent=a) for a in ACCENTS if a),
    ],
    ids=caption,
)
def test_what_is_asked_for_changes_the_picture(other):
    differs = painted(BASE, 3).astype(int) - painted(other, 3)
    assert (np.abs(differs).max(axis=-1) > 24).mean() > 0.005


def test_captions_say_everything():
    assert (
        caption(Attributes(sky="sunset", ground="lake", relief="snowy mountains", weather="clouds", accent="boulders"))
        == "lake at sunset with snowy mountains, clouds, boulders"
    )
    assert caption(Attributes("storm", "sea")) == "sea in a storm"
    assert caption(Attributes("fog", "wheat field", accent="a cabin")) == "wheat field in fog, a cabin"


@pytest.mark.parametrize("seed", range(100))
def test_captions_mention_the_attributes_and_nothing_else(seed):
    rng = np.random.default_rng(seed)
    a = draw_attributes(rng)
    full, drawn = caption(a), caption(a, rng)
    for part in (a.sky, a.ground, a.relief, a.weather, a.accent):
        assert part in full
    assert a.sky in drawn and drawn.startswith(a.ground)
    assert set(drawn.replace(" with ", ", ").split(", ")) <= set(full.replace(" with ", ", ").split(", "))


def test_optional_parts_are_sometimes_left_unsaid():
    a = Attributes(sky="day", ground="lake", relief="green hills", weather="clouds", accent="boulders")
    said = [caption(a, np.random.default_rng(seed)) for seed in range(400)]
    for part, share in (("green hills", 0.9), ("clouds", 0.8), ("boulders", 0.8)):
        assert np.mean([part in text for text in said]) == pytest.approx(share, abs=0.08)  # four standard errors


def test_attributes_go_together():
    rng, drawn = np.random.default_rng(0), []
    for _ in range(2000):
        a = draw_attributes(rng)
        assert a.weather in SKIES[a.sky].weathers and a.relief in RELIEFS
        assert a.accent in (("", "boulders", "a sailboat", "tall grass") if a.ground in WATER else ACCENTS)
        drawn.append(a)
    assert {a.sky for a in drawn} == set(SKIES) and {a.ground for a in drawn} == set(GROUNDS)


@pytest.mark.parametrize("shape", [(64,), (32, 32), (16, 48), (31, 33)])
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.5])
def test_fractal_has_zero_mean_and_unit_variance(shape, beta):
    field = fractal(np.random.default_rng(0), shape, beta)
    assert field.shape == shape
    assert field.mean() == pytest.approx(0, abs=1e-12) and field.std() == pytest.approx(1)


def test_steeper_fractals_are_smoother():
    def roughness(beta):
        field = fractal(np.random.default_rng(0), (64, 64), beta)
        return (np.diff(field, axis=0) ** 2).mean() + (np.diff(field, axis=1) ** 2).mean()

    rough = [roughness(beta) for beta in (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)]
    assert rough == sorted(rough, reverse=True) and rough[0] > 10 * rough[-1]


def test_fractal_has_the_spectrum_it_is_asked_for():
    n, beta = 64, 1.5
    power = np.mean(
        [np.abs(np.fft.fft2(fractal(np.random.default_rng(s), (n, n), beta))) ** 2 for s in range(20)], axis=0
    )
    k = np.hypot(*np.meshgrid(np.fft.fftfreq(n) * n, np.fft.fftfreq(n) * n))
    kept = (k > 0) & (k < n / 2)
    slope = np.polyfit(np.log(k[kept]), np.log(power[kept]), 1)[0]
    assert slope == pytest.approx(-2 * beta, abs=0.1)


def test_fractal_is_periodic():
    field = fractal(np.random.default_rng(0), (64, 64), 2.0)
    assert np.abs(field[0] - field[-1]).mean() < 3 * np.abs(np.diff(field, axis=0)).mean()
