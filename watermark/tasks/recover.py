"""Recover latents and noise of many files, kept by content so that nothing is inverted twice."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ringmark.data.batches import chunks
from ringmark.data.images import Sample, read_sample, to_array
from ringmark.data.results import Results, ResultsFolder, content_id
from ringmark.errors import ImageError
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.detect.detector import blankness

__all__ = ["RecoveredFiles", "recover_files"]

LOG = logging.getLogger(__name__)


@dataclass
class RecoveredFiles:
    """Ids, noise (n, C, h, w) and computing time in seconds (n,) of all readable files, in order.

    `refused` holds the errors of files that cannot be read. `doubts` maps the number of a file to the reason why its
    noise is not reliable. Files with equal `contents` have the same pixels.
    """

    noise: Tensor
    seconds: Tensor
    ids: list[str] = field(default_factory=list)
    refused: list[ImageError] = field(default_factory=list)
    doubts: dict[int, str] = field(default_factory=dict)
    contents: list[str] = field(default_factory=list)


def recover_files(
    recoverer: Recoverer,
    paths: Iterable[Path],
    kept: ResultsFolder,
    *,
    size: tuple[int, int] | None = None,
    batch: int = 8,
    name: str = "recover",
) -> RecoveredFiles:
    """Recover the noise of every file. Latents and noise are `kept`, by their settings and by what they come from.

    Pictures are fitted to `size` (H, W), by default the model's native one.

    An interrupted run therefore resumes at its last batch, changing the sampler steps repeats no decoder inversion, and
    decoder inversions that give the same latents share the sampler inversion. Raises StoreError if another run writes
    the same results (results.locked).
    """
    paths = list(paths)
    size = size or recoverer.model.image_size
    files = RecoveredFiles(noise=torch.empty(0, *recoverer.model.noise_shape(size)), seconds=torch.empty(0))
    parts: list[_Timed] = []
    readable = _readable(paths, size, files.refused)
    with tqdm(total=len(paths), desc=name, unit="image", disable=None, leave=False) as bar:
        for group in chunks(readable, batch):
            parts.append(_add(files, recoverer, group, kept))
            bar.update(len(files.ids) + len(files.refused) - bar.n)
    files.noise = torch.cat([files.noise, *(part.values for part in parts)])
    files.seconds = torch.cat([files.seconds, *(part.seconds for part in parts)])
    return files


class _Timed(NamedTuple):
    """Latents or noise (n, C, h, w) and the computing time in seconds (n,)."""

    values: Tensor
    seconds: Tensor


def _readable(paths: list[Path], size: tuple[int, int], refused: list[ImageError]) -> Iterator[Sample]:
    for path in paths:
        try:
            yield read_sample(path, size)
        except ImageError as error:
            LOG.warning("%s", error)
            refused.append(error)


def _add(files: RecoveredFiles, recoverer: Recoverer, samples: list[Sample], kept: ResultsFolder) -> _Timed:
    """Recover a batch and add it to `files`; returns its noise."""
    images = [to_array(sample.image) for sample in samples]
    contents = [content_id(image) for image in images]
    recovered = _recover(recoverer, torch.from_numpy(np.stack(images)), contents, kept)
    for sample, image, noise in zip(samples, images, recovered.values, strict=True):
        if doubt := blankness(torch.from_numpy(image), noise):
            files.doubts[len(files.ids)] = doubt
        files.ids.append(sample.id)
    files.contents += contents
    return recovered


def _recover(recoverer: Recoverer, images: Tensor, contents: list[str], kept: ResultsFolder) -> _Timed:
    """Noise of images (B, 3, H, W)."""
    height, width = images.shape[-2:]
    settings = recoverer.settings_at((height, width))
    device = {"device": recoverer.model.device.type}  # times differ between devices
    results = kept.of("latents", settings.of_latents() | device)
    latents = _complete(results, contents, images, lambda rows: recoverer.latents(rows).value)
    results = kept.of("noise", settings.of_noise() | device)
    noise = _complete(results, list(map(content_id, latents.values)), latents.values, recoverer.noise)
    return _Timed(noise.values, latents.seconds + noise.seconds)


def _complete(results: Results, ids: list[str], rows: Tensor, work: Callable[[Tensor], Tensor]) -> _Timed:
    """`work` on rows (n, …), as far as it is not in the results already."""

    def make(missing: list[int]) -> list[dict[str, np.ndarray]]:
        started = time.perf_counter()
        values = work(rows[missing]).float().cpu().numpy()  # which waits for the device
        seconds = np.float32((time.perf_counter() - started) / len(missing))
        return [{"value": value, "seconds": np.asarray(seconds)} for value in values]

    found = results.complete(ids, make)
    columns = {name: torch.from_numpy(np.stack([tensors[name] for tensors in found])) for name in ("value", "seconds")}
    return _Timed(columns["value"], columns["seconds"])
