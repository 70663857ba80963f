"""Time and memory of decoder inversion."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ringmark.inversion.decoder import Inverter
from ringmark.inversion.memory import memory_kilobytes, peak_during
from ringmark.inversion.models.pipeline import LatentModel


def seconds(model: LatentModel, inverters: dict[str, Inverter], images: Tensor, rounds: int = 3) -> dict[str, float]:
    """Seconds per image: the median over rounds that run all inverters in turn, with the device synchronised.

    On a CPU they are processor time, summed over threads, with which other programs interfere little.
    """
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in inverters}
    with tqdm(total=rounds * len(inverters), desc="time", leave=False, disable=None) as bar:
        for _ in range(rounds):
            for name, inverter in inverters.items():
                synchronise(model.device)
                started = clock()
                inverter(model, images.to(model.device))
                synchronise(model.device)
                taken[name].append((clock() - started) / len(images))
                bar.update()
    return {name: float(np.median(values)) for name, values in taken.items()}


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that times include queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work(*arguments)`, computed in a new process that has imported the libraries but not used them.

    Raises BrokenProcessPool if the process is killed.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["diffusers.models.autoencoders.autoencoder_kl"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def peak_memory(source: str, inverter: Inverter, images: Tensor, dtype: str = "float32") -> float:
    """Peak megabytes of one batch above the loaded model, measured in a new process.

    Two steps reach the peak; no method needs more memory later.
    """
    short = replace(inverter, max_steps=min(2, inverter.max_steps))
    return in_own_process(_peak, source, short, images, dtype)


def _peak(source: str, inverter: Inverter, images: Tensor, dtype: str) -> float:
    model = LatentModel.from_pretrained(source, dtype=getattr(torch, dtype))
    Inverter(max_steps=1)(model, images[:1])  # warm up: libraries allocate some memory once
    return peak_during(model.device, lambda: inverter(model, images.to(model.device)))[1]


def limit_memory(gib: float) -> None:
    """Limit this process to `gib` more memory than it has now (Linux); infinity lifts the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = hard if gib == float("inf") else memory_kilobytes("VmData") * 1024 + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
