"""Where the time of a short command goes: imports, loading of pocket, a verdict, and the exit.

    python -m scripts.experiments loading -o build/loading              # 2 minutes
    python -m scripts.experiments loading -o build/small --rounds 1

Every round starts a Python for each of two ways: with Python's garbage collector as it comes, and paused while the
model is loaded, as all commands of ringmark do. Seconds are processor time, medians of the rounds.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import click
import numpy as np

from scripts.experiments.common import Bench, experiment, line

STEPS = {
    "start, import torch": "import torch",
    "import ringmark": "from ringmark.watermark.tasks.load import load_model",
    "import diffusers": "import diffusers",
    "its classes": "from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel",
    "load pocket": "model = load_model(text=False)",
    "a verdict": "from ringmark import verify; verify(picture, keys, model=model)",
}
LOADING = 5  # the first of these steps
PROGRAM = """
import json, sys, time
from contextlib import nullcontext
from PIL import Image
from ringmark.watermark.cli.options import uncollected
taken, before = {}, 0.0
def run(steps):
    global before
    for name, text in steps:
        exec(text, names)
        now = time.process_time()
        taken[name], before = now - before, now
names = {"picture": Image.effect_noise((128, 128), 64).convert("RGB"), "keys": sys.argv[2]}
steps = list(json.loads(sys.argv[3]).items())
with uncollected() if sys.argv[1] == "paused" else nullcontext():
    run(steps[:LOADING])
run(steps[LOADING:])
print(json.dumps(taken))
""".replace("LOADING", str(LOADING))
WAYS = ("as it comes", "paused")


def processor_time() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(way: str, key: str) -> dict[str, float]:
    """Seconds of each step, of the exit, and of the whole process."""
    before = processor_time()
    given = [sys.executable, "-c", PROGRAM, way, key, json.dumps(STEPS)]
    done = subprocess.run(given, check=True, capture_output=True, text=True)
    whole = processor_time() - before
    steps: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return steps | {"exit": whole - sum(steps.values()), "whole": whole}


@experiment(drawing=False)
@click.option("--rounds", default=5, show_default=True)
def main(bench: Bench, rounds: int) -> None:
    """Time the steps of a short command."""
    bench.output.mkdir(parents=True, exist_ok=True)
    file = bench.output / "a.key"
    bench.key(seed=bench.seed).save(file, overwrite=True)
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            taken[way].append(measured(way, str(file)))
    rows = [
        {"garbage collector": way} | {name: float(np.median([one[name] for one in found])) for name in found[0]}
        for way, found in taken.items()
    ]
    for row in rows:
        click.echo(line(row))
    bench.write(rows, rounds=rounds, all=taken)
