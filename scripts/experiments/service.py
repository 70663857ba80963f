"""Load on `ringmark serve` over loopback, against the engine alone on the same pictures.

    python -m scripts.experiments service -o build/service

Rounds of `--clients` clients that each send one picture after the other for `--seconds`, and wait as told when they are
refused with 429, alternate with rounds of `Verifier.scan` for as long. Reported are pictures per second, of wall time
and of the processor time of all threads, the ratio of service to engine, the latency of answered requests, all
statuses, and the memory of the service. The clients' own work is part of the wall time of the service.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from ringmark.data.images import from_array, read_samples, save_png
from ringmark.watermark.schemes.base import scheme_of
from ringmark.watermark.tasks.load import load_verifier
from scripts.experiments.common import Bench, experiment, line
from scripts.experiments.plots import panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ringmark.watermark.detect.verifier import Verifier

BOUNDARY = "ringmark"
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass
class Load:
    """What clients saw in one round: seconds of answered requests, statuses, errors, and (time, MB) of the service."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, float]] = field(default_factory=list)


def request(content: bytes) -> bytes:
    """A picture as an HTTP request."""
    disposition = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    body = disposition.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()
    kind = f"Content-Type: multipart/form-data; boundary={BOUNDARY}"
    head = f"POST /v1/verify HTTP/1.1\r\nHost: localhost\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def asked(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the response to a request, over a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await writer.drain()
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(status.split()[1]), headers, await reader.readexactly(int(headers["content-length"]))
    finally:
        writer.close()


async def client(port: int, requests: Iterator[bytes], load: Load) -> None:
    """Send one request after the other."""
    for content in requests:
        started = time.perf_counter()
        try:
            status, headers, _ = await asked(port, content)
        except (OSError, asyncio.IncompleteReadError) as error:
            load.errors[type(error).__name__] += 1
            continue
        load.statuses[status] += 1
        if status == 200:
            load.seconds.append(time.perf_counter() - started)
        else:
            await asyncio.sleep(float(headers.get("retry-after", 1)))


async def loaded(process: int, port: int, contents: list[bytes], clients: int, seconds: float) -> Load:
    """Let clients send pictures for so many seconds."""
    load, requests = Load(), cycle(map(request, contents))
    tasks = [asyncio.create_task(client(port, requests, load)) for _ in range(clients)]
    started = time.perf_counter()
    while time.perf_counter() < started + seconds:
        await asyncio.sleep(min(1, seconds / 10))
        load.memory.append((time.perf_counter() - started, resident(process)))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return load


