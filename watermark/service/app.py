"""The routes: what is asked over HTTP, handed to a `Service`."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Depends, FastAPI, File, Form, Query, Request, Response, Security, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from ringmark.errors import ImageError, RingmarkError, ServiceError
from ringmark.watermark.service.access import Caller
from ringmark.watermark.service.answers import Answer, Created, Job, Problem, Refusal, for_public
from ringmark.watermark.service.fetch import checked_url
from ringmark.watermark.service.gate import Gate
from ringmark.watermark.service.jobs import Source
from ringmark.watermark.service.metrics import CONTENT_TYPE_LATEST
from ringmark.watermark.service.service import Service

__all__ = ["make_app"]

ABOUT = """
Tells whether pictures carry the keys of this service. A verdict is "present", "absent" or "inconclusive"; with a token
of the scope p, the answer also holds the p-value and what it rests on. "present" does not prove who made a picture, nor
that it is unmodified; "absent" does not prove that no model made it.
"""
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
NAMES = {400: "malformed", 404: "unknown", 405: "method", 408: "slow", 413: "too-large"}
FORBIDDEN = ("url.forbidden", "url.private", "url.scheme")
PICTURE = ("file", "photo", "url")  # names of the fields that hold the one picture of a request
MAX_NAME = 200  # characters of the name of a picture
MINUTE = 60
SIGNAL = "ringmark"  # the signal type that lookups answer for


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The statuses with which a route can refuse, for the description."""
    return {status: {"model": Problem} for status in statuses}


def the_service(request: Request) -> Service:
    """The service that this application is a shell around."""
    service: Service = request.app.state.service
    return service


def the_caller(request: Request) -> Caller:
    """The caller, as the gate has identified it."""
    caller: Caller = request.state.caller
    return caller


Served = Annotated[Service, Depends(the_service)]
Called = Annotated[Caller, Depends(the_caller)]
OptionalFile = Annotated[UploadFile | None, File(description="The picture.")]
Url = Annotated[str, Field(max_length=2048)]
OptionalUrl = Annotated[Url | None, Form(description="Where to fetch it, if the service allows URLs.")]

pages = APIRouter(include_in_schema=False)
health = APIRouter(tags=["operation"])
api = APIRouter(
    dependencies=[Security(HTTPBearer(auto_error=False, description="A token, if the service requires one."))],
    responses=problems(400, 401, 408, 413, 422, 429, 500),
)


@pages.get("/")
@pages.get("/page.js")
@pages.get("/page.css")
@pages.get("/icon.svg")
async def page(request: Request) -> Response:
    """The page for people, and what it needs."""
    name, media_type = PAGE[request.url.path]
    return Response((files(__package__) / "page" / name).read_bytes(), media_type=media_type)


@health.get("/healthz")
async def healthz() -> dict[str, str]:
    """Answers as soon as the model is loaded."""
    return {"status": "ok"}


