"""Recover latents and noise of many files, cached by content so that nothing is inverted twice."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
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
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.detect.detector import blankness

__all__ = ["RecoveredFiles", "recover_files"]

LOG = logging.getLogger(__name__)


@dataclass
class RecoveredFiles:
    """Ids, noise (n, C, h, w) and computing time in seconds (n,) of all readable files, in order.

    `refused` holds the errors of files that cannot be read. `doubts` maps the number of a file to the reason why its
    noise is not reliable. Files with equal `digests` have the same pixels.
    """

    noise: Tensor
    seconds: Tensor
    ids: list[str] = field(default_factory=list)
    refused: list[ImageError] = field(default_factory=list)
    doubts: dict[int, str] = field(default_factory=dict)
    digests: list[bytes] = field(default_factory=list)


def recover_files(
    recoverer: Recoverer, paths: Iterable[Path], cache: Path, *, batch: int = 8, name: str = "recover"
) -> RecoveredFiles:
    """Recover the noise of every file. Latents and noise are cached in the folder `cache`, keyed by their inputs.

    An interrupted run therefore resumes at its last batch, changing the sampler steps repeats no decoder inversion, and
    decoder inversions that give the same latents share the sampler inversion.
    """
    paths = list(paths)
    files = RecoveredFiles(noise=torch.empty(0, *recoverer.model.latent_shape), seconds=torch.empty(0))
    parts: list[dict[str, Tensor]] = []
    readable = _readable(paths, recoverer.model.image_size, files.refused)
    with tqdm(total=len(paths), desc=name, unit="image", disable=None, leave=False) as bar:
        while group := list(islice(readable, batch)):
            parts.append(_add(files, recoverer, group, cache))
            bar.update(len(files.ids) + len(files.refused) - bar.n)
    files.noise = torch.cat([files.noise, *(part["value"] for part in parts)])
    files.seconds = torch.cat([files.seconds, *(part["seconds"] for part in parts)])
    return files


def _readable(paths: list[Path], size: tuple[int, int], refused: list[ImageError]) -> Iterator[Sample]:
    for path in paths:
        try:
            yield read_sample(path, size)
        except ImageError as error:
            LOG.warning("%s", error)
            refused.append(error)


def _add(files: RecoveredFiles, recoverer: Recoverer, samples: list[Sample], cache: Path) -> dict[str, Tensor]:
    """Recover a batch and add it to `files`; returns its noise as `value` and its `seconds`."""
    images = [to_array(sample.image) for sample in samples]
    recovered = _recover(recoverer, torch.from_numpy(np.stack(images)), cache)
    for sample, image, noise in zip(samples, images, recovered["value"], strict=True):
        if doubt := blankness(torch.from_numpy(image), noise):
            files.doubts[len(files.ids)] = doubt
        files.ids.append(sample.id)
        files.digests.append(hashlib.sha256(image.tobytes()).digest())
    return recovered


def _recover(recoverer: Recoverer, images: Tensor, cache: Path) -> dict[str, Tensor]:
    """Noise of images (B, 3, H, W) as `value`, and `seconds` per image."""
    settings, device = recoverer.settings, recoverer.model.device.type  # times differ between devices
    invert = partial(_timed, partial(_latents, recoverer))
    latents = cached_rows(cache, [settings.of_latents(), device], images, invert)
    walk = partial(_timed, recoverer.noise)
    noise = cached_rows(cache, [settings.of_noise(), device], latents["value"], walk)
    return {"value": noise["value"], "seconds": latents["seconds"] + noise["seconds"]}


def _latents(recoverer: Recoverer, images: Tensor) -> Tensor:
    return recoverer.latents(images).value


def _timed(work: Callable[[Tensor], Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The result as `value` on the CPU (which waits for the device), and the `seconds` per row."""
    started = time.perf_counter()
    value = work(rows).float().cpu()
    return {"value": value, "seconds": torch.full((len(rows),), (time.perf_counter() - started) / len(rows))}
