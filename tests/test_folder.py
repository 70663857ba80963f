"""Folders of keys: what is in them counts once and is whole; what is told and published of a key shows no value."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest
from identity import key

from ringmark.errors import KeyFileError
from ringmark.watermark.keys.folder import describe, export_public, load_folder, load_ring
from ringmark.watermark.keys.key import READABLE, Key
from ringmark.watermark.tasks.keys import listing


@pytest.fixture
def ring(tmp_path) -> Path:
    """A folder of three keys, each in a file of its own name."""
    for seed in range(3):
        made = key(seed, "rand")
        made.save(tmp_path / "ring" / f"{made.fingerprint}.key")
    return tmp_path / "ring"


def refused(act) -> KeyFileError:
    with pytest.raises(KeyFileError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return caught.value


def test_folders_and_files_make_one_ring(ring, tmp_path):
    first, *_ = files = sorted(ring.iterdir())
    (ring / "notes.txt").touch()
    (ring / "._mac.key").touch()
    (ring / "below").mkdir()
    copy = tmp_path / "copy.key"
    Key.load(first).save(copy)
    assert list(load_ring([ring])) == list(load_folder(ring)) == files
    assert list(load_ring([copy, ring, first, ring])) == [copy, *files[1:]]
    assert list(load_ring([ring, copy])) == files


def test_two_files_with_one_key_are_named(ring):
    first = min(ring.iterdir())
    Key.load(first).save(ring / "a copy.key")
    for act in (lambda: load_ring([ring]), lambda: load_folder(ring)):
        error = refused(act)
        assert error.code == "key.duplicate"
        assert str(first) in str(error) and "a copy.key" in str(error)


def test_an_empty_folder_is_no_ring(tmp_path):
    error = refused(lambda: load_ring([tmp_path]))
    assert (error.code, error.subject) == ("key.none", tmp_path)
    assert load_folder(tmp_path) == {}
    (tmp_path / "x.key").mkdir()
    error = refused(lambda: load_ring([tmp_path]))
    assert (error.code, error.subject) == ("key.folder", tmp_path / "x.key")


def test_a_folder_that_cannot_be_listed(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "none"):
        error = refused(lambda path=path: load_folder(path))
        assert (error.code, error.subject) == ("key.unlisted", path)
    assert refused(lambda: load_ring([tmp_path / "none"])).code == "key.missing"


def test_what_is_no_key_is_named(ring):
    (ring / "server.key").write_text("-----BEGIN PRIVATE KEY-----")
    error = refused(lambda: load_folder(ring))
    assert (error.code, error.subject) == ("key.damaged", ring / "server.key")


@pytest.mark.skipif(os.name != "posix", reason="files have no modes")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o602, 0o666])
def test_a_key_that_others_may_read_is_refused_unless_told(ring, mode, monkeypatch):
    path = min(ring.iterdir())
    path.chmod(mode)
    error = refused(lambda: load_ring([ring]))
    assert (error.code, error.subject) == ("key.readable", path)
    monkeypatch.setenv(READABLE, "1")
    assert len(load_ring([ring])) == 3
    monkeypatch.setenv(READABLE, "")
    path.chmod(0o400)
    assert len(load_ring([ring])) == 3


def test_nothing_that_is_told_shows_a_value(ring, tmp_path):
    keys = load_ring([ring])
    one = next(iter(keys.values()))
    record = export_public(one, tmp_path / "public.json")
    assert json.loads((tmp_path / "public.json").read_text()) == record
    told = json.dumps([record, describe(one)]) + json.dumps(listing(keys))
    for shown in (one.secret.hex(), base64.b64encode(one.secret).decode(), repr(one.secret)[2:-1], str([*one.secret])):
        assert shown not in told
    assert record["commitment"].startswith(one.fingerprint) and len(record["commitment"]) == 64
    described = {"fingerprint", "scheme", "pattern", "mask", "channels", "radii"}
    described |= {"kind", "reference", "model", "created"}
    assert set(record) == described | {"ringmark", "commitment", "proves", "commitment_of"}
    assert set(describe(one)) == described | {"commitment"}
