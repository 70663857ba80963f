"""Attacks as maps: neutral strengths change nothing, sizes stay, seeds decide everything."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import wrap
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ringmark.errors import AttackError
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.attacks.chains import Step, apply, listing, parse
from ringmark.watermark.attacks.distortions import ATTACKS

OVER_PILLOW = [name for name, known in ATTACKS.items() if not known.needs_model]
NEUTRAL = (
    *("rotation:0", "crop:1", "widthcrop:1", "resize:1", "blur:0", "median:1", "noise:0", "wrapnoise:0", "brighten:1"),
    *("contrast:1", "saturation:1", "gamma:1", "erase:0", "sharpen:0", "text:0"),
)


def picture(width: int = 48, height: int = 48, seed: int = 0) -> Image.Image:
    """Noise: the hardest picture for whatever should leave it alone."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int = 48, height: int = 48) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    rgb = [128 + 90 * np.sin(x / 15 + 1), 128 + 90 * np.cos(y / 12), 60 + x + y]
    return Image.fromarray(np.rint(np.stack(rgb, -1)).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, int)


@pytest.fixture(scope="module")
def tiny(tiny_parts) -> LatentModel:
    return wrap(tiny_parts)


@st.composite
def steps(draw, names=OVER_PILLOW) -> Step:
    name = draw(st.sampled_from(names))
    known = ATTACKS[name]
    if not known.unit:
        return Step(name, None)
    if known.kind == "any":
        return Step(name, draw(st.floats(known.low, known.high)))
    number = draw(st.integers(int(known.low), int(known.high)))
    return Step(name, float(number | 1 if known.kind == "odd" else number))


@pytest.mark.parametrize("spec", NEUTRAL)
def test_neutral_strengths_change_nothing(spec: str) -> None:
    image = picture()
    assert np.array_equal(pixels(apply(spec, image, 3)), pixels(image))


def test_every_attack_with_a_neutral_strength_was_tried() -> None:
    tried = {parse(spec).steps[0].name for spec in NEUTRAL}
    assert set(ATTACKS) - tried == {"jpeg", "webp", "brightness", "flip", "screenshot", "vae", "diffuse"}


@pytest.mark.parametrize("name", OVER_PILLOW)
@settings(max_examples=12)
@given(data=st.data(), width=st.integers(8, 70), height=st.integers(8, 70))
def test_size_and_mode_stay_and_the_source_too(name: str, data, width: int, height: int) -> None:
    step, image = data.draw(steps([name])), picture(width, height)
    before = image.copy()
    out = step(image, np.random.default_rng(0))
    assert (out.size, out.mode) == ((width, height), "RGB")
    assert np.array_equal(pixels(image), pixels(before))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3)])
def test_every_attack_takes_the_least_of_pictures(size: tuple[int, int]) -> None:
    for spec in (*OVER_PILLOW, "resize:64", "screenshot:0.1", "crop:0.01", "erase:1", "blur:100", "median:15"):
        assert apply(spec, picture(*size), 0).size == size


