"""`ringmark verify`."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shell import QUICK, pictures, refused, run

from ringmark.watermark.detect.geometry import Grid
from ringmark.watermark.detect.search import Search
from ringmark.watermark.keys.key import Key
from ringmark.watermark.tasks import load
from ringmark.watermark.tasks import verify as tasks


def test_verify_says_a_line_an_image(house: Path) -> None:
    paths = pictures(house)
    result = run("verify", *paths, "--key", house / "my.key", *QUICK, code=1)
    lines = result.stdout.splitlines()
    assert len(lines) == len(paths)
    for path, line in zip(paths, lines, strict=True):
        assert re.fullmatch(re.escape(str(path)) + r": (carries|does not carry) key [0-9a-f]{8}, p = \S+", line)
    assert [("carries" in line) for line in lines] == [p.parent.name == "marked" for p in paths]


def test_verify_exit_codes_and_json(house: Path, tmp_path: Path) -> None:
    marked = pictures(house, "marked")
    records = json.loads(run("verify", *marked, "--key", house / "my.key", *QUICK, "--json").stdout)
    assert [r["present"] for r in records] == [True, True]
    assert all(0 <= r["p_value"] <= 1e-3 and r["seconds"] > 0 for r in records)
    Image.new("RGB", (128, 128), (90, 120, 30)).save(tmp_path / "flat.png")
    flat = run("verify", tmp_path / "flat.png", "--key", house / "my.key", *QUICK, code=3)
    assert "inconclusive" in flat.stdout and "flat" in flat.stdout
    missing = run("verify", marked[0], tmp_path / "none.png", "--key", house / "my.key", *QUICK, code=2)
    assert "carries" in missing.stdout and "none.png" in missing.stderr


def test_verify_explains(house: Path, tmp_path: Path) -> None:
    run(
        "verify", pictures(house, "marked")[0], "--key", house / "my.key", *QUICK, "--explain", tmp_path / "new/why.png"
    )
    with Image.open(tmp_path / "new/why.png") as image:
        assert image.width > 1000 and np.asarray(image.convert("L")).std() > 10
    assert "secret" in run("verify", "--help").stdout


def test_strange_names_are_printed_on_one_line(house: Path, tmp_path: Path) -> None:
    path = tmp_path / "a\n$x.png"
    path.write_bytes(pictures(house, "marked")[0].read_bytes())
    result = run("verify", path, "--key", house / "my.key", *QUICK, "--explain", tmp_path / "why.SVG")
    assert r"a\n$x.png: carries" in result.stdout and len(result.stdout.splitlines()) == 1
    assert (tmp_path / "why.SVG").read_text().startswith("<?xml")


def test_a_key_of_a_stranger_forges_no_line(house: Path, tmp_path: Path) -> None:
    mine = Key.load(house / "my.key")
    name = "x\nb.png: carries key 0123abcd, p = 1e-60\x1b[31m"
    Key(mine.metadata | {"model": mine.metadata["model"] | {"name": name, "fingerprint": "0"}}, mine.secret).save(
        tmp_path / "a.key"
    )
    result = run("verify", pictures(house, "marked")[0], "--key", tmp_path / "a.key", *QUICK)
    assert len(result.stdout.splitlines()) == 1 and r"x\nb.png: carries" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr


def test_verdicts_are_given_one_by_one_and_in_order(house: Path, tmp_path: Path) -> None:
    marked, unmarked = pictures(house, "marked")[0], pictures(house, "unmarked")[0]
    verifier = load.load_verifier(house / "my.key", method="encoder", steps=2).verifier
    paths = [tmp_path / "none.png", marked, tmp_path / "none.png", unmarked, tmp_path / "none.png"]
    outcomes = tasks.verify_files(verifier, paths, batch=1)
    first, second = next(outcomes), next(outcomes)
    assert first.error and second.present
    rest = list(outcomes)
    assert [outcome.path for outcome in rest] == paths[2:] and [o.present for o in rest] == [None, False, None]


@pytest.mark.parametrize("also", [[], ["--json"], ["--explain", "why.svg"]])
def test_images_are_released_once_they_are_decided(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, also: list[str]
) -> None:
    held: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def counted(*args: Any, **options: Any) -> Iterator[tasks.Outcome]:
        nonlocal most
        for outcome in whole(*args, **options):
            assert outcome.judged
            held.add(outcome.judged.noise)
            most = max(most, len(held))
            yield outcome

    whole = tasks.verify_files
    monkeypatch.setattr(tasks, "verify_files", counted)
    monkeypatch.chdir(tmp_path)
    run("verify", *[pictures(house, "marked")[0]] * 6, "--key", house / "my.key", *QUICK, "--batch", 1, *also)
    assert most <= 3, "the one to explain, the last one, and the next"


def test_encoder_only_takes_no_steps(house: Path) -> None:
    (record,) = json.loads(
        run(
            "verify",
            pictures(house, "marked")[0],
            "--key",
            house / "my.key",
            "--method",
            "encoder",
            "--steps",
            4,
            "--json",
        ).stdout
    )
    assert record["residual"] is None and record["p_value"] < 1e-3


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b"hello", "not an image"), (b"\x89PNG\r\n\x1a\n" + b"0" * 64, "damaged")],
)
def test_verify_refuses_what_is_no_image(house: Path, tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "strange.png"
    path.write_bytes(content)
    message = run("verify", path, "--key", house / "my.key", *QUICK, code=2).stderr
    assert len(message.strip().splitlines()) == 1 and str(path) in message and said in message


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16", "CMYK", "RGBA", "LA"])
def test_verify_takes_every_kind_of_picture(house: Path, tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 255, (150, 200), dtype=np.uint8))
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    image = (
        Image.fromarray(rng.integers(0, 65535, (150, 200), dtype=np.uint16)) if mode == "I;16" else grey.convert(mode)
    )
    image.save(path)
    line = run("verify", path, "--key", house / "my.key", *QUICK, "--alpha", 1e-9, code=1).stdout
    assert "does not carry" in line and "resized 200x150" in line


def test_wrong_corrupt_and_missing_keys(house: Path, tmp_path: Path) -> None:
    picture = pictures(house)[0]
    assert "no such file" in refused("verify", picture, "--key", tmp_path / "none.key")
    damaged = bytearray((house / "my.key").read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "damaged.key").write_bytes(damaged)
    assert "damaged" in refused("verify", picture, "--key", tmp_path / "damaged.key")
    assert "no safetensors header" in refused("verify", picture, "--key", picture)


def test_a_turned_picture_is_searched(house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(Search, grid=Grid(anchors=12, spacing=30, enlarged=0), refined=1, steps=4)
    monkeypatch.setattr(load, "Search", few)
    run("attack", pictures(house, "marked")[0], tmp_path / "turned.png", "--attack", "rotation:30")
    asked = ["verify", tmp_path / "turned.png", "--key", house / "my.key", *QUICK]
    assert "does not carry" in run(*asked, code=1).output
    assert "rotated by 30°" in run(*asked, "--search").output
    run("keygen", "-o", tmp_path / "zeros.key", "--pattern", "zeros")
    message = refused(*asked[:2], "--key", tmp_path / "zeros.key", "--search", *QUICK)
    assert "cannot be searched for" in message and "--search" in message


def test_verdicts_are_printed_where_the_explanation_cannot_be_written(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "why.png")

    monkeypatch.setattr(tasks, "save_figure", fail)
    asked = ["verify", pictures(house, "marked")[0], "--key", house / "my.key", *QUICK]
    result = run(*asked, "--explain", tmp_path / "why.png", code=2)
    assert "carries key" in result.stdout and "why.png" in result.stderr and "make room" in result.stderr


@pytest.mark.parametrize("link", [False, True])
def test_an_explanation_replaces_no_file_of_others(house: Path, tmp_path: Path, link: bool) -> None:
    mine, why = tmp_path / "mine.png", tmp_path / "why.png"
    mine.write_bytes(b"mine")
    why.symlink_to(mine) if link else shutil.copy(mine, why)
    asked = ["verify", pictures(house, "marked")[0], "--key", house / "my.key", *QUICK, "--explain", why]
    message = refused(*asked)
    assert "was not written by ringmark" in message and "--force" in message and why.read_bytes() == b"mine"


def test_a_folder_is_for_audit(house: Path) -> None:
    result = run("verify", house / "images", "--key", house / "my.key", *QUICK, code=2)
    assert f"is a folder; give a file in it, or test all of them with: ringmark audit {house}" in result.stderr


def test_the_calibration_is_noted_once_and_only_where_a_key_was_found(house: Path) -> None:
    marked, unmarked = pictures(house, "marked"), pictures(house, "unmarked")
    found = run("verify", *marked, "--key", house / "my.key", *QUICK).stderr
    assert found.count("note: ") == 1 == len(found.splitlines()) and "steps was 10, is 4" in found
    assert "note: " not in run("verify", *unmarked, "--key", house / "my.key", *QUICK, code=1).stderr


@pytest.mark.slow
def test_a_key_works_with_another_precision_of_its_model(tmp_path: Path) -> None:
    """Its weights are rounded to float16, so that they are no longer those that the key names."""
    import torch

    from ringmark.inversion.models.loading import POCKET, load_pipeline

    pipe, generator = load_pipeline(POCKET), torch.Generator().manual_seed(0)
    with torch.no_grad():  # pocket's own weights are float16 numbers
        for weight in pipe.unet.parameters():
            weight.mul_(1 + 1e-4 * torch.randn(weight.shape, generator=generator))
    pipe.save_pretrained(tmp_path / "wide")
    pipe.to(torch.float16).save_pretrained(tmp_path / "half")
    run("keygen", "--model", tmp_path / "wide", "-o", tmp_path / "my.key")
    drawing = ["--model", tmp_path / "wide", "--key", tmp_path / "my.key", "--steps", 4]
    run("generate", *drawing, "-o", tmp_path / "marked")
    asked = ["verify", tmp_path / "marked/0000000.png", "--key", tmp_path / "my.key", *QUICK, "--json"]
    own, other = (json.loads(run(*asked, "--model", tmp_path / name).stdout)[0] for name in ("wide", "half"))
    assert own["present"] and other["present"]
    assert other["log10_p"] == pytest.approx(own["log10_p"], rel=0.02)
    assert own["notes"] == [] and "the key was made for model wide" in other["notes"][0]
