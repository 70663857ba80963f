"""Latents and noise of many files, kept by content: what was inverted once is not inverted again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ringmark.data.cache import cached_rows
from ringmark.data.images import Sample, read_sample, to_array
from ringmark.errors import ImageError
from ringmark.watermark.calibration import relevant
from ringmark.watermark.detect.detector import Detector

__all__ = ["RecoveredFiles", "recover_files"]


@dataclass(frozen=True)
class RecoveredFiles:
    """Of the files that can be read, in order: names, noise (n, C, h, w), and seconds each (n,) when it was computed.

    `refused` says in a line each why others cannot be read; `doubts` why nothing can be said of file i, where that is
    so: its noise is then not to be relied on. Files of one of the `digests` show the same pixels.
    """

    ids: list[str]
    noise: Tensor
    seconds: Tensor
    refused: list[str]
    doubts: dict[int, str]
    digests: list[bytes]


def recover_files(
    detector: Detector, paths: Iterable[Path], cache: Path, *, batch: int = 8, name: str = "recover"
) -> RecoveredFiles:
    """Recover the noise of every file. Latents and noise are kept in the folder `cache`, each by what it is made from.

    So a stopped run goes on from its last batch, other DDIM steps cost no decoder inversion, and a decoder inversion that
    finds the latents of another one costs no DDIM steps.
    """
    paths, ids, refused, parts, digests = list(paths), [], [], [], []
    readable = _readable(paths, detector.model.image_size, refused)
    with tqdm(total=len(paths), desc=name, unit="image", disable=None, leave=False) as bar:
        while some := list(islice(readable, batch)):
            ids += [s.id for s in some]
            images = np.stack([to_array(s.image) for s in some])
            digests += [hashlib.sha256(image.tobytes()).digest() for image in images]
            parts.append(_recover(detector, torch.from_numpy(images), cache))
            bar.update(len(ids) + len(refused) - bar.n)
    empty = {"noise": torch.empty(0, *detector.model.latent_shape), "seconds": torch.empty(0)}
    stack = lambda field: torch.cat([empty[field], *(p[field] for p in parts)])
    doubts = [doubt for p in parts for doubt in p["doubts"]]
    doubtful = {i: doubt for i, doubt in enumerate(doubts) if doubt}
    return RecoveredFiles(ids, stack("noise"), stack("seconds"), refused, doubtful, digests)


def _readable(paths: list[Path], size: tuple[int, int], refused: list[str]) -> Iterator[Sample]:
    for path in paths:
        try:
            yield read_sample(path, size)
        except ImageError as error:
            refused.append(str(error))


def _recover(detector: Detector, images: Tensor, cache: Path) -> dict:
    """`noise`, `seconds` and `doubts` of images (B, 3, H, W)."""
    way_back = relevant(detector.settings())
    network = {name: way_back.pop(name) for name in ("steps", "timesteps")}
    network |= {name: way_back[name] for name in ("model", "dtype")}  # two methods may find the same latents
    device = detector.model.device.type  # or its seconds would be another's
    latents = cached_rows(
        cache, [way_back, device], images, partial(_timed, lambda x: detector.invert_decoder(x).value)
    )
    noise = cached_rows(cache, [network, device], latents["value"], partial(_timed, detector.recover_noise))
    doubts = [detector.doubt(image, n) for image, n in zip(images, noise["value"], strict=True)]
    return {"noise": noise["value"], "seconds": latents["seconds"] + noise["seconds"], "doubts": doubts}


def _timed(work: Callable[[Tensor], Tensor], rows: Tensor) -> dict[str, Tensor]:
    """`value` on the CPU, which waits for the device, and the `seconds` that each row took."""
    started = time.perf_counter()
    value = work(rows).float().cpu()
    return {"value": value, "seconds": torch.full((len(rows),), (time.perf_counter() - started) / len(rows))}
