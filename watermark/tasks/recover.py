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

from ringmark.data.files import write_atomic
from ringmark.data.images import Sample, read_sample, to_array
from ringmark.errors import ImageError
from ringmark.watermark.calibration import relevant
from ringmark.watermark.detect.detector import Detector

__all__ = ["RecoveredFiles", "cached", "recover_files"]


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


def cached_rows(
    folder: Path, key: list, rows: Tensor, make: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """As `cached`, each of the `rows` (n, …) by itself; `make` is asked once, for those that are missing."""
    paths = [_place(folder, [*key, row]) for row in rows]
    found = [_kept(path) for path in paths]
    missing = [i for i, row in enumerate(found) if row is None]
    if missing:
        made = make(rows[missing])
        for k, i in enumerate(missing):
            found[i] = _keep(paths[i], {name: x[k] for name, x in made.items()})
    return {name: torch.stack([row[name] for row in found]) for name in found[0]}


def cached(folder: Path, key: list, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that `make` returns, kept in `folder` under a digest of `key`: a run that was stopped goes on.

    Noises of marked images would give the key away, so only their owner may read them. A damaged file is made anew.
    """
    path = _place(folder, key)
    found = _kept(path)
    return _keep(path, make()) if found is None else found


def _place(folder: Path, key: list) -> Path:
    digest = hashlib.sha256()
    for part in key:
        digest.update(part.contiguous().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return folder / f"{digest.hexdigest()[:24]}.safetensors"


def _kept(path: Path) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path) if path.exists() else None
    except SafetensorError:
        path.unlink()
        return None


def _keep(path: Path, made: dict[str, Tensor]) -> dict[str, Tensor]:
    from safetensors.torch import save

    made = {name: x.contiguous() for name, x in made.items()}
    write_atomic(path, save(made), 0o600)
    return made
