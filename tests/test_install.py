"""One import name, from an editable install and from a wheel, also where a user's own modules have our rooms' names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A working directory whose modules would shadow ours, had ours these names; importing one of them fails."""
    folder = tmp_path / "strange"
    for name in ("data.py", "watermark.py", "inversion/__init__.py"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"raise ImportError('the {name} of somebody else')\n")
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy by the environment's own setuptools."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("ringmark", "inversion", "watermark", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source]
    done = subprocess.run(build, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no wheel can be built here: {done.stderr.strip().splitlines()[-1:]}")
    (path,) = folder.glob("*.whl")
    return path


def run(folder: Path, *arguments: str, **environment: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def verify(folder: Path, **environment: str) -> None:
    """Key, image and verdict by the command line."""
    ringmark = ("-m", "ringmark.watermark.cli.main")
    run(folder, *ringmark, "keygen", "-o", "my.key", **environment)
    run(folder, *ringmark, "generate", "--key", "my.key", "-n", "1", "--steps", "4", "-o", "marked", **environment)
    text = run(folder, *ringmark, "verify", "marked/0000000.png", "--key", "my.key", "--steps", "4", **environment)
    assert "carries key" in text


def test_other_modules_of_our_rooms_names_do_no_harm(strange: Path) -> None:
    assert run(strange, "-c", "import ringmark; print(ringmark.LatentModel.__name__)").strip() == "LatentModel"


@pytest.mark.slow
def test_an_editable_install_verifies_there(strange: Path) -> None:
    verify(strange)


@pytest.mark.slow
def test_a_wheel_holds_one_name_and_verifies_there(wheel: Path, strange: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"ringmark"}
    models = {f"ringmark/data/{model}/model_index.json" for model in ("pocket", "pocket_flow")}
    assert {"ringmark/py.typed"} | models <= set(names)
    site = str(tmp_path / "site")
    assert site in run(strange, "-c", "import ringmark; print(ringmark.__file__)", PYTHONPATH=site)
    verify(strange, PYTHONPATH=site)
