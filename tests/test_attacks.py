"""Attacks as maps: neutral strengths change nothing, sizes stay, seeds decide everything, chains are compositions."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ringmark.errors import AttackError
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.attacks.distortions import ATTACKS, PRESETS, Step, apply, expand, listing, parse, seed_of
from ringmark.watermark.cli import main as cli

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
    return LatentModel(**tiny_parts, name="tiny")


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
    ("spec", "said"),
    [
        ("", "a name is missing"),
        ("jpeg:25+", "a name is missing"),
        (":3", "a name is missing"),
        ("magic:3", "'magic' is no attack; choose from rotation, jpeg"),
        ("tree-ring+blur", "presets, alone"),
        ("jpeg:0", "jpeg:0: the strength is out of range; jpeg takes quality, whole, 1 … 100"),
        ("jpeg:25.5", "whole"),
        ("median:4", "odd"),
        ("blur:much", "blur:much: 'much' is no number; blur takes radius in px, 0 … 100"),
        ("blur:", "'' is no number"),
        ("blur:4:5", "'4:5' is no number"),
        ("noise:nan", "0 … 1"),
        ("noise:inf", "0 … 1"),
        ("brighten:-1", "0 … 20"),
        ("flip:1", "takes no strength"),
        ("flip:magic", "'magic' is no number; flip takes no strength"),
    ],
)
def test_what_is_no_attack_is_refused_in_one_line(spec: str, said: str) -> None:
    with pytest.raises(AttackError) as error:
        parse(spec)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_table_is_sound() -> None:
    for name, known in ATTACKS.items():
        assert known.takes(known.default) and not known.takes(float("nan"))
        assert known.function.__name__ == name and name in listing()
        if known.unit:
            assert known.takes(known.low) and known.takes(known.high) and not known.takes(None)
            assert not known.takes(known.low - 1) and not known.takes(known.high + 1)


def test_presets() -> None:
    for name, specs in PRESETS.items():
        assert [str(chain) for chain in expand([name])] == list(specs) and name in listing()
    assert set(PRESETS["waves"]) == {s for level in ("weak", "medium", "strong") for s in PRESETS[f"waves-{level}"]}
    once = list(map(str, expand(["jpeg:25.0", "tree-ring", "jpeg:25", "flip"])))
    assert once[:2] == ["jpeg:25", "rotation:75"] and len(once) == 7


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
    error = lambda quality: np.sqrt(np.mean((pixels(apply(f"{name}:{quality}", image, 0)) - pixels(image)) ** 2))
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


def test_seeds_follow_from_paths() -> None:
    names = [f"{folder}/{i}.png" for folder in ("a", "b") for i in range(50)]
    seeds = {name: seed_of(0, name) for name in names}
    assert len(set(seeds.values())) == 100 and {n: seed_of(0, n) for n in reversed(names)} == seeds
    assert seed_of(1, "a/0.png") != seeds["a/0.png"] and 0 <= seed_of(0, "\udcff.png") < 2**64


def test_a_picture_too_wide_for_webp() -> None:
    with pytest.raises(AttackError, match="WEBP cannot hold 20000x1 pixels"):
        apply("webp", Image.new("RGB", (20000, 1)), 0)


# With a model


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
    from test_detect import Identity

    class Plain(Identity):
        encode = decode = staticmethod(lambda x: x)

    image = Image.new("RGB", (32, 32), (128, 128, 128))
    alpha = float(Plain().grid(100).alpha_bar[21])  # the level of timestep 20 of 100
    change = pixels(apply("diffuse:0.2", image, 0, Plain())) - 128
    assert change.std() / 127.5 == pytest.approx(((1 - alpha) / alpha) ** 0.5, rel=0.05)


def test_what_needs_a_model_says_so() -> None:
    with pytest.raises(AttackError, match="vae:1: needs a model"):
        apply("vae", picture(), 0)


def test_a_model_that_decodes_to_nan(tiny: LatentModel, monkeypatch) -> None:
    monkeypatch.setattr(tiny, "decode", lambda z: z[:, :3] * float("nan"))
    with pytest.raises(AttackError, match="--dtype float32"):
        apply("vae", picture(16, 16), 0, tiny)


# The command


def run(*args: object, code: int = 0):
    from click.testing import CliRunner

    result = CliRunner().invoke(cli.main, ["attack", *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def refused(*args: object) -> str:
    message = run(*args, code=2).stderr.strip()
    assert "\n" not in message and message.startswith("Error: "), message
    return message


@pytest.fixture
def album(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    (folder / "deep").mkdir(parents=True)
    picture(seed=1).save(folder / "a.png")
    picture(40, 25, seed=2).save(folder / "deep" / "b.jpg")
    return folder


def attacked(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as image:
            found[path.relative_to(folder).as_posix()] = pixels(image.convert("RGB"))
    return found


def test_a_folder_and_what_is_in_it(album: Path, tmp_path: Path) -> None:
    assert "2 attacked images written, 0 were there" in run(album, tmp_path / "out", "--attack", "noise").stdout
    found = attacked(tmp_path / "out")
    assert list(found) == ["a.png", "deep/b.jpg.png"] and found["deep/b.jpg.png"].shape == (25, 40, 3)
    wanted = apply("noise:0.1", picture(seed=1), seed_of(0, "a.png"))
    assert np.array_equal(found["a.png"], pixels(wanted))


def test_results_do_not_depend_on_the_others(album: Path, tmp_path: Path) -> None:
    args = ["--attack", "noise+crop", "--seed", 7]
    run(album, tmp_path / "all", *args)
    (album / "a.png").unlink()
    picture(seed=3).save(album / "deep" / "0.png")
    run(album, tmp_path / "some", *args)
    name = "deep/b.jpg.png"
    assert np.array_equal(attacked(tmp_path / "all")[name], attacked(tmp_path / "some")[name])


def test_many_attacks_have_a_folder_each(album: Path, tmp_path: Path) -> None:
    args = [album, tmp_path / "out", "--attack", "jpeg:25+blur:4", "--attack", "tree-ring", "--json"]
    found = json.loads(run(*args).stdout)
    assert (found["written"], found["kept"], found["errors"]) == (14, 0, [])
    assert Path(found["outputs"]["jpeg:25+blur:4"]) == tmp_path / "out/jpeg-25+blur-4"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "jpeg-25+blur-4",
        *(s.slug for s in expand(["tree-ring"])),
    }
    found = json.loads(run(*args, "--attack", "flip").stdout)
    assert (found["written"], found["kept"]) == (2, 14)


def test_a_run_goes_on_and_notices_what_changed(album: Path, tmp_path: Path) -> None:
    args = [album, tmp_path / "out", "--attack", "blur:2"]
    run(*args)
    kept, lost = tmp_path / "out/a.png", tmp_path / "out/deep/b.jpg.png"
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    assert "1 attacked images written, 1 were there already" in run(*args).stdout
    assert lost.exists() and kept.stat().st_mtime_ns == stamp
    picture(seed=9).save(album / "a.png", compress_level=0)
    assert "1 attacked images written, 1" in run(*args).stdout and kept.stat().st_mtime_ns != stamp
    assert "2 attacked images written, 0" in run(*args, "--force").stdout


def test_other_images_are_not_replaced(album: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(album, out, "--attack", "blur:2")
    before = attacked(out)
    message = refused(album, out, "--attack", "blur:3")
    assert "attack was blur:2, is blur:3" in message and "--force" in message and "a.png" in message
    assert "seed was 0, is 1" in refused(album, out, "--attack", "blur:2", "--seed", 1)
    assert all(np.array_equal(before[name], image) for name, image in attacked(out).items())
    run(album, out, "--attack", "blur:3", "--force")
    assert "0 attacked images written, 2" in run(album, out, "--attack", "blur:3").stdout
    picture().save(out / "a.png")
    assert "is no image of this command" in refused(album, out, "--attack", "blur:3")


def test_one_file(album: Path, tmp_path: Path) -> None:
    source = album / "a.png"
    run(source, tmp_path / "new/b.png", "--attack", "flip")
    run(source, tmp_path / "folder", "--attack", "flip")
    for path in (tmp_path / "new/b.png", tmp_path / "folder/a.png"):
        with Image.open(path) as image:
            assert np.array_equal(pixels(image), pixels(picture(seed=1))[:, ::-1])
    assert "0 attacked images written, 1" in run(source, tmp_path / "new/b.png", "--attack", "flip").stdout
    run(source, tmp_path / "many", "--attack", "flip", "--attack", "blur")
    assert sorted(attacked(tmp_path / "many")) == ["blur-4/a.png", "flip/a.png"]


def test_an_image_that_cannot_be_attacked_does_not_stop_the_others(album: Path, tmp_path: Path) -> None:
    (album / "0.png").write_bytes(b"broken")
    Image.new("RGB", (20000, 1)).save(album / "wide.png")
    result = run(album, tmp_path / "out", "--attack", "webp", "--attack", "flip", code=2)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 2 and "0.png: is not an image" in lines[0] and "wide.png: WEBP cannot hold" in lines[1]
    assert "5 attacked images written" in result.stdout
    assert "0.png: is not an image" in refused(album / "0.png", tmp_path / "out.png", "--attack", "flip")
    assert not (tmp_path / "out.png").exists()


def test_bad_names_are_refused_before_anything_is_written(album: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cli, "load_model", lambda *_: pytest.fail("a model was loaded"))
    out, flip = tmp_path / "out", ("--attack", "flip")
    assert "no such file or folder" in refused(tmp_path / "none", out, *flip)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(tmp_path / "empty", out, *flip)
    assert "takes quality" in refused(album, out, "--attack", "jpeg:101", "--attack", "vae")
    assert "is one file" in refused(album, tmp_path / "out.png", *flip)
    assert "is one file" in refused(album / "a.png", tmp_path / "b.png", *flip, "--attack", "blur")
    assert "end the name in .png" in refused(album / "a.png", tmp_path / "b.jpg", *flip)
    assert "is the image to be attacked" in refused(album, album, *flip, "--force")
    assert "is the image to be attacked" in refused(album / "a.png", album / "a.png", *flip, "--force")
    assert "whose images are attacked" in refused(album, album / "attacked", *flip)
    assert "Missing option '--attack'" in run(album, out, code=2).stderr
    picture().save(album / "deep/b.jpg.png")
    assert "would be written there" in refused(album, out, *flip)
    assert not out.exists() and not (album / "attacked").exists()


def test_a_model_is_loaded_where_one_is_named(album: Path, tmp_path: Path, tiny: LatentModel, monkeypatch) -> None:
    monkeypatch.setattr(cli, "load_model", lambda *_: tiny)
    args = [album, tmp_path / "out", "--attack", "vae", "--attack", "diffuse:0.05"]
    assert "4 attacked images written" in run(*args).stdout and "0 attacked images written, 4" in run(*args).stdout
    other = LatentModel(
        **{f: getattr(tiny, f) for f in ("vae", "unet", "text_encoder", "tokenizer", "scheduler")}, name="other"
    )
    monkeypatch.setattr(cli, "load_model", lambda *_: other)
    assert "model was" in refused(*args)


def test_all_attacks_are_listed_without_in_and_out() -> None:
    said = run("--list").stdout
    assert all(name in said for name in (*ATTACKS, *PRESETS)) and "quality, whole, 1 … 100 [25]" in said


def test_pillow_is_enough(album: Path, tmp_path: Path) -> None:
    script = """
import sys
from watermark import cli
cli.main(["attack", *sys.argv[1:]], standalone_mode=False)
sys.exit("torch" in sys.modules)
"""
    args = [str(album), str(tmp_path / "out"), "--attack", "waves-weak"]
    done = subprocess.run([sys.executable, "-c", script, *args], cwd=Path(cli.__file__).parents[1], timeout=60)
    assert done.returncode == 0 and len(attacked(tmp_path / "out")) == 16


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse("flip").steps[0].name = "other"
