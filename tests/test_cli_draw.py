"""`ringmark generate`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from checkpoints import draw
from identity import of_shape
from PIL import Image
from shell import QUICK, refused, run

from ringmark.data.reader import read_records
from ringmark.inversion.models.loading import POCKET, load_pipeline
from ringmark.watermark.schemes.base import make_key


def test_generate_is_deterministic_and_goes_on(house: Path, tmp_path: Path) -> None:
    args = ["generate", "--no-mark", "-n", 2, "--seed", 2, "-o", tmp_path / "again", "--steps", 4]
    run(*args)
    first = tmp_path / "again/0000002.png"
    assert first.read_bytes() == (house / "images/unmarked/0000002.png").read_bytes()
    first.unlink()
    stamp = (tmp_path / "again/0000003.png").stat().st_mtime_ns
    run(*args)
    assert first.exists() and (tmp_path / "again/0000003.png").stat().st_mtime_ns == stamp
    rows = list(csv.DictReader((tmp_path / "again/labels.csv").open()))
    assert [(r["path"], r["label"]) for r in rows] == [("0000002.png", "0"), ("0000003.png", "0")]
    assert "steps was 4, is 5" in refused(*args[:-1], 5)


def test_generate_refuses_other_prompts_for_the_same_pictures(tmp_path: Path) -> None:
    args = ["generate", "--no-mark", "-o", tmp_path / "drawn", "--steps", 2]
    run(*args, "--prompt", "lake at sunset")
    message = refused(*args, "--prompt", "desert at noon")
    assert "lake at sunset" in message and "desert at noon" in message and "--seed" in message
    run(*args, "--prompt", "desert at noon", "--seed", 1)
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2


def test_generate_needs_a_key_or_no_mark(house: Path) -> None:
    assert "--no-mark" in refused("generate", "-o", house / "none")
    assert "--no-mark" in refused("generate", "-o", house / "none", "--key", house / "my.key", "--no-mark")


def test_a_key_of_another_model_marks_nothing(tmp_path: Path) -> None:
    for name, shape in (("other", (4, 32, 32)), ("larger", (4, 64, 64))):
        described = of_shape(shape, name=name, fingerprint="0")
        key = make_key("tree-ring", **described, channels=(0,), radii=(3, 6))
        key.save(tmp_path / f"{name}.key")
        said = refused("generate", "--key", tmp_path / f"{name}.key", "-n", 1, "-o", tmp_path / "out")
        assert key.fingerprint[:8] in said and name in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("guidance", ["1e300", "101", "0.5", "inf"])
def test_guidance_has_bounds(tmp_path: Path, guidance: str) -> None:
    assert "--guidance" in refused("generate", "--no-mark", "-o", tmp_path / "out", "--guidance", guidance)


def test_one_image_is_one(tmp_path: Path) -> None:
    assert run("generate", "--no-mark", "--steps", 2, "-o", tmp_path).stdout == f"1 unmarked image in {tmp_path}\n"


def test_a_foreign_file_is_replaced_by_force_only(tmp_path: Path) -> None:
    (tmp_path / "0000000.png").write_bytes(b"mine")
    message = refused("generate", "--no-mark", "--steps", 2, "-o", tmp_path)
    assert "0000000.png: exists and was not drawn by an earlier run; " in message and "--force" in message
    assert (tmp_path / "0000000.png").read_bytes() == b"mine"
    run("generate", "--no-mark", "--steps", 2, "-o", tmp_path, "--force")


def test_size_sampler_and_negative_prompt_are_used_and_recorded(house: Path, tmp_path: Path) -> None:
    args = ["generate", "--key", house / "my.key", "-o", tmp_path, "--steps", 2]
    done = run(*args, "--size", "160x128", "--sampler", "euler-a", "--negative-prompt", "fog")
    assert done.stderr.count("Warning: ") == 1 and "EulerAncestralDiscreteScheduler adds new noise" in done.stderr
    with Image.open(tmp_path / "0000000.png") as image:
        assert image.size == (160, 128)
    settings, _ = read_records(tmp_path / "drawn.jsonl")
    assert (settings["size"], settings["sampler"], settings["negative"]) == ([128, 160], "euler-a", "fog")
    assert "size was [128, 160], is [128, 128]" in refused(*args, "--sampler", "euler-a", "--negative-prompt", "fog")


@pytest.mark.parametrize(
    "wrong", [("--size", "100x100"), ("--size", "wide"), ("--sampler", "none"), ("--lora", "none.safetensors")]
)
def test_what_the_model_cannot_draw_leaves_nothing_behind(tmp_path: Path, wrong: tuple[str, str]) -> None:
    refused("generate", "--no-mark", "--steps", 2, "-o", tmp_path / "out", *wrong)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA of rank 2 for one attention of pocket."""
    from safetensors.torch import save_file

    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    rows, columns = load_pipeline(POCKET, text=False).unet.get_submodule(name).weight.shape
    tensors = {f"unet.{name}.lora_A.weight": draw(2, columns), f"unet.{name}.lora_B.weight": draw(rows, 2, seed=1)}
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


@pytest.mark.slow
def test_a_lora_draws_other_pictures_in_which_the_key_is_found(house: Path, tmp_path: Path, lora: Path) -> None:
    key, out = house / "my.key", tmp_path / "styled"
    run("generate", "--key", key, "-n", 1, "-o", out, "--steps", 4, "--lora", f"{lora}:0.5")
    settings, _ = read_records(out / "drawn.jsonl")
    plain, _ = read_records(house / "images/marked/drawn.jsonl")
    assert settings["loras"] == ["style.safetensors:0.5"] and settings["model"] != plain["model"]
    picture = out / "0000000.png"
    assert picture.read_bytes() != (house / "images/marked/0000000.png").read_bytes()
    (verdict,) = json.loads(run("verify", picture, "--key", key, *QUICK, "--json").stdout)
    assert verdict["present"] and verdict["notes"] == []
    load_pipeline(POCKET, loras=[f"{lora}:0.5"]).save_pretrained(tmp_path / "fused")
    noted = run("verify", picture, "--key", key, *QUICK, "--model", tmp_path / "fused").stdout
    assert "carries key" in noted and "the key was made for model pocket" in noted
