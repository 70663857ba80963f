"""The Ray engine with a model: overhead, scaling, and memory.

    python -m scripts.experiments cluster -o build/cluster                    # half an hour of two idle cores
    python -m scripts.experiments cluster -o build/small -n 8 --batch 2 --rounds 1 --memory 10

Of `-n` drawn pictures every other one is marked; with `--images`, the others come from that folder. In rounds that take
all rows in turn, the local engine and Ray audit them for one key, each time in new processes of one thread. Times are
those of the clock, and of the processor in the driver and in all processes of Ray. The first quarter, with Ray's start
and the loading of models, is left out.

Overhead is Ray with one actor against the local engine at equal cores: either is held to one core, where reading, the
computation, the driver and Ray's own processes share the time. With a second core, Ray's work would cost nothing by the
clock, and neither would reading, to the one that does more of it in advance. Scaling is two actors against one, both on
two cores; readers and driver then have a core that is idle otherwise beside one actor, and none beside two. Records of
all runs are compared, but for times.

"memory": audits of `--memory` pictures of noise, 64 x 64, by the encoder's latents alone, with two actors. Resident
memory, of which pages that processes share are divided among them (PSS) where the system tells, is that of the driver,
of actors, of readers (with processes that wait for a task), and of Ray's own processes: the peak of each group, loading
included, and the median of the last quarter of the run. It is sampled twice a second.

What has been measured is kept: an interrupted run resumes.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from ringmark.data.engine import Local
from ringmark.data.images import from_array
from ringmark.data.ray_engine import QUIET, STAYING, Cluster, Ray
from ringmark.data.reader import read_records
from ringmark.data.results import content_id
from ringmark.data.sources import find_images
from ringmark.watermark.schemes.fourier import Placement
from ringmark.watermark.schemes.tree_ring import TreeRing
from ringmark.watermark.tasks.audit import AuditJudge
from ringmark.watermark.tasks.load import Setup, load_verifier
from scripts.experiments.common import Bench, experiment, kept_tensors, line
from scripts.experiments.engines import audit
from scripts.experiments.growth import RADII, SMALL, noise_pictures
from scripts.experiments.processes import alone, memory, sampled

Load = Callable[[], Setup]

LOCAL, RAY, ONE, TWO = RUNS = (0, 1), (1, 1), (1, 2), (2, 2)
"""Actors of Ray, of which the local engine has none, and cores."""
RATIOS = {"overhead": (RAY, LOCAL), "scaling": (ONE, TWO)}
WORKERS = 2  # threads that read, or tasks for each actor
TIMES = ("seconds", "mtime_ns")  # what differs between the records of equal runs
SAMPLED = 0.5  # seconds between samples of memory
GROUPS = ("driver", "actors", "readers", "Ray", "all")


def fill(folder: Path, bench: Bench) -> Path:
    """A folder of pictures, in turn marked and not."""
    folder.mkdir()
    half = bench.number // 2
    given = find_images(bench.photographs)[: bench.number - half] if bench.photographs else []
    noise, prompts = bench.fresh(half if given else bench.number)
    noise[:half] = TreeRing(bench.key(seed=bench.seed)).embed(noise[:half])
    for i, image in enumerate(bench.draw(noise, prompts).images):
        turn = 2 * i if i < half else 2 * (i - half) + 1
        from_array(image.numpy()).save(folder / f"{turn:06}.png")
    for i, path in enumerate(given):
        shutil.copy(path, folder / f"{2 * i + 1:06}{path.suffix}")
    return folder


# -- in a process of its own ------------------------------------------------------------------------------------------


def timed(run: tuple[int, int], load: Load, folder: Path, results: Path, batch: int) -> list[float]:
    """Milliseconds a picture, of the clock and of all processors."""
    actors, cores = run
    if hasattr(os, "sched_setaffinity"):  # processes that are started from here inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(1)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    judge = AuditJudge(load().verifier, batch, keep_noise=False)
    with running_ray(actors) if actors else nullcontext():
        engine = Local(judge, batch=batch, workers=WORKERS)
        if actors:
            remake = partial(AuditJudge.loaded, load, batch, False)
            engine = Ray(judge, remake, cluster=Cluster(), batch=batch, workers=WORKERS)
        found = audit(engine, folder, results, judge.settings(), batch)
    return [found["ms an image"], found["processor ms an image"]]


@contextmanager
def running_ray(actors: int) -> Iterator[None]:
    """Ray on this machine, with a core for each actor, whatever the machine has."""
    os.environ.update(QUIET | STAYING)
    import ray

    ray.init("local", num_cpus=actors, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def group_of(name: str) -> str:
    """The group of a process of Ray with this name."""
    if name.startswith("ray::_Tester"):
        return "actors"
    return "readers" if name.startswith(("ray::_read", "ray::IDLE")) else "Ray"


def remembered(load: Load, number: int, seed: int, batch: int) -> list[list[float]]:
    """Peak and late memory of each group, in megabytes, during an audit of this number of pictures of noise."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = noise_pictures(Path(temporary) / "pictures", number, seed)
        with sampled(partial(memory, group_of), SAMPLED) as samples:
            timed(TWO, load, folder, Path(temporary) / "audit.jsonl", batch)
    values = np.array([[sample[group] for group in GROUPS] for sample in samples])
    return np.stack([values.max(0), np.median(values[-len(values) // 4 :], 0)], 1).tolist()


# -- the whole --------------------------------------------------------------------------------------------------------


def kept(bench: Bench, name: str, work: Callable[..., list], *arguments: object) -> list:
    """The numbers that the function returns in a new process, or has returned there before."""

    def made() -> dict[str, torch.Tensor]:
        return {"found": torch.tensor(alone(work, *arguments), dtype=torch.float64)}

    with bench.kept() as folder:
        return kept_tensors(folder.of("cluster", {}), name, made)["found"].tolist()


def verdicts(results: Path) -> dict[str, dict[str, Any]]:
    """The records of an audit without what depends on the moment."""
    records = read_records(results)[1]
    return {r["sample_id"]: {name: value for name, value in r.items() if name not in TIMES} for r in records}


def different(found: dict, expected: dict) -> int:
    """How many records are not the same."""
    return sum(found.get(id) != expected.get(id) for id in found.keys() | expected.keys())


def ratios(taken: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """Median, least and greatest of each ratio in the rounds (rounds, runs, 2), by the clock and by the processor."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, (run, base) in RATIOS.items():
        each = taken[:, RUNS.index(run)] / taken[:, RUNS.index(base)]
        values = np.stack([np.median(each, 0), each.min(0), each.max(0)], 1).tolist()
        found[name] = dict(zip(("clock", "processor"), values, strict=True))
    return found


@experiment(120, photographs=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--batch", default=8, show_default=True, help="Pictures that are tested at a time.")
@click.option("--memory", "numbers", type=int, multiple=True, default=[1000, 5000, 20000], show_default=True)
def main(bench: Bench, rounds: int, batch: int, numbers: tuple[int, ...]) -> None:
    """Overhead, scaling and memory of the Ray engine with a model."""
    os.environ["OMP_NUM_THREADS"] = "1"
    steps = bench.recoverer.steps
    load = partial(load_verifier, model=bench.source, device="cpu")
    whole = partial(load, [bench.key(seed=bench.seed)], steps=steps)
    given = (bench.source, bench.number, bench.seed, steps, bench.guidance, str(bench.photographs), batch)
    taken, unequal = np.empty((rounds, len(RUNS), 2)), [0] * len(RUNS)
    with tempfile.TemporaryDirectory() as temporary:
        pictures = fill(Path(temporary) / "pictures", bench)
        for turn in range(rounds):
            expected: dict = {}
            for i, run in enumerate(RUNS):
                name = content_id("time", *given, turn, run)
                results = bench.output / "records" / f"{name}.jsonl"
                taken[turn, i] = kept(bench, name, timed, run, whole, pictures, results, batch)
                records = verdicts(results)
                expected = expected or records  # the local engine's
                unequal[i] += different(records, expected)
    rows = [
        {"engine": "ray" if actors else "local", "actors": actors, "cores": cores, "images": bench.number}
        | dict(zip(("ms an image", "processor ms an image"), np.median(taken[:, i], 0).tolist(), strict=True))
        | {"different": unequal[i]}
        for i, (actors, cores) in enumerate(RUNS)
    ]
    key = bench.key(Placement(channels=(0,), radii=RADII), seed=bench.seed)
    cheap = partial(load, [key], method="encoder", steps=0, sizes=[(SMALL, SMALL)])
    memories = []
    for number in numbers:
        name = content_id("memory", bench.source, bench.seed, batch, number)
        found = kept(bench, name, remembered, cheap, number, bench.seed, batch)
        for group, (peak, late) in zip(GROUPS, found, strict=True):
            memories.append({"images": number, "processes": group, "peak MB": peak, "late MB": late})
    for row in (*rows, *memories):
        click.echo(line(row))
    shares = ratios(taken)
    for name, values in shares.items():
        for what, (median, least, most) in values.items():
            click.echo(f"{name} by the {what}: {median:.3f} ({least:.3f} to {most:.3f})")
    bench.write(rows, rounds=taken.tolist(), memory=memories, **shares)
