"""Every command end to end on the embedded model, and what it says to bad input."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from ringmark.watermark.cli import main as cli
from ringmark.watermark.keys.key import Key
from ringmark.watermark.schemes.tree_ring import Placement, make_key
from ringmark.watermark.tasks import audit as runs
from ringmark.watermark.tasks import evaluate as comparison
from ringmark.watermark.tasks import verify as single

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--steps", "4", "--max-steps", "1"]


def run(*args: object, code: int = 0) -> Result:
    """Run a command as a user would; stderr apart from stdout."""
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def refused(*args: object) -> str:
    """The one line by which a command refuses its arguments."""
    message = run(*args, code=2).stderr.strip()
    assert "Traceback" not in message
    if message.startswith("Error: "):
        assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a key, two marked and two unmarked images, drawn in a few steps."""
    folder = tmp_path_factory.mktemp("house")
    run("keygen", "-o", folder / "my.key")
    run("generate", "--key", folder / "my.key", "-n", 2, "-o", folder / "images/marked", "--steps", 4)
    run("generate", "--no-mark", "-n", 2, "--seed", 2, "-o", folder / "images/unmarked", "--steps", 4)
    return folder


def pictures(house: Path, kind: str = "*") -> list[Path]:
    return sorted((house / "images").glob(f"{kind}/*.png"))


def test_every_command_has_an_example_and_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for name, command in cli.main.commands.items():
        assert f"Example:\n  ringmark {name}" in re.sub(r"\n +", "\n  ", command.help)
        assert f"ringmark {name}" in readme
    for name, command in cli.keys.commands.items():
        assert f"Example:\n  ringmark keys {name}" in re.sub(r"\n +", "\n  ", command.help)
        assert f"ringmark keys {name}" in readme


def test_same_words_for_the_same_options() -> None:
    helps: dict[str, set[str | None]] = {}
    for command in cli.main.commands.values():
        for option in command.params:
            if option.name in (
                "source",
                "device",
                "dtype",
                "steps",
                "batch",
                "as_json",
                "guidance",
                "max_steps",
                "alpha",
            ):
                helps.setdefault(option.name, set()).add((option.help, str(option.default)))
    assert all(len(texts) == 1 for texts in helps.values()), helps


def test_keygen_writes_a_key_once(house: Path) -> None:
    made = json.loads(
        run(
            "keygen", "-o", house / "second.key", "--pattern", "rand", "--channels", "1", "--radii", "2-6", "--json"
        ).stdout
    )
    assert made["pattern"] == "rand" and made["channels"] == [1] and made["radii"] == [2, 6]
    assert "exists already" in refused("keygen", "-o", house / "second.key")
    again = json.loads(run("keygen", "-o", house / "second.key", "--force", "--json").stdout)
    assert again["fingerprint"] != made["fingerprint"]


def test_a_ring_of_keys_is_made_listed_and_looked_for(house: Path, tmp_path: Path) -> None:
    ring = tmp_path / "ring"
    made = json.loads(run("keygen", "-n", 3, "-o", ring, "--json").stdout)
    assert "2 keys written" in run("keygen", "-n", 2, "-o", ring).stdout
    listed = json.loads(run("keys", "list", ring, "--json").stdout)
    assert len(listed) == 5 and all(key in listed for key in made)
    lines = run("keys", "list", ring, house / "my.key").stdout.splitlines()
    assert len(lines) == 7 and str(house / "my.key") in lines[-1]
    keys = ["--key", ring, "--key", house / "my.key", "--key", made[0]["path"]]
    said = run("verify", *pictures(house), *keys, *QUICK, code=1).stdout
    assert said.count(": carries key") == 2 and said.count(": carries none of 6 keys, nearest") == 2
    shutil.copy(made[0]["path"], ring / "copy.key")
    message = refused("audit", house / "images", "--key", ring, "-o", tmp_path / "r.jsonl")
    assert "copy.key" in message and made[0]["path"] in message


def test_keys_are_shown_without_their_values(house: Path, tmp_path: Path) -> None:
    key, record = house / "my.key", tmp_path / "public.json"
    shown = json.loads(run("keys", "show", key, "--json", "--plot", tmp_path / "key.png").stdout)
    assert (tmp_path / "key.png").stat().st_mode & 0o077 == 0 and (tmp_path / "key.png").stat().st_size > 5000
    assert "has the key" in " ".join(run("keys", "show", "--help").stdout.split())
    assert shown["commitment"] in run("keys", "show", key).stdout
    run("keys", "export-public", key, "-o", record)
    assert json.loads(record.read_text())["commitment"] == shown["commitment"]
    assert ".json" in refused("keys", "export-public", key, "-o", key)
    assert "exists already" in refused("keys", "export-public", key, "-o", record)
    run("keys", "export-public", key, "-o", record, "--force")


