"""A key comes back as it was saved, is never lost or shown, and nothing else is taken for one."""

from __future__ import annotations

import base64
import errno
import json
import os
import pickle
import stat
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringmark.watermark.keys.key
from ringmark.data.files import refuse_existing
from ringmark.errors import KeyFileError, SchemeError
from ringmark.watermark.keys.key import COMMON, READABLE, SECRET_BYTES, Key
from ringmark.watermark.schemes.base import scheme_of

SECRET = bytes(range(101, 101 + SECRET_BYTES))
VALUES = np.array([[0.7310586, -1.2345678], [3.1415927, -0.0987654]], np.float32)
MARK = {"scheme": "tree-ring", "pattern": "ring", "mask": "centred", "channels": [0, 2], "radii": [3, 8]}
MADE = {"model": {"name": "pocket", "fingerprint": "0123456789abcdef"}}
LATENTS = {"kind": {"family": "stable-diffusion", "channels": 4, "factor": 8}, "reference": [256, 384]}
PUBLIC = MARK | LATENTS | MADE
CREATED = {"created": "2026-01-01T00:00:00+00:00"}
KEY = Key(PUBLIC | CREATED, SECRET)
OLD = Key(MARK | {"latent_shape": [4, 32, 32]} | MADE | CREATED, values=VALUES)
OTHER = bytes(SECRET_BYTES)


@pytest.fixture
def path(tmp_path):
    KEY.save(tmp_path / "my.key")
    return tmp_path / "my.key"


