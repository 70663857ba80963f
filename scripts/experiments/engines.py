"""The Ray engine: records while its processes are killed, overhead, and two workers against one.

    python -m scripts.experiments engines -o build/engines             # 10 minutes
    python -m scripts.experiments engines -o build/small -n 60 --kills 2 --drivers 1

A cluster of three nodes of one core, on this machine, audits `-n` pictures of noise of 64 px, of which every 50th has
the pixels of the one before and every 100th is broken. A stand-in for the model costs `--cost` milliseconds of
processor time a picture. `--kills` times a process of the cluster that reads or tests is killed, and `--drivers` times
the driver is, which is then started again; processes are chosen at random, moments are spread over the run. The records
must be those of an undisturbed run of the local engine.

Overhead and scaling are measured with a stand-in that waits 50 ms a picture instead of computing, on one node and on
two. So the clock says how busy the engine keeps its workers, not how busy the machine is, and the processor time is
what the engine itself takes: that of the driver and of all processes of Ray, above that of the local engine. The first
quarter of the `--measured` pictures is left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from PIL import Image

from ringmark.data.engine import Engine, Local
from ringmark.data.lines import Record
from ringmark.data.ray_engine import Cluster, Ray
from ringmark.data.reader import read_records
from ringmark.data.results import Results
from ringmark.watermark.tasks.audit import NEEDED, _Run, find_pictures
from scripts.experiments.common import Bench, experiment, line
from scripts.experiments.processes import Processors, sampled
from scripts.experiments.stand_in import StandIn, same

NODES, BATCH, WORKERS = 3, 8, 2
WAITING = 0.05
SAMPLED = 2.0  # seconds between samples of processor time
SCRIPT = "import sys; from scripts.experiments.engines import drive; drive(*sys.argv[1:])"


def draw(folder: Path, number: int, seed: int) -> Path:
    """A folder of pictures, some equal and some broken."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for i in range(number):
        file = folder / f"{i:06}.png"
        if i % 100 == 99:
            file.write_bytes(b"broken")
        elif i % 50 == 49:
            file.write_bytes((folder / f"{i - 1:06}.png").read_bytes())
        else:
            Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    return folder


def on_ray(judge: StandIn, address: str, workers: int = WORKERS) -> Ray:
    return Ray(judge, partial(same, judge), cluster=Cluster(address), batch=BATCH, workers=workers)


def audit(
    engine: Engine, folder: Path, results: Path, settings: Record | None = None, batch: int = BATCH
) -> dict[str, float]:
    """Audit a folder; milliseconds a picture after the first quarter, of the clock and of all processors.

    The quarter ends with a batch, because the records of a batch come at once.
    """
    times: list[tuple[float, float]] = []
    pictures = find_pictures([folder])
    assert pictures.total
    first = max(1, pictures.total // 4 // batch) * batch
    used, store = Processors(), Results(results, settings or StandIn().settings(), fields=NEEDED)
    with store, engine, sampled(used.seconds, SAMPLED):
        for number, _ in enumerate(_Run(engine, store, keep_noise=False).records(pictures.items), 1):
            if number in (first, pictures.total):
                times.append((time.perf_counter(), used.seconds()))
    clock, cpu = np.subtract(times[-1], times[0]) / (pictures.total - first)
    return {"images": pictures.total, "ms an image": 1000 * clock, "processor ms an image": 1000 * cpu}


def drive(folder: str, results: str, address: str, cost: str) -> None:
    """A driver, in a process of its own."""
    audit(on_ray(StandIn(computing=float(cost)), address), Path(folder), Path(results))


def victims() -> list[psutil.Process]:
    """Processes of the cluster that read or test, or are about to."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.name().startswith(("ray::_read", "ray::_Tester", "ray::IDLE")):
                found.append(process)
    return found


def disturbed(
    folder: Path, results: Path, address: str, cost: float, plan: list[str], number: int, random: np.random.Generator
) -> dict[str, Any]:
    """Run drivers until one ends; what `plan` names is killed when so many more records are written."""
    arguments = [sys.executable, "-c", SCRIPT, str(folder), str(results), address, str(cost)]
    driver, killed, started = subprocess.Popen(arguments), {"worker": 0, "driver": 0}, time.perf_counter()
    for turn, what in enumerate(plan, 1):
        while written(results) < number * turn / (len(plan) + 1):
            if driver.poll() is not None:
                raise click.ClickException(f"a driver ended with {driver.returncode}")
            time.sleep(0.05)
        if what == "driver":
            driver.kill()
            driver.wait()
            driver = subprocess.Popen(arguments)
        else:
            while not (found := victims()):
                time.sleep(0.05)
            found[random.integers(len(found))].kill()
        killed[what] += 1
    if driver.wait():
        raise click.ClickException(f"the last driver ended with {driver.returncode}")
    return {"killed": killed, "seconds": time.perf_counter() - started, "lines": written(results)}


def written(results: Path) -> int:
    """The number of records in a file."""
    return max(0, results.read_bytes().count(b"\n") - 1) if results.exists() else 0


@experiment(2000, drawing=False)
@click.option("--kills", default=10, show_default=True, help="Workers to kill.")
@click.option("--drivers", default=3, show_default=True, help="Drivers to kill.")
@click.option("--cost", default=10.0, show_default=True, help="Processor milliseconds a picture.")
@click.option("--measured", default=400, show_default=True, help="Pictures for overhead and scaling.")
def main(bench: Bench, kills: int, drivers: int, cost: float, measured: int) -> None:
    """Records, overhead and scaling of the Ray engine."""
    from ray.cluster_utils import Cluster as Nodes

    random, seconds = np.random.default_rng(bench.seed), cost / 1000
    os.environ["PYTHONPATH"] = os.getcwd()
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        pictures, few = draw(here / "all", bench.number, bench.seed), draw(here / "few", measured, bench.seed + 1)
        audit(Local(StandIn(), batch=BATCH, workers=WORKERS), pictures, here / "local.jsonl")
        waiting = StandIn(waiting=WAITING)
        local = audit(Local(waiting, batch=BATCH, workers=WORKERS), few, here / "waiting.jsonl")
        rows: list[dict[str, Any]] = [{"engine": "local", "workers": 1, **local}]
        nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        for workers in (1, 2):
            if workers == 2:
                nodes.add_node(num_cpus=1)
            results = here / f"{workers}.jsonl"
            rows.append({"engine": "ray", "workers": workers, **audit(on_ray(waiting, nodes.address), few, results)})
        nodes.add_node(num_cpus=1)
        plan = ["worker"] * kills + ["driver"] * drivers
        random.shuffle(plan)
        found = disturbed(pictures, here / "killed.jsonl", nodes.address, seconds, plan, bench.number, random)
        nodes.shutdown()
        expected, records = (
            {record["sample_id"]: record for record in read_records(here / name)[1]}
            for name in ("local.jsonl", "killed.jsonl")
        )
    different = sum(records.get(id) != record for id, record in expected.items())
    rows.append({"engine": "ray, killed", "workers": NODES, "images": len(records), "different": different})
    for row in rows:
        click.echo(line({name: value for name, value in row.items() if value is not None}))
    overhead = rows[1]["processor ms an image"] - rows[0]["processor ms an image"]
    scaling = rows[1]["ms an image"] / rows[2]["ms an image"]
    click.echo(f"overhead {overhead:.2f} ms an image; two workers are {scaling:.2f} times as fast; killed: {found}")
    bench.write(rows, nodes=NODES, overhead=overhead, scaling=scaling, plan=plan, **found)
