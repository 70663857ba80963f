"""`ringmark serve` and `ringmark token`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from serving import KEY
from shell import pictures, refused, run

from ringmark.watermark.service import installed
from ringmark.watermark.service.access import Access, load_tokens


def test_token_prints_a_token_once(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    text = run("token", "alice", "--tokens", path, "--scope", "p", "--per-minute", 60).stdout.strip()
    caller = Access(load_tokens(path)).caller(f"Bearer {text}")
    assert caller == ("alice", "p", 60) and text not in path.read_text()
    assert "--revoke" in refused("token", "alice", "--tokens", path)
    run("token", "alice", "--tokens", path, "--revoke")
    assert load_tokens(path) == []


def test_what_serve_refuses(tmp_path: Path) -> None:
    KEY.save(tmp_path / "my.key")
    key = ("--key", tmp_path / "my.key")
    assert "ringmark token" in refused("serve", *key, "--host", "0.0.0.0", "--port", 0)
    assert "ringmark token" in refused("serve", *key, "--tokens", tmp_path / "none.json")
    assert "--host" in refused("serve", *key, "--host", "192.0.2.1", "--port", 0, "--tokens", tokens(tmp_path))
    assert "no such file" in refused("serve", "--key", tmp_path / "none.key", "--port", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "--port" in refused("serve", *key, "--port", taken.getsockname()[1])
    (tmp_path / "open.key").write_bytes((tmp_path / "my.key").read_bytes())
    (tmp_path / "open.key").chmod(0o644)
    assert "chmod 600" in refused("serve", "--key", tmp_path / "open.key", "--port", 0)
    tokens(tmp_path).chmod(0o644)
    assert "chmod 600" in refused("serve", *key, "--tokens", tmp_path / "tokens.json")


def tokens(folder: Path) -> Path:
    path = folder / "tokens.json"
    if not path.exists():
        run("token", "alice", "--tokens", path)
    return path


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert 'pip install "ringmark[serve]"' in refused("serve", "--key", "my.key")


@contextmanager
def served(*args: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service in a process of its own, and its address."""
    command = [sys.executable, "-m", "ringmark.watermark.cli", "serve", "--port", "0", *map(str, args)]
    # A shell that started the tests in the background may have made its children ignore SIGINT.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL) if os.name == "posix" else None
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    try:
        assert process.stderr
        yield process, process.stderr.readline().split()[0]
    finally:
        process.kill()
        process.communicate()


def posted(url: str, name: str, *files: Path) -> dict:
    """The answer to an upload, with the standard library."""
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="%s"; filename="a.png"\r\n\r\n%s\r\n'
        % (name.encode(), file.read_bytes())
        for file in files
    ]
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(url, b"".join(parts) + b"--x--\r\n", headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_sigterm_loses_no_job(house: Path, tmp_path: Path) -> None:
    marked, plain = pictures(house, "marked")[0], pictures(house, "unmarked")[0]
    options = ("--key", house / "my.key", "--steps", 4, "--jobs", tmp_path / "jobs", "--batch", 2)
    with served(*options) as (process, address):
        assert posted(f"{address}/v1/verify", "file", marked)["verdict"] == "present"
        job = posted(f"{address}/v1/batch", "files", *[marked, plain] * 5)["id"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    with served(*options) as (process, address):
        until = time.monotonic() + 120
        found: dict = {}
        while found.get("state") != "done" and time.monotonic() < until:
            with urllib.request.urlopen(f"{address}/v1/jobs/{job}", timeout=60) as response:
                found = json.load(response)
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert [p["answer"]["verdict"] for p in found["pictures"]] == ["present", "absent"] * 5


@pytest.mark.slow
def test_hostile_senders(house: Path) -> None:
    """Slow, endless, cut off and nonsensical requests end, and others are answered meanwhile."""
    with served("--key", house / "my.key", "--steps", 4, "--max-mb", 1) as (_, address):
        host, port = address.removeprefix("http://").split(":")

        def sent(head: bytes, *, body: bytes = b"", cut: bool = False) -> bytes:
            with socket.create_connection((host, int(port)), 60) as connection:
                try:
                    connection.sendall(head + body)
                    return b"" if cut else connection.recv(100)
                except ConnectionError:  # it closed before it had read everything
                    return b" 413 "

        multipart = b"POST /v1/verify HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        slow_head = socket.create_connection((host, int(port)), 60)
        slow_head.sendall(b"GET /healthz HTTP/1.1\r\nHost:")
        slow_body = socket.create_connection((host, int(port)), 60)
        slow_body.sendall(multipart + b"Content-Length: 1000\r\n\r\n--x")
        assert b" 400 " in sent(b"nonsense\r\n\r\n")
        assert b" 413 " in sent(multipart + b"Content-Length: 99999999999\r\n\r\n")
        start = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        chunks = b"%x\r\n%s\r\n" % (len(start), start) + (b"10000\r\n" + b"x" * 0x10000 + b"\r\n") * 200
        assert b" 413 " in sent(multipart + b"Transfer-Encoding: chunked\r\n\r\n", body=chunks)
        sent(multipart + b"Content-Length: 1000\r\n\r\n--x\r\nContent-Disp", cut=True)
        assert posted(f"{address}/v1/verify", "file", pictures(house, "marked")[0])["verdict"] == "present"
        assert slow_head.recv(100) == b"", "closed"
        assert b" 408 " in slow_body.recv(100)
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(urllib.request.Request(f"{address}/v1/verify", b"x"), timeout=60)
        assert refusal.value.code == 422
        with urllib.request.urlopen(f"{address}/metrics", timeout=60) as response:
            metrics = response.read().decode()
        assert 'route="/v1/verify",status="413"' in metrics and 'status="5' not in metrics