def parts(path) -> tuple[dict, bytes]:
    """Header and body of a safetensors file."""
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def put(path, header: dict, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def put_description(path, text: str) -> None:
    header, body = parts(path)
    put(path, header | {"__metadata__": {"ringmark": text}}, body)


def refused(act, path) -> str:
    """The code of the error, one line that names the path and shows no value, with which `act` fails."""
    with pytest.raises(KeyFileError) as caught:
        act()
    message = str(caught.value)
    assert str(caught.value.subject) == str(path) and message.startswith(f"{path}: ") and "\n" not in message
    assert not shows_values(message + repr(caught.value))
    return caught.value.code


def shows_values(text: str) -> bool:
    ways = (SECRET.hex(), base64.b64encode(SECRET).decode(), repr(SECRET)[2:-1], ", ".join(map(str, SECRET)))
    return any(way in text for way in ways) or any(f"{abs(x):.3f}"[:-1] in text for x in VALUES.flat)


def test_there_and_back(tmp_path):
    key = Key.new(SECRET, **PUBLIC)
    key.save(tmp_path / "a.key")
    back = Key.load(tmp_path / "a.key")
    assert back.secret == SECRET and back.values is None and back.latent_shape == (4, 32, 48)
    assert back.metadata == key.metadata and back.fingerprint == key.fingerprint
    header, body = parts(tmp_path / "a.key")
    assert (header["secret"]["dtype"], header["secret"]["shape"], body) == ("U8", [SECRET_BYTES], SECRET)


def test_an_old_key_comes_back_as_it_was(tmp_path):
    OLD.save(tmp_path / "a.key")
    back = Key.load(tmp_path / "a.key")
    assert back.values.dtype == np.float32 and np.array_equal(back.values, VALUES) and back.secret == b""
    assert back.metadata == OLD.metadata and back.latent_shape == (4, 32, 32)
    assert parts(tmp_path / "a.key")[0]["values"]["dtype"] == "F32"
    back.save(tmp_path / "b.key")
    assert (tmp_path / "a.key").read_bytes() == (tmp_path / "b.key").read_bytes()


def test_non_contiguous_values_come_back(tmp_path):
    Key(OLD.metadata, values=np.arange(12, dtype=np.float32).reshape(3, 4).T).save(tmp_path / "a.key")
    assert np.array_equal(Key.load(tmp_path / "a.key").values, np.arange(12).reshape(3, 4).T)


def test_the_fingerprints_of_known_keys_never_change():
    assert (KEY.fingerprint, OLD.fingerprint) == ("ccd4ac856bf234fd", "6d974d3b8170ea53")


@given(st.integers(0, 8 * SECRET_BYTES - 1))
def test_any_bit_of_the_secret_changes_the_fingerprint(bit):
    secret = (int.from_bytes(SECRET, "big") ^ 1 << bit).to_bytes(SECRET_BYTES, "big")
    assert Key(KEY.metadata, secret).fingerprint != KEY.fingerprint


@pytest.mark.parametrize("field", [*PUBLIC, "another"])
def test_any_public_field_changes_the_fingerprint(field):
    assert Key(KEY.metadata | {field: "other"}, SECRET).fingerprint != KEY.fingerprint


def test_neither_time_nor_order_of_fields_changes_the_fingerprint():
    assert Key(KEY.metadata | {"created": "2030"}, SECRET).fingerprint == KEY.fingerprint
    assert Key(dict(reversed(KEY.metadata.items())), SECRET).fingerprint == KEY.fingerprint


def test_two_system_keys_differ():
    a, b = (Key.new(**PUBLIC) for _ in range(2))
    assert a.secret != b.secret and len(a.secret) == len(b.secret) == SECRET_BYTES and a.fingerprint != b.fingerprint


def test_a_printed_key_shows_its_fingerprint_alone():
    for key in (KEY, OLD):
        for text in (repr(key), str(key), f"{key}", repr([key])):
            assert key.fingerprint in text and not shows_values(text)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("overwrite", [False, True])
def test_only_the_owner_may_read_it(tmp_path, umask, overwrite):
    target = tmp_path / "new" / "folder" / "my.key"
    before = os.umask(umask)
    try:
        if overwrite:
            target.parent.mkdir(parents=True)
            target.write_bytes(b"")
            target.chmod(0o666)
        KEY.save(target, overwrite=overwrite)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert os.listdir(target.parent) == ["my.key"]


def test_a_key_is_never_replaced_unasked(path):
    before = path.read_bytes()
    other = Key.new(OTHER, **PUBLIC)
    assert refused(lambda: other.save(path), path) == "key.exists"
    assert path.read_bytes() == before and os.listdir(path.parent) == ["my.key"]


def test_replacing_is_atomic(path):
    reader, before = path.with_name("reader"), path.read_bytes()
    os.link(path, reader)  # stands for a process that has the old file open
    other = Key.new(OTHER, **PUBLIC)
    other.save(path, overwrite=True)
    assert Key.load(path).fingerprint == other.fingerprint
    assert reader.read_bytes() == before and sorted(os.listdir(path.parent)) == ["my.key", "reader"]


def test_of_many_writers_one_wins(tmp_path):
    keys = [Key.new(bytes([i] * SECRET_BYTES), **PUBLIC) for i in range(8)]

    def save(key):
        try:
            key.save(tmp_path / "my.key")
        except KeyFileError:
            return None
        return key.fingerprint

    with ThreadPoolExecutor(8) as pool:
        won = [f for f in pool.map(save, keys) if f]
    assert won == [Key.load(tmp_path / "my.key").fingerprint] and os.listdir(tmp_path) == ["my.key"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failed_save_leaves_no_trace(path, monkeypatch, overwrite, call):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target, before = path if overwrite else path.with_name("new.key"), path.read_bytes()
    monkeypatch.setattr(ringmark.watermark.keys.key.os, call, fail)
    code = refused(lambda: Key.new(OTHER, **PUBLIC).save(target, overwrite=overwrite), target)
    assert code == "file.full"
    assert path.read_bytes() == before and os.listdir(path.parent) == ["my.key"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_replacing_follows_links_and_leaves_what_is_no_file(path, tmp_path):
    link, pipe, other = tmp_path / "link.key", tmp_path / "pipe.key", Key.new(OTHER, **PUBLIC)
    link.symlink_to(path)
    os.mkfifo(pipe)
    other.save(link, overwrite=True)
    assert link.is_symlink() and Key.load(path).fingerprint == other.fingerprint
    assert refused(lambda: other.save(pipe), pipe) == "key.exists"
    assert refused(lambda: other.save(pipe, overwrite=True), pipe) == "key.unwritable"
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_where_nothing_can_be_written(path, tmp_path):
    below = path / "x.key"  # its folder is a file
    assert refused(lambda: KEY.save(below), below) == "key.unwritable"
    assert refused(lambda: KEY.save(tmp_path, overwrite=True), tmp_path) == "key.unwritable"
    assert refused(lambda: KEY.save(tmp_path), tmp_path) == "key.folder"
    assert os.listdir(tmp_path) == ["my.key"]


def test_missing_file_and_folder(tmp_path):
    for name, code in (("none.key", "key.missing"), ("no/such.key", "key.missing"), (".", "key.folder")):
        assert refused(lambda name=name: Key.load(tmp_path / name), tmp_path / name) == code


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"key",
        bytes(range(256)) * 8,
        b"\xff" * 4096,
        struct.pack("<Q", 2**63) + b"{}",
        b"\x02" + b"\0" * 7 + b"{}",
    ],
    ids=["empty", "nul", "short", "bytes", "ones", "endless header", "no tensor"],
)
def test_other_bytes(tmp_path, data):
    (tmp_path / "x.key").write_bytes(data)
    assert refused(lambda: Key.load(tmp_path / "x.key"), tmp_path / "x.key") == "key.damaged"


def test_a_truncated_or_lengthened_key(path):
    data = path.read_bytes()
    for some in [data[:n] for n in (7, 8, 9, len(data) // 2, len(data) - 1)] + [data + b"\0"]:
        path.write_bytes(some)
        refused(lambda: Key.load(path), path)


def test_no_bit_of_the_secret_can_be_turned(path):
    header, body = parts(path)
    for i in range(8 * len(body)):
        turned = bytearray(body)
        turned[i // 8] ^= 1 << i % 8
        put(path, header, bytes(turned))
        assert refused(lambda: Key.load(path), path) == "key.fingerprint"


@pytest.mark.parametrize("field", [*PUBLIC, "fingerprint"])
def test_no_field_may_be_altered_or_missing(path, field):
    stored = json.loads(parts(path)[0]["__metadata__"]["ringmark"])
    other = {"kind": LATENTS["kind"] | {"factor": 4}, "reference": [256, 256], "model": {}}
    same_type = [1, 2] if isinstance(stored[field], list) else "other"
    put_description(path, json.dumps(stored | {field: other.get(field, same_type)}))
    assert refused(lambda: Key.load(path), path) == "key.fingerprint"
    put_description(path, json.dumps({k: v for k, v in stored.items() if k != field}))
    common = field in (*COMMON, "fingerprint")
    assert refused(lambda: Key.load(path), path) == ("key.damaged" if common else "key.fingerprint")


@pytest.mark.parametrize(
    "field, value",
    [(field, 7) for field in (*LATENTS, "scheme", "model", "created")]
    + [
        ("reference", sides)
        for sides in ([256], [256, None], [256, 0], [256, -8], [True, 256], [256, 260], [2**40] * 2)
    ]
    + [("kind", LATENTS["kind"] | change) for change in ({"channels": 0}, {"factor": "8"}, {"family": None})]
    + [("kind", {})],
)
def test_types_are_checked_even_if_the_fingerprint_fits(path, field, value):
    Key(KEY.metadata | {field: value}, SECRET).save(path, overwrite=True)
    assert refused(lambda: Key.load(path), path) == "key.damaged"


@pytest.mark.parametrize("shape", [7, [4, 32], [4, None, 32], [4, 32, 0], [4, True, 32]])
def test_types_of_an_old_key_are_checked_too(path, shape):
    Key(OLD.metadata, values=VALUES).save(path, overwrite=True)
    Key.load(path)
    stored = json.loads(parts(path)[0]["__metadata__"]["ringmark"])
    put_description(path, json.dumps(stored | {"latent_shape": shape}))
    assert refused(lambda: Key.load(path), path) == "key.damaged"


@pytest.mark.parametrize("size", [0, 16, 31, 33, 64])
def test_a_secret_has_256_bits(path, size):
    Key(KEY.metadata, bytes(size)).save(path, overwrite=True)
    assert refused(lambda: Key.load(path), path) == "key.damaged"


def test_a_key_has_a_secret_or_values_and_not_both(path):
    header, body = parts(path)
    info = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
    put(path, header | {"values": info}, body + bytes(4))
    assert refused(lambda: Key.load(path), path) == "key.damaged"


WRONG = [(field, 7) for field in PUBLIC if field not in COMMON]
WRONG += [("channels", ["0"]), ("channels", [True]), ("channels", [{}]), ("radii", [1, 2, 3]), ("radii", [1.5, 3])]


@pytest.mark.parametrize("field, value", WRONG)
def test_types_of_a_schemes_own_fields_are_checked_by_the_scheme(path, field, value):
    Key(KEY.metadata | {field: value}, SECRET).save(path, overwrite=True)
    with pytest.raises(SchemeError) as caught:
        scheme_of(Key.load(path))
    assert "\n" not in str(caught.value) and caught.value.code in ("scheme.pattern", "scheme.description")


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", '"text"', "7", "{", '{"a": ' + "1" * 5000 + "}", "[" * 10**5, '{"fingerprint": NaN}'],
    ids=["empty", "null", "list", "string", "number", "cut", "long number", "deep", "nan"],
)
def test_descriptions_that_are_none(path, text):
    put_description(path, text)
    refused(lambda: Key.load(path), path)


def test_nesting_at_the_very_limit_of_json(path):
    stored = parts(path)[0]["__metadata__"]["ringmark"]
    for depth in range(900, 1000):
        put_description(path, f'{stored[:-1]}, "x": {"[" * depth}{"]" * depth}}}')
        refused(lambda: Key.load(path), path)


def test_no_description_at_all(path):
    header, body = parts(path)
    for some in ({}, {"__metadata__": {}}, {"__metadata__": {"other": "x"}}):
        put(path, {"secret": header["secret"]} | some, body)
        refused(lambda: Key.load(path), path)
    put(path, {"other": header["secret"], "__metadata__": header["__metadata__"]}, body)
    refused(lambda: Key.load(path), path)


@pytest.mark.parametrize(
    "dtype, size",
    [("I32", 4), ("U32", 4), ("F64", 8), ("F16", 2), ("BF16", 2), ("C64", 8), ("F8_E4M3", 1), ("BOOL", 1), ("X", 4)],
)
def test_the_same_bytes_as_other_numbers(path, dtype, size):
    header, body = parts(path)
    put(path, header | {"secret": header["secret"] | {"dtype": dtype, "shape": [len(body) // size]}}, body)
    refused(lambda: Key.load(path), path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_numbers(path, value):
    values = VALUES.copy()
    values[0, 0] = value
    Key(OLD.metadata, values=values).save(path, overwrite=True)
    refused(lambda: Key.load(path), path)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_never_opened(tmp_path, protocol):
    data = pickle.dumps(Trap(tmp_path / "sprung"), protocol)
    (tmp_path / "x.key").write_bytes(data)
    refused(lambda: Key.load(tmp_path / "x.key"), tmp_path / "x.key")
    assert not (tmp_path / "sprung").exists()
    pickle.loads(data)
    assert (tmp_path / "sprung").exists()  # the trap works


def test_too_large_a_file_is_not_read(path, monkeypatch):
    size = path.stat().st_size
    monkeypatch.setattr(ringmark.watermark.keys.key, "MAX_BYTES", size)
    Key.load(path)
    monkeypatch.setattr(ringmark.watermark.keys.key, "MAX_BYTES", size - 1)
    assert refused(lambda: Key.load(path), path) == "key.too-large"


def test_nothing_large_is_allocated(path):
    header, body = parts(path)
    claims = [
        {"shape": [2**62, 2**62]},
        {"shape": [2**40]},
        {"shape": [2**40], "data_offsets": [0, 2**42]},
        {"shape": [2**64 - 1], "data_offsets": [0, 2**64 - 1]},
        {"shape": [2, 2], "data_offsets": [2**63, 2**63 + 16]},
    ]
    Key.load(path)
    tracemalloc.start()
    try:
        for claim in claims:
            put(path, header | {"secret": header["secret"] | claim}, body)
            refused(lambda: Key.load(path), path)
        with path.open("r+b") as file:
            file.truncate(1 << 32)  # sparse
        refused(lambda: Key.load(path), path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24  # what is claimed begins at 1 << 40
    finally:
        tracemalloc.stop()
        path.unlink()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_key_that_may_not_be_read(path):
    path.chmod(0)
    assert refused(lambda: Key.load(path), path) == "key.denied"


def test_reading_that_is_forbidden_is_said_to_be(path, monkeypatch):
    def forbid(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", forbid)
    assert refused(lambda: Key.load(path), path) == "key.denied"


@pytest.mark.parametrize(
    ("claim", "body"),
    [
        ({"shape": [2, 2, 1, 1, 1, 1, 1, 1, 1]}, 16),
        ({"shape": [2, 3]}, 16),
        ({"shape": []}, 4),
        ({"shape": [0], "data_offsets": [0, 0]}, 0),
        ({"shape": [True, 4]}, 16),
        ({"shape": "22"}, 16),
        ({"data_offsets": [4, 16]}, 16),
        ({"shape": [2**62, 4]}, 16),
    ],
)
def test_what_a_header_claims_is_checked_before_it_is_believed(tmp_path, monkeypatch, claim, body):
    monkeypatch.setattr(np, "frombuffer", lambda *_, **__: pytest.fail("believed"))
    monkeypatch.setattr(np, "empty", lambda *_, **__: pytest.fail("believed"))
    header = json.dumps({"values": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, body]} | claim}).encode()
    (tmp_path / "x.key").write_bytes(len(header).to_bytes(8, "little") + header + bytes(body))
    assert refused(lambda: Key.load(tmp_path / "x.key"), tmp_path / "x.key") == "key.damaged"


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_file_is_refused_or_still_the_same_key(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    path = folder / "x.key"
    key = data.draw(st.sampled_from([KEY, OLD]))
    key.save(path, overwrite=True)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, 700) | st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(content)
    try:
        assert Key.load(path).fingerprint == key.fingerprint
    except KeyFileError as error:
        assert "\n" not in str(error)


@pytest.mark.skipif(os.name != "posix", reason="files have no modes")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o602, 0o666])
def test_a_key_that_others_may_read_is_refused_unless_told(path, mode, monkeypatch):
    path.chmod(mode)
    assert refused(lambda: Key.load(path), path) == "key.readable"
    monkeypatch.setenv(READABLE, "1")
    assert Key.load(path).fingerprint == KEY.fingerprint
    monkeypatch.setenv(READABLE, "")
    assert refused(lambda: Key.load(path), path) == "key.readable"
    path.chmod(0o400)
    assert Key.load(path).fingerprint == KEY.fingerprint


def test_a_commitment_binds_secret_and_description_but_not_the_date():
    values = VALUES.copy()
    values.flat[0] *= 1 + 1e-6
    assert KEY.commitment.startswith(KEY.fingerprint) and len(KEY.commitment) == 64
    assert Key(KEY.metadata, OTHER).commitment != KEY.commitment
    assert Key(OLD.metadata, values=values).commitment != OLD.commitment
    assert Key(KEY.metadata | {"radii": [2, 7]}, SECRET).commitment != KEY.commitment
    assert Key(KEY.metadata | {"created": "1999"}, SECRET).commitment == KEY.commitment


def test_a_name_that_is_taken_is_refused(path, tmp_path):
    refuse_key = partial(refuse_existing, error=KeyFileError, room="key")
    refuse_key(tmp_path / "new.key")
    assert refused(lambda: refuse_key(path), path) == "key.exists"
    assert refused(lambda: refuse_key(tmp_path), tmp_path) == "key.folder"
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert refused(lambda: refuse_key(tmp_path / "dangling"), tmp_path / "dangling") == "key.exists"
