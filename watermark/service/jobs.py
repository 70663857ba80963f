"""Batches of pictures that outlive the process: an SQLite database, and a file for each picture until it is judged."""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from ringmark.errors import ServiceError
from ringmark.watermark.service.access import Caller
from ringmark.watermark.service.answers import Answer, Item, Job, Problem, for_public

__all__ = ["Jobs", "Picture", "Source", "Webhook"]

KEEP = timedelta(days=7)
RETRIES = (10, 60, 600, 3600)  # seconds between the attempts to call a webhook
SCHEMA = """
CREATE TABLE IF NOT EXISTS job (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created TEXT NOT NULL, done TEXT,
    webhook TEXT, attempts INTEGER NOT NULL DEFAULT 0, due TEXT
);
CREATE TABLE IF NOT EXISTS picture (
    job TEXT NOT NULL REFERENCES job ON DELETE CASCADE, number INTEGER NOT NULL, name TEXT NOT NULL,
    url TEXT, answer TEXT, problem TEXT, PRIMARY KEY (job, number)
);
CREATE INDEX IF NOT EXISTS waiting ON picture (job) WHERE answer IS NULL AND problem IS NULL;
"""
WAITING = "answer IS NULL AND problem IS NULL"


class Source(NamedTuple):
    """A picture of a new job: its name, and either its file or the URL to fetch it from."""

    name: str
    file: BinaryIO | None = None
    url: str | None = None


class Picture(NamedTuple):
    """A picture that waits: its job and number there, and the URL to fetch it from, if it has no file."""

    job: str
    number: int
    url: str | None


class Webhook(NamedTuple):
    """A finished job whose webhook is due, and the number of attempts so far."""

    job: str
    url: str
    attempts: int