def test_an_interrupted_keygen_says_how_many_keys_there_are(tmp_path: Path, monkeypatch) -> None:
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Key, "save", stop)
    said = run("keygen", "-n", 2, "-o", tmp_path / "ring", code=130).stderr
    assert "interrupted: 0 of 2 keys" in said


def test_keys_are_listed_without_torch(house: Path) -> None:
    script = "import sys; from ringmark.watermark.cli.main import main; main(sys.argv[1:], standalone_mode=False); assert 'torch' not in sys.modules"
    for args in (["list", str(house)], ["show", str(house / "my.key")]):
        subprocess.run([sys.executable, "-c", script, "keys", *args], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.skipif(os.name != "posix", reason="files have no modes")
def test_a_key_that_others_may_read_is_refused(house: Path, tmp_path: Path) -> None:
    shutil.copy(house / "my.key", tmp_path / "a b.key")
    (tmp_path / "a b.key").chmod(0o644)
    for args in (["verify", "x.png", "--key"], ["generate", "-o", tmp_path / "out", "--key"], ["keys", "list"]):
        assert f"run: chmod 600 '{tmp_path}/a b.key'" in refused(*args, tmp_path / "a b.key")


@pytest.mark.parametrize(
    "options",
    [
        ["--channels", "9"],
        ["--channels", "1,1"],
        ["--radii", "5"],
        ["--radii", "5-2"],
        ["--radii", "2-3-4"],
        ["--channels", "1-0"],
        ["--channels", ""],
        ["--radii", "0-99"],
        ["--channels", "x"],
    ],
)
def test_keygen_refuses(house: Path, options: list[str]) -> None:
    refused("keygen", "-o", house / "never.key", *options)
    assert not (house / "never.key").exists()


def test_channels_are_a_list_and_radii_a_pair(tmp_path: Path) -> None:
    made = json.loads(
        run("keygen", "-o", tmp_path / "a.key", "--channels", "0,2-3", "--radii", "3-10", "--json").stdout
    )
    assert (made["channels"], made["radii"]) == ([0, 2, 3], [3, 10])


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


def test_audit_records_everything_and_goes_on(house: Path, tmp_path: Path) -> None:
    folder, results = tmp_path / "folder", tmp_path / "results.jsonl"
    (folder / "deep").mkdir(parents=True)
    for i, path in enumerate(pictures(house)):
        (folder / ("deep" if i % 2 else ".") / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    run("keygen", "-o", tmp_path / "other.key")
    args = [
        "audit",
        folder,
        "--key",
        house / "my.key",
        "--key",
        tmp_path / "other.key",
        "-o",
        results,
        *QUICK,
        "--json",
    ]
    found = json.loads(run(*args).stdout)
    assert (found["images"], found["present"], found["absent"], found["unreadable"]) == (5, 2, 2, 1)
    assert list(found["by_key"].values()) == [2]
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    assert json.loads(run(*args).stdout) == found
    records = {r["sample_id"]: r for r in map(json.loads, results.read_text().splitlines()[1:])}
    assert "error" in records["broken.png"] and len(records) == 5
    assert "max_steps was 1, is 2" in refused(*args[:-2], 2)


@pytest.fixture
def album(house: Path, tmp_path: Path) -> list[object]:
    """The audit of a small album; it ends with the name of its results."""
    folder = tmp_path / "here" / "album"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(pictures(house, "marked")[0].read_bytes())
    (folder / "broken.png").write_bytes(b"broken")
    (folder / "notes.txt").touch()
    return ["audit", folder, "--key", house / "my.key", *QUICK, "-o", tmp_path / "here" / "results.jsonl"]


def test_an_audit_says_what_it_did_not_read(album: list[object]) -> None:
    result = run(*album)
    assert "1 unreadable; 1 other files skipped" in result.stdout
    assert result.stderr.strip().endswith("AVIF") and "broken.png: is not an image" in result.stderr
    result = run(*album, "--json")
    found = json.loads(result.stdout)
    assert found["skipped"] == 1 and "broken.png" in found["errors"][0] and not result.stderr


def test_an_audit_looks_again_at_what_has_changed_only(album: list[object], house: Path) -> None:
    picture, results = album[1] / "a.png", album[-1]
    assert "1 carry a key" in run(*album).stdout
    before = results.read_bytes()
    run(*album)
    assert results.read_bytes() == before
    picture.write_bytes(pictures(house, "unmarked")[0].read_bytes())
    assert "0 carry a key" in run(*album).stdout
    (album[1] / "broken.png").write_bytes(b"broken otherwise")
    run(*album)
    assert len(results.read_text().splitlines()) == 1 + 2 + 1 + 1


def test_an_audit_belongs_to_its_folder_even_if_both_are_moved(album: list[object], tmp_path: Path) -> None:
    run(*album)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.png").write_bytes(b"broken")
    assert "folder was" in refused("audit", tmp_path / "other", *album[2:])
    before = album[-1].read_bytes()
    (tmp_path / "here").rename(tmp_path / "there")
    run("audit", tmp_path / "there" / "album", *album[2:-1], tmp_path / "there" / "results.jsonl")
    assert (tmp_path / "there" / "results.jsonl").read_bytes().count(b"\n") <= before.count(b"\n") + 1


def test_an_audit_goes_on_past_a_folder_that_cannot_be_listed(album: list[object], monkeypatch) -> None:
    closed, scandir = album[1] / "closed", os.scandir
    closed.mkdir()

    def forbid(path):
        if Path(path) == closed:
            raise PermissionError(13, "no", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)
    result = run(*album)
    assert "3 images: 1 carry a key" in result.stdout and "closed: cannot be listed" in result.stderr


def test_roc_from_an_audit(house: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    run("audit", house / "images", "--key", house / "my.key", "-o", results, *QUICK)
    labels = [x for kind in ("marked", "unmarked") for x in ("--labels", house / "images" / kind / "labels.csv")]
    said = run("roc", results, results, *labels, "-o", tmp_path / "roc.png", "--json")
    curves = json.loads(said.stdout)
    assert said.stderr == "4 of 4 records labelled; 0 labels fit no record\n"
    (tmp_path / "copy.jsonl").write_bytes(results.read_bytes())
    message = refused("roc", results, tmp_path / "copy.jsonl", *labels)
    assert all(part in message for part in ("copy.jsonl", "results.jsonl", "marked/0000000.png"))
    assert curves[0]["auc"] == 1.0 and (curves[0]["positives"], curves[0]["negatives"]) == (2, 2)
    assert (tmp_path / "roc.png").stat().st_size > 10_000
    assert "marked and unmarked" in refused("roc", results, *labels[:2])
    (tmp_path / "labels.csv").write_text("path,label\nelsewhere.png,1\n")
    (tmp_path / "more.csv").write_text("path,label\nelsewhere.png,1\nmarked/0000000.png,1\nunmarked/0000002.png,0\n")
    assert "2 of 4 records labelled; 1 labels fit" in run("roc", results, "--labels", tmp_path / "more.csv").stdout
    assert "no label fits" in refused("roc", results, "--labels", tmp_path / "labels.csv")
    assert "Missing option '--labels'" in run("roc", results, code=2).stderr


def test_evaluate_compares_methods_and_attacks(tmp_path: Path, monkeypatch) -> None:
    train = comparison.train_classifiers
    monkeypatch.setattr(comparison, "train_classifiers", lambda *_: train(20, 5, comparison.SCENE_SIZE))
    args = ["evaluate", "-o", tmp_path / "out", "-n", 2, *QUICK]
    found = json.loads(run(*args, "--json").stdout)
    assert {(row["method"], row["attack"]) for row in found["rows"]} == {("encoder", "clean"), ("guarded", "clean")}
    for name in ("evaluation.csv", "evaluation.json", "evaluation.md", "scores.csv", "roc-clean.png", "roc-clean.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    more = run(*args, "--methods", "encoder", "--methods", " forward", "--attacks", "flip, blur:1").stdout
    assert all(f"| {a:7}| {m:8}|" in more for a in ("clean", "flip", "blur:1") for m in ("encoder", "forward"))
    assert more.endswith(f"0 files refused; tables and plots in {tmp_path / 'out'}\n")
    message = refused(*args, "-n", 3)
    assert str(tmp_path / "out") in message and "number was 2, is 3" in message
    own = ["--key", tmp_path / "out/evaluation.key"]
    unmarked = tmp_path / "out/images/unmarked"
    assert 'unmarked was null, is "images/unmarked"' in refused(*args, *own, "--unmarked", unmarked)
    assert "choose from" in refused(*args, "--methods", "magic")
    assert "--key" in refused(*args, "--marked", unmarked)
    assert "2 of 2 images are unmarked" in refused(*args[:2], tmp_path / "o", *own, "--marked", unmarked)


def test_invert_writes_what_it_found(house: Path, tmp_path: Path) -> None:
    run("invert", pictures(house)[0], "-o", tmp_path / "noise.safetensors", *QUICK)
    tensors = load_file(tmp_path / "noise.safetensors")
    assert tensors["latents"].shape == tensors["noise"].shape == (4, 32, 32)
    with safe_open(tmp_path / "noise.safetensors", "numpy") as file:
        facts = json.loads(file.metadata()["ringmark"])
    assert facts["evaluations"] == 2 and len(facts["residuals"]) == 2
    at = facts["residuals"].index(facts["residual"])
    assert facts["pixel_residuals"][at] == min(facts["pixel_residuals"])


def test_info_names_the_model() -> None:
    assert json.loads(run("info", "--json").stdout)["latent shape"] == "4x32x32"


def test_demo_does_the_whole_job(tmp_path: Path) -> None:
    out = run("demo", "-o", tmp_path / "demo", "-n", 2).stdout
    assert "AUC" in out and "carries key" in out
    for name in ("my.key", "explain.png", "results.jsonl", "roc.png"):
        assert (tmp_path / "demo" / name).exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b"hello", "not an image"), (b"\x89PNG\r\n\x1a\n" + b"0" * 64, "damaged")],
)
def test_verify_refuses_what_is_no_image(house: Path, tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "strange.png"
    path.write_bytes(content)
    message = run("verify", path, "--key", house / "my.key", *QUICK, code=2).stderr
    note, *message = message.strip().splitlines()
    assert note.startswith("note: ") and "calibration.safetensors: made with" in note  # QUICK is not its way
    assert len(message) == 1 and str(path) in message[0] and said in message[0]


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16", "CMYK", "RGBA", "LA"])
def test_verify_takes_every_kind_of_picture(house: Path, tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 255, (150, 200), dtype=np.uint8))
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    image = (
        Image.fromarray(rng.integers(0, 65535, (150, 200), dtype=np.uint16)) if mode == "I;16" else grey.convert(mode)
    )
    image.save(path)
    line = run("verify", path, "--key", house / "my.key", *QUICK, code=1).stdout
    assert "does not carry" in line and "resized 200x150" in line


def test_wrong_corrupt_and_missing_keys(house: Path, tmp_path: Path) -> None:
    picture = pictures(house)[0]
    assert "no such key" in refused("verify", picture, "--key", tmp_path / "none.key")
    damaged = bytearray((house / "my.key").read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "damaged.key").write_bytes(damaged)
    assert "damaged" in refused("verify", picture, "--key", tmp_path / "damaged.key")
    assert "not a ringmark key" in refused("verify", picture, "--key", picture)


def test_folders_and_models_that_are_not(house: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    args = ["--key", house / "my.key", "-o", tmp_path / "r.jsonl"]
    assert "empty" in refused("audit", tmp_path / "empty", *args)
    assert "none" in refused("audit", tmp_path / "none", *args)
    assert not (tmp_path / "r.jsonl").exists()
    assert "no model_index.json" in refused("info", "--model", tmp_path / "empty")
    assert "--device" in refused("info", "--device", "warp")
    before = pictures(house)[0].read_bytes()
    assert "--explain" in refused("verify", pictures(house)[0], *args[:2], "--explain", pictures(house)[0])
    assert pictures(house)[0].read_bytes() == before


def test_a_key_of_another_model_marks_nothing(tmp_path: Path) -> None:
    for name, shape in (("other", (4, 32, 32)), ("larger", (4, 64, 64))):
        key = make_key(shape, Placement((0,), (3, 6)), model={"name": name, "fingerprint": "0"})
        key.save(tmp_path / f"{name}.key")
        said = refused("generate", "--key", tmp_path / f"{name}.key", "-n", 1, "-o", tmp_path / "out")
        assert key.fingerprint[:8] in said and name in said and not (tmp_path / "out").exists()


def test_a_refusal_does_not_cost_a_model(house: Path, tmp_path: Path, monkeypatch) -> None:
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(cli, "load_model", load)
    picture, key, none = pictures(house)[0], ["--key", house / "my.key"], tmp_path / "none"
    assert "exists already" in refused("keygen", "-o", house / "my.key")
    assert "exists already" in refused("invert", picture, "-o", picture)
    for option in (["verify", picture, *key, "--alpha"], ["generate", "--no-mark", "-o", none, "--guidance"]):
        assert "nan is not a finite number" in refused(*option, "nan")
    assert "no such key" in refused("verify", picture, "--key", none)
    assert "no *.key file" in refused("verify", picture, "--key", tmp_path)
    assert "is a folder" in refused("generate", "--key", tmp_path, "-o", tmp_path / "out")
    assert "is not a folder" in refused("keygen", "-n", 2, "-o", house / "my.key")
    assert "with -n" in refused("keygen", "-o", tmp_path)
    assert "no such folder" in refused("audit", none, *key, "-o", tmp_path / "r.jsonl")
    assert "no such folder" in refused("evaluate", *key, "--marked", none, "-o", tmp_path / "out")
    assert "choose from" in refused("evaluate", "--methods", "magic", "-o", tmp_path / "out")
    assert "choose from" in refused("evaluate", "--attacks", "magic", "-o", tmp_path / "out")
    assert "same key" in refused("evaluate", *key, *key, "-o", tmp_path / "out")
    assert ".png or .svg" in refused("verify", picture, *key, "--explain", "why.txt")
    assert ".png or .svg" in refused("roc", none, "--labels", none, "-o", "roc.pdf")
    assert "the name is empty" in refused("verify", "", *key)
    assert "the name is empty" in refused("keygen", "-o", "")
    assert "--seed" in refused("generate", "--no-mark", "--seed", 2**64, "-o", tmp_path / "out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_a_device_that_is_not_there() -> None:
    assert "--device cuda" in refused("info", "--device", "cuda")


def test_no_fault_of_ours_looks_like_a_verdict(monkeypatch) -> None:
    def fail(*_):
        raise TypeError("a fault of ours")

    monkeypatch.setattr(single, "facts", fail)
    assert "TypeError: a fault of ours" in run("info", code=2).stderr


def test_a_full_disk_wants_room_and_not_another_name(tmp_path: Path, monkeypatch) -> None:
    def fail(number: int):
        def draw(*_, **__):
            raise OSError(number, os.strerror(number), str(tmp_path / "0.png"))

        monkeypatch.setattr(runs, "draw", draw)
        return refused("generate", "--no-mark", "-o", tmp_path)

    assert "make room" in fail(errno.ENOSPC) and str(tmp_path / "0.png") in fail(errno.ENOSPC)
    assert "choose another" in fail(errno.EISDIR)


def test_only_what_is_resumed_says_so_when_interrupted(tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(single, "facts", interrupt)
    monkeypatch.setattr(runs, "draw", interrupt)
    assert run("info", code=130).stderr == "interrupted\n"
    assert "goes on from here" in run("generate", "--no-mark", "-o", tmp_path, code=130).stderr


@pytest.mark.skipif(os.name != "posix", reason="pipes of another kind")
@pytest.mark.parametrize(("args", "closed"), [(["--help"], 1), (["info"], 1), (["keygen"], 2)])
def test_a_closed_pipe_ends_it_quietly(args: list[str], closed: int) -> None:
    command = [sys.executable, "-m", "ringmark.watermark.cli", *args]
    read, write = os.pipe()
    os.close(read)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {("stdout", "stderr")[closed - 1]: write}
    done = subprocess.run(command, cwd=ROOT, **streams)
    os.close(write)
    assert (done.returncode, done.stdout or b"", done.stderr or b"") == (cli.EXIT_PIPE, b"", b"")


def test_every_decoder_inversion_is_offered_by_name() -> None:
    from ringmark.inversion.decoder import INVERTERS

    for command in (cli.verify, cli.audit, cli.invert, cli.calibrate):
        (option,) = (p for p in command.params if p.name == "method")
        assert set(option.type.choices) == set(INVERTERS), command.name


def test_a_turned_picture_is_searched(house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ringmark.watermark.detect import search as searching
    from ringmark.watermark.detect.geometry import Search

    few = Search(angles=(0, 30), scales=(1.0,), dear=1, steps=4)
    monkeypatch.setattr(searching.SearchingDetector.__init__, "__defaults__", (few,))
    run("attack", pictures(house, "marked")[0], tmp_path / "turned.png", "--attack", "rotation:30")
    asked = ["verify", tmp_path / "turned.png", "--key", house / "my.key", *QUICK]
    assert "does not carry" in run(*asked, code=1).output
    assert "turned by 30°" in run(*asked, "--search").output
    run("keygen", "-o", tmp_path / "zeros.key", "--pattern", "zeros")
    assert "leave it or --search out" in refused(*asked[:2], "--key", tmp_path / "zeros.key", "--search", *QUICK)