@pytest.mark.parametrize("name", ATTACKS)
def test_the_seed_decides_everything(name: str, tiny: LatentModel) -> None:
    image = picture()
    first, again, other = (pixels(apply(name, image, seed, tiny)) for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    random = {"crop", "widthcrop", "noise", "wrapnoise", "brightness", "erase", "text", "diffuse"}
    assert np.array_equal(first, other) == (name not in random)


def test_the_table_is_sound() -> None:
    for name, known in ATTACKS.items():
        assert known.takes(known.default) and not known.takes(float("nan"))
        assert known.function.__name__ == name and name in listing()
        if known.unit:
            assert known.takes(known.low) and known.takes(known.high) and not known.takes(None)
            assert not known.takes(known.low - 1) and not known.takes(known.high + 1)


@pytest.mark.parametrize("size", [(48, 48), (31, 20)])
def test_flips_are_involutions_and_half_turns_too(size: tuple[int, int]) -> None:
    image = picture(*size)
    for spec in ("flip+flip", "rotation:180+rotation:180", "rotation:-180+rotation:180"):
        assert np.array_equal(pixels(apply(spec, image, 0)), pixels(image))
    assert np.array_equal(pixels(apply("flip", image, 0)), pixels(image)[:, ::-1])


def test_four_quarter_turns_of_a_square_are_none() -> None:
    image = picture(33, 33)
    assert np.array_equal(pixels(apply("rotation:90", image, 0)), np.rot90(pixels(image)))
    assert np.array_equal(pixels(apply("+".join(["rotation:90"] * 4), image, 0)), pixels(image))


def test_outside_of_a_rotation_is_black() -> None:
    turned = pixels(apply("rotation:45", Image.new("RGB", (50, 50), "white"), 0))
    assert not turned[0, 0].any() and not turned[-1, -1].any() and (turned[25, 25] == 255).all()


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_compression_is_close_at_high_quality_and_monotone(name: str) -> None:
    image = smooth()

    def error(quality: int) -> float:
        return np.sqrt(np.mean((pixels(apply(f"{name}:{quality}", image, 0)) - pixels(image)) ** 2))

    assert error(95) < 3
    assert error(95) < error(25) < error(1)


def test_stronger_attacks_change_more() -> None:
    image = smooth()
    for name, strengths in {
        **{"blur": (1, 4, 10), "resize": (2, 4, 16), "noise": (0.02, 0.1, 0.5), "gamma": (1.1, 2, 5)},
        **{"brighten": (0.9, 0.5, 0), "contrast": (0.9, 0.5, 0), "saturation": (0.9, 0.5, 0), "crop": (0.9, 0.6, 0.2)},
        **{"widthcrop": (0.9, 0.6, 0.2), "erase": (0.05, 0.3, 1), "text": (0.2, 0.6, 1), "screenshot": (0.8, 0.3, 0.1)},
        **{"rotation": (1, 10, 45), "median": (3, 7, 15), "sharpen": (0.5, 1, 3), "wrapnoise": (0.005, 0.02, 0.1)},
    }.items():
        errors = [np.mean((pixels(apply(f"{name}:{s}", image, 2)) - pixels(image)) ** 2) for s in strengths]
        assert errors == sorted(errors) and errors[0] > 0, name


def test_shares_of_the_area() -> None:
    white = Image.new("RGB", (60, 40), "white")
    for share in (0.05, 0.25, 0.6, 1):
        assert np.mean(pixels(apply(f"erase:{share}", white, 1)) == 0) == pytest.approx(share, abs=0.02)
    # A ramp keeps its slope, made flatter by what is kept of the side.
    ramp = Image.fromarray(np.repeat(np.tile(np.arange(100, dtype=np.uint8) * 2, (100, 1))[..., None], 3, 2))
    for spec, kept in (("crop:0.25", 0.5), ("widthcrop:0.5", 0.5), ("crop:0.75", 0.75**0.5)):
        row = pixels(apply(spec, ramp, 4))[50, 10:90, 0]
        assert (row[-1] - row[0]) / 79 == pytest.approx(2 * kept, abs=0.03)


def test_brightness_is_drawn_uniformly() -> None:
    grey = Image.new("RGB", (8, 8), (20, 20, 20))
    factors = np.array([pixels(apply("brightness:6", grey, seed)).mean() / 20 for seed in range(400)])
    assert 0 <= factors.min() < 0.2 and 5.8 < factors.max() <= 6 and abs(factors.mean() - 3) < 0.3


def test_noise_has_its_deviation_and_is_cut_or_wraps() -> None:
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    for name in ("noise", "wrapnoise"):
        assert (pixels(apply(f"{name}:0.1", grey, 0)) - 128).std() == pytest.approx(25.5, rel=0.03)
    white = Image.new("RGB", (64, 64), "white")
    assert pixels(apply("noise:0.02", white, 0)).min() > 200
    assert pixels(apply("wrapnoise:0.02", white, 0)).min() < 10


def test_greys_and_powers() -> None:
    image = picture()
    grey = pixels(apply("saturation:0", image, 0))
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert np.ptp(pixels(apply("contrast:0", image, 0))) == 0 and not pixels(apply("brighten:0", image, 0)).any()
    squared = np.rint(255 * (pixels(image) / 255) ** 2)
    assert np.array_equal(pixels(apply("gamma:2", image, 0)), squared)


def test_a_picture_too_wide_for_webp() -> None:
    with pytest.raises(AttackError, match="20000x1") as error:
        apply("webp", Image.new("RGB", (20000, 1)), 0)
    assert error.value.code == "attack.size"


@pytest.mark.parametrize("spec", ["vae:1", "vae:2", "diffuse:0.1", "diffuse:1", "jpeg:50+vae+flip"])
@pytest.mark.parametrize("size", [(16, 16), (23, 40)])
def test_regenerations_keep_the_size(tiny: LatentModel, spec: str, size: tuple[int, int]) -> None:
    out = apply(spec, smooth(*size), 0, tiny)
    assert (out.size, out.mode) == (size, "RGB")


def test_regenerations_compose(tiny: LatentModel) -> None:
    image = smooth(16, 16)
    once = apply("vae", image, 0, tiny)
    assert not np.array_equal(pixels(once), pixels(image))
    assert np.array_equal(pixels(apply("vae:2", image, 0, tiny)), pixels(apply("vae", once, 0, tiny)))
    assert np.array_equal(pixels(apply("diffuse:0", image, 0, tiny)), pixels(once))


def test_diffusion_adds_noise_to_a_level_and_walks_back() -> None:
    """With E = D = identity and ε = 0, DDIM only scales: x̂ = √(ᾱ_0/ᾱ_t) (√ᾱ_t x + √(1 − ᾱ_t) ε)."""
    from identity import Identity

    class Plain(Identity):
        encode = decode = staticmethod(lambda x: x)

    image = Image.new("RGB", (32, 32), (128, 128, 128))
    alpha = Plain().schedule(100).at(21)[0] ** 2  # the level of timestep 20 of 100
    change = pixels(apply("diffuse:0.2", image, 0, Plain())) - 128
    assert change.std() / 127.5 == pytest.approx(((1 - alpha) / alpha) ** 0.5, rel=0.05)


def test_a_model_that_decodes_to_nan(tiny: LatentModel, monkeypatch) -> None:
    monkeypatch.setattr(tiny, "decode", lambda z: z[:, :3] * float("nan"))
    with pytest.raises(AttackError) as error:
        apply("vae", picture(16, 16), 0, tiny)
    assert error.value.code == "attack.nan"
