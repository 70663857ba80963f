"""Results as Parquet: what JSON lines promise holds for a folder of parts too, and other tools read them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringmark.data import parts
from ringmark.data.reader import read_records, read_results, read_settings
from ringmark.data.results import Results
from ringmark.data.schema import FIELDS, arrow_schema, record_of, row_of
from ringmark.errors import StoreError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SETTINGS = {"steps": 50, "key": "abc"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "results.parquet"


@pytest.fixture
def small(monkeypatch):
    """Parts of two records."""
    monkeypatch.setattr(parts, "ROWS", 2)


def verdict(id: str, **fields) -> dict:
    values = {
        **{"sample_id": id, "content": "c", "width": 4, "height": 3, "present": True, "key": "k", "p_value": 1e-9},
        **{"log10_p": -9.0, "score": 0.5, "stage": "latents", "calibration": None, "conformal_p": None},
        **{"carries": ["k"], "keys": {"k": {"p_value": 1e-9, "other": 2.0}}, "stages": {"latents": 1e-9}},
        **{"residual": None, "status": "converged", "seconds": 0.1, "notes": [], "by_search": False},
        **{"shows": True, "model": "pocket", "size": 9, "mtime_ns": 2**60, "other": 2.0},
    }
    return values | fields


def failure(id: str) -> dict:
    return {"sample_id": id, "error": "broken", "code": "image.damaged", "size": None, "mtime_ns": None}


def fill(path, *records):
    with Results(path, SETTINGS) as results:
        for record in records:
            results.append(record)


def refused(path, code: str, given=SETTINGS) -> StoreError:
    with pytest.raises(StoreError) as caught:
        Results(path, given)
    assert caught.value.code == code and "\n" not in str(caught.value)
    return caught.value


def names(path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_records_come_back_as_from_json_lines(path, tmp_path, small):
    records = [verdict("a"), failure("b"), verdict("c", present=None, stages={}, notes=["doubt"])]
    fill(path, *records)
    fill(tmp_path / "r.jsonl", *records)
    assert read_records(path) == (SETTINGS, records) == read_records(tmp_path / "r.jsonl")
    with Results(path, SETTINGS) as results:
        assert results.records == {record["sample_id"]: record for record in records} and results.done == {"a", "c"}
    assert names(path) == ["part-000000.parquet", "part-000001.parquet"]
    assert all((path / name).stat().st_mode & 0o777 == 0o644 for name in names(path))


def test_the_last_record_of_an_id_counts_across_parts(path, small):
    fill(path, verdict("a", score=0.0), verdict("b"), verdict("c"), failure("a"), verdict("a", score=1.0))
    assert [(r["sample_id"], r["score"]) for r in read_records(path)[1]] == [("a", 1.0), ("b", 0.5), ("c", 0.5)]
    tables = list(read_results(path, ["sample_id", "score"], rows=1))
    assert [tuple(row) for table in tables for row in table.to_numpy()] == [("b", 0.5), ("c", 0.5), ("a", 1.0)]


def test_both_forms_give_the_same_tables(path, tmp_path, small):
    records = [verdict("a"), failure("b"), verdict("c"), verdict("a", other=3.0)]
    for form in (path, tmp_path / "r.jsonl"):
        fill(form, *records)
        assert read_settings(form) == SETTINGS
    one, other = (
        [row for table in read_results(form, rows=2) for row in table.astype(object).where(table.notna(), None).values]
        for form in (path, tmp_path / "r.jsonl")
    )
    assert len(one) == 3
    for mine, theirs in zip(one, other, strict=True):
        plain = [list(x) if isinstance(x, np.ndarray) else x for x in mine]
        assert dict(zip(FIELDS, plain, strict=True)) == dict(zip(FIELDS, theirs, strict=True))
    assert one[2][list(FIELDS).index("statistics")] == {"other": 3.0}


def test_tables_can_be_read_while_another_writes(path, small):
    with Results(path, SETTINGS) as results:
        results.append(verdict("a"))
        tables = read_results(path, ["sample_id"], rows=1)
        assert list(next(tables)["sample_id"]) == ["a"]
        results.extend([verdict("b"), verdict("a")])
        assert sum(len(table) for table in tables) <= 2
        assert len(read_records(path)[1]) == 2
    with pytest.raises(ValueError, match="size_"):
        next(read_results(path, ["size_"]))


def test_a_part_that_is_finished_while_the_folder_is_listed_is_read(path, small, monkeypatch):
    list_parts = parts.list_parts
    with Results(path, SETTINGS) as results:
        results.append(verdict("a"))
        coming = iter(["b", "c", "d"])

        def listed(folder):
            found = list_parts(folder)
            if id := next(coming, None):
                results.append(verdict(id))
            return found

        monkeypatch.setattr(parts, "list_parts", listed)
        assert [record["sample_id"] for record in read_records(path)[1]][:2] == ["a", "b"]


def test_duckdb_and_pandas_read_the_parts(path, small):
    duckdb = pytest.importorskip("duckdb")
    import pandas as pd

    fill(path, verdict("a"), failure("b"), verdict("c", present=False, carries=[]))
    found = duckdb.sql(f"SELECT sample_id FROM '{path}/part-*.parquet' WHERE list_contains(carries, 'k')").fetchall()
    assert found == [("a",)]
    assert duckdb.sql(f"SELECT keys['k']['other'] FROM '{path}/part-*.parquet' WHERE present").fetchall() == [(2.0,)]
    table = pd.read_parquet(path, columns=["sample_id", "p_value"])
    assert list(table["sample_id"]) == ["a", "b", "c"] and table["p_value"].isna().sum() == 1


def test_columns_are_exactly_the_fields(path):
    fill(path, verdict("a"))
    assert pq.read_schema(path / "part-000000.parquet").names == list(FIELDS)
    with Results(path, SETTINGS) as results, pytest.raises(TypeError, match="diary"):
        results.append(verdict("b", diary="dear"))
    assert [r["sample_id"] for r in read_records(path)[1]] == ["a"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", ["write_atomic", "Lines", "unlink"])
def test_a_crash_while_a_part_is_written_loses_nothing(path, small, monkeypatch, step):
    def crash(*_, **__):
        raise Killed

    results = Results(path, SETTINGS)
    results.append(verdict("a"))
    with monkeypatch.context() as patch:
        patch.setattr(*(("pathlib.Path.unlink", crash) if step == "unlink" else (parts, step, crash)))
        with pytest.raises(Killed):
            results.append(verdict("b"))
    results._lock.release()
    with Results(path, SETTINGS) as resumed:
        assert resumed.done == {"a", "b"}
        resumed.append(verdict("c"))
    assert [r["sample_id"] for r in read_records(path)[1]] == ["a", "b", "c"]
    assert not [name for name in names(path) if name.startswith("_")]
    assert sum(pq.read_metadata(path / name).num_rows for name in names(path)) == 3


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 10**6))
def test_a_crash_at_any_byte_loses_at_most_the_last_record(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("crash") / "results.parquet"
    results = Results(path, SETTINGS)
    results.extend([verdict(id) for id in "abc"])
    (tail,) = path.iterdir()
    whole = tail.read_bytes()
    results._lock.release()
    tail.write_bytes(whole[: cut % (len(whole) + 1)])
    kept = max(tail.read_bytes().count(b"\n") - 1, 0)
    with Results(path, SETTINGS) as resumed:
        assert resumed.done == set("abc"[:kept])


def test_tensors_lie_beside_the_folder(path, small):
    made = [{"x": np.full(3, float(i))} for i in range(5)]
    with Results(path, SETTINGS) as results:
        for i in range(5):
            results.extend([verdict("abcab"[i], score=float(i))], [made[i]])
    with Results(path, SETTINGS) as results:
        np.testing.assert_equal(results.tensors("abc"), {"a": made[3], "b": made[4], "c": made[2]})


def test_other_settings_and_runs_are_refused(path):
    fill(path, verdict("a"))
    assert "steps was 50, is 20" in refused(path, "results.settings", {"steps": 20, "key": "abc"}).fact
    with Results(path, SETTINGS):
        refused(path, "results.locked")


def test_an_empty_audit_keeps_its_settings(path):
    fill(path)
    assert read_records(path) == (SETTINGS, [])
    refused(path, "results.settings", {})


def test_folders_of_other_files_are_left_alone(tmp_path):
    (tmp_path / "holiday.png").touch()
    refused(tmp_path, "results.foreign")
    assert names(tmp_path) == ["holiday.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError) as caught:
        read_records(tmp_path / "empty")
    assert caught.value.code == "results.foreign"
    with pytest.raises(StoreError) as caught:
        read_records(tmp_path / "missing.parquet")
    assert caught.value.code == "results.missing"
    (tmp_path / "file.parquet").touch()
    refused(tmp_path / "file.parquet", "results.unwritable")


@pytest.mark.parametrize(
    ("header", "code"), [(None, "results.foreign"), ({"ringmark": 2, "settings": {}}, "results.version")]
)
def test_parts_of_another_schema_are_refused(path, header, code):
    path.mkdir(parents=True)
    metadata = {parts.HEADER: json.dumps(header).encode()} if header else {}
    pq.write_table(pa.table({"x": [1]}, schema=pa.schema([("x", pa.int64())], metadata)), path / "part-000000.parquet")
    refused(path, code)
    with pytest.raises(StoreError) as caught:
        list(read_results(path))
    assert caught.value.code == code


@settings(max_examples=30, deadline=None)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_part_is_named_or_harmless(tmp_path_factory, at, bit, cut):
    path = tmp_path_factory.mktemp("damage") / "results.parquet"
    fill(path, verdict("a"), failure("b"))
    part = path / "part-000000.parquet"
    content = bytearray(part.read_bytes())
    at %= len(content)
    content[at] ^= 1 << bit
    part.write_bytes(content[:at] if cut else content)
    for read in (read_records, lambda path: list(read_results(path)), lambda path: Results(path, SETTINGS).close()):
        try:
            read(path)
        except StoreError as error:
            assert error.code.startswith("results.") and "\n" not in str(error)


def test_without_pyarrow_the_extra_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused_now = pytest.raises(StoreError)
    with refused_now as caught:
        Results(path, SETTINGS)
    assert caught.value.code == "results.no-pyarrow" and not path.exists()
    with refused_now as caught:
        read_records(path)
    assert caught.value.code == "results.no-pyarrow"


@given(id=st.text(st.characters(codec=None, exclude_categories=()), max_size=8))
def test_names_that_are_not_utf_8_come_back(id):
    id = id.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    row = row_of(verdict(id))
    row["sample_id"].encode()
    assert record_of(row) == verdict(id)
    assert list(row) == list(FIELDS) == arrow_schema().names
