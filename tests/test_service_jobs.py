"""Jobs outlive the process that took them."""

from __future__ import annotations

import asyncio
import io
import sqlite3
import stat
import threading
import time
from pathlib import Path

import pytest
from serving import FLAT, MARKED, PLAIN, client

from ringmark.errors import ServiceError
from ringmark.watermark.service import jobs as module
from ringmark.watermark.service.access import PUBLIC, Caller
from ringmark.watermark.service.answers import Problem
from ringmark.watermark.service.fetch import Fetcher
from ringmark.watermark.service.jobs import Jobs, Picture, Source
from ringmark.watermark.service.service import Limits

PROBLEM = Problem(code="image.damaged", message="is damaged")


def sources(*contents: bytes) -> list[Source]:
    return [Source(name=f"{i}.png", file=io.BytesIO(content)) for i, content in enumerate(contents)]


def finished(client, id: str, **headers: str) -> dict:
    """The job once it is done."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        job = client.get(f"/v1/jobs/{id}", headers=headers).json()
        if job["state"] == "done":
            return job
        time.sleep(0.01)
    raise AssertionError("the job is not done")


def test_a_job_is_kept_until_its_last_picture_is_done(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path / "jobs")
    id = jobs.add(PUBLIC, sources(b"a", b"b"), None)
    assert stat.S_IMODE((tmp_path / "jobs").stat().st_mode) == 0o700
    first, second = jobs.waiting(8)
    assert (first, second) == (Picture(id, 0, None), Picture(id, 1, None)) and jobs.count() == 2
    assert jobs.file(first).read_bytes() == b"a" and stat.S_IMODE(jobs.file(first).stat().st_mode) == 0o600
    jobs.finish(first, PROBLEM)
    found = jobs.job(id, PUBLIC)
    assert found and found.state == "working" and [p.problem for p in found.pictures] == [PROBLEM, None]
    assert not jobs.file(first).exists() and jobs.file(second).exists()
    jobs.finish(second, PROBLEM)
    found = jobs.job(id, PUBLIC)
    assert found and found.state == "done" and not (tmp_path / "jobs" / id).exists()
    jobs.close()


def test_a_job_survives_the_process_and_what_it_left_behind_does_not(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    id = jobs.add(PUBLIC, sources(b"a", b"b"), None)
    jobs.finish(jobs.waiting(1)[0], PROBLEM)
    (tmp_path / "unknown").mkdir()
    jobs.close()
    again = Jobs(tmp_path)
    assert again.waiting(8) == [Picture(id, 1, None)] and again.file(Picture(id, 1, None)).read_bytes() == b"b"
    assert not (tmp_path / "unknown").exists()
    again.close()


def test_a_job_belongs_to_its_token(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    id = jobs.add(Caller("alice", "p", 60), sources(b"a"), None)
    assert jobs.job(id, Caller("alice", "verdict", 60)) and not jobs.job(id, Caller("bob", "p", 60))
    assert not jobs.job("0" * 32, PUBLIC)
    jobs.close()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    with pytest.raises(ServiceError) as error:
        Jobs(tmp_path)
    assert error.value.code == "jobs.locked"
    jobs.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError) as error:
        Jobs(tmp_path / "file")
    assert error.value.code == "jobs.unusable"
    (tmp_path / "jobs.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(ServiceError) as error:
        Jobs(tmp_path)
    assert error.value.code == "jobs.unusable"


def test_old_jobs_are_removed(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    old = jobs.add(PUBLIC, sources(b"a"), None)
    jobs.finish(jobs.waiting(1)[0], PROBLEM)
    with sqlite3.connect(tmp_path / "jobs.sqlite") as database:
        database.execute("UPDATE job SET done = '2020-01-01T00:00:00Z'")
    database.close()
    new = jobs.add(PUBLIC, sources(b"a"), None)
    assert not jobs.job(old, PUBLIC) and jobs.job(new, PUBLIC)
    jobs.close()


def test_a_webhook_is_tried_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRIES", (0, 0))
    jobs = Jobs(tmp_path)
    id = jobs.add(PUBLIC, sources(b"a"), "http://example.org/hook")
    assert jobs.webhooks() == [], "not before the job is done"
    jobs.finish(jobs.waiting(1)[0], PROBLEM)
    for attempts in range(3):
        [webhook] = jobs.webhooks()
        assert (webhook.job, webhook.attempts) == (id, attempts)
        jobs.called(webhook, success=False)
    assert jobs.webhooks() == [], "given up"
    jobs.close()


def test_a_batch_is_judged_and_its_webhook_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bytes]] = []

    async def post(self: Fetcher, url: str, body: bytes) -> None:
        calls.append((url, body))

    monkeypatch.setattr(Fetcher, "post", post)
    with client(jobs=Jobs(tmp_path), fetcher=Fetcher()) as web:
        files = [("files", (f"{i}.png", content)) for i, content in enumerate([MARKED, PLAIN, FLAT, b"nothing"])]
        data = {"webhook": "https://example.org/hook", "urls": ["http://127.0.0.1/secret"]}
        assert web.post("/v1/batch", files=files, data={"webhook": "file:///x"}).json()["code"] == "url.scheme"
        created = web.post("/v1/batch", files=files, data=data)
        assert created.status_code == 202 and created.json()["pictures"] == 5
        job = finished(web, created.json()["id"])
        until = time.monotonic() + 30
        while not calls and time.monotonic() < until:
            time.sleep(0.01)
    verdicts = [p["answer"] and p["answer"]["verdict"] for p in job["pictures"]]
    assert verdicts == ["present", "absent", "inconclusive", None, None]
    assert [p["problem"]["code"] for p in job["pictures"][3:]] == ["image.unknown-format", "url.private"]
    assert [p["name"] for p in job["pictures"][:4]] == [f"{i}.png" for i in range(4)]
    assert all(p["answer"] is None or p["answer"]["evidence"] is None for p in job["pictures"])
    assert calls == [("https://example.org/hook", b'{"id": "%s", "state": "done"}' % job["id"].encode())]
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["jobs.sqlite"]


def due(jobs: Jobs, number: int) -> None:
    """Jobs that are done, whose webhooks are not called yet."""
    for _ in range(number):
        jobs.add(PUBLIC, sources(b"a"), "https://example.org/hook")
        jobs.finish(jobs.waiting(1)[0], PROBLEM)


def test_a_service_that_stops_calls_no_further_webhook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = threading.Semaphore(0)

    async def slow(self: Fetcher, url: str, body: bytes) -> None:
        calls.release()
        await asyncio.sleep(0.2)

    monkeypatch.setattr(Fetcher, "post", slow)
    monkeypatch.setattr("ringmark.watermark.service.service.CALLS", 2)
    jobs = Jobs(tmp_path)
    due(jobs, 20)
    with client(jobs=jobs, fetcher=Fetcher()):
        assert calls.acquire(timeout=30)
    jobs = Jobs(tmp_path)
    assert len(jobs.webhooks()) >= 16, "they wait for the next start"
    jobs.close()


def test_a_slow_webhook_holds_no_other_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bytes] = []
    others = asyncio.Event()

    async def post(self: Fetcher, url: str, body: bytes) -> None:
        called.append(body)
        if len(called) == 1:
            await asyncio.wait_for(others.wait(), 30)
        others.set()

    monkeypatch.setattr(Fetcher, "post", post)
    jobs = Jobs(tmp_path)
    due(jobs, 2)
    with client(jobs=jobs, fetcher=Fetcher()):
        until = time.monotonic() + 10
        while len(called) < 2 and time.monotonic() < until:
            time.sleep(0.01)
    assert len(set(called)) == 2


def test_the_pictures_of_jobs_are_bounded(tmp_path: Path) -> None:
    with client(jobs=Jobs(tmp_path), limits=Limits(job_pictures=3, waiting_in_jobs=2)) as web:
        sent = [web.post("/v1/batch", files=[("files", MARKED)] * number) for number in (0, 4, 3)]
        assert [r.json()["code"] for r in sent] == ["request.invalid", "request.invalid", "service.busy"]
        assert sent[2].status_code == 429 and sent[2].headers["Retry-After"] == "60"
        assert web.post("/v1/batch", files=[("files", MARKED)] * 2).status_code == 202


def test_a_restarted_service_goes_on(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    id = jobs.add(PUBLIC, sources(*[MARKED] * 20), None)
    jobs.close()
    with client(jobs=Jobs(tmp_path)) as web:  # ends at once, after the batch in work
        assert web.get("/healthz").status_code == 200
    with client(jobs=Jobs(tmp_path)) as web:
        job = finished(web, id)
    assert [p["answer"]["verdict"] for p in job["pictures"]] == ["present"] * 20


@pytest.mark.parametrize("method", ["waiting", "finish", "webhooks"])
def test_a_failure_of_the_database_is_logged_and_work_goes_on(tmp_path, monkeypatch, caplog, method: str) -> None:
    failures = [sqlite3.OperationalError("database or disk is full")]

    def failing(self: Jobs, *args: object) -> object:
        if failures:
            raise failures.pop()
        return whole(self, *args)

    whole = getattr(Jobs, method)
    monkeypatch.setattr(Jobs, method, failing)
    monkeypatch.setattr("ringmark.watermark.service.service.IDLE_SECONDS", 0.01)
    with client(jobs=Jobs(tmp_path), fetcher=Fetcher()) as web:
        id = web.post("/v1/batch", files=[("files", MARKED), ("files", PLAIN)]).json()["id"]
        job = finished(web, id)
    assert [p["answer"]["verdict"] for p in job["pictures"]] == ["present", "absent"]
    assert not failures and "for the moment" in caplog.text and "disk is full" in caplog.text
