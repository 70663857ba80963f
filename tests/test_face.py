"""`import ringmark`: names looked up on first use, and what they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ringmark


def test_the_import_loads_nothing_heavy() -> None:
    script = """
import sys
before = set(sys.modules)
import ringmark
dir(ringmark)
ringmark.RingmarkError, ringmark.KeyFileError
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
sys.exit(", ".join(sorted(loaded - {"ringmark"} - set(sys.stdlib_module_names))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ringmark.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(ringmark, name).__name__ == name
    assert name in dir(ringmark)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = ringmark.nothing_such


def test_pictures_are_verified_in_python(house: Path) -> None:
    from PIL import Image

    marked, unmarked = (sorted((house / "images" / kind).glob("*.png"))[0] for kind in ("marked", "unmarked"))
    key = ringmark.Key.load(house / "my.key")
    quick = {"steps": 4, "max_steps": 1}
    verdicts = ringmark.verify([marked, str(unmarked)], house / "my.key", **quick)
    assert [v.present for v in verdicts] == [True, False] and isinstance(verdicts[0], ringmark.Verdict)
    model = ringmark.LatentModel.from_pretrained("pocket")
    with Image.open(marked) as image:
        (same,) = ringmark.verify(image, [key, house / "my.key"], model=model, **quick)
    assert same.score == pytest.approx(verdicts[0].score, abs=1e-3) and same.key == key.fingerprint
    with pytest.raises(ringmark.ImageError):
        ringmark.verify(house / "none.png", key, **quick)


def test_verifying_without_a_key_or_a_level_is_refused(house: Path) -> None:
    with pytest.raises(ringmark.KeyFileError) as caught:
        ringmark.verify([], [])
    assert caught.value.code == "key.not-given"
    for alpha in (0, 1, float("nan")):
        with pytest.raises(ringmark.RingmarkError) as refused:
            ringmark.verify([], house / "my.key", alpha=alpha)
        assert refused.value.code == "detector.alpha"


def test_a_device_that_is_none_is_named_in_a_few_words(house: Path) -> None:
    with pytest.raises(ringmark.ModelError) as caught:
        ringmark.verify([], house / "my.key", device="tpu")
    assert caught.value.code == "model.device" and "Expected one of" not in caught.value.fact


def test_a_folder_is_audited_in_python(house: Path, tmp_path: Path) -> None:
    found = ringmark.audit(str(house / "images"), house, tmp_path / "results.jsonl", steps=4, max_steps=1)
    assert (found.images, found.present, found.absent, found.unreadable) == (4, 2, 2, 0)