def resident(process: int) -> float:
    """Resident megabytes of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(text.split()[1]) / 1024 for text in lines if text.startswith("VmRSS"))


def processor_seconds(process: int) -> float:
    """Processor time of all threads of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def served(*options: object) -> Iterator[tuple[int, int]]:
    """A service in a process of its own: its process id and port."""
    command = [sys.executable, "-m", "ringmark.watermark.cli", "serve", "--port", "0", *map(str, options)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        port = int(process.stderr.readline().split()[0].rpartition(":")[2])
        judged_by(port)  # waits until it answers
        try:
            yield process.pid, port
        finally:
            process.terminate()


def judged_by(port: int) -> int:
    """How many pictures the service has judged, also those that nobody waited for."""
    *_, metrics = asyncio.run(asked(port, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    found = re.search(rb"^ringmark_batch_pictures_sum (\S+)", metrics, re.MULTILINE)
    assert found
    return round(float(found[1]))


def settle(process: int) -> None:
    """Wait until a process has no more work."""
    before = -1.0
    while (now := processor_seconds(process)) > before:
        before = now
        time.sleep(1)


def scanned(verifier: Verifier, paths: list[Path], seconds: float) -> int:
    """How many pictures the engine judges in at least so many seconds, reading included."""
    until, number = time.perf_counter() + seconds, 0

    def views() -> Iterator[list]:
        for path in cycle(paths):
            if time.perf_counter() > until:
                return
            yield read_samples(path, verifier.sizes_of)

    for _ in verifier.scan(views(), batch=8):
        number += 1
    return number


@experiment(number=32)
@click.option("--clients", default=200, show_default=True, help="Clients at a time.")
@click.option("--seconds", default=60.0, show_default=True, help="Length of a round.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of the service, and as many of the engine.")
@click.option("--deadline", default=30.0, show_default=True, help="--deadline of the service.")
def main(bench: Bench, clients: int, seconds: float, rounds: int, deadline: float) -> None:
    """Throughput, latency and memory of ringmark serve under load."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        key = bench.key(seed=bench.seed)
        key.save(folder / "my.key")
        pictures = bench.pictures(scheme_of(key)).images
        paths = [folder / f"{i}.png" for i in range(len(pictures))]
        for path, image in zip(paths, pictures, strict=True):
            save_png(from_array(image.numpy()), path)
        verifier, _ = load_verifier(folder / "my.key", model=bench.model)
        rows, loads = [], []
        with served("--key", folder / "my.key", "--model", bench.source, "--deadline", deadline) as (process, port):
            scanned(verifier, paths, 0)
            for _ in range(rounds):
                loads.append(measured(process, port, paths, clients, seconds, rows))
                rows.append(engine_row(verifier, paths, seconds))
    facts = summary(rows, loads)
    for row in rows:
        click.echo(line(row))
    click.echo(line(facts))
    bench.write(rows, figure(loads), **facts, clients=clients, seconds=seconds)


def measured(process: int, port: int, paths: list[Path], clients: int, seconds: float, rows: list[dict]) -> Load:
    """A round of the service, whose row is added to `rows`."""
    contents = [path.read_bytes() for path in paths]
    before, judged, started = processor_seconds(process), judged_by(port), time.perf_counter()
    load = asyncio.run(loaded(process, port, contents, clients, seconds))
    wall = time.perf_counter() - started
    settle(process)
    judged, busy = judged_by(port) - judged, processor_seconds(process) - before
    rows.append(row("service", len(load.seconds) / wall, judged / busy))
    return load


def engine_row(verifier: Verifier, paths: list[Path], seconds: float) -> dict:
    """A round of the engine."""
    before, started = time.process_time(), time.perf_counter()
    number = scanned(verifier, paths, seconds)
    return row("engine", number / (time.perf_counter() - started), number / (time.process_time() - before))


def row(what: str, wall: float, busy: float) -> dict:
    """Pictures per second of wall time and of processor time."""
    return {"what": what, "per second": wall, "per processor second": busy}


def summary(rows: list[dict], loads: list[Load]) -> dict:
    """Ratios of the totals of all rounds, percentiles of the latency, statuses, errors and the change of memory."""
    rates = {
        (what, unit): float(np.median([r[unit] for r in rows if r["what"] == what]))
        for what in ("service", "engine")
        for unit in ("per second", "per processor second")
    }
    seconds = [s for load in loads for s in load.seconds] or [float("nan")]
    statuses, errors = (sum((getattr(load, name) for load in loads), Counter()) for name in ("statuses", "errors"))
    return {
        "ratio": rates["service", "per second"] / rates["engine", "per second"],
        "ratio by processor time": rates["service", "per processor second"] / rates["engine", "per processor second"],
        "median seconds": float(np.median(seconds)),
        "99th percentile seconds": float(np.percentile(seconds, 99)),
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
        "errors": dict(errors),
        "first MB": loads[0].memory[0][1],
        "last MB": loads[-1].memory[-1][1],
        "most MB": max(mb for load in loads for _, mb in load.memory),
        "median MB of rounds": [float(np.median([mb for _, mb in load.memory])) for load in loads],
    }


def figure(loads: list[Load]) -> Figure:
    """Latency, and memory over time."""
    made, (latency, memory) = panels(8, 3, across=2)
    latency.hist(np.concatenate([load.seconds for load in loads]), bins=40, color="#1b3a5c")
    latency.set(xlabel="seconds to an answer", ylabel="requests", yscale="log")
    offset = 0.0
    for load in loads:
        times, mb = np.array(load.memory).T
        memory.plot(offset + times, mb, color="#1b3a5c")
        offset += times[-1]
    memory.set(xlabel="seconds under load", ylabel="resident MB")
    memory.set_ylim(bottom=0)
    return made
