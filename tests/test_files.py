"""Files are written whole or not at all, never over what is not ours; tensors are read safely."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.numpy import save

from ringmark.data import files
from ringmark.data.files import is_ours, one_line, read_tensors, refuse_existing, refuse_foreign, write_atomic
from ringmark.data.results import Results
from ringmark.errors import KeyFileError, StoreError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "folder" / "results.jsonl"


# -- writing ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["a.png", "é" * 120 + ".png"])
def test_what_a_killed_run_left_is_removed_by_the_next_write(tmp_path, name):
    script = f"""
import os, signal
from ringmark.data import files
files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomic({str(tmp_path / name)!r}, "half")
"""
    if os.name != "posix":
        pytest.skip("no signals")
    subprocess.run([sys.executable, "-c", script], check=False)
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".") and left.endswith(".tmp")
    write_atomic(tmp_path / "other.png", "text")
    assert os.listdir(tmp_path) == ["other.png"]
    write_atomic(tmp_path / name, "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([name, "other.png"])


def test_what_a_running_process_writes_is_left_alone(tmp_path):
    partial = files._partial_name(tmp_path / "a")
    unknown = [partial.replace(str(os.getpid()), other) for other in ("mine", "9" * 30)]
    elsewhere = partial.replace(files._machine(), "0" * 6).replace(str(os.getpid()), "4194303")
    for name in (kept := {partial, *unknown, elsewhere}):
        (tmp_path / name).touch()
    write_atomic(tmp_path / "a", "text")
    assert set(os.listdir(tmp_path)) == {"a", *kept}


def test_one_line():
    assert one_line("a\nb\tç\udcff") == "a\\nb\\tç\\udcff"


# -- what may be replaced ---------------------------------------------------------------------------------------------


def code(call, *args, **options) -> str:
    try:
        call(*args, **options)
    except StoreError as error:
        assert error.subject == args[0]
        return error.code
    return ""


def test_what_exists_is_refused_unless_forced(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert code(refuse_existing, tmp_path) == code(refuse_existing, tmp_path, force=True) == "file.folder"
    assert code(refuse_existing, tmp_path / "a") == code(refuse_existing, tmp_path / "dangling") == "file.exists"
    assert not code(refuse_existing, tmp_path / "a", force=True) and not code(refuse_existing, tmp_path / "new")


def png(software: str | None) -> bytes:
    import io

    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("Comment", "ringmark")
    if software:
        info.add_text("Software", software)
    Image.new("L", (2, 2)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


SVG = "<?xml version='1.0'?><svg><metadata><dc:creator>\n<cc:Agent>\n<dc:title>{}</dc:title></svg>"
VALUES = {"a": np.zeros(2, np.float32)}
OURS = {
    "a.png": png("ringmark 0.1.0"),
    "a.svg": SVG.format("ringmark 0.1.0").encode(),
    "a.json": b'{\n "ringmark": "public key record"}',
    "a.jsonl": b'{"ringmark": 1, "settings": {}}\n',
    "a.safetensors": save(VALUES, {"ringmark calibration": "{}"}),
    "a.md": b"<!-- ringmark 0.1.0 -->\n# Report",
}
FOREIGN = {
    "b.png": png("Adobe Photoshop"),
    "c.png": png(None),
    "b.svg": SVG.format("Inkscape, not ringmark").encode(),
    "b.json": b'{"name": "ringmark"}',
    "c.json": b'["ringmark"]',
    "b.safetensors": save(VALUES, {"model": "ringmark"}),
    "c.safetensors": save({"ringmark": VALUES["a"]}),
    "b.md": b"# ringmark\n<!-- ringmark -->",
    "empty": b"",
    "b.txt": b"ringmark",
    "short": b"\x89PNG\r\n\x1a\n\0\0\0",
    "length": b"\xff" * 8 + b'{"__metadata__": {',
}


def test_our_own_files_may_be_replaced_and_no_others(tmp_path):
    for name, content in (OURS | FOREIGN).items():
        path, link = tmp_path / name, tmp_path / f"link-{name}"
        path.write_bytes(content)
        link.symlink_to(path)
        expected = "" if name in OURS else "file.foreign"
        assert code(refuse_foreign, path) == code(refuse_foreign, link) == expected, name
        assert not code(refuse_foreign, path, force=True) and not code(refuse_foreign, link, force=True)


@pytest.mark.parametrize("name", ["why.png", "why.svg", "public.json", "results.jsonl", "table.md", "labels.csv"])
def test_a_link_of_another_kind_does_not_replace_our_tensors(tmp_path, name):
    (tmp_path / "my.key").write_bytes(save(VALUES, {"ringmark": "{}"}))
    (tmp_path / name).symlink_to(tmp_path / "my.key")
    assert code(refuse_foreign, tmp_path / name) == "file.foreign"
    assert not code(refuse_foreign, tmp_path / "my.key")


def test_a_link_named_like_a_figure_does_not_replace_our_results(tmp_path):
    Results(tmp_path / "results.jsonl", {}).close()
    (tmp_path / "roc.png").symlink_to(tmp_path / "results.jsonl")
    assert code(refuse_foreign, tmp_path / "roc.png") == "file.foreign"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_figures_are_ours(tmp_path, suffix):
    from matplotlib.figure import Figure

    from ringmark.watermark.figures import save_figure

    path = tmp_path / f"x.{suffix}"
    Figure().savefig(path)
    assert code(refuse_foreign, path) == "file.foreign"
    save_figure(Figure(), path, force=True)
    assert not code(refuse_foreign, path)
    save_figure(Figure(), path)


def test_a_table_is_ours_beside_our_journal(tmp_path):
    (tmp_path / "labels.csv").write_text("path,label\n")
    (tmp_path / "notes.jsonl").write_text('{"a": 1}\n')
    assert code(refuse_foreign, tmp_path / "labels.csv") == "file.foreign"
    Results(tmp_path / "drawn.jsonl", {}).close()
    (tmp_path / "diary.md").write_text("mine")
    assert not code(refuse_foreign, tmp_path / "labels.csv")
    assert code(refuse_foreign, tmp_path / "diary.md") == "file.foreign"


@pytest.mark.parametrize(("first", "ours"), [("<!-- ringmark report -->", True), ("<p>ringmark report", False)])
def test_a_report_is_ours_by_its_comment(tmp_path, first, ours):
    (tmp_path / "report.html").write_text(f"<!doctype html>\n{first}\n")
    assert is_ours(tmp_path / "report.html") == ours


def test_what_is_no_file_is_never_replaced(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert not code(refuse_foreign, tmp_path / "new")
    assert code(refuse_foreign, tmp_path / "dangling") == "file.foreign"
    assert code(refuse_foreign, tmp_path) == code(refuse_foreign, tmp_path, force=True) == "file.folder"
    assert not is_ours(tmp_path) and not is_ours(tmp_path / "new")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert (
            code(refuse_foreign, tmp_path / "pipe") == code(refuse_foreign, "/dev/null", force=True) == "file.special"
        )


# -- tensors ----------------------------------------------------------------------------------------------------------


def write(path, header: dict | bytes, values: bytes = b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_tensors_come_back(tmp_path):
    path = tmp_path / "x"
    made = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(3.5),
        "c": np.array([1, 2, 3], np.uint8),
        "d": np.zeros((0, 4), np.float16),
        "e": np.array([True, False]),
        "f": np.array([-1, 2], np.int64),
    }
    path.write_bytes(save(made, {"ringmark": "text"}))
    tensors, metadata = read_tensors(path, max_bytes=1 << 20)
    assert metadata == {"ringmark": "text"} and tensors.keys() == made.keys()
    for name, values in made.items():
        assert np.array_equal(tensors[name], values) and tensors[name].dtype == values.dtype
        assert tensors[name].flags.writeable and tensors[name].flags.aligned


DAMAGED = [
    (b"", b""),
    (b"[]", b""),
    (b"null", b""),
    (b"{torn", b""),
    (b"[" * 100_000, b""),
    (b'{"a":' * 100_000, b""),
    (b"\xff\xfe", b""),
    ({"a": 3}, b""),
    ({"a": None}, b""),
    ({"a": {}}, b""),
    ({"a": entry()}, b"1234567"),
    ({"a": entry()}, b"123456789"),
    ({"a": entry("F128")}, b"12345678"),
    ({"a": entry(["F32"])}, b"12345678"),
    ({"a": entry(shape=(2.0,))}, b"12345678"),
    ({"a": entry(shape=(True, 2))}, b"12345678"),
    ({"a": entry(shape=(-2, -1))}, b"12345678"),
    ({"a": entry(shape=(1,) * 9 + (2,))}, b"12345678"),
    ({"a": entry(shape=(1 << 62, 1 << 62), offsets=(0, 1 << 126))}, b"12345678"),
    ({"a": entry(offsets=(-8, 0))}, b"12345678"),
    ({"a": entry(offsets=(8, 16))}, b"12345678" * 2),
    ({"a": entry(), "b": entry()}, b"12345678"),
    ({"a": entry(), "b": entry(offsets=(4, 12))}, b"12345678" * 2),
    ({"a": entry() | {"more": 1}}, b"12345678"),
    ({"__metadata__": {"a": 1}}, b""),
    ({"__metadata__": []}, b""),
    (b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), b"12345678"),
    (b'{"__metadata__": {"a": "1", "a": "2"}}', b""),
    (b" " * files.MAX_HEADER + b"{}", b""),
]


@pytest.mark.parametrize(("header", "values"), DAMAGED)
def test_a_header_that_cannot_be_right_is_refused(tmp_path, header, values):
    write(tmp_path / "x", header, values)
    with pytest.raises(StoreError) as caught:
        read_tensors(tmp_path / "x", max_bytes=1 << 30)
    assert caught.value.code == "file.damaged" and caught.value.subject == tmp_path / "x"
    assert "()" not in caught.value.fact


def test_nothing_is_allocated_for_what_a_header_only_says(tmp_path, monkeypatch):
    write(tmp_path / "x", {"a": entry(shape=(1 << 40,), offsets=(0, 4 << 40))})
    monkeypatch.setattr(np, "empty", lambda *_: pytest.fail("allocated"))
    assert code(read_tensors, tmp_path / "x", max_bytes=1 << 30) == "file.damaged"


def test_the_caller_names_error_size_and_more_checks(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(save(VALUES, {"kind": "key"}))

    def refused(**options) -> str:
        with pytest.raises(KeyFileError) as caught:
            read_tensors(path, error=KeyFileError, room="key", **options)
        return caught.value.code

    def check(infos, metadata):
        assert infos["a"].dtype == "F32" and infos["a"].shape == (2,)
        return metadata["owner"]

    assert refused(max_bytes=path.stat().st_size - 1) == "key.too-large"
    assert refused(max_bytes=1000, check=check) == "key.damaged"
    path.unlink()
    assert refused(max_bytes=1000) == "key.missing"
    path.mkdir()
    assert refused(max_bytes=1000) == "key.folder"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert code(read_tensors, tmp_path / "pipe", max_bytes=1000) == "file.special"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_never_escapes_as_another_error(tmp_path_factory, data):
    path, content = tmp_path_factory.mktemp("damage") / "x", bytearray(save(VALUES, {"ringmark": "{}"}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    assert code(read_tensors, path, max_bytes=1 << 20) in ("", "file.damaged")