class Jobs:
    """Jobs in a folder that one service uses at a time.

    Each method is one transaction, so a killed process loses no job; a picture is judged again if its answer had not
    been written. A new job removes those that were done more than KEEP ago. Raises ServiceError if the folder is in use
    (jobs.locked) or cannot be used (jobs.unusable).
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._guard = folder, threading.Lock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock", timeout=0, thread_local=False)
            self._lock.acquire()
            os.close(os.open(folder / "jobs.sqlite", os.O_CREAT | os.O_RDWR, 0o600))
            self._database = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False)
            self._database.execute("PRAGMA foreign_keys = ON")
            self._database.execute("PRAGMA secure_delete = ON")
            self._database.executescript(SCHEMA)
            self._remove_leftovers()
        except Timeout:
            raise ServiceError("jobs.locked", "is in use by another service", subject=folder) from None
        except (OSError, sqlite3.Error) as error:
            raise ServiceError("jobs.unusable", f"cannot be used for jobs ({error})", subject=folder) from error

    def close(self) -> None:
        """Close the database and let another service use the folder."""
        with self._guard:
            self._database.close()
            self._lock.release()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._guard, self._database:
            yield self._database

    def add(self, caller: Caller, sources: Sequence[Source], webhook: str | None) -> str:
        """Store a new job and its pictures, and return its id, which cannot be guessed."""
        job = secrets.token_hex(16)
        folder = self.folder / job
        folder.mkdir(mode=0o700)
        try:
            for number, source in enumerate(sources):
                if source.file:
                    _store(source.file, folder / str(number))
            with self._transaction() as database:
                database.execute("DELETE FROM job WHERE done < ?", (_now(-KEEP),))
                database.execute(
                    "INSERT INTO job (id, owner, created, webhook) VALUES (?, ?, ?, ?)",
                    (job, caller.name, _now(), webhook),
                )
                rows = [(job, number, source.name, source.url) for number, source in enumerate(sources)]
                database.executemany("INSERT INTO picture (job, number, name, url) VALUES (?, ?, ?, ?)", rows)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return job

    def file(self, picture: Picture) -> Path:
        """Where the file of a picture lies, or where to put it once fetched."""
        return self.folder / picture.job / str(picture.number)

    def waiting(self, number: int) -> list[Picture]:
        """At most `number` pictures that wait, the oldest jobs first."""
        with self._transaction() as database:
            rows = database.execute(
                f"SELECT job, number, url FROM picture JOIN job ON job.id = job WHERE {WAITING} "
                "ORDER BY created, job, number LIMIT ?",
                (number,),
            )
            return [Picture(*row) for row in rows]

    def count(self) -> int:
        """The number of pictures that wait."""
        with self._transaction() as database:
            [(number,)] = database.execute(f"SELECT count(*) FROM picture WHERE {WAITING}")
            return int(number)

    def finish(self, picture: Picture, found: Answer | Problem) -> None:
        """Record the answer or the problem of a picture, and delete its file; the job is done with its last one."""
        column = "answer" if isinstance(found, Answer) else "problem"
        with self._transaction() as database:
            database.execute(
                f"UPDATE picture SET {column} = ? WHERE job = ? AND number = ?",
                (found.model_dump_json(), picture.job, picture.number),
            )
            done = database.execute(
                "UPDATE job SET done = ?, due = ? WHERE id = ? AND NOT EXISTS "
                f"(SELECT 1 FROM picture WHERE job = id AND {WAITING})",
                (_now(), _now(), picture.job),
            )
        self.file(picture).unlink(missing_ok=True)
        if done.rowcount:
            shutil.rmtree(self.folder / picture.job, ignore_errors=True)

    def job(self, id: str, caller: Caller) -> Job | None:
        """The caller's job of this id, with evidence if the caller's scope is p; None if there is none."""
        with self._transaction() as database:
            found = database.execute("SELECT created, done FROM job WHERE id = ? AND owner = ?", (id, caller.name))
            row = found.fetchone()
            rows = database.execute("SELECT name, answer, problem FROM picture WHERE job = ? ORDER BY number", (id,))
            pictures = rows.fetchall()
        if not row:
            return None
        items = [_item(*picture, caller=caller) for picture in pictures]
        return Job(id=id, state="done" if row[1] else "working", created=row[0], pictures=items)

    def webhooks(self) -> list[Webhook]:
        """The webhooks that are due."""
        with self._transaction() as database:
            rows = database.execute(
                "SELECT id, webhook, attempts FROM job WHERE webhook IS NOT NULL AND due <= ? ORDER BY due", (_now(),)
            )
            return [Webhook(*row) for row in rows]

    def called(self, webhook: Webhook, *, success: bool) -> None:
        """Record an attempt to call a webhook; the next one, if any, is due later each time."""
        retry = not success and webhook.attempts < len(RETRIES)
        due = _now(timedelta(seconds=RETRIES[webhook.attempts])) if retry else None
        with self._transaction() as database:
            database.execute(
                "UPDATE job SET attempts = ?, due = ? WHERE id = ?", (webhook.attempts + 1, due, webhook.job)
            )

    def _remove_leftovers(self) -> None:
        """Remove pictures that a killed process left behind: those of no job, and of jobs that are done."""
        with self._transaction() as database:
            working = {row[0] for row in database.execute("SELECT id FROM job WHERE done IS NULL")}
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder.name not in working:
                shutil.rmtree(folder, ignore_errors=True)


def _store(file: BinaryIO, path: Path) -> None:
    file.seek(0)
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as stored:
        shutil.copyfileobj(file, stored)
        stored.flush()
        os.fsync(stored.fileno())


def _item(name: str, answer: str | None, problem: str | None, *, caller: Caller) -> Item:
    whole = Answer.model_validate_json(answer) if answer else None
    shown = for_public(whole) if whole and caller.scope != "p" else whole
    return Item(name=name, answer=shown, problem=Problem.model_validate_json(problem) if problem else None)


def _now(later: timedelta = timedelta()) -> str:
    return (datetime.now(timezone.utc) + later).strftime("%Y-%m-%dT%H:%M:%SZ")
