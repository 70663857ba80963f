"""What is asked over HTTP, and what is answered to whom."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from serving import FLAT, KEY, MARKED, PLAIN, Known, client, service, verify
from starlette.testclient import TestClient

from ringmark.errors import ModelError, ServiceError
from ringmark.watermark.service.access import Caller
from ringmark.watermark.service.app import FORBIDDEN, make_app
from ringmark.watermark.service.fetch import Fetcher
from ringmark.watermark.service.service import Limits

CALLERS = {"yes": Caller("public-site", "verdict", None), "all": Caller("lab", "p", None), "few": Caller("few", "p", 2)}
NAME = "secret-name.png"
ROOT = Path(__file__).parents[1]
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.fixture(scope="module")
def web():
    with client() as found:
        yield found


@pytest.fixture(scope="module")
def guarded():
    with client(access=Known(**CALLERS)) as found:
        yield found


def test_verdicts(web) -> None:
    answers = [verify(web, picture).json() for picture in (MARKED, PLAIN, FLAT)]
    assert [a["verdict"] for a in answers] == ["present", "absent", "inconclusive"]
    assert answers[0]["keys"] == [KEY.fingerprint] and not answers[1]["keys"] and not answers[2]["keys"]
    assert answers[0]["sentence"] == f"carries key {KEY.fingerprint[:8]}"
    assert answers[0]["rests_on"] == {"model": "identity", "keys_tested": 1, "alpha": 1e-3, "calibration": None}


def test_the_public_sees_no_figure(web, guarded) -> None:
    for picture in (MARKED, PLAIN, FLAT):
        for response in (verify(web, picture), verify(guarded, picture, Authorization="Bearer yes")):
            assert response.json()["evidence"] is None
            assert set(response.json()["rests_on"]) == {"model", "keys_tested", "alpha", "calibration"}
            assert not re.search(r"\d\.\d|e-\d", response.text.replace("0.001", ""))


def test_the_scope_p_sees_the_evidence(guarded) -> None:
    found = verify(guarded, MARKED, Authorization="Bearer all").json()["evidence"]
    assert found["key"] == KEY.fingerprint and 0 < found["p_value"] < 1e-9 and found["log10_p"] < -9


def test_a_token_is_required_where_there_are_tokens(guarded) -> None:
    for path in ("/v1/verify", "/v1/batch", "/m/lookup"):
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            refused = guarded.post(path, files={"file": MARKED}, headers=headers)
            assert refused.status_code == 401 and refused.json()["code"] == "token.required"
            assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert guarded.get("/metrics").status_code == guarded.get("/v1/jobs/1").status_code == 401
    assert guarded.get("/healthz").status_code == guarded.get("/openapi.json").status_code == 200


def test_a_rate_is_limited(guarded) -> None:
    statuses = [verify(guarded, PLAIN, Authorization="Bearer few") for _ in range(3)]
    assert [r.status_code for r in statuses] == [200, 200, 429]
    assert statuses[2].json()["code"] == "rate.exceeded" and 1 <= int(statuses[2].headers["Retry-After"]) <= 30


def test_unreadable_pictures(web) -> None:
    codes = {b"": "image.empty", b"text": "image.unknown-format", MARKED[:-500]: "image.damaged"}
    for content, code in codes.items():
        refused = verify(web, content, NAME)
        assert (refused.status_code, refused.json()["code"]) == (422, code)
        assert NAME not in refused.text and "/" not in refused.json()["message"]


def test_malformed_requests(web) -> None:
    one = {"file": MARKED}
    assert web.post("/v1/verify").json()["code"] == "request.invalid"
    for path, field in (("/v1/verify", "file"), ("/m/lookup", "photo")):
        two = web.post(path, files=[(field, ("a.png", PLAIN)), (field, ("b.png", MARKED))])
        assert (two.status_code, two.json()["code"]) == (422, "request.invalid")
        assert two.json()["message"] == "give one picture, as a file or as a URL"
    assert web.get("/m/lookup?url=http://a.example&url=http://b.example").json()["code"] == "request.invalid"
    assert web.post("/v1/verify", files=one, data={"url": "http://example.org"}).json()["code"] == "request.invalid"
    assert web.post("/v1/verify", json={"file": "x"}).json()["code"] == "request.invalid"
    assert web.post("/v1/verify", data={"file": b"\xff\x00"}).status_code == 422
    assert web.post("/m/lookup", files=one).json()["code"] == "request.invalid"
    assert web.post("/v1/verify", content=b"--x\r\nnonsense", headers=MULTIPART).status_code in (400, 422)
    assert web.put("/v1/verify").json()["code"] == "request.method"
    assert web.get("/nothing").json()["code"] == "request.unknown"


def test_urls_and_jobs_are_refused_unless_allowed(web) -> None:
    assert web.post("/v1/verify", data={"url": "http://example.org"}).json()["code"] == "url.forbidden"
    assert web.get("/m/lookup", params={"url": "http://example.org"}).json()["code"] == "url.forbidden"
    assert web.post("/v1/batch", files=[("files", MARKED)]).json()["code"] == "service.no-jobs"


def test_a_lookup_lists_keys_as_banks(web) -> None:
    assert web.post("/m/lookup", files={"photo": MARKED}).json() == {"ringmark": [KEY.fingerprint]}
    assert web.post("/m/lookup", files={"photo": PLAIN}).json() == {"ringmark": []}


def test_a_picture_is_fetched_where_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(self, url, into, max_bytes):
        into.write({"https://example.org/a.png": MARKED}[url])

    with client(fetcher=Fetcher()) as web:
        private = web.post("/v1/verify", data={"url": "http://169.254.169.254/latest/meta-data"})
        assert (private.status_code, private.json()["code"]) == (403, "url.private")
        monkeypatch.setattr(Fetcher, "fetch", fetch)
        url = "https://example.org/a.png"
        assert web.post("/v1/verify", data={"url": url}).json()["verdict"] == "present"
        assert web.get("/m/lookup", params={"url": url}).json() == {"ringmark": [KEY.fingerprint]}


def test_only_what_cannot_be_fetched_is_a_bad_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(self, url, into, max_bytes):
        raise ServiceError("url.status", "was answered with status 404", subject="the URL")

    def scan(pictures, batch):
        raise ModelError("model.memory", "the GPU has too little free memory", subject="/secret/model")

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    whole = service(fetcher=Fetcher())
    with TestClient(make_app(whole), base_url="http://127.0.0.1", raise_server_exceptions=False) as web:
        fetched = web.post("/v1/verify", data={"url": "https://example.org"})
        whole.verifier.scan = scan
        failed = verify(web, MARKED)
    assert (fetched.status_code, fetched.json()["code"]) == (502, "url.status")
    assert failed.status_code == 500
    assert failed.json() == {"code": "model.memory", "message": "the GPU has too little free memory"}


def test_every_refusal_is_documented() -> None:
    source = "".join(path.read_text() for path in (ROOT / "watermark" / "service").glob("*.py"))
    codes = set(re.findall(r'Refusal\((?!499)(\d+), "([\w.-]+)"', source))
    codes |= {("403" if code in FORBIDDEN else "502", code) for code in re.findall(r'"(url\.[\w-]+)"', source)}
    lines = (ROOT / "docs" / "howto" / "serve.md").read_text().splitlines()
    assert len(codes) > 15
    for status, code in codes:
        assert any(line.startswith(f"| {status} |") and f"`{code}`" in line for line in lines), (status, code)


def test_large_requests_are_refused() -> None:
    with client(limits=Limits(max_bytes=1000)) as web:
        assert verify(web, MARKED).status_code == 413
        assert verify(web, b"x" * 70_000).json()["code"] == "request.too-large"
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        of_unknown_length = web.post("/v1/verify", content=iter([head, *[b"x" * 1000] * 100]), headers=MULTIPART)
        assert of_unknown_length.json()["code"] == "request.too-large"


def test_only_localhost_is_answered_without_tokens(web, guarded) -> None:
    for host in ("evil.example", "[", "[evil", "[x]:1", "::1", ""):
        refused = web.get("/v1/jobs/1", headers={"Host": host})
        assert (refused.status_code, refused.json()["code"]) == (400, "request.host"), host
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert web.get("/v1/jobs/1", headers={"Host": host}).json()["code"] == "job.unknown"
    there = {"Host": "ringmark.example", "Authorization": "Bearer all"}
    assert guarded.get("/v1/jobs/1", headers=there).json()["code"] == "job.unknown"


class Held:
    """Holds the compute thread up until it is let go."""

    def __init__(self, verifier) -> None:
        self.go, self.started, self.scan = threading.Event(), threading.Event(), verifier.scan
        self.names: list[str] = []
        verifier.scan = self

    def __call__(self, pictures, batch):
        self.names += [views[0].id for views in pictures]
        if self.names[-1] != "noise":
            self.started.set()
            self.go.wait(30)
        return self.scan(pictures, batch)


def test_the_queue_is_bounded_and_a_deadline_is_kept() -> None:
    made = service(limits=Limits(waiting=2, deadline=0.5, batch=1))
    held = Held(made.verifier)
    with TestClient(make_app(made), base_url="http://127.0.0.1") as web, ThreadPoolExecutor() as pool:
        made.batcher.seconds = 0.0  # as if pictures took no time, so that only their number is bounded
        first = [pool.submit(verify, web, MARKED) for _ in range(2)]
        held.started.wait(30)
        until = time.monotonic() + 30
        while made.waiting < 2 and time.monotonic() < until:
            time.sleep(0.001)
        busy = verify(web, MARKED)
        assert (busy.status_code, busy.json()["code"]) == (429, "service.busy") and int(busy.headers["Retry-After"])
        late = [future.result() for future in first]
        assert {(r.status_code, r.json()["code"]) for r in late} == {(504, "service.late")}
        held.go.set()
        assert made.waiting == 0
        assert verify(web, MARKED).json()["verdict"] == "present"
    assert held.names == ["noise", "picture", "picture"], "one was in work, and the one behind it was skipped"


def test_the_work_of_a_client_that_leaves_is_skipped(tmp_path: Path) -> None:
    made = service(limits=Limits(batch=1))
    held = Held(made.verifier)
    picture = tmp_path / "picture.png"
    picture.write_bytes(MARKED)

    async def leave() -> None:
        async with made.run():
            first = asyncio.ensure_future(made.judge(picture, partial(asyncio.sleep, 30)))
            await asyncio.to_thread(held.started.wait, 30)
            gone = asyncio.Event()
            second = asyncio.ensure_future(made.judge(picture, gone.wait))
            await asyncio.sleep(0.05)
            gone.set()
            with pytest.raises(Exception) as refusal:
                await second
            assert refusal.value.code == "request.left"
            held.go.set()
            assert (await first).verdict == "present"

    asyncio.run(leave())
    assert held.names == ["noise", "picture"]


def test_an_unexpected_error_says_nothing() -> None:
    made = service()
    made.verifier.sizes_of = lambda size: 1 / 0
    with TestClient(make_app(made), base_url="http://127.0.0.1", raise_server_exceptions=False) as web:
        failed = verify(web, MARKED)
    assert failed.status_code == 500
    assert failed.json() == {"code": "service.failed", "message": "the request failed"}


def test_the_log_names_no_picture_no_token_and_no_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "ringmark")
    with client(access=Known(**CALLERS)) as web:
        verify(web, MARKED, NAME, Authorization="Bearer all")
        verify(web, MARKED[:-500], NAME, Authorization="Bearer all")
        verify(web, MARKED, NAME, Authorization="Bearer wrong")
        web.get(f"/v1/jobs/{NAME}?x={NAME}", headers={"Authorization": "Bearer all"})
        web.get("/m/lookup", params={"url": f"http://example.org/{NAME}"}, headers={"Authorization": "Bearer all"})
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("ringmark.watermark.service")]
    assert len([line for line in lines if line.startswith(("POST", "GET"))]) == 5
    for secret in (NAME, "Bearer", "wrong", KEY.secret.hex()):
        assert not [line for line in lines if secret in line]


def test_metrics(web) -> None:
    before = web.get("/metrics").text
    verify(web, MARKED)
    verify(web, b"text")
    after = web.get("/metrics").text

    def count(text: str, name: str) -> float:
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)

    for name in (
        'ringmark_verdicts_total{verdict="present"}',
        'ringmark_unreadable_total{code="image.unknown-format"}',
        'ringmark_requests_total{method="POST",route="/v1/verify",status="200"}',
        "ringmark_batch_pictures_count",
    ):
        assert count(after, name) == count(before, name) + 1, name
    assert count(after, "ringmark_pictures_waiting") == 0


def test_the_description_has_examples(web) -> None:
    found = web.get("/openapi.json").json()
    assert set(found["paths"]) == {"/healthz", "/metrics", "/v1/verify", "/v1/batch", "/v1/jobs/{id}", "/m/lookup"}
    for name in ("Answer", "Problem", "Job", "Created", "Evidence"):
        assert found["components"]["schemas"][name]["example"], name
    assert "429" in found["paths"]["/v1/verify"]["post"]["responses"]
    assert json.dumps(found).count("HTTPValidationError") == 0


def test_every_answer_has_the_headers_that_keep_it_safe(web) -> None:
    for response in (web.get("/"), web.get("/nothing"), verify(web, MARKED), verify(web, b"")):
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Cache-Control"] == "no-store"


def test_requests_leave_nothing_behind(monkeypatch):
    """Once everything is loaded and all pools are full, the number of objects stays the same, where a leak goes on."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # pytest keeps what is logged
    with client() as web:

        def objects_after(requests: int) -> int:
            for _ in range(requests):
                for picture in (MARKED, PLAIN, b"broken"):
                    verify(web, picture)
            gc.collect()
            return len(gc.get_objects())

        counts = [objects_after(10)]
        while len(counts) < 15:
            counts.append(objects_after(10))
            if counts[-1] - counts[-2] < 30:
                return
        pytest.fail(f"objects after each ten requests: {counts}")
