"""The text form of attacks: parsing, composition, presets, seeds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ringmark.errors import AttackError
from ringmark.watermark.attacks.chains import PRESETS, Step, apply, expand, listing, parse, seed_of
from ringmark.watermark.attacks.distortions import ATTACKS
from ringmark.watermark.cli.remedies import explained

OVER_PILLOW = [name for name, known in ATTACKS.items() if not known.needs_model]


def picture(width: int = 48, height: int = 48, seed: int = 0) -> Image.Image:
    """Noise: the hardest picture for whatever should leave it alone."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, int)


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


@settings(max_examples=30)
@given(chain=st.lists(steps(), min_size=1, max_size=3))
def test_a_chain_is_its_attacks_in_turn(chain: list[Step]) -> None:
    spec, image = "+".join(map(str, chain)), picture(20, 15)
    rng, turn = np.random.default_rng(1), image
    for step in chain:
        turn = step(turn, rng)
    assert np.array_equal(pixels(apply(spec, image, 1)), pixels(turn))


@given(chain=st.lists(steps(list(ATTACKS)), min_size=1, max_size=4))
def test_parse_reads_what_a_chain_says(chain: list[Step]) -> None:
    read = parse("+".join(map(str, chain)))
    assert read.steps == tuple(chain) and parse(str(read)) == read
    assert not set(read.slug) & set('/\\:*?"<>| ')


def test_names_defaults_and_files() -> None:
    assert str(parse(" jpeg:25.0 + blur ")) == "jpeg:25+blur:4" and parse("jpeg:25+blur:4").slug == "jpeg-25+blur-4"
    assert str(parse("flip+noise:0.10")) == "flip+noise:0.1" and parse("noise:1e-3") == parse("noise:0.001")
    assert parse("jpeg+vae").needs_model and not parse("jpeg+flip").needs_model


@pytest.mark.parametrize(
    ("spec", "code", "text"),
    [
        ("", "attack.empty", "'': a name is missing"),
        ("jpeg:25+", "attack.empty", "'jpeg:25+': a name"),
        (":3", "attack.empty", "':3': a name"),
        ("magic:3", "attack.unknown", "unknown attack 'magic'; choose from rotation, jpeg"),
        ("tree-ring+blur", "attack.unknown", "a preset alone: tree-ring,"),
        ("jpeg:0", "attack.strength", "range; jpeg takes: quality from 1 to 100, whole numbers only"),
        ("jpeg:25.5", "attack.strength", "whole"),
        ("median:4", "attack.strength", "odd"),
        ("blur:much", "attack.strength", "blur:much: 'much' is not a number; blur takes: radius in px from 0 to 100"),
        ("blur:", "attack.strength", "'' is not a number"),
        ("blur:4:5", "attack.strength", "'4:5' is not a number"),
        ("noise:nan", "attack.strength", "from 0 to 1"),
        ("noise:inf", "attack.strength", "from 0 to 1"),
        ("brighten:-1", "attack.strength", "from 0 to 20"),
        ("flip:1", "attack.no-strength", "flip: takes no strength; omit the strength"),
        ("flip:magic", "attack.no-strength", "flip: takes no strength; omit the strength"),
        ("magic:much", "attack.unknown", "unknown attack 'magic'"),
    ],
)
def test_what_is_no_attack_is_refused_in_one_line(spec: str, code: str, text: str) -> None:
    with pytest.raises(AttackError) as error:
        parse(spec)
    message = explained(error.value)
    assert error.value.code == code and text in message and "\n" not in message
    assert "--" not in str(error.value)  # options belong to the command line


def test_presets() -> None:
    for name, specs in PRESETS.items():
        assert [str(chain) for chain in expand([name])] == list(specs) and name in listing()
    assert set(PRESETS["waves"]) == {s for level in ("weak", "medium", "strong") for s in PRESETS[f"waves-{level}"]}
    once = list(map(str, expand(["jpeg:25.0", "tree-ring", "jpeg:25", "flip"])))
    assert once[:2] == ["jpeg:25", "rotation:75"] and len(once) == 7


def test_seeds_follow_from_paths() -> None:
    names = [f"{folder}/{i}.png" for folder in ("a", "b") for i in range(50)]
    seeds = {name: seed_of(0, name) for name in names}
    assert len(set(seeds.values())) == 100 and {n: seed_of(0, n) for n in reversed(names)} == seeds
    assert seed_of(1, "a/0.png") != seeds["a/0.png"] and 0 <= seed_of(0, "\udcff.png") < 2**64


def test_what_needs_a_model_says_so() -> None:
    with pytest.raises(AttackError) as error:
        apply("vae", picture(), 0)
    assert error.value.code == "attack.model" and str(error.value.subject) == "vae:1"


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse("flip").steps[0].name = "other"
