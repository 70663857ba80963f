"""Keys: made, listed, shown, published; and what keygen refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shell import QUICK, ROOT, pictures, refused, run

from ringmark.watermark.keys.key import Key


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
    output = run("verify", *pictures(house), *keys, *QUICK, code=1).stdout
    assert output.count(": carries key") == 2 and output.count(": carries none of 6 keys, best fit") == 2
    shutil.copy(made[0]["path"], ring / "copy.key")
    message = refused("audit", house / "images", "--key", ring, "-o", tmp_path / "r.jsonl")
    assert "copy.key" in message and made[0]["path"] in message


def test_keys_are_shown_without_their_values(house: Path, tmp_path: Path) -> None:
    key, record = house / "my.key", tmp_path / "public.json"
    shown = json.loads(run("keys", "show", key, "--json", "--plot", tmp_path / "key.png").stdout)
    assert (tmp_path / "key.png").stat().st_mode & 0o077 == 0 and (tmp_path / "key.png").stat().st_size > 5000
    assert "reveals the key" in " ".join(run("keys", "show", "--help").stdout.split())
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


@pytest.mark.parametrize("budget", ["x", "0", "5", "nan"])
def test_a_budget_that_is_no_share_is_refused_in_one_way(tmp_path: Path, budget: str) -> None:
    assert "use a share above 0 and at most 1" in refused("keygen", "--budget", budget, "-o", tmp_path / "a.key")


def test_keys_are_listed_without_torch(house: Path) -> None:
    script = """
import sys
from ringmark.watermark.cli.main import main
main(sys.argv[1:], standalone_mode=False)
assert "torch" not in sys.modules
"""
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
