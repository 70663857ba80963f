"""Results survive crashes, other runs and other people's files."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringmark.data.files import is_ours, read_tensors
from ringmark.data.reader import read_records
from ringmark.data.results import Results, ResultsFolder, content_id
from ringmark.data.tensor_files import TensorFiles
from ringmark.errors import StoreError

SETTINGS = {"steps": 50, "key": "abc", "size": (128, 128)}
ROW = {"file": 0, "at": 0, "size": 9, "sha256": "", "row": 0}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "folder" / "results.jsonl"


def fill(path, *records):
    with Results(path, SETTINGS) as results:
        for record in records:
            results.append(record)


def refused(path, code: str, settings=SETTINGS, **options) -> StoreError:
    """The error with which a file is refused; the file must be left as it is."""
    before = path.read_bytes()
    with pytest.raises(StoreError) as caught:
        Results(path, settings, **options)
    assert path.read_bytes() == before
    assert caught.value.code == code and caught.value.subject == path and "\n" not in str(caught.value)
    return caught.value


def test_what_is_appended_is_read(path):
    fill(path, {"sample_id": "a", "p": 0.5}, {"sample_id": "b", "p": 0.25})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"ringmark": 1, "settings": {"steps": 50, "key": "abc", "size": [128, 128]}}
    assert read_records(path) == (lines[0]["settings"], lines[1:])


def test_a_second_start_goes_on(path):
    fill(path, {"sample_id": "a"})
    with Results(path, SETTINGS) as results:
        assert results.done == {"a"}
        results.append({"sample_id": "b"})
        assert results.done == {"a", "b"}
    assert [r["sample_id"] for r in read_records(path)[1]] == ["a", "b"]


@pytest.mark.parametrize("name", ["results.jsonl", "results.parquet"])
def test_records_stay_in_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr("ringmark.data.positions.RECENT", 100)
    monkeypatch.setattr("ringmark.data.parts.ROWS", 250)
    ids = [str(i) for i in range(1000)]
    with Results(tmp_path / name, SETTINGS) as results:
        results.extend({"sample_id": id, "status": id * 1000} for id in ids)
        assert results.records["999"]["status"] == "999" * 1000
    tracemalloc.start()
    with Results(tmp_path / name, SETTINGS) as results:
        held = tracemalloc.get_traced_memory()[0]
        assert len(results.done) == 1000 and list(results.records) == ids
        assert results.records["7"]["status"] == "7" * 1000
    tracemalloc.stop()
    assert held < 500_000  # of 3 MB


def test_errors_are_tried_again_and_the_later_record_wins(path):
    fill(path, {"sample_id": "a", "error": "damaged"}, {"sample_id": "b", "error": None})
    with Results(path, SETTINGS) as results:
        assert results.done == {"b"}
        results.append({"sample_id": "a", "p": 1})
        assert results.done == {"a", "b"}
        results.append({"sample_id": "b", "error": "later"})
        assert results.done == {"a"}
    assert read_records(path)[1] == [{"sample_id": "a", "p": 1}, {"sample_id": "b", "error": "later"}]


def test_a_crash_at_any_byte_loses_at_most_the_last_record(path):
    records = [{"sample_id": id} for id in "abc"]
    fill(path, *records)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with Results(path, SETTINGS) as results:
            kept = max(whole[:cut].count(b"\n") - 1, 0)
            assert results.done == {r["sample_id"] for r in records[:kept]}
            for record in records[kept:]:
                results.append(record)
        assert path.read_bytes() == whole


def test_reading_leaves_a_torn_end_out_and_alone(path):
    fill(path, {"sample_id": "a"}, {"sample_id": "b"})
    path.write_bytes(path.read_bytes()[:-1])
    before = path.read_bytes()
    assert read_records(path)[1] == [{"sample_id": "a"}]
    assert path.read_bytes() == before


def test_reading_works_while_another_writes(path):
    with Results(path, SETTINGS) as results:
        for n in range(3):
            assert len(read_records(path)[1]) == n
            results.append({"sample_id": str(n)})


def test_threads_read_while_another_appends(path, request):
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    ids = [str(i) for i in range(50)]
    fill(path, *({"sample_id": id} for id in ids))
    with Results(path, SETTINGS) as results, ThreadPoolExecutor(2) as pool:
        reads = [pool.submit(lambda: [results.records[id]["sample_id"] for id in ids * 300]) for _ in range(2)]
        while not all(read.done() for read in reads):
            results.append({"sample_id": "new"})
        assert [read.result() for read in reads] == [ids * 300] * 2


def test_other_settings_are_refused_by_name(path):
    fill(path, {"sample_id": "a"})
    fact = refused(path, "results.settings", {"steps": 20, "key": "abc", "size": [128, 128], "seed": 1}).fact
    assert "steps was 50, is 20" in fact and "seed was not set, is 1" in fact
    assert "key" not in fact and "size" not in fact


@pytest.mark.parametrize(
    "line", [b"{torn", b"", b"null", b"3", b'{"p": 1}', b'{"sample_id": 3}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_damaged_line_is_named(path, line):
    fill(path, {"sample_id": "a"}, {"sample_id": "b"})
    head, first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join((head, first, line, second, b"")))
    assert refused(path, "results.damaged").details == {"line": 3}
    with pytest.raises(StoreError) as caught:
        read_records(path)
    assert (caught.value.code, caught.value.details) == ("results.damaged", {"line": 3})


@pytest.mark.parametrize("depth", [100, 900, 100_000])
@pytest.mark.parametrize("line", [b'{"sample_id": "a", "x": %b}', b'{"ringmark": 1, "settings": {"x": %b}}'])
def test_deep_nesting_is_damage(path, line, depth):
    fill(path, {"sample_id": "a"})
    deep = line % (b"[" * depth + b"]" * depth)
    head = path.read_bytes().split(b"\n")[0] if b"sample_id" in line else deep
    path.write_bytes(head + b"\n" + deep + b"\n")
    refused(path, "results.damaged" if b"sample_id" in line else "results.foreign")
    with pytest.raises(StoreError):
        read_records(path)


def test_a_record_without_a_needed_field_is_named(path):
    fill(path, {"sample_id": "a", "p": 1}, {"sample_id": "b", "error": "damaged"}, {"sample_id": "c"})
    error = refused(path, "results.incomplete", fields=("p",))
    assert "'p'" not in error.fact and "no p" in error.fact and error.details == {"line": 4}
    with pytest.raises(StoreError) as caught:
        read_records(path, fields=("p",))
    assert (caught.value.code, caught.value.details) == ("results.incomplete", {"line": 4})
    fill(path, {"sample_id": "c", "p": 2})
    with pytest.raises(StoreError) as caught:  # each line is checked: none is half a record
        read_records(path, fields=("p",))
    assert (caught.value.code, caught.value.details) == ("results.incomplete", {"line": 4})
    assert len(read_records(path)[1]) == 3


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
    refused(path, "results.foreign")
    with pytest.raises(StoreError):
        read_records(path)


def test_a_later_format_is_refused(tmp_path):
    path = tmp_path / "later.jsonl"
    path.write_text('{"ringmark": 2, "settings": {}}\n')
    assert "format 2" in refused(path, "results.version").fact


def test_two_runs_never_share_a_file(path):
    with Results(path, SETTINGS) as results:
        results.append({"sample_id": "a"})
        refused(path, "results.locked")
    with Results(path, SETTINGS) as results:
        assert results.done == {"a"}


def test_a_refused_start_leaves_no_lock(path):
    fill(path)
    refused(path, "results.settings", {})
    fill(path, {"sample_id": "a"})


def test_a_link_takes_the_same_lock(path, tmp_path):
    with Results(path, SETTINGS):
        (tmp_path / "link.jsonl").symlink_to(path)
        refused(tmp_path / "link.jsonl", "results.locked")


def test_another_process_is_kept_out_until_this_one_ends(path):
    script = f"import sys; from ringmark.data.results import Results; kept = Results(sys.argv[1], {SETTINGS}); input()"
    other = subprocess.Popen([sys.executable, "-c", script, path], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    while not path.exists() or not path.read_bytes().endswith(b"\n"):
        assert other.poll() is None, other.stderr.read()
    refused(path, "results.locked")
    other.kill()
    other.communicate()
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
            Results(path, SETTINGS)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_records_need_an_id(path):
    with Results(path, SETTINGS) as results:
        for record in ({}, {"sample_id": 3}, {"sample_id": None}):
            with pytest.raises(StoreError) as caught:
                results.append(record)
            assert caught.value.code == "results.id"
        with pytest.raises(TypeError):
            results.append({"sample_id": "a", "what": object()})
    assert read_records(path)[1] == []


def test_appending_after_closing_fails(path):
    results = Results(path, SETTINGS)
    results.close()
    results.close()
    with pytest.raises(ValueError, match="closed"):
        results.append({"sample_id": "a"})


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
    with Results(path, SETTINGS) as results:
        results.append({"sample_id": "a"})
        whole, file = path.read_bytes(), results._journal._file

        class Full:
            def write(self, line):
                return file.write(line[:5])

            def __getattr__(self, name):
                return getattr(file, name)

        monkeypatch.setattr(results._journal, "_file", Full())
        with pytest.raises(OSError, match="space"):
            results.append({"sample_id": "b"})

        def refuse(*_):
            raise OSError(errno.ENOSPC, "no space")

        monkeypatch.setattr(Full, "write", refuse)
        with pytest.raises(OSError, match="space") as caught:
            results.append({"sample_id": "b"})
        assert caught.value.filename == str(path)
        assert path.read_bytes() == whole and results.done == {"a"}


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


# --- tensors


def row(x: float, n: int = 3) -> dict:
    return {"x": np.full(n, x), "t": np.array(x, np.float32)}


def tensor_files(path) -> list:
    return sorted(path.with_name(f"{path.name}.tensors").glob("*.blocks"))


def completed(path, wanted: dict[str, float]) -> tuple[list, list[int]]:
    """The tensors of these ids, and the positions of those that were made."""
    made = []

    def make(positions):
        made.extend(positions)
        return [row(list(wanted.values())[i]) for i in positions]

    with Results(path, SETTINGS) as results:
        found = results.complete(list(wanted), make)
    for tensors, x in zip(found, wanted.values(), strict=True):
        np.testing.assert_equal(tensors, row(x))
    return found, made


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, np.bool_])
def test_types_and_shapes_come_back(path, dtype):
    made = {
        "x": np.arange(6).reshape(2, 3).T.astype(dtype),
        "scalar": np.array(1, dtype),
        "none": np.zeros((0, 2), dtype),
    }
    with Results(path, SETTINGS) as results:
        results.extend([{"sample_id": "a", "p": 1}, {"sample_id": "b"}], [made, {"x": np.ones(2)}])
    with Results(path, SETTINGS) as results:
        kept = results.tensors(["b", "a", "c"])
        assert results.records["a"]["p"] == 1 and results.done == {"a", "b"}
    np.testing.assert_equal(kept, {"b": {"x": np.ones(2)}, "a": made})
    assert {name: values.dtype for name, values in kept["a"].items()} == dict.fromkeys(made, np.dtype(dtype))


def test_tensors_are_the_owners_and_ours(path):
    completed(path, {"a": 1.0, "b": 2.0})
    (file,) = tensor_files(path)  # one for the batch
    assert is_ours(file) and (os.name != "posix" or file.stat().st_mode & 0o077 == 0)
    assert set(read_tensors(file, max_bytes=1000).tensors) == {"0,1/x", "0,1/t"}


def test_only_what_is_missing_is_made_and_equal_ids_once(path):
    assert completed(path, {"b": 1.0, "c": 2.0})[1] == [0, 1]
    assert completed(path, {"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0})[1] == [0, 3]
    with Results(path, SETTINGS) as results:
        found = results.complete(["e", "a", "e"], lambda positions: [row(5.0)] * len(positions))
        assert len(results.records) == 5 and found[0] is found[2]


@given(cut=st.integers(0, 10**6), batch=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_a_crash_anywhere_loses_at_most_a_batch(tmp_path_factory, cut, batch):
    """A crash leaves the beginning of the results, and any whole tensor files, or a new one without its records."""
    path, wanted = (
        tmp_path_factory.mktemp("crash") / "results.jsonl",
        {name: float(i) for i, name in enumerate("abcdef")},
    )
    for i in range(0, 6, batch):
        completed(path, dict(list(wanted.items())[i : i + batch]))
    files = {file: file.read_bytes() for file in tensor_files(path)}
    content = path.read_bytes()
    path.write_bytes(content[: cut % (len(content) + 1)])
    lines = max(path.read_bytes().count(b"\n") - 1, 0)
    assert completed(path, wanted)[1] == list(range(lines, 6))
    assert completed(path, wanted)[1] == []
    assert lines % batch or len(tensor_files(path)) <= len(files)


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
@settings(max_examples=20, deadline=None)
def test_damage_at_any_byte_is_noticed_and_made_again(tmp_path_factory, at, bit, cut):
    path, wanted = tmp_path_factory.mktemp("damage") / "results.jsonl", {"a": 1.0, "b": 2.0, "c": 3.0}
    completed(path, {"a": 1.0, "b": 2.0})
    completed(path, {"c": 3.0})
    (file,) = tensor_files(path)
    content = bytearray(file.read_bytes())
    at %= len(content)
    content[at] ^= 1 << bit
    file.write_bytes(content[:at] if cut else content)
    with Results(path, SETTINGS) as results:
        begin = results.records["c"]["tensors"]["at"]
        whole = set() if at < begin and cut else {"c"} if at < begin else {"a", "b"}
        assert set(results.tensors("abc")) == whole == results.done
    assert completed(path, wanted)[1] == [i for i, name in enumerate("abc") if name not in whole]
    assert completed(path, wanted)[1] == []


def test_files_of_tensors_are_large_and_their_blocks_are_read_alone(path, monkeypatch):
    monkeypatch.setattr("ringmark.data.tensor_files.FULL", 500)
    wanted = {str(i): float(i) for i in range(8)}
    for name, x in wanted.items():
        completed(path, {name: x})
    first, *others = tensor_files(path)
    assert others and all(file.stat().st_size >= 500 for file in [first, *others[:-1]])
    first.unlink()
    lost = completed(path, wanted)[1]
    assert lost == list(range(len(lost))) and 0 < len(lost) < 8


def test_files_of_tensors_are_listed_once_in_a_run(path, monkeypatch):
    monkeypatch.setattr("ringmark.data.tensor_files.FULL", 500)
    listings, files = [], TensorFiles._files
    monkeypatch.setattr(TensorFiles, "_files", lambda self: listings.append(self) or files(self))
    for run in range(2):
        with Results(path, SETTINGS) as results:
            for i in range(8):
                results.extend([{"sample_id": f"{run}/{i}"}], [row(float(i))])
    with Results(path, SETTINGS) as results:
        assert len(results.tensors(results.records)) == 16
    assert len(listings) == 2 and len(tensor_files(path)) > 3


def test_missing_tensors_are_made_again_with_a_warning(path, caplog):
    completed(path, {"a": 1.0, "b": 2.0})
    (file,) = tensor_files(path)
    file.unlink()
    assert completed(path, {"b": 2.0})[1] == [0]
    assert [record.levelname for record in caplog.records] == ["WARNING"] and str(file) in caplog.text


@pytest.mark.parametrize(
    "row", [None, 3, {}, ROW | {"file": "../x"}, ROW | {"file": -1}, ROW | {"at": -1}, ROW | {"file": 1}]
)
def test_records_without_a_row_have_no_tensors(path, row):
    fill(path, {"sample_id": "a", "tensors": row}, {"sample_id": "b", "error": "damaged"})
    with Results(path, SETTINGS) as results:
        assert results.tensors(["a", "b", "c"]) == {} and results.done == set()


def test_tensors_that_cannot_be_written_leave_no_record(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "no space")

    with Results(path, SETTINGS) as results:
        monkeypatch.setattr("ringmark.data.tensor_files.os.fsync", refuse)
        with pytest.raises(OSError, match="space"):
            results.extend([{"sample_id": "a"}], [row(1.0)])
        assert results.done == set() and results.records == {}
    assert read_records(path)[1] == [] and tensor_files(path)[0].stat().st_size == 0


def test_a_folder_has_a_file_for_each_settings(tmp_path):
    with ResultsFolder(tmp_path / "kept") as kept:
        one, other = kept.of("noise", {"steps": 1}), kept.of("noise", {"steps": 2})
        assert kept.of("noise", {"steps": 1}) is one and one.path != other.path
        one.extend([{"sample_id": "a"}], [row(1.0)])
        with pytest.raises(StoreError) as caught:
            ResultsFolder(tmp_path / "kept").of("noise", {"steps": 1})
        assert caught.value.code == "results.locked"
    with ResultsFolder(tmp_path / "kept") as kept:
        assert kept.of("noise", {"steps": 1}).done == {"a"}
    (tmp_path / "kept" / "mine.jsonl").touch()
    kept.remove()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["mine.jsonl"]


def test_contents_are_told_apart(path):
    zeros = np.zeros((2, 3), np.float32)
    contents = [zeros, zeros + 1, zeros.T, zeros.astype(np.int32), zeros.tolist(), "a"]
    assert len({content_id(x) for x in contents}) == len(contents)
    assert content_id(zeros.T) == content_id(zeros.T.copy())
    assert content_id("a", "b") != content_id("ab")
