"""`ringmark attack`: files and folders, resuming, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import wrap
from PIL import Image

from ringmark.inversion.models.pipeline import LatentModel
from ringmark.watermark.attacks.chains import PRESETS, apply, expand, seed_of
from ringmark.watermark.attacks.distortions import ATTACKS
from ringmark.watermark.cli import main as cli
from ringmark.watermark.tasks import load


def picture(width: int = 48, height: int = 48, seed: int = 0) -> Image.Image:
    """Noise: the hardest picture for whatever should leave it alone."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, int)


@pytest.fixture(scope="module")
def tiny(tiny_parts) -> LatentModel:
    return wrap(tiny_parts)


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
    assert "2 attacked images written, 0 kept" in run(album, tmp_path / "out", "--attack", "noise").stdout
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
    assert {p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")} == {
        "attacked.jsonl",
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
    assert "1 attacked image written, 1 kept" in run(*args).stdout
    assert lost.exists() and kept.stat().st_mtime_ns == stamp
    picture(seed=9).save(album / "a.png", compress_level=0)
    assert "1 attacked image written, 1" in run(*args).stdout and kept.stat().st_mtime_ns != stamp
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
    (out / "a.png").unlink()
    (out / "a.png").symlink_to(tmp_path / "elsewhere.png")
    assert "was not made by an earlier run" in refused(album, out, "--attack", "blur:3")
    (out / "deep" / "b.jpg.png").unlink()
    (out / "attacked.jsonl").unlink()
    (out / "a.png").unlink()
    picture().save(out / "a.png")
    assert "was not made by an earlier run" in refused(album, out, "--attack", "blur:3")


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
    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    out, flip = tmp_path / "out", ("--attack", "flip")
    assert "no such file or folder" in refused(tmp_path / "none", out, *flip)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(tmp_path / "empty", out, *flip)
    assert "takes: quality" in refused(album, out, "--attack", "jpeg:101", "--attack", "vae")
    assert "is a single file" in refused(album, tmp_path / "out.png", *flip)
    assert "is a single file" in refused(album / "a.png", tmp_path / "b.png", *flip, "--attack", "blur")
    assert "use a name that ends in .png" in refused(album / "a.png", tmp_path / "b.jpg", *flip)
    assert "is the image to be attacked" in refused(album, album, *flip, "--force")
    assert "is the image to be attacked" in refused(album / "a.png", album / "a.png", *flip, "--force")
    assert "lies in the source folder" in refused(album, album / "attacked", *flip)
    assert "Missing option '--attack'" in run(album, out, code=2).stderr
    picture().save(album / "deep/b.jpg.png")
    assert "would be written there" in refused(album, out, *flip)
    assert not out.exists() and not (album / "attacked").exists()


def test_a_model_is_loaded_where_one_is_named(album: Path, tmp_path: Path, tiny: LatentModel, monkeypatch) -> None:
    monkeypatch.setattr(load, "load_model", lambda *_, **__: tiny)
    args = [album, tmp_path / "out", "--attack", "vae", "--attack", "diffuse:0.05"]
    assert "4 attacked images written" in run(*args).stdout and "0 attacked images written, 4" in run(*args).stdout
    other = LatentModel(tiny.pipe, name="other")
    monkeypatch.setattr(load, "load_model", lambda *_, **__: other)
    assert "model name was tiny, is other" in refused(*args)


def test_all_attacks_are_listed_without_in_and_out() -> None:
    said = run("--list").stdout
    assert all(name in said for name in (*ATTACKS, *PRESETS))
    assert "quality from 1 to 100, whole numbers only [25]" in said


def test_pillow_is_enough(album: Path, tmp_path: Path) -> None:
    script = """
import sys
from ringmark.watermark.cli.main import main
main(["attack", *sys.argv[1:]], standalone_mode=False)
sys.exit("torch" in sys.modules)
"""
    args = [str(album), str(tmp_path / "out"), "--attack", "waves-weak"]
    done = subprocess.run([sys.executable, "-c", script, *args], timeout=60)
    assert done.returncode == 0 and len(attacked(tmp_path / "out")) == 16
