"""Results survive crashes, other runs and other people's files."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringmark.data.files import one_line, write_atomic
from ringmark.data.results import Store, read_records
from ringmark.errors import StoreError

SETTINGS = {"steps": 50, "key": "abc", "size": (128, 128)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "folder" / "results.jsonl"


def fill(path, *records):
    with Store(path, SETTINGS) as store:
        for record in records:
            store.append(record)


def refused(path, settings=SETTINGS) -> str:
    """The message with which a store is refused; the file must be left as it is."""
    before = path.read_bytes()
    with pytest.raises(StoreError) as caught:
        Store(path, settings)
    assert path.read_bytes() == before
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_appended_is_read(path):
    fill(path, {"sample_id": "a", "p": 0.5}, {"sample_id": "b", "p": 0.25})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"ringmark": 1, "settings": {"steps": 50, "key": "abc", "size": [128, 128]}}
    assert read_records(path) == (lines[0]["settings"], lines[1:])


def test_a_second_start_goes_on(path):
    fill(path, {"sample_id": "a"})
    with Store(path, SETTINGS) as store:
        assert store.done == {"a"}
        store.append({"sample_id": "b"})
        assert store.done == {"a", "b"}
    assert [r["sample_id"] for r in read_records(path)[1]] == ["a", "b"]


def test_errors_are_tried_again_and_the_later_record_wins(path):
    fill(path, {"sample_id": "a", "error": "damaged"}, {"sample_id": "b", "error": None})
    with Store(path, SETTINGS) as store:
        assert store.done == {"b"}
        store.append({"sample_id": "a", "p": 1})
        assert store.done == {"a", "b"}
        store.append({"sample_id": "b", "error": "later"})
        assert store.done == {"a"}
    assert read_records(path)[1] == [{"sample_id": "a", "p": 1}, {"sample_id": "b", "error": "later"}]


def test_a_crash_at_any_byte_loses_at_most_the_last_record(path):
    records = [{"sample_id": id} for id in "abc"]
    fill(path, *records)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with Store(path, SETTINGS) as store:
            kept = max(whole[:cut].count(b"\n") - 1, 0)
            assert store.done == {r["sample_id"] for r in records[:kept]}
            for record in records[kept:]:
                store.append(record)
        assert path.read_bytes() == whole


def test_reading_leaves_a_torn_end_out_and_alone(path):
    fill(path, {"sample_id": "a"}, {"sample_id": "b"})
    path.write_bytes(path.read_bytes()[:-1])
    before = path.read_bytes()
    assert read_records(path)[1] == [{"sample_id": "a"}]
    assert path.read_bytes() == before


def test_reading_works_while_another_writes(path):
    with Store(path, SETTINGS) as store:
        for n in range(3):
            assert len(read_records(path)[1]) == n
            store.append({"sample_id": str(n)})


def test_other_settings_are_refused_by_name(path):
    fill(path, {"sample_id": "a"})
    message = refused(path, {"steps": 20, "key": "abc", "size": [128, 128], "seed": 1})
    assert "steps was 50, is 20" in message and "seed was not set, is 1" in message and "-o" in message
    assert "key" not in message and "size" not in message


@pytest.mark.parametrize(
    "line", [b"{torn", b"", b"null", b"3", b'{"p": 1}', b'{"sample_id": 3}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_damaged_line_is_named(path, line):
    fill(path, {"sample_id": "a"}, {"sample_id": "b"})
    head, first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join((head, first, line, second, b"")))
    assert "line 3" in refused(path)
    with pytest.raises(StoreError, match="line 3"):
        read_records(path)


@pytest.mark.parametrize(
    "content",
    [
        b"my diary",
        b"my diary\n",
        b"\n",
        b"{}\n",
        b"[1]\n",
        b'{"ringmark": 1}\n',
        b'{"ringmark": 1, "settings": 3}\n',
        b"\x89PNG\r\n\x1a\n",
        b'{"sample_id": "a"}\n',
    ],
)
def test_other_peoples_files_are_left_alone(tmp_path, content):
    path = tmp_path / "thesis.txt"
    path.write_bytes(content)
    assert "left as it is" in refused(path)
    with pytest.raises(StoreError):
        read_records(path)


def test_a_later_format_is_refused(tmp_path):
    path = tmp_path / "later.jsonl"
    path.write_text('{"ringmark": 2, "settings": {}}\n')
    assert "format 2" in refused(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no advisory locks")
def test_two_runs_never_share_a_file(path):
    with Store(path, SETTINGS) as store:
        store.append({"sample_id": "a"})
        assert "another run" in refused(path)
    with Store(path, SETTINGS) as store:
        assert store.done == {"a"}


def test_a_refused_start_leaves_no_lock(path):
    fill(path)
    refused(path, {})
    fill(path, {"sample_id": "a"})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_folders_and_pipes_are_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe, tmp_path / "missing" / "x"):
        with pytest.raises(StoreError):
            read_records(path)
    for path in (tmp_path, pipe, pipe / "below"):
        with pytest.raises(StoreError):
            Store(path, SETTINGS)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_records_need_an_id(path):
    with Store(path, SETTINGS) as store:
        for record in ({}, {"sample_id": 3}, {"sample_id": None}):
            with pytest.raises(StoreError, match="sample_id"):
                store.append(record)
        with pytest.raises(TypeError):
            store.append({"sample_id": "a", "what": object()})
    assert read_records(path)[1] == []


def test_appending_after_closing_fails(path):
    store = Store(path, SETTINGS)
    store.close()
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.append({"sample_id": "a"})


def test_what_json_cannot_hold_has_a_form(path, tmp_path):
    record = {
        "sample_id": "x",
        "nan": float("nan"),
        "deep": [{"inf": np.float32("-inf")}],
        "array": np.array([1.5, np.nan]),
        "flag": np.bool_(True),
        "path": tmp_path,
        "pair": (1, 2),
    }
    fill(path, record)
    assert b"NaN" not in path.read_bytes() and b"Infinity" not in path.read_bytes()
    assert read_records(path)[1] == [
        {
            "sample_id": "x",
            "nan": None,
            "deep": [{"inf": None}],
            "array": [1.5, None],
            "flag": True,
            "path": str(tmp_path),
            "pair": [1, 2],
        }
    ]


def test_a_full_disk_leaves_the_file_whole(path, monkeypatch):
    with Store(path, SETTINGS) as store:
        store.append({"sample_id": "a"})
        whole, file = path.read_bytes(), store._file

        class Full:
            def write(self, line):
                return file.write(line[:5])

            def __getattr__(self, name):
                return getattr(file, name)

        monkeypatch.setattr(store, "_file", Full())
        with pytest.raises(OSError, match="space"):
            store.append({"sample_id": "b"})

        def refuse(*_):
            raise OSError(errno.ENOSPC, "no space")

        monkeypatch.setattr(Full, "write", refuse)
        with pytest.raises(OSError, match="space") as caught:
            store.append({"sample_id": "b"})
        assert caught.value.filename == str(path)
        assert path.read_bytes() == whole and store.done == {"a"}


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.text(st.characters(codec=None), max_size=8), max_size=6), value=VALUES)
def test_any_record_comes_back(tmp_path_factory, ids, value):
    path = tmp_path_factory.mktemp("store") / "r.jsonl"
    fill(path, *({"sample_id": id, "n": n, "value": value} for n, id in enumerate(ids)))
    _, records = read_records(path)
    assert [r["sample_id"] for r in records] == list(dict.fromkeys(ids))
    assert {r["sample_id"]: r["n"] for r in records} == {id: n for n, id in enumerate(ids)}
    assert all(r["value"] == value for r in records)


def test_write_atomic_replaces_whole_files(path):
    write_atomic(path, "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    write_atomic(path, b"\0\r\n", mode=0o600)
    assert path.read_bytes() == b"\0\r\n"
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name]


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    write_atomic(path, "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "no")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no") as caught:
        write_atomic(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_write_atomic_follows_links_and_refuses_what_is_no_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomic(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match="regular"):
            write_atomic(path, "text")


def test_one_line():
    assert one_line("a\nb\tç\udcff") == "a\\nb\\tç\\udcff"