@api.get("/metrics", tags=["operation"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: Served) -> Response:
    """Metrics for Prometheus."""
    text = await asyncio.to_thread(service.metrics.text)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@api.post("/v1/verify", tags=["verdicts"], responses=problems(403, 502, 504))
async def verify(
    request: Request, service: Served, caller: Called, file: OptionalFile = None, url: OptionalUrl = None
) -> Answer:
    """Tell whether a picture carries a key. Give the picture as a file or, if the service allows it, as a URL."""
    return await judged(request, service, caller, file, url)


@api.post("/v1/batch", status_code=202, tags=["verdicts"], responses=problems(403))
async def batch(
    service: Served,
    caller: Called,
    files: Annotated[list[UploadFile], File(description="Pictures.")] = [],  # noqa: B006  FastAPI copies it
    urls: Annotated[list[Url], Form(description="Where to fetch more.")] = [],  # noqa: B006
    webhook: Annotated[Url | None, Form(description="Called once all are judged.")] = None,
) -> Created:
    """Judge many pictures in the background: a job, which survives a restart of the service.

    Fetch its verdicts from /v1/jobs. The webhook is sent a POST request with the job's id and nothing else, at most
    five times, until it answers with a status of 2xx.
    """
    if service.jobs is None:
        raise Refusal(403, "service.no-jobs", "this service takes no jobs")
    if (urls or webhook) and not service.fetcher:
        raise Refusal(403, "url.forbidden", "this service does not open URLs")
    sources = [Source(name=(file.filename or "")[:MAX_NAME], file=await checked(service, file)) for file in files]
    sources += [Source(name=url, url=checked_url(url)) for url in urls]
    if not 0 < len(sources) <= service.limits.job_pictures:
        fact = f"a job has 1 to {service.limits.job_pictures} pictures, not {len(sources)}"
        raise Refusal(422, "request.invalid", fact)
    if await asyncio.to_thread(service.jobs.count) + len(sources) > service.limits.waiting_in_jobs:
        raise Refusal(429, "service.busy", "too many pictures of jobs are waiting", MINUTE)
    service.charge(caller, len(sources) - 1)  # the request has been counted as one
    id = await asyncio.to_thread(service.jobs.add, caller, sources, webhook and checked_url(webhook))
    service.has_work()
    return Created(id=id, pictures=len(sources))


@api.get("/v1/jobs/{id}", tags=["verdicts"], responses=problems(404))
async def job(service: Served, caller: Called, id: str) -> Job:
    """A job of this token, and what is known about its pictures so far."""
    found = await asyncio.to_thread(service.jobs.job, id, caller) if service.jobs else None
    if found is None:
        raise Refusal(404, "job.unknown", "there is no such job")
    return found


@api.post("/m/lookup", tags=["hasher-matcher-actioner"], responses=problems(403, 504))
async def lookup(
    request: Request, service: Served, caller: Called, photo: Annotated[UploadFile, File(description="The picture.")]
) -> dict[str, list[str]]:
    """The keys that a picture carries, in the form in which hasher-matcher-actioner lists matching banks."""
    found = await judged(request, service, caller, photo, None)
    return {SIGNAL: found.keys}


@api.get("/m/lookup", tags=["hasher-matcher-actioner"], responses=problems(403, 502, 504))
async def lookup_url(
    request: Request,
    service: Served,
    caller: Called,
    url: Annotated[Url, Query(description="Where to fetch the picture.")],
) -> dict[str, list[str]]:
    """The same for a picture to fetch."""
    found = await judged(request, service, caller, None, url)
    return {SIGNAL: found.keys}


async def judged(
    request: Request, service: Service, caller: Caller, file: UploadFile | None, url: str | None
) -> Answer:
    """The answer to a request, as much of it as the caller may see."""
    fields = (await request.form(), request.query_params)
    several = any(len(each.getlist(name)) > 1 for each in fields for name in PICTURE)
    if several or (file is None) == (url is None):
        raise Refusal(422, "request.invalid", "give one picture, as a file or as a URL")
    with tempfile.NamedTemporaryFile(dir=service.folder) as copy:  # the reader of files takes a path
        path = Path(copy.name)
        if file is not None:
            await asyncio.to_thread(shutil.copyfileobj, await checked(service, file), copy)
            copy.flush()
        elif url is not None:
            await service.fetch(url, path)
        found = await service.judge(path, partial(left, request))
    return found if caller.scope == "p" else for_public(found)


async def left(request: Request) -> None:
    """Wait until the client has left; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def checked(service: Service, file: UploadFile) -> BinaryIO:
    """An upload as a file. Raises Refusal if it is too large."""
    if (file.size or 0) > service.limits.max_bytes:
        raise Refusal(413, "image.too-large", f"a picture has more than {service.limits.max_bytes >> 20} MB")
    await file.seek(0)
    return file.file


# -- errors -----------------------------------------------------------------------------------------------------------


def refused(request: Request, error: Exception) -> Response:
    """An error as a Problem: ours by its code, and any other by its status or, if it is unexpected, without detail.

    Of the ServiceErrors, only those of fetching a picture are raised while the service runs.
    """
    status, code, message, headers = 500, "service.failed", "the request failed", None
    if isinstance(error, HTTPException):
        status, message, headers = error.status_code, error.detail, error.headers
        code = error.code if isinstance(error, Refusal) else f"request.{NAMES.get(status, 'refused')}"
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]  # not its input, which is part of the request
        where = ".".join(map(str, first["loc"]))
        status, code, message = 422, "request.invalid", f"{where}: {first['msg']}"
    elif isinstance(error, ServiceError):
        status, code, message = 403 if error.code in FORBIDDEN else 502, error.code, str(error)
    elif isinstance(error, RingmarkError):  # without its subject, which can be a path
        status, code, message = 422 if isinstance(error, ImageError) else 500, error.code, error.fact
    return JSONResponse({"code": code, "message": message}, status, headers)


def make_app(service: Service) -> FastAPI:
    """The application around a service, which it starts and stops."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.run():
            yield

    app = FastAPI(
        title="ringmark",
        version=version("ringmark"),
        description=ABOUT,
        docs_url=None,  # its scripts come from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        middleware=[Middleware(Gate, service=service)],
    )
    app.state.service = service
    for router in (pages, health, api):
        app.include_router(router)
    for kind in (HTTPException, RequestValidationError, RingmarkError, Exception):
        app.add_exception_handler(kind, refused)
    return app
