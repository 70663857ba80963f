"""Tokens, their file, and rates."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ringmark.errors import ServiceError
from ringmark.watermark.service.access import PUBLIC, Access, Caller, add_token, load_tokens, remove_token


def test_a_token_is_known_and_only_its_hash_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    alice = add_token(path, "alice", "verdict", 60)
    bob = add_token(path, "bob", "p", 600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert alice not in path.read_text() and alice != bob and len(alice) > 40
    access = Access(load_tokens(path))
    assert access.caller(f"Bearer {alice}") == Caller("alice", "verdict", 60)
    assert access.caller(f"bearer {bob}") == Caller("bob", "p", 600)
    for wrong in ("", alice, f"Basic {alice}", f"Bearer {alice[:-1]}", f"Bearer {alice}x", "Bearer ", "Bearer ÿ"):
        assert access.caller(wrong) is None


def test_without_tokens_everyone_is_the_public() -> None:
    assert Access().caller("") == PUBLIC and PUBLIC.scope == "verdict"
    assert Access([]).caller("") is None


def test_a_removed_token_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    text = add_token(path, "alice", "p", 60)
    remove_token(path, "alice")
    assert Access(load_tokens(path)).caller(f"Bearer {text}") is None
    with pytest.raises(ServiceError) as error:
        remove_token(path, "alice")
    assert error.value.code == "tokens.unknown"


def test_tokens_that_are_made_at_once_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    add_token(path, "old", "p", 60)
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(add_token, path, f"n{i}", "p", 60) for i in range(8)]
        gone = pool.submit(remove_token, path, "old")
    texts = [future.result() for future in (*made, gone)][:-1]
    access = Access(load_tokens(path))
    assert all(access.caller(f"Bearer {text}") for text in texts) and len(load_tokens(path)) == 8


@pytest.mark.parametrize("name", ["", "x" * 81, "\udcff"])
def test_a_name_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ServiceError) as error:
        add_token(tmp_path / "tokens.json", name, "p", 60)
    assert error.value.code == "tokens.name" and not (tmp_path / "tokens.json").exists()


def test_a_name_is_given_once(tmp_path: Path) -> None:
    add_token(tmp_path / "tokens.json", "alice", "p", 60)
    with pytest.raises(ServiceError) as error:
        add_token(tmp_path / "tokens.json", "alice", "verdict", 60)
    assert error.value.code == "tokens.exists"


@pytest.mark.skipif(os.name != "posix", reason="needs file modes")
def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    add_token(path, "alice", "p", 60)
    path.chmod(0o640)
    with pytest.raises(ServiceError) as error:
        load_tokens(path)
    assert error.value.code == "tokens.readable"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"tokens": []',
        json.dumps({"ringmark_tokens": 2, "tokens": []}).encode(),
        json.dumps({"tokens": [{"name": "a", "sha256": "x", "scope": "p", "per_minute": 1}]}).encode(),
        json.dumps({"tokens": [{"name": "a", "sha256": "0" * 64, "scope": "all", "per_minute": 1}]}).encode(),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokens.json"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ServiceError) as error:
        load_tokens(path)
    assert error.value.code == "tokens.damaged"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServiceError) as error:
        load_tokens(tmp_path / "tokens.json")
    assert error.value.code == "tokens.missing"


def test_a_rate_allows_a_minutes_pictures_and_refills() -> None:
    now = 0.0
    access, caller = Access([], clock=lambda: now), Caller("alice", "p", 60)
    assert [access.wait(caller) for _ in range(60)] == [0.0] * 60
    assert access.wait(caller) == pytest.approx(1)
    now = 1.0
    assert access.wait(caller) == 0 and access.wait(caller) == pytest.approx(1)
    assert access.wait(Caller("bob", "p", 60)) == 0, "each token has its own"
    now = 1000.0
    assert access.wait(caller, 600) == 0, "a large job is accepted when a minute's allowance is left"
    assert access.wait(caller) == pytest.approx(541), "and paid for afterwards"
    assert all(access.wait(PUBLIC) == 0 for _ in range(1000))
