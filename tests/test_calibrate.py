"""Folders become a calibration, a stopped run goes on, and keygen, verify and audit go by it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from identity import MODEL, Identity, generate, key, verifier
from PIL import Image

from ringmark.data.images import read_sample, to_array
from ringmark.data.reader import read_records
from ringmark.data.sources import find_images
from ringmark.errors import CalibrationError, ImageError, SchemeError
from ringmark.inversion.decoder import INVERTERS
from ringmark.inversion.noise_recovery import NoiseRecovery, rings
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.calibration import LEAST, Calibration
from ringmark.watermark.cli.main import main
from ringmark.watermark.detect.cascade import EARLY
from ringmark.watermark.embed import initial_noise
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.fourier import Placement
from ringmark.watermark.tasks import draw as tasks
from ringmark.watermark.tasks import load
from ringmark.watermark.tasks.calibrate import KNOWN, Unmarked, calibrate, recovery_of
from ringmark.watermark.tasks.keygen import new_key

WAY = ["--method", "encoder", "--steps", "2"]


def recoverer() -> Recoverer:
    return Recoverer(MODEL, INVERTERS["encoder"], 2)


def drawn(folder: Path, number: int, first_seed: int = 0, model=MODEL, marked: Key | None = None, size=None) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "generate", generate)
        tasks.draw(model, folder, [""] * number, first_seed, key=marked, steps=2, guidance=1.0, size=size)
    return folder


def photographs(folder: Path, number: int, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(number):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """Forty drawn images, five given ones, and a calibration of both."""
    house = tmp_path_factory.mktemp("house")
    folders = [drawn(house / "drawn", 40), photographs(house / "given", 5)]
    calibrate(recoverer(), Unmarked.of(folders), house / "my.cal")
    return house


@pytest.fixture
def run(monkeypatch):
    """A command on the model whose maps are the identity; stdout, or stderr where it fails with exit code 2."""
    monkeypatch.setattr(load, "load_model", lambda *_, **__: MODEL)

    def run(*args, code: int = 0) -> str:
        done = CliRunner().invoke(main, [str(a) for a in args])
        assert done.exit_code == code, (done.output, done.stderr)
        return done.stderr.removeprefix("Error: ").strip() if code == 2 else done.stdout

    return run


# --- making one


def test_folders_become_a_calibration(house):
    made = Calibration.load(house / "my.cal")
    assert (made.n, made.sources, made.latent_shape) == (45, {"drawn": 40, "given": 5}, MODEL.latent_shape)
    made.check(recoverer().settings.as_dict())
    assert not (house / "my.cal.unfinished").exists()
    images = [to_array(read_sample(p, MODEL.image_size).image) for p in find_images(house / "drawn")]
    noise = recoverer()(torch.from_numpy(np.stack(images))).noise
    expected = NoiseRecovery.measure(noise, initial_noise(list(range(40)), MODEL.latent_shape))
    torch.testing.assert_close(made.recovery.attenuation, expected.attenuation)
    torch.testing.assert_close(made.recovery.variance, expected.variance)


def test_a_calibration_at_another_size(house, tmp_path):
    recoverer, images = Recoverer(MODEL, INVERTERS["encoder"], steps=2), Unmarked.of([house / "drawn"])
    made = calibrate(recoverer, images, tmp_path / "c", size=(32, 48)).calibration
    assert made.latent_shape == (3, 32, 48) and made.settings["image_size"] == [32, 48]
    made.check(recoverer.settings.as_dict())  # of the native size


def test_what_cannot_be_used_is_left_out_and_said(tmp_path):
    folder = photographs(tmp_path / "given", LEAST)
    Image.new("RGB", (32, 32), "red").save(folder / "flat.png")
    (folder / "broken.png").write_bytes(b"broken")
    shutil.copy(find_images(folder)[0], folder / "zz copy.png")
    found = calibrate(recoverer(), Unmarked.of([folder, folder]), tmp_path / "my.cal")
    assert found.calibration.n == LEAST and found.calibration.sources == {"given": LEAST}
    assert [error.split(": ")[0] for error in found.errors] == [
        str(folder / n) for n in ("broken.png", "flat.png", "zz copy.png")
    ]
    assert "flat colour" in found.errors[1] and "shows the same pixels as" in found.errors[2]
    assert "3 left out" in found.sentence()
    assert found.recommended is None and f"needs {KNOWN} images" in found.sentence()


def test_only_enough_images_of_this_very_model_tell_how_well_noise_comes_back(tmp_path):
    class Other(Identity):
        identity = MODEL.identity | {"fingerprint": "1"}

    folders = [drawn(tmp_path / "few", KNOWN - 1), drawn(tmp_path / "others", 9, 1000, Other())]
    folders += [drawn(tmp_path / "larger", 2, 2000, size=(64, 64))]
    found = calibrate(recoverer(), Unmarked.of(folders), tmp_path / "my.cal")
    assert found.calibration.recovery is None and found.calibration.sources == {"drawn": KNOWN - 1, "given": 11}
    one_more = drawn(tmp_path / "one more", 1, 500)
    found = calibrate(recoverer(), Unmarked.of([*folders, one_more]), tmp_path / "my.cal")
    assert found.calibration.recovery is not None and "recommended mark: bands 2-3 in channels 0-2" in found.sentence()
    assert set(found.record()["recommended"]) == {"bands"}


def test_a_stopped_run_goes_on(tmp_path):
    class Stopping(Recoverer):
        calls, last = 0, 3

        def latents(self, images):
            self.calls += 1
            if self.calls > self.last:
                raise KeyboardInterrupt
            return super().latents(images)

    images = Unmarked.of([photographs(tmp_path / "given", 20)])
    stopping, again = (Stopping(MODEL, INVERTERS["encoder"], 2) for _ in range(2))
    whole = calibrate(recoverer(), images, tmp_path / "whole.cal", batch=4).calibration
    with pytest.raises(KeyboardInterrupt):
        calibrate(stopping, images, tmp_path / "my.cal", batch=4)
    unfinished = tmp_path / "my.cal.unfinished"
    kept = [len(read_records(path)[1]) for path in sorted(unfinished.glob("*.jsonl"))]
    assert kept == [3 * 4, 3 * 4] and not (tmp_path / "my.cal").exists()
    (unfinished / "mine.txt").touch()
    assert calibrate(again, images, tmp_path / "my.cal", batch=4).calibration.fingerprint == whole.fingerprint
    assert again.calls == 2 and [p.name for p in unfinished.iterdir()] == ["mine.txt"]  # only its own are removed


# --- what is refused, in one line


def refused(act, kind=CalibrationError) -> CalibrationError:
    with pytest.raises(kind) as caught:
        act()
    assert "\n" not in str(caught.value)
    return caught.value


def test_folders_that_cannot_be_used_are_named(house, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty"):
        assert refused(lambda folder=folder: Unmarked.of([folder]), ImageError).path == folder
    error = refused(lambda: Unmarked.of([house / "given"]))
    assert (error.code, error.subject) == ("calibration.too-few", "5 unmarked images")
    marked = drawn(tmp_path / "images" / "marked", 2, marked=key(1))
    error = refused(lambda: Unmarked.of([house, tmp_path / "images"]))
    assert (error.code, error.subject) == ("calibration.marked", marked) and key(1).fingerprint[:8] in error.fact
    error = refused(lambda: Unmarked.of([house, drawn(tmp_path / "again", 1, 3)]))
    assert (error.code, error.subject) == ("calibration.same-noise", tmp_path / "again/0000003.png")
    assert str(house / "drawn/0000003.png") in error.fact


def test_images_without_texture_are_refused(tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(LEAST):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "flat" / f"{i:02d}.png")
    error = refused(lambda: calibrate(recoverer(), Unmarked.of([tmp_path / "flat"]), tmp_path / "my.cal"))
    assert (error.code, error.subject) == ("calibration.too-few", "0 unmarked images")
    assert f"{tmp_path / 'flat/00.png'}: the image is one flat colour" in error.fact
    for i in range(LEAST):
        pixels = np.arange(i, i + 4, dtype=np.uint8).reshape(2, 2).repeat(2, 0).repeat(2, 1) * 9
        Image.fromarray(pixels).save(tmp_path / "flat" / f"{i:02d}.png")
    error = refused(lambda: calibrate(recoverer(), Unmarked.of([tmp_path / "flat"]), tmp_path / "my.cal"))
    assert (error.code, error.subject) == ("calibration.degenerate", f"{LEAST} unmarked images")
    assert not (tmp_path / "my.cal").exists()


def test_the_command_refuses_before_a_model_is_loaded(house, run, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    to = ["-o", tmp_path / "new.cal"]
    (tmp_path / "empty").mkdir()
    for args, beginning in [
        ([tmp_path / "none", *to], f"{tmp_path / 'none'}: "),
        ([tmp_path / "empty", *to], f"{tmp_path / 'empty'}: "),
        ([house / "given", *to], "5 unmarked images: "),
        ([house, "-o", house / "my.cal"], f"{house / 'my.cal'}: exists already"),
        ([house, "-o", house, "--force"], f"{house}: is a folder"),
    ]:
        message = run("calibrate", *args, code=2)
        assert message.startswith(beginning) and "\n" not in message


def test_a_plot_that_cannot_be_drawn_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "load_model", lambda *_, **__: MODEL)
    folder, plot = drawn(tmp_path / "few", LEAST), tmp_path / "plot.png"
    args = ["calibrate", folder, "-o", tmp_path / "my.cal", "--plot", plot, *WAY]
    done = CliRunner().invoke(main, [str(arg) for arg in args])
    assert done.exit_code == 0 and f"{plot}: not drawn" in done.stderr and not plot.exists()


# --- keygen


def well_recovered(channel: int, low: int, high: int) -> NoiseRecovery:
    good = torch.zeros(3, int(rings(32, 32).max()) + 1, dtype=torch.float64)
    good[channel, low : high + 1] = 1
    return NoiseRecovery(good, torch.ones_like(good))


def test_a_key_goes_where_the_calibration_says(house, tmp_path):
    made = replace(Calibration.load(house / "my.cal"), recovery=well_recovered(1, 3, 8), name="my.cal")
    found = new_key(MODEL, "tree-ring", made).metadata
    assert found["bands"] == [{"channels": [0, 1, 2], "radii": [2, 3]}, {"channels": [1], "radii": [4, 8]}]
    assert new_key(MODEL, "tree-ring", made, channels=(0,)).metadata["bands"][0]["channels"] == [0]
    low, high = new_key(MODEL, "tree-ring", made, budget=0.03).metadata["radii"]
    assert Placement((1,), (low, high)).share(MODEL.latent_shape) <= 0.03 < Placement((1,), (3, 8)).share((3, 32, 32))
    error = refused(lambda: new_key(MODEL, "tree-ring", made, budget=0.001), SchemeError)
    assert (error.code, error.subject) == ("scheme.budget", "channels 0, 1, 2, radii 1-4")
    assert "0.0664" in error.fact and "0.001" in error.fact
    unknown = new_key(MODEL, "tree-ring").metadata["bands"]  # nothing is known of this model
    assert [band["channels"] for band in unknown] == [[0, 1, 2], [0, 1, 2]]
    assert recovery_of(MODEL, None) is None and recovery_of(MODEL, made) is made.recovery
    error = refused(lambda: new_key(MODEL, "tree-ring", replace(made, recovery=None)))
    assert (error.code, error.subject) == ("calibration.no-recovery", "my.cal") and error.details["needed"] == KNOWN
    other = replace(made, settings=made.settings | {"model": {"name": "other"}})
    error = refused(lambda: new_key(MODEL, "tree-ring", other))
    assert (error.code, error.subject) == ("calibration.model", "my.cal") and "'other'" in error.fact


def test_keygen_takes_a_calibration(house, run, tmp_path):
    replace(Calibration.load(house / "my.cal"), recovery=well_recovered(1, 3, 8)).save(tmp_path / "my.cal")
    args = ["keygen", "-o", tmp_path / "my.key", "--json", "--force", "--calibration"]
    found = json.loads(run(*args, tmp_path / "my.cal"))
    assert found["bands"][1] == {"channels": [1], "radii": [4, 8]}
    assert json.loads(run(*args, tmp_path / "my.cal", "--channels", "0"))["bands"][1]["channels"] == [0]
    assert run(*args, tmp_path / "none", code=2).startswith(f"{tmp_path / 'none'}: ")


# --- verify and audit


@pytest.fixture
def pictures(tmp_path) -> list:
    """A marked and an unmarked picture, and the key."""
    mine = key(1, "rand")
    mine.save(tmp_path / "my.key")
    drawn(tmp_path / "pictures" / "marked", 1, 900, marked=mine)
    drawn(tmp_path / "pictures" / "unmarked", 1, 901)
    return [*find_images(tmp_path / "pictures"), "--key", tmp_path / "my.key", *WAY]


def test_verify_and_audit_go_by_a_calibration(house, run, pictures, tmp_path):
    calibration = ["--calibration", house / "my.cal", "--alpha", 0.03]
    assert "45 unmarked images cannot confirm p below" in run("verify", *pictures, *calibration[:2], code=2)
    with pytest.raises(CalibrationError) as caught:
        Calibration.load(house / "my.cal").check_level(1e-3)
    assert (caught.value.code, caught.value.details["needed"]) == ("calibration.level", 999)
    made = Calibration.load(house / "my.cal")
    records = json.loads(run("verify", *pictures, *calibration, "--json", code=1))
    assert [r["present"] for r in records] == [True, False]
    assert {r["calibration"] for r in records} == {made.fingerprint}
    assert list(records[0]["stages"]) == ["latents"] and "latents" in records[1]["stages"]
    assert records[0]["conformal_p"] == pytest.approx(1 / 46 / EARLY[0]) and records[1]["conformal_p"] == 1
    (thorough, _) = json.loads(run("verify", *pictures, *calibration, "--json", "--thorough", code=1))
    assert list(thorough["stages"]) == ["latents", "full"]
    assert {r["calibration"] for r in json.loads(run("verify", *pictures, "--json", code=1))} == {None}
    audit = ["audit", tmp_path / "pictures", *pictures[2:], "-o", tmp_path / "results.jsonl"]
    assert "1 with a key, 1 without" in run(*audit, *calibration)
    assert "calibration was" in run(*audit, code=2)
    run("verify", pictures[0], *pictures[2:], *calibration, "--explain", tmp_path / "why.png")


def test_a_calibration_of_another_way_is_refused(house, run, pictures, tmp_path):
    message = run("verify", *pictures, "--calibration", house / "my.cal", "--alpha", 0.03, "--steps", 3, code=2)
    assert message.startswith(f"{house / 'my.cal'}: ") and "steps was 2, is 3" in message and "\n" not in message
    (tmp_path / "damaged").write_bytes((house / "my.cal").read_bytes()[:-1])
    assert "damaged" in run("verify", *pictures, "--calibration", tmp_path / "damaged", "--alpha", 0.03, code=2)


def test_the_models_own_calibration_is_used_where_it_fits(house, run, pictures, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").touch()
    shutil.copy(house / "my.cal", tmp_path / "model" / Calibration.FILE)
    args = ["verify", pictures[0], *pictures[2:], "--json", "--model", tmp_path / "model"]
    used, unused = (json.loads(run(*args, *more))[0]["calibration"] for more in ((), ("--steps", 3)))
    assert (used, unused) == (Calibration.load(house / "my.cal").fingerprint, None)
    (tmp_path / "model" / Calibration.FILE).write_bytes(b"damaged")
    assert run(*args, code=2).startswith(f"{tmp_path / 'model' / Calibration.FILE}: is damaged")


def test_a_key_beyond_the_calibration_is_refused_by_name(house):
    made = Calibration.load(house / "my.cal")
    wide = key(1, "zeros", (2, 11))  # compares with what is outside
    with pytest.raises(CalibrationError, match=r"\b12\b") as caught:
        verifier([wide], method="encoder", calibration=made)
    assert (caught.value.code, caught.value.subject) == ("calibration.reach", str(house / "my.cal"))
