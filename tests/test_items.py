"""Every source yields its pictures, lazily; what is hostile, broken or unreachable is said in one line."""

from __future__ import annotations

import functools
import http.server
import io
import logging
import os
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ringmark.data import archives, locations
from ringmark.data.items import items_of
from ringmark.data.locations import Location, public
from ringmark.data.results import content_id
from ringmark.errors import ImageError
from ringmark.watermark.cli.remedies import explained

SIZE = (16, 16)


def png(seed: int, side: int = 16) -> bytes:
    """A picture of noise."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = {"a.png": png(0), "deep/b.png": png(1), "c.webp": png(2)}
"""By name; the suffix does not decide the format."""


def read(*sources: object) -> dict[str, str]:
    """The content of each picture, or the code of its error, by id."""
    found = {}
    for source in sources:
        for item in items_of(str(source)):
            assert item.id not in found
            try:
                [sample] = item.read(lambda _: (SIZE,))
                assert sample.id == item.id and sample.size == sample.image.size[::-1]
                found[item.id] = sample.content
            except ImageError as error:
                assert "\n" not in str(error)
                found[item.id] = error.code
    return found


def content(data: bytes) -> str:
    return content_id(np.asarray(Image.open(io.BytesIO(data))))


CONTENTS = {name: content(data) for name, data in PICTURES.items()}


def refused(source: object) -> ImageError:
    with pytest.raises(ImageError) as caught:
        list(items_of(str(source)))
    assert "\n" not in str(caught.value)
    return caught.value


def fill(folder: Path, **more: bytes) -> Path:
    for name, data in {**PICTURES, "notes.md": b"no", ".hidden.png": b"no", **more}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tar(path: Path, entries: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 7
            archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def below(place: object, contents: dict[str, str] = CONTENTS) -> dict[str, str]:
    return {f"{place}/{name}": value for name, value in contents.items()}


# -- files of this machine


def test_folders_files_and_patterns(tmp_path, monkeypatch):
    folder = fill(tmp_path / "album")
    assert read(folder) == below(folder)
    assert read(folder / "a.png") == {f"{folder}/a.png": CONTENTS["a.png"]}
    assert read(folder / "*.png") == {f"{folder}/a.png": CONTENTS["a.png"]}
    assert set(read(f"{folder}/**/*.png")) == {f"{folder}/a.png", f"{folder}/deep/b.png"}
    monkeypatch.chdir(tmp_path)
    assert read("album") == below("album")
    [item] = items_of("album/a.png")
    assert item.stamp == {"size": len(PICTURES["a.png"]), "mtime_ns": (folder / "a.png").stat().st_mtime_ns}
    assert refused(folder / "none.png").code == refused(folder / "*.tif").code == "source.missing"


@pytest.mark.parametrize(
    ("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.xz", "w:xz")]
)
def test_tars(tmp_path, suffix, mode):
    path = tar(tmp_path / f"shard{suffix}", {**PICTURES, "a.json": b"{}", ".hidden.png": b"no"}, mode)
    assert read(path) == below(path)
    assert {item.mtime_ns for item in items_of(str(path))} == {7 * 10**9}


def test_zips(tmp_path):
    path = zipped(tmp_path / "album.zip", {**PICTURES, "folder/": b"", "a.json": b"{}"})
    assert read(path) == below(path)


def test_names_in_archives_are_only_names(tmp_path):
    names = ["../up.png", "/etc/passwd.png", "a/../../b.png", "C:\\x.png", "line\nbreak.png"]
    entries = {name: png(i) for i, name in enumerate(names)}
    for path in (tar(tmp_path / "a.tar", entries), zipped(tmp_path / "a.zip", entries)):
        assert read(path) == {f"{path}/{name}": content(data) for name, data in entries.items()}
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.zip"]


def test_links_and_devices_in_a_tar_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert read(tmp_path / "a.tar") == {}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_of_a_tar_that_is_cut_off_what_came_before_is_kept(tmp_path, mode):
    whole = tar(tmp_path / "whole.tar", {f"{i}.png": png(i) for i in range(4)}, mode).read_bytes()
    path = tmp_path / ("cut.tar.gz" if ":" in mode else "cut.tar")
    seen = set()
    for cut in range(0, len(whole) - 1, 97 if ":" in mode else 61):
        path.write_bytes(whole[:cut])
        found = read(path)
        if ":" not in mode and cut >= 4 * 1536 + 512:  # the last blocks only fill up the archive
            assert str(path) not in found
            continue
        assert found.pop(str(path)) == "source.damaged"
        assert found == {f"{path}/{i}.png": content(png(i)) for i in range(len(found))}
        seen.add(len(found))
    assert seen >= {0, 3}


def test_damage_in_a_zip_costs_its_entry(tmp_path):
    path = zipped(tmp_path / "a.zip", PICTURES)
    data = bytearray(path.read_bytes())
    data[data.index(b"deep/b.png") + 30] ^= 255
    path.write_bytes(data)
    assert sorted(read(path).values()) == sorted(["image.damaged", CONTENTS["a.png"], CONTENTS["c.webp"]])
    path.write_bytes(data[:-30])
    assert read(path) == {str(path): "source.damaged"}
    path.write_bytes(b"")
    assert read(path) == {str(path): "source.damaged"}


def test_dates_that_make_no_sense_are_left_out(tmp_path):
    path = zipped(tmp_path / "a.zip", PICTURES)
    with zipfile.ZipFile(path) as archive:
        first = archive.infolist()[0]
    assert first.date_time[1] and all(item.mtime_ns for item in items_of(str(path)))
    month = (13 << 5 | 1).to_bytes(2, "little")  # as zip stores it
    data = path.read_bytes()
    at = data.index(b"PK\1\2") + 14
    path.write_bytes(data[:at] + month + data[at + 2 :])
    assert read(path) == below(path)
    assert [item.mtime_ns is None for item in items_of(str(path))] == [True, False, False]
    for when in (1e30, float("inf"), float("nan"), -1.0):
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            info = tarfile.TarInfo("a.png")
            info.size, info.pax_headers = len(PICTURES["a.png"]), {"mtime": str(when)}
            archive.addfile(info, io.BytesIO(PICTURES["a.png"]))
        [item] = items_of(str(tmp_path / "a.tar"))
        assert item.mtime_ns is None and item.read(lambda _: (SIZE,))


def test_bombs_are_bounded(tmp_path, monkeypatch):
    zeros = bytes(1 << 20)
    bombs = [tar(tmp_path / "a.tar.gz", {"0.png": png(0), "1.png": zeros, "2.png": png(2)}, "w:gz")]
    bombs.append(zipped(tmp_path / "a.zip", {"0.png": png(0), "1.png": zeros, "2.png": png(2)}))
    monkeypatch.setattr(archives, "ALLOWANCE", 1000)
    for path in bombs:
        assert read(path) == {f"{path}/0.png": content(png(0)), str(path): "source.bomb"}
    monkeypatch.undo()
    monkeypatch.setattr(archives, "MAX_BYTES", 1 << 19)
    for path in bombs:
        found = read(path)
        assert found[f"{path}/1.png"] == "image.too-many-bytes" and found[f"{path}/2.png"] == content(png(2))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_inflates_no_more_than_it_declares(tmp_path, method):
    path = zipped(tmp_path / "a.zip", {"0.png": png(0), "1.png": bytes(50 << 20)}, method)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\1\2") + 24  # the size of the second entry
    data[at : at + 4] = (100).to_bytes(4, "little")
    path.write_bytes(data)
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    kept, code = content(png(0)), "image.compression"
    assert list(found.values()) == ([kept, "image.damaged"] if method == zipfile.ZIP_DEFLATED else [code, code])
    assert peak < 10 << 20


def test_a_header_that_asks_for_gigabytes_is_refused(tmp_path, monkeypatch):
    """A name in a pax header of 300 kB, where entries may have 100 kB."""
    monkeypatch.setattr(archives, "MAX_BYTES", 100_000)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("n" * 300_000 + ".png"))
    assert read(tmp_path / "a.tar") == {str(tmp_path / "a.tar"): "source.bomb"}


# -- tables and lists


def table(path: Path, columns: dict, compression: str | None = None, rows: int = 2) -> Path:
    pa = pytest.importorskip("pyarrow")
    made = pa.table(columns)
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        pq.write_table(made, path, row_group_size=rows)
    else:
        new = pa.ipc.new_file if path.suffix == ".feather" else pa.ipc.new_stream
        with new(path, made.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as file:
            file.write_table(made)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize("shape", ["struct", "bytes", "jpg"])
def test_tables_of_pictures(tmp_path, suffix, shape):
    data = [*PICTURES.values(), None, b"broken"]
    structs = [{"bytes": x, "path": None} for x in data]
    columns = {"struct": {"image": structs}, "bytes": {"what": data}, "jpg": {"other": data, "jpg": data}}[shape]
    path = table(tmp_path / f"t{suffix}", {"label": list(range(5)), **columns})
    expected = [*CONTENTS.values(), "image.empty", "image.unknown-format"]
    assert read(path) == {f"{path}#{i}": value for i, value in enumerate(expected)}


@pytest.mark.parametrize("suffix", [".arrow", ".feather"])
@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_tables_are_read_unless_they_are_bombs(tmp_path, monkeypatch, suffix, compression):
    pa = pytest.importorskip("pyarrow")
    kinds = pa.array(["x", None, "y"]).dictionary_encode()  # has a message of its own
    path = table(tmp_path / f"t{suffix}", {"kind": kinds, "image": list(PICTURES.values())}, compression)
    assert list(read(path).values()) == list(CONTENTS.values())
    monkeypatch.setattr("ringmark.data.arrow.MAX_BYTES", 1000)
    monkeypatch.setattr("ringmark.data.arrow.RATIO", 10)
    assert list(read(path).values()) == list(CONTENTS.values())
    zeros = bytes(100_000)
    values = pa.array([zeros.decode()] * 3).dictionary_encode()
    for columns in ({"image": [zeros] * 3}, {"image": [b"x"] * 3, "kind": values}):
        bomb = table(tmp_path / f"bomb{suffix}", columns, compression)
        assert read(bomb) == {str(bomb): "source.bomb"}


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_of_a_value_in_many_rows_there_is_one_copy_at_a_time(tmp_path, suffix):
    pa = pytest.importorskip("pyarrow")
    value, pool = bytes(1 << 20), pa.default_memory_pool()
    repeated = [value] * 64 if suffix == ".parquet" else pa.DictionaryArray.from_arrays([0] * 64, [value])
    path = table(tmp_path / f"t{suffix}", {"image": repeated}, rows=64)
    pa.set_memory_pool(counted := pa.proxy_memory_pool(pool))
    tracemalloc.start()
    try:
        assert set(read(path).values()) == {"image.unknown-format"}
        assert counted.max_memory() + tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(pool)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_a_row_larger_than_a_picture_is_not_read(tmp_path, monkeypatch, suffix):
    path = table(tmp_path / f"t{suffix}", {"image": [png(0), png(1, 64), png(2)]})
    monkeypatch.setattr("ringmark.data.tables.MAX_BYTES", 4000)
    expected = [content(png(0)), "image.too-many-bytes", content(png(2))]
    assert read(path) == {f"{path}#{i}": value for i, value in enumerate(expected)}


def test_a_value_outside_of_its_table_is_damage(tmp_path):
    path = table(tmp_path / "t.arrow", {"image": [b"abcd"] * 4})
    data, places = path.read_bytes(), np.array([0, 4, 8, 12, 16], np.int32)
    assert places.tobytes() in data
    path.write_bytes(data.replace(places.tobytes(), (places + [0, 0, 2_000_000_000, 0, 0]).astype(np.int32).tobytes()))
    assert read(path) == {str(path): "source.damaged"}


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.txt", "list.parquet"])
def test_lists_of_paths(tmp_path, name):
    fill(tmp_path)
    paths = ["a.png", "deep/b.png", str(tmp_path / "c.webp"), "missing.png"]
    if name == "list.parquet":
        table(tmp_path / name, {"n": [1, 2, 3, 4], "path": paths})
    else:
        by = "\t" if name.endswith("tsv") else ","
        header = "" if name.endswith("txt") else f"n{by}path\n"
        lines = paths if name.endswith("txt") else [f"{i}{by}{path}" for i, path in enumerate(paths)]
        (tmp_path / name).write_text(header + "\n".join(lines) + "\n")
    assert read(tmp_path / name) == below(tmp_path) | {f"{tmp_path}/missing.png": "image.missing"}


def test_tables_that_are_none_are_named(tmp_path):
    (tmp_path / "no.csv").write_text("one,two\n1,2\n")
    (tmp_path / "no.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "cut.parquet").write_bytes(table(tmp_path / "no.parquet", {"one": [1], "two": [2.0]}).read_bytes()[:-9])
    expected = {"no.csv": "column", "no.txt": "damaged", "cut.parquet": "damaged", "no.parquet": "column"}
    for name, code in expected.items():
        assert read(tmp_path / name) == {f"{tmp_path}/{name}": f"source.{code}"}


def test_without_pyarrow_the_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    [item] = items_of(str(tmp_path / "a.parquet"))
    with pytest.raises(ImageError) as caught:
        item.read(lambda _: (SIZE,))
    assert caught.value.code == "source.no-driver" and caught.value.details["package"] == "pyarrow"


# -- the web


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if "forbidden" in self.path:
            self.send_error(403)
        elif "broken" in self.path:
            self.send_error(500)
        else:
            super().do_GET()

    do_HEAD = do_GET


@pytest.fixture
def web(tmp_path):
    """The address of a server of these pictures."""
    pytest.importorskip("aiohttp")
    fill(tmp_path / "web")
    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_pictures_archives_and_lists_on_the_web(web, tmp_path):
    folder = tmp_path / "web"
    assert read(f"{web}/a.png") == {f"{web}/a.png": CONTENTS["a.png"]}
    tar(folder / "shard.tar", PICTURES)
    zipped(folder / "album.zip", PICTURES)
    assert read(f"{web}/shard.tar", f"{web}/album.zip") == below(f"{web}/shard.tar") | below(f"{web}/album.zip")
    table(folder / "t.parquet", {"image": list(PICTURES.values())})
    assert list(read(f"{web}/t.parquet").values()) == list(CONTENTS.values())
    for name in ("shard.tar", "album.zip", "t.parquet"):  # parameters do not hide what a file is
        assert list(read(f"{web}/{name}?download=true").values()) == list(CONTENTS.values())
    (folder / "list.txt").write_text("a.png\n")
    assert list(read(f"{web}/list.txt?download=true").values()) == [CONTENTS["a.png"]]
    mine = tmp_path / "mine.png"  # which no list elsewhere may name
    mine.write_bytes(PICTURES["a.png"])
    for path in (f"file://{mine}", f"local://{mine}", f"filecache://x::file://{mine}", str(mine), "s3://bucket/a.png"):
        (folder / "list.txt").write_text(f"{path}\n")
        assert list(read(f"{web}/list.txt").values()) == ["source.outside"]
    (folder / "list.csv").write_text(f"url\na.png\n{web}/deep/b.png\n/etc/passwd\n../../x.png\nnone.png\n")
    assert read(f"{web}/list.csv") == {
        **{f"{web}/a.png": CONTENTS["a.png"], f"{web}/deep/b.png": CONTENTS["deep/b.png"]},
        **{"/etc/passwd": "source.outside", "../../x.png": "source.outside", f"{web}/none.png": "source.missing"},
    }


def test_what_the_web_refuses_is_said_without_secrets(web, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG, "ringmark")
    host = web.removeprefix("http://")
    for path, code in (("none", "missing"), ("forbidden", "denied"), ("broken", "unreachable")):
        error = refused(f"http://user:hunter2@{host}/{path}.png?X-Amz-Signature=hunter2&token=hunter2&id=hunter2")
        assert error.code == f"source.{code}" and "hunter2" not in str(error) + repr(error.details) + caplog.text
        assert str(error.subject).startswith(f"{web}/{path}.png") and not error.__cause__
    [(id, _)] = read(f"http://user:hunter2@{host}/a.png?sig=hunter2").items()
    assert id == f"{web}/a.png"
    assert refused("http://127.0.0.1:9/a.png").code == "source.unreachable"


def test_names_of_addresses_keep_no_secret_and_tell_pictures_apart():
    for signed in (
        "X-Amz-Signature=1&X-Amz-Date=2&x-amz-security-token=3",
        "Expires=1&AWSAccessKeyId=2&Signature=3",
        "Policy=1&Key-Pair-Id=2&Signature=3",
        "sv=1&se=2&sp=r&sr=b&sig=x",
        "x-oss-signature-version=1&x-oss-credential=2&x-oss-date=3&x-oss-expires=4&x-oss-signature=5",
        "q-sign-algorithm=1&q-ak=2&q-sign-time=3&q-key-time=4&q-header-list=5&q-url-param-list=6&q-signature=7",
    ):
        assert public(f"https://a.b/c.png?{signed}") == "https://a.b/c.png"
        assert (
            public(f"https://a.b/c?id=1&{signed}") == public("https://u:p@a.b/c?id=1#z") != public("https://a.b/c?id=2")
        )
    for name in ("key", "monkey", "keyword", "sv", "sz", "token", "policy", "author", "expires", "x-oss-process"):
        one, other = public(f"https://a.b/c?{name}=hunter2"), public(f"https://a.b/c?{name}=hunter3")
        assert one != other and name not in one and "hunter" not in one
    assert public("s3://bucket/what?is#this.png") == "s3://bucket/what?is#this.png"
    assert public("sftp://user:pw@host/a.png") == "sftp://host/a.png"
    assert public("plain/path?x@y.png") == "plain/path?x@y.png"


# -- buckets


@pytest.fixture(scope="module")
def bucket():
    """A server of S3 on this machine; the filesystem that reaches it."""
    pytest.importorskip("s3fs")
    server_of = pytest.importorskip("moto.server").ThreadedMotoServer
    server = server_of(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "hunter2")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        import s3fs

        files = s3fs.S3FileSystem()
        files.mkdir("bucket")
        for name, data in {**PICTURES, "notes.md": b"no"}.items():
            files.pipe(f"bucket/album/{name}", data)
        yield files
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


def test_prefixes_objects_and_patterns_of_a_bucket(bucket, tmp_path):
    assert read("s3://bucket/album") == read("s3://bucket/album/") == below("s3://bucket/album")
    assert read("s3://bucket") == below("s3://bucket/album")
    assert read("s3://bucket/album/*.png") == {"s3://bucket/album/a.png": CONTENTS["a.png"]}
    assert read("s3://bucket/album/a.png") == {"s3://bucket/album/a.png": CONTENTS["a.png"]}
    stamps = {item.id: item.stamp for item in items_of("s3://bucket/album")}
    assert all(stamp["size"] and stamp["mtime_ns"] for stamp in stamps.values())
    bucket.pipe("bucket/shards/0.tar", tar(tmp_path / "0.tar", PICTURES).read_bytes())
    bucket.pipe("bucket/shards/1.tar", tar(tmp_path / "1.tar", PICTURES).read_bytes()[:2000])
    found = read("s3://bucket/shards/*.tar")
    assert found.pop("s3://bucket/shards/1.tar") == "source.damaged"
    assert found == below("s3://bucket/shards/0.tar") | {"s3://bucket/shards/1.tar/a.png": CONTENTS["a.png"]}


def test_objects_are_stamped_however_they_are_named(bucket):
    import fsspec

    fsspec.filesystem("memory").pipe("/d/a.png", PICTURES["a.png"])
    for folder in ("memory://d", "s3://bucket/album"):
        stamps = [
            item.stamp
            for name in ("", "/*.png", "/a.png")
            for item in items_of(folder + name)
            if item.id.endswith("/a.png")
        ]
        assert stamps == stamps[:1] * 3 and stamps[0]["size"] == len(PICTURES["a.png"]) and stamps[0]["mtime_ns"]


def test_a_listing_is_read_page_by_page(bucket, monkeypatch):
    for i in range(25):
        bucket.pipe(f"bucket/many/{i:03d}.png", b"x")
    asked, call = [], bucket.call_s3

    def pages(method, **given):
        asked.append(method)
        return call(method, MaxKeys=10, **given)

    location = Location.at("s3://bucket/many")
    monkeypatch.setattr(location.files, "call_s3", pages)
    walk = location.walk()
    next(walk)
    assert len(asked) == 1
    assert [path for path, _ in walk] == [f"bucket/many/{i:03d}.png" for i in range(1, 25)] and len(asked) == 3


def test_buckets_that_cannot_be_read_are_named(bucket, monkeypatch):
    assert refused("s3://nowhere/album").code == "source.missing"
    assert refused("s3://bucket/none").code == "source.missing"
    assert refused("s3://bucket/none/*.png").code == "source.missing"
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    assert refused("s3://bucket/album").code == "source.denied"
    s3fs.S3FileSystem.clear_instance_cache()


def test_drivers_and_schemes_that_are_not_there(monkeypatch):
    assert refused("nosuch://a/b").code == "source.scheme"
    import fsspec

    def missing(*_, **__):
        raise ImportError("install it")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    error = refused("gs://bucket/album")
    assert error.code == "source.no-driver" and error.details["package"] == "gcsfs"
    error = refused("abfs://container/album")
    assert explained(error) == f"abfs://container/album: {error.fact}; install the fsspec driver for abfs"


def test_what_is_larger_than_a_picture_is_not_fetched(web, monkeypatch):
    monkeypatch.setattr(locations, "MAX_BYTES", 100)
    assert read(f"{web}/a.png") == {f"{web}/a.png": "image.too-many-bytes"}
