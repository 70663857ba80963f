"""The environment that the scripts make: installed once for given files, and again where one of them changes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = ("setup.cfg", "pyproject.toml", "constraints.txt")

PYTHON = """#!/bin/sh
case "$1" in
    -c) echo -cconstraints.txt ;;
    -m) shift; echo "$@" >> calls ;;
esac
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the script and of the files it looks at, in whose environment `pip` only writes down its arguments."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "environment.sh", tmp_path / "scripts")
    for name in FILES:
        (tmp_path / name).write_text(f"# {name}\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def installed(project: Path) -> list[str]:
    """What pip is asked for when the script is sourced."""
    calls = project / "calls"
    calls.unlink(missing_ok=True)
    command = ["bash", "-c", "source scripts/environment.sh"]
    subprocess.run(command, cwd=project, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}, check=True)
    return calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.skipif(shutil.which("bash", path="/usr/bin:/bin") is None, reason="a bash script")
def test_installed_once_and_again_after_a_change(project):
    first = installed(project)
    assert len(first) == 2 and all("-cconstraints.txt" in call for call in first) and "-e .[test,docs]" in first[-1]
    assert installed(project) == []  # nothing is asked of an index: works offline
    for name in FILES:
        (project / name).write_text("changed\n")
        assert installed(project) == first
        assert installed(project) == []
